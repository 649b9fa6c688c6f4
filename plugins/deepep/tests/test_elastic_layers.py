"""Whole EP layers over the strict double of DeepEP V2, in two and four real processes, equal the layer of one rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_core_deepep
import pytest

from moe_core.testing import run_ranks

PATHS = (Path(moe_core_deepep.__file__).parents[1], Path(__file__).parent)

SCRIPT = """
import elastic_double
sys.modules["deep_ep"] = elastic_double

import logging
from dataclasses import replace
from moe_core import MoeConfig, ParallelConfig, Phase, RunningState, TopKOutput, hookimpl
from moe_core.registry import Registry
from moe_core.specs import Wants
from moe_core.testing import make_layer, probe
from moe_core.testing.expert_parallel import Ranks
from moe_core.testing.layers import make_routing
from moe_core.vocabulary import GROUPED, STANDARD, DroppedSlot, Step
from moe_core_deepep import buffers
from moe_core_deepep.plugin import DeepEpPlugin

V2, SORTED = "deepep_v2", "deepep_v2_grouped"
PREFILL, DECODE = Phase.PREFILL, Phase.DECODE
Buffer = elastic_double.ElasticBuffer


class OnCpu(DeepEpPlugin):
    "The same dispatchers, where the double runs."

    @hookimpl
    def moe_core_dispatchers(self):
        here = dict(devices={"cpu": ("*",)}, requires=())
        return tuple(replace(spec, support=replace(spec.support, **here)) for spec in super().moe_core_dispatchers())


harness = Ranks(group, "cpu", Registry([OnCpu()]))


def config_of(**changes):
    sizes = dict(num_experts=8, top_k=3, hidden_size=256, intermediate_size=128, routed_scaling_factor=1.5)
    return MoeConfig(**(sizes | changes))


def same(name, counts, *, phase=PREFILL, scheme="bf16", **more):
    config = config_of(scheme=scheme, **more.pop("config", {}))
    far = harness.error(name, counts, config=config, phase=phase, **more)
    assert not buffers._OPEN
    return far


def built_for_int32(name):
    elastic_double.topk_idx_t = torch.int32
    try:
        return same(name, [5, 0, 8, 1])
    finally:
        elastic_double.topk_idx_t = torch.int64


def planned(name=V2, *, phases=(PREFILL,), most=8, config=None, **options):
    config = config or config_of()
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(config, 5, tokens=4)
    settings = moe_core.Settings(runner="reference", dispatcher=name, options={name: options} if options else {})
    plan = moe_core.plan(config, layer.weights.shard(config, parallel), parallel, group=group, max_tokens=most,
                         phases=phases, registry=harness.registry, settings=settings)
    return plan, layer


def both_phases(name, **options):
    "Calls of both phases by turns, with one buffer; the shapes that DeepEP was called with."
    shapes, dispatch = [], Buffer.dispatch

    def seen(self, x, **given):
        out = dispatch(self, x, **given)
        rows = out[0][0] if isinstance(out[0], tuple) else out[0]
        shapes.append([given["num_max_tokens_per_rank"], given["do_cpu_sync"], len(rows)])
        return out

    Buffer.dispatch = seen
    try:
        config = config_of()
        plan, layer = planned(name, phases=(PREFILL, DECODE), most=11, **options)
        compiled, room = len(shapes), buffers._OPEN[0].need.tokens
        whole = moe_core.plan(config, layer.weights, runner="reference")
        worst, expected = 0.0, whole(layer.hidden, layer.topk).float()
        for phase in (PREFILL, DECODE, PREFILL):
            result = plan(layer.hidden, layer.topk, phase=phase).float()
            worst = max(worst, float((result - expected).abs().max() / expected.abs().max()))
        plan.close()
    finally:
        Buffer.dispatch = dispatch
    return [worst < 2e-2, compiled, room, shapes[-2]]


