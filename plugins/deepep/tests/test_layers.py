"""Whole EP layers over the strict double of DeepEP V1, in two and four real processes, equal the layer of one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_core_deepep
import pytest

from moe_core.testing import run_ranks

PATHS = (Path(moe_core_deepep.__file__).parents[1], Path(__file__).parent)

SCRIPT = """
import gc
import deep_ep_double
sys.modules["deep_ep"] = deep_ep_double

from dataclasses import replace
from moe_core import MoeConfig, ParallelConfig, Phase, RunningState, TopKOutput, hookimpl
from moe_core.capability import Requires
from moe_core.registry import Registry
from moe_core.specs import Wants
from moe_core.testing import make_layer, probe
from moe_core.vocabulary import STANDARD, DroppedSlot, Step
from moe_core_deepep import buffers
from moe_core_deepep.plugin import DeepEpPlugin

MOST = 8
PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}


class OnCpu(DeepEpPlugin):
    "The same dispatchers, where the double runs."

    @hookimpl
    def moe_core_dispatchers(self):
        here = dict(devices={"cpu": ("*",)}, requires=())
        return tuple(replace(spec, support=replace(spec.support, **here)) for spec in super().moe_core_dispatchers())


def registry():
    return Registry([OnCpu()])


def config_of(**changes):
    sizes = dict(num_experts=8, top_k=3, hidden_size=2048, intermediate_size=128, routed_scaling_factor=1.5)
    return MoeConfig(**(sizes | changes))


def planned(name, layer, config, *, phases=("prefill",), max_tokens=MOST, **options):
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    chosen = {name: options} if options else {}
    settings = moe_core.Settings(runner="reference", dispatcher=name, options=chosen)
    return moe_core.plan(config, layer.weights.shard(config, parallel), parallel, group=group, max_tokens=max_tokens,
                         phases=[PHASES[phase] for phase in phases], registry=registry(), settings=settings)


def tokens_of(layer, counts):
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return layer.hidden[rows], TopKOutput(layer.topk.topk_ids[rows], layer.topk.topk_weights[rows]), rows


def compare(name, counts, *, phases=("prefill",), scheme="bf16", flights=1, **options):
    "The largest difference from one rank's plan, relative to its largest value, over phases and repeated calls."
    counts, worst = counts[:ranks], 0.0
    config = config_of(scheme=scheme)
    layers = [make_layer(config, 5 + i, tokens=sum(counts)) for i in range(flights)]
    for layer in layers:
        layer.topk.topk_ids[::4, 0] = -1
    whole = moe_core.plan(config, layers[0].weights, runner="reference")
    plan = planned(name, layers[0], config, phases=phases, **options)
    for phase in phases:
        for _ in range(2):
            states, begun, kept = [], [], []
            for i, layer in enumerate(layers):
                hidden, topk, _ = tokens_of(layer, counts)
                state = RunningState(output=torch.full_like(hidden, float("nan")) if i else None)
                kept.append(state.output)
                if flights == 1:
                    begun.append(plan(hidden, topk, phase=PHASES[phase], state=state))
                else:
                    begun.append(plan.dispatch_begin(hidden, topk, state, phase=PHASES[phase]))
                states.append(state)
            if flights > 1:
                done = [plan.run(plan.dispatch_finish(one, state), state) for one, state in zip(begun, states)]
                back = [plan.combine_begin(one, state) for one, state in zip(done, states)]
                begun = [plan.combine_finish(one, state) for one, state in zip(back, states)]
            for layer, result, output in zip(layers, begun, kept):
                _, _, rows = tokens_of(layer, counts)
                everything = whole(layer.hidden, layer.topk)
                expected = everything[rows].float()
                assert output is None or result is output
                assert result.shape == expected.shape and result.dtype == torch.bfloat16
                if len(result):
                    worst = max(worst, float((result.float() - expected).abs().max() / everything.abs().max()))
    assert buffers._OPEN
    plan.close()
    assert not buffers._OPEN
    return worst


