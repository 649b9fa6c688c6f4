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
from moe_core.testing import make_layer
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


def compare(name, counts, *, phases=("prefill",), scheme="bf16", flights=1, hidden_size=2048, **options):
    "The largest difference from one rank's plan, relative to its largest value, over phases and repeated calls."
    counts, worst = counts[:ranks], 0.0
    config = config_of(scheme=scheme, hidden_size=hidden_size)
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
#: What is refused, and what the message must say.
REFUSED = {
    "third": ("a_third_flight()", "2 results of low-latency dispatches wait"),
    "shapes": ("two_low_latency_shapes()", "BindError: a plan holds DeepEP's low-latency buffer for 8 tokens"),
    "closed": ("after_closing()", "ContractViolation: the plan was closed"),
    "decode": ("too_many_in_decode()", "ContractViolation: 6 tokens in a low-latency call"),
    "overlap": ("overlap({'signals': 1})", "asks for signals, which the installed DeepEP's"),
    "queues": ("queues(100, 100)", "BindError: 100 tokens a rank need queues of 202 entries"),
    "wide": ("compare('deepep_normal', [4, 4, 4, 4], hidden_size=8192)", "rows of at most 16368 bytes"),
    "sms": ("sms(7)", "BindError: the option num_sms is an even number of SMs, got 7"),
}


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said to every call."""
    sources = {name: f"compare({d!r}, {counts!r}, **{more!r})" for name, (d, counts, more) in LAYERS.items()}
    sources |= {name: source for name, (source, _) in REFUSED.items()}
    sources |= {"lost": "a_result_that_nobody_wants()", "shared": "layers_share_a_buffer()"}
    sources |= {"deep": "[queues(None, 8), queues(None, 600), queues(4096, 600)]"}
    lines = (f"say({name!r}, lambda: {source})\n" for name, source in sources.items())
    return run_ranks(request.param, SCRIPT + "".join(lines), tmp_path_factory.mktemp("gloo"), paths=PATHS)


@pytest.mark.parametrize("name", LAYERS)
def test_as_one_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_deepep_is_called(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(REFUSED[name][1] in str(text) for text in found), found


def test_a_result_that_is_never_combined_makes_room(said: list[dict[str, Any]]) -> None:
    assert all(rank["lost"] is True for rank in said), [rank["lost"] for rank in said]


def test_layers_share_a_buffer_and_the_last_one_destroys_it(said: list[dict[str, Any]]) -> None:
    assert all(rank["shared"] == [1, 3, 1, 1, 0] for rank in said), [rank["shared"] for rank in said]


def test_queues_are_as_deep_as_the_call_needs(said: list[dict[str, Any]]) -> None:
    assert all(rank["deep"] == [None, "1202", "4096"] for rank in said), [rank["deep"] for rank in said]