def chosen_twice(name, phase, **options):
    config = config_of(top_k=4)
    plan, layer = planned(name, phases=(phase,), config=config, **options)
    whole = moe_core.plan(config, layer.weights, runner="reference")
    worst = 0.0
    for pattern in ("duplicate", "one_hot", "dropped"):
        topk = make_routing(pattern, 4, 8, 4, seed=rank)
        expected = whole(layer.hidden, topk).float()
        result = plan(layer.hidden, topk).float()
        assert result.isfinite().all()
        worst = max(worst, float((result - expected).abs().max() / expected.abs().max().clamp(min=1e-3)))
    plan.close()
    return worst


def probed(name, phase=PREFILL, payload="bf16", ids_dtype="int64", dropped=DroppedSlot.NEGATIVE,
           incoming=DroppedSlot.NEGATIVE, extras=(), scales=True, **options):
    "Experts that multiply, on any terms: the weighted sum. The probe checks masks, offsets and ids."
    counts = [5, 0, 8, 1][:ranks]
    config = config_of(scheme="fp8_block128" if payload != "bf16" else "bf16")
    format = STANDARD if name == V2 else GROUPED
    wants = Wants(payloads=(payload,), dropped=(dropped,), ids_dtypes=(ids_dtype,), extras=frozenset(extras),
                  can=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM} | ({Step.ROUTED_SCALING} if scales else set())))
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(config, 100 + rank, tokens=counts[rank])
    layer.topk.topk_ids[::4, 0] = -1
    layer.topk.topk_weights[::4, 0] = float("nan")
    clean = TopKOutput(layer.topk.topk_ids.clone(), layer.topk.topk_weights.nan_to_num())
    expected = probe.expected(config, moe_core.quant.roundtrip_activation(layer.hidden, payload)
                              if payload != "bf16" else layer.hidden, clean)
    if incoming is DroppedSlot.SINK:
        layer.topk.topk_ids[layer.topk.topk_ids < 0] = config.num_experts
    plan = moe_core.plan(config, make_layer(config, 5, tokens=1).weights.shard(config, parallel), parallel, group=group,
                         max_tokens=8, registry=Registry([OnCpu(), probe.probe_plugin(format, wants)]), phases=[phase],
                         incoming=incoming, settings=moe_core.Settings(runner=probe.NAME, dispatcher=name,
                                                                       options={name: options} if options else {}))
    terms = plan.terms[format]
    assert (terms.payload, terms.ids_dtype, terms.dropped) == (payload, ids_dtype, dropped), terms
    assert set(extras) <= terms.extras and terms.runner_does(Step.ROUTED_SCALING) == scales
    result = plan(layer.hidden, layer.topk)
    if "num_valid" in extras:
        d = plan.dispatch(layer.hidden, layer.topk, RunningState())
        assert d.num_valid.dtype == torch.int32 and d.num_valid.dim() == 0
        here = (d.topk_ids >= 0).any(1)
        assert here[: int(d.num_valid)].all() and (phase is DECODE or int(d.num_valid) == len(here))
    plan.close()
    return float((result.double() - expected).abs().max() / expected.abs().max()) if len(result) else 0.0


def layouts():
    "What runners are told: ids of the tail, the number of rows, offsets, rows that are padding."
    said = {}
    for name, phase in ((V2, PREFILL), (V2, DECODE), (SORTED, PREFILL), (SORTED, DECODE)):
        plan, layer = planned(name, phases=(phase,), **({"alignment": 16} if name == SORTED else {}))
        d = plan.dispatch(layer.hidden, layer.topk, RunningState())
        key = f"{name} {phase.value}"
        if name == V2:
            live = (d.topk_ids >= 0).any(1)  # without num_valid all rows are in order
            slots, lowest = int((d.topk_ids >= 0).sum()), int(d.topk_ids.min())
            said[key] = [len(live), int(live.sum()), bool(live[: int(live.sum())].all()), lowest, slots]
        else:
            live = d.row_ids >= 0
            sizes = d.offsets.diff()
            kept = [int(live[a:b].sum()) for a, b in zip(d.offsets[:-1], d.offsets[1:])]
            slots = int(live.sum())
            assert d.alignment == 16 and not (sizes % 16).any()
            assert slots == sum(kept) and len(live) == len(d.row_weights)
            assert (d.row_ids[live] == torch.arange(len(live))[live]).all() and d.row_ids.dtype == torch.int32
            assert d.hidden_states[live].isfinite().all() and d.hidden_states[~live].isnan().all()
            said[key] = [len(live), slots]
        plan.close()
    return said