def probed(name, payload="bf16", ids_dtype="int64", dropped=DroppedSlot.NEGATIVE, incoming=DroppedSlot.NEGATIVE,
           extras=()):
    "Experts that multiply, on any terms: the weighted sum. The probe checks masks, counts and ids."
    counts = [5, 0, 8, 1][:ranks]
    config = config_of(scheme="fp8_block128" if payload != "bf16" else "bf16")
    wants = Wants(payloads=(payload,), dropped=(dropped,), ids_dtypes=(ids_dtype,), extras=frozenset(extras),
                  can=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.ROUTED_SCALING}))
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(config, 100 + rank, tokens=counts[rank])
    layer.topk.topk_ids[::4, 0] = -1
    expected = probe.expected(config, moe_core.quant.roundtrip_activation(layer.hidden, payload)
                              if payload != "bf16" else layer.hidden, layer.topk)
    if incoming is DroppedSlot.SINK:
        layer.topk.topk_ids[layer.topk.topk_ids < 0] = config.num_experts
    plan = moe_core.plan(config, make_layer(config, 5, tokens=1).weights.shard(config, parallel), parallel, group=group,
                         max_tokens=MOST, registry=Registry([OnCpu(), probe.probe_plugin(STANDARD, wants)]),
                         incoming=incoming, settings=moe_core.Settings(runner=probe.NAME, dispatcher=name))
    terms = plan.terms[STANDARD]
    assert (terms.payload, terms.ids_dtype, terms.dropped) == (payload, ids_dtype, dropped), terms
    assert set(extras) <= terms.extras
    result = plan(layer.hidden, layer.topk)
    plan.close()
    return float((result.double() - expected).abs().max() / expected.abs().max()) if len(result) else 0.0


def finish_after_close():
    plan, layer = calls("deepep_ll", "decode")
    state = RunningState()
    begun = plan.dispatch_begin(layer.hidden, layer.topk, state)
    plan.close()
    plan.dispatch_finish(begun, state)


def calls(name, phase):
    config = config_of()
    layer = make_layer(config, 5, tokens=4)
    return planned(name, layer, config, phases=(phase,)), layer


def a_third_flight():
    plan, layer = calls("deepep_ll", "decode")
    one, two = (plan.dispatch(layer.hidden, layer.topk, RunningState()) for _ in range(2))
    try:
        plan.dispatch(layer.hidden, layer.topk, RunningState())
    except moe_core.ContractViolation as error:
        refused = str(error)
    state = RunningState()
    plan.combine(plan.run(one, state), state)
    three = plan.dispatch(layer.hidden, layer.topk, RunningState())
    for given in (two, three):
        plan.combine(plan.run(given, state), state)
    plan.close()
    return refused


def a_result_that_nobody_wants():
    "A call that failed before its combine blocks no later one."
    plan, layer = calls("deepep_ll", "decode")
    for _ in range(5):
        plan.dispatch(layer.hidden, layer.topk, RunningState())
    plan.close()
    return True


def layers_share_a_buffer():
    "A plan that is dropped counts until the end: ranks collect garbage at different times."
    plans = [calls("deepep", "prefill")[0] for _ in range(3)]
    seen = [len(buffers._OPEN), buffers._OPEN[0].users]
    plans[0].close()
    plans[0].close()
    del plans[1]
    gc.collect()
    seen += [len(buffers._OPEN), buffers._OPEN[0].users]
    plans[-1].close()
    return [*seen, len(buffers._OPEN)]


def two_low_latency_shapes():
    plan, _ = calls("deepep_ll", "decode")
    config = config_of()
    try:
        planned("deepep_ll", make_layer(config, 5, tokens=4), config, phases=("decode",), max_tokens=16)
    finally:
        plan.close()


def after_closing():
    plan, layer = calls("deepep_normal", "prefill")
    plan.close()
    plan(layer.hidden, layer.topk)


def too_many_in_decode():
    config = config_of()
    layer = make_layer(config, 5, tokens=6)
    plan = planned("deepep", layer, config, phases=("prefill", "decode"), decode_max_tokens=4)
    try:
        plan(layer.hidden, layer.topk, phase=Phase.DECODE)
    finally:
        plan.close()


def overlap(given):
    plan, layer = calls("deepep_ll", "decode")
    try:
        return len(plan(layer.hidden, layer.topk, state=RunningState(overlap=given)))
    finally:
        gc.collect()
        plan.close()


def queues(depth, tokens):
    "NVSHMEM_QP_DEPTH that a plan leaves behind."
    os.environ.pop("NVSHMEM_QP_DEPTH", None)
    if depth:
        os.environ["NVSHMEM_QP_DEPTH"] = str(depth)
    try:
        config = config_of()
        layer = make_layer(config, 5, tokens=4)
        plan = planned("deepep_ll", layer, config, phases=("decode",), max_tokens=tokens)
        plan(layer.hidden, layer.topk)
        plan.close()
        return os.environ.get("NVSHMEM_QP_DEPTH")
    finally:
        os.environ.pop("NVSHMEM_QP_DEPTH", None)


def sms(number):
    planned("deepep_normal", make_layer(config_of(), 5, tokens=4), config_of(), num_sms=number)