def values_asked_for(name):
    "How often decode asks the device for a value, beside DeepEP itself."
    plan, layer = planned(name, phases=(DECODE,))
    asked, dispatch, names = [], Buffer.dispatch, ("item", "tolist", "__int__", "__bool__", "__float__", "__index__")
    before = {name: getattr(torch.Tensor, name) for name in names}

    def watched(watch):
        for name in names:
            setattr(torch.Tensor, name, (lambda self: asked.append(1)) if watch else before[name])

    def unwatched(self, *args, **given):
        watched(False)
        try:
            return dispatch(self, *args, **given)
        finally:
            watched(True)

    Buffer.dispatch = unwatched
    watched(True)
    try:
        plan.dispatcher.dispatch(layer.hidden, layer.topk, RunningState(DECODE))
    finally:
        watched(False)
        Buffer.dispatch = dispatch
    plan.close()
    return len(asked)


def layers_share_a_buffer():
    plans = [planned(name)[0] for name in (V2, SORTED, V2)]
    other = planned(most=100)[0]
    seen = [len(buffers._OPEN), buffers._OPEN[0].users, buffers._OPEN[1].need.tokens]
    other.close()
    for plan in plans[:2]:
        plan.close()
        plan.close()
    seen += [len(buffers._OPEN), buffers._OPEN[0].users]
    plans[2].close()
    return [*seen, len(buffers._OPEN)]


def compiled_once():
    "Calls of DeepEP while layers of one shape, then of another number of experts, are planned."
    counted, dispatch = [0], Buffer.dispatch

    def seen(self, *args, **given):
        counted[0] += 1
        return dispatch(self, *args, **given)

    Buffer.dispatch, seen_after = seen, []
    try:
        plans = []
        for name, experts in ((V2, 8), (V2, 8), (V2, 16), (SORTED, 8)):
            plans.append(planned(name, phases=(PREFILL, DECODE), config=config_of(num_experts=experts))[0])
            seen_after.append(counted[0])
    finally:
        Buffer.dispatch = dispatch
    for plan in plans:
        plan.close()
    return seen_after


def refused(work, **options):
    plan, layer = planned(**options)
    try:
        work(plan, layer)
    finally:
        plan.close()


def after_closing():
    plan, layer = planned()
    plan.close()
    plan(layer.hidden, layer.topk)


def finish_after_close():
    plan, layer = planned(SORTED)
    state = RunningState()
    done = plan.run(plan.dispatch_finish(plan.dispatch_begin(layer.hidden, layer.topk, state), state), state)
    plan.close()
    plan.dispatcher.combine(done, state)


def too_many():
    def work(plan, layer):
        hidden = torch.zeros(5, 256, dtype=torch.bfloat16)
        plan(hidden, TopKOutput(torch.zeros(5, 3, dtype=torch.int32), torch.zeros(5, 3)), phase=DECODE)
    refused(work, phases=(PREFILL, DECODE), decode_max_tokens=4)


def torch_fills():
    torch.use_deterministic_algorithms(True)
    try:
        planned()
    finally:
        torch.use_deterministic_algorithms(False)


def no_compiler():
    dispatch = Buffer.dispatch
    Buffer.dispatch = lambda *args, **given: (_ for _ in ()).throw(RuntimeError("nvcc is missing"))
    try:
        planned()
    finally:
        Buffer.dispatch = dispatch
        while buffers._OPEN:
            buffers._OPEN.pop().buffer.destroy()


def no_memory():
    make = Buffer.__init__
    Buffer.__init__ = lambda self, *args, **given: (_ for _ in ()).throw(RuntimeError("NCCL GIN is unavailable"))
    try:
        planned()
    finally:
        Buffer.__init__ = make


def warned(number):
    "What DeepEP's own choice of SMs makes the plugin say."
    kept, choose = [], Buffer.get_theoretical_num_sms
    handler = logging.Handler()
    handler.emit = lambda record: kept.append(record.getMessage())
    Buffer.get_theoretical_num_sms = lambda self, experts, top_k: number
    logging.getLogger("moe_core.deepep").addHandler(handler)
    try:
        planned()[0].close()
    finally:
        logging.getLogger("moe_core.deepep").removeHandler(handler)
        Buffer.get_theoretical_num_sms = choose
    return [text[:20] for text in kept]
"""

ODD, ZERO = [5, 0, 8, 1], [0, 0, 0, 0]
NAMES, PHASES = ("V2", "SORTED"), ("PREFILL", "DECODE")
LAYERS = {
    f"{name}, {phase}{what}": f"same({name}, {counts}, phase={phase}{more})"
    for name in NAMES
    for phase in PHASES
    for what, counts, more in (
        ("", ODD, ""),
        (", fp8", ODD, ", scheme='fp8_block128'"),
        (", nobody", ZERO, ""),
        (", in flight", ODD, ", flights=3"),
    )
} | {
    "by the cpu runner": "same(V2, [5, 0, 8, 1], phase=DECODE, runner='cpu')",
    "by the cpu runner, prefill": "same(V2, [5, 0, 8, 1], runner='cpu')",
    "int32 on the wire": "built_for_int32(V2)",
    "few SMs": "same(V2, [5, 0, 8, 1], options={'num_sms': 8})",
    "in flight, fp8": "same(SORTED, [5, 0, 8, 1], phase=DECODE, flights=2, scheme='fp8_block128')",
    "aligned": "same(SORTED, [5, 0, 8, 1], options={'alignment': 128})",
    "aligned, decode": "same(SORTED, [5, 0, 8, 1], phase=DECODE, options={'alignment': 16})",
    "aligned, fp8": "same(SORTED, [5, 0, 8, 1], scheme='fp8_block128', options={'alignment': 128})",
    "top-1 on the input": "same(V2, [5, 0, 8, 1], config=dict(top_k=1, router_weight_on_input=True))",
    "weighted input": "same(SORTED, [5, 0, 8, 1], config=dict(router_weight_on_input=True),"
    " options={'distinct_experts': True})",
    "distinct": "same(V2, [5, 0, 8, 1], phase=DECODE, options={'distinct_experts': True})",
}
TWICE = {f"{name}, {phase}, twice": f"chosen_twice({name}, {phase})" for name in NAMES for phase in PHASES}
PROBED = {
    "int32": "probed(V2, ids_dtype='int32')",
    "sink": "probed(V2, dropped=DroppedSlot.SINK, extras=['expert_mask'])",
    "sink, decode": "probed(V2, DECODE, dropped=DroppedSlot.SINK, extras=['expert_mask'])",
    "valid": "probed(V2, extras=['num_valid'])",
    "valid, decode": "probed(V2, DECODE, extras=['num_valid', 'expert_mask'])",
    "scaled": "probed(V2, scales=False)",
    "scaled, grouped": "probed(SORTED, DECODE, scales=False)",
    "from the sink": "probed(V2, incoming=DroppedSlot.SINK)",
    "payload": "probed(V2, DECODE, payload='fp8_group128')",
    "grouped": "probed(SORTED)",
    "grouped, decode": "probed(SORTED, DECODE, alignment=8)",
    "grouped, payload": "probed(SORTED, payload='fp8_group128', alignment=128)",
}
#: What is refused, and what the message must say.
REFUSED = {
    "closed": ("after_closing()", "ContractViolation: the plan was closed"),
    "closed in flight": ("finish_after_close()", "ContractViolation: the plan was closed"),
    "many": ("too_many()", "ContractViolation: 5 tokens in a call that was made for at most 4"),
    "sms": ("planned(num_sms=7)", "BindError: the option num_sms is an even number of SMs, got 7"),
    "alignment": ("planned(SORTED, alignment=0)", "BindError: the option alignment is a positive number of rows"),
    "decode": ("planned(decode_max_tokens=9)", "decode_max_tokens is between 1 and max_tokens, this is 9"),
    "hidden": ("planned(config=config_of(hidden_size=384))", "256"),
    "input": ("planned(config=config_of(router_weight_on_input=True))", "with the sum of its weights"),
    "fills": ("torch_fills()", "BindError: torch's deterministic algorithms fill new memory"),
    "compiler": ("no_compiler()", "its first call failed: nvcc is missing"),
    "memory": ("no_memory()", "EP_DISABLE_GIN=1"),
}
OTHER = {
    "phases": "both_phases(V2)",
    "phases, grouped": "both_phases(SORTED)",
    "small decode": "both_phases(V2, decode_max_tokens=5)",
    "layouts": "layouts()",
    "shared": "layers_share_a_buffer()",
    "compiled": "compiled_once()",
    "host": "[values_asked_for(V2), values_asked_for(SORTED)]",
    "warned": "[warned(4), warned(12)]",
}


#: What four ranks are asked; two are asked everything.
OF_FOUR = LAYERS | TWICE | {"layouts": OTHER["layouts"]}
Runs = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Number of ranks -> what each of them said to every call."""
    known: dict[int, list[dict[str, Any]]] = {}
    everything = LAYERS | TWICE | PROBED | {name: source for name, (source, _) in REFUSED.items()} | OTHER

    def of(ranks: int) -> list[dict[str, Any]]:
        if ranks not in known:
            sources = everything if ranks == 2 else OF_FOUR
            lines = (f"say({name!r}, lambda: {source})\n" for name, source in sources.items())
            known[ranks] = run_ranks(ranks, SCRIPT + "".join(lines), tmp_path_factory.mktemp("gloo"), paths=PATHS)
        return known[ranks]

    return of