"""

ODD, ZERO = [5, 0, 8, 1], [0, 0, 0, 0]
LAYERS = {
    "normal": ("deepep_normal", ODD, {}),
    "normal, few SMs": ("deepep_normal", ODD, {"num_sms": 8}),
    "normal, fp8": ("deepep_normal", ODD, {"scheme": "fp8_block128"}),
    "normal, nobody": ("deepep_normal", ZERO, {}),
    "normal, in flight": ("deepep_normal", ODD, {"flights": 3}),
    "static": ("deepep_normal_static", ODD, {}),
    "static, fp8": ("deepep_normal_static", ODD, {"scheme": "fp8_block128"}),
    "ll": ("deepep_ll", ODD, {"phases": ("decode",)}),
    "ll, fp8": ("deepep_ll", ODD, {"phases": ("decode",), "scheme": "fp8_block128"}),
    "ll, nobody": ("deepep_ll", ZERO, {"phases": ("decode",)}),
    "ll, in flight": ("deepep_ll", ODD, {"phases": ("decode",), "flights": 2}),
    "auto": ("deepep", ODD, {"phases": ("prefill", "decode")}),
    "auto, fp8": ("deepep", ODD, {"phases": ("prefill", "decode"), "scheme": "fp8_block128"}),
    "auto, in flight": ("deepep", ODD, {"phases": ("prefill", "decode"), "flights": 2}),
}
PROBED = {
    "int32": "probed('deepep_normal', ids_dtype='int32')",
    "sink": "probed('deepep_normal', dropped=DroppedSlot.SINK, extras=['expert_mask'])",
    "sink, static": "probed('deepep_normal_static', dropped=DroppedSlot.SINK, extras=['expert_mask'])",
    "counts": "probed('deepep_normal', extras=['host_counts', 'expert_mask'])",
    "from the sink": "probed('deepep_normal', incoming=DroppedSlot.SINK)",
    "payload": "probed('deepep_normal', payload='fp8_group128')",
}
#: What is refused, and what the message must say.
REFUSED = {
    "third": ("a_third_flight()", "2 results of low-latency dispatches wait"),
    "shapes": ("two_low_latency_shapes()", "BindError: a plan holds DeepEP's NVSHMEM buffer for 8 low-latency tokens"),
    "closed": ("after_closing()", "ContractViolation: the plan was closed"),
    "decode": ("too_many_in_decode()", "ContractViolation: 6 tokens in a low-latency call"),
    "closed in flight": ("finish_after_close()", "ContractViolation: the plan was closed"),
    "not ours": ("overlap({'zero_copy': True})", "asks for zero_copy, which the installed DeepEP's"),
    "overlap": ("overlap({'signals': 1})", "asks for signals, which the installed DeepEP's"),
    "queues": ("queues(100, 100)", "BindError: 100 tokens a rank need queues of 202 entries"),
    "sms": ("sms(7)", "BindError: the option num_sms is an even number of SMs, got 7"),
}


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said to every call."""
    sources = {name: f"compare({d!r}, {counts!r}, **{more!r})" for name, (d, counts, more) in LAYERS.items()}
    sources |= {name: source for name, (source, _) in REFUSED.items()}
    sources |= PROBED
    sources |= {"lost": "a_result_that_nobody_wants()", "shared": "layers_share_a_buffer()"}
    sources |= {"deep": "[queues(None, 8), queues(None, 600), queues(4096, 600)]"}
    lines = (f"say({name!r}, lambda: {source})\n" for name, source in sources.items())
    return run_ranks(request.param, SCRIPT + "".join(lines), tmp_path_factory.mktemp("gloo"), paths=PATHS)


@pytest.mark.parametrize("name", LAYERS)
def test_as_one_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", PROBED)
def test_the_weighted_sum_on_any_terms(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_deepep_is_called(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(REFUSED[name][1] in str(text) for text in found), found


def test_a_result_that_is_never_combined_makes_room(said: list[dict[str, Any]]) -> None:
    assert all(rank["lost"] is True for rank in said), [rank["lost"] for rank in said]


def test_layers_share_a_buffer_until_all_of_them_are_closed(said: list[dict[str, Any]]) -> None:
    assert all(rank["shared"] == [1, 3, 1, 2, 1] for rank in said), [rank["shared"] for rank in said]


def test_queues_are_as_deep_as_the_call_needs(said: list[dict[str, Any]]) -> None:
    assert all(rank["deep"] == [None, None, "4096"] for rank in said), [rank["deep"] for rank in said]