@pytest.fixture
def said(runs: Runs) -> list[dict[str, Any]]:
    """Of two ranks."""
    return runs(2)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", LAYERS | TWICE)
def test_as_one_rank(name: str, ranks: int, runs: Runs) -> None:
    found = [rank[name] for rank in runs(ranks)]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", PROBED)
def test_the_weighted_sum_on_any_terms(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(REFUSED[name][1] in str(text) for text in found), found


def test_every_phase_has_its_own_room(said: list[dict[str, Any]]) -> None:
    """max_tokens 11 is rounded up to 16; prefill gets as many rows as came, decode as may come."""
    ranks = len(said)
    for rank in said:
        assert rank["phases"] == [True, 2, 16, [16, False, 16 * ranks]]
        assert rank["phases, grouped"] == [True, 2, 16, [16, False, 16 * ranks * min(3, 8 // ranks)]]
        assert rank["small decode"] == [True, 2, 16, [8, False, 8 * ranks]]


@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_that_nobody_may_read_are_marked(ranks: int, runs: Runs) -> None:
    said = runs(ranks)
    for rank in said:
        layouts = rank["layouts"]
        rows, valid, *found = layouts["deepep_v2 prefill"]
        assert rows == valid
        assert layouts["deepep_v2 decode"] == [8 * ranks, valid, *found]
        assert found[:2] == [True, -1]
        padded, slots = layouts["deepep_v2_grouped prefill"]
        assert padded % 16 == 0
        assert slots < padded
        assert slots == found[2]
        worst = 8 * ranks * min(3, 8 // ranks) + 15 * (8 // ranks)
        assert layouts["deepep_v2_grouped decode"] == [-(-worst // 16) * 16, slots]
    assert sum(rank["layouts"]["deepep_v2_grouped decode"][1] for rank in said) == 4 * 3 * ranks


def test_layers_share_a_buffer_until_all_of_them_are_closed(said: list[dict[str, Any]]) -> None:
    assert all(rank["shared"] == [2, 3, 128, 1, 1, 0] for rank in said), [rank["shared"] for rank in said]


def test_kernels_are_compiled_when_the_first_layer_of_a_shape_is_bound(said: list[dict[str, Any]]) -> None:
    assert all(rank["compiled"] == [2, 2, 4, 6] for rank in said), [rank["compiled"] for rank in said]


def test_decode_asks_the_device_for_nothing(said: list[dict[str, Any]]) -> None:
    assert all(rank["host"] == [0, 0] for rank in said), [rank["host"] for rank in said]


def test_a_number_of_sms_that_deepep_guessed_is_said(said: list[dict[str, Any]]) -> None:
    assert all(rank["warned"] == [["DeepEP chose 4 SMs, "], []] for rank in said), [rank["warned"] for rank in said]
