"""Dispatchers: what they hand out is right, and what comes back is the weighted sum.

All in one process. The experts are those of `moe_core.testing.probe`, so a wrong expert, weight or row shows.
"""

from __future__ import annotations

from typing import Any

import moe_core
from moe_core.config import ParallelConfig
from moe_core.settings import Settings
from moe_core.testing import probe
from moe_core.testing.case import Case
from moe_core.testing.checks.parallel import ranks, uneven_map
from moe_core.testing.dispatch_case import Meeting, incoming_as
from moe_core.testing.layers import make_layer
from moe_core.testing.oracle import dense
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.testing.stage import any_config
from moe_core.testing.tolerances import assert_close
from moe_core.vocabulary import DroppedSlot, IdSpace


@check("dispatcher.round_trip", kind="dispatcher", each="format", needs="run")
def round_trip(case: Case) -> None:
    """combine(experts(dispatch(x))) is the weighted sum, for every id space and dropped-slot encoding it offers."""
    meeting = Meeting(case, case.param)
    for space in sorted(meeting.offers.id_spaces):
        for dropped in sorted(meeting.offers.dropped):
            never = dropped is DroppedSlot.NEVER
            incoming = DroppedSlot.NEVER if never else DroppedSlot.NEGATIVE
            plan = meeting.plan(meeting.wants(id_spaces=(space,), dropped=(dropped,)), incoming=incoming)
            for pattern in ("uniform", "duplicate", "one_hot") if never else ("uniform", "dropped", "skewed"):
                meeting.verify(
                    plan, meeting.call(pattern=pattern), f"{space} ids, dropped as {dropped}, {pattern} routing"
                )


@check("dispatcher.incoming_dropped", kind="dispatcher", each="format", needs="run")
def incoming_dropped(case: Case) -> None:
    """Slots that the caller dropped, as -1 or as the sink id, contribute exactly zero; their weight may be NaN."""
    meeting = Meeting(case, case.param)
    config = meeting.config()
    for dropped in sorted(meeting.offers.dropped - {DroppedSlot.NEVER}):
        for incoming in (DroppedSlot.NEGATIVE, DroppedSlot.SINK):
            plan = meeting.plan(meeting.wants(dropped=(dropped,)), incoming=incoming)
            call = meeting.call(pattern="dropped")
            topk = incoming_as(call.topk, incoming, config.num_experts)
            result = plan(call.hidden, topk, phase=meeting.phase)
            what = f"dropped slots coming in as {incoming} and agreed as {dropped}"
            empty = (call.topk.topk_ids < 0).all(dim=1)
            if bool((result[empty] != 0).any()):
                raise CheckFailed(f"{what}: tokens without a live slot did not give exactly 0")
            meeting.close(result, probe.expected(config, call.hidden, call.topk), what, plan)


@check("dispatcher.expert_map_and_mask", kind="dispatcher", each="format", needs="run")
def map_and_mask(case: Case) -> None:
    """The expert map is int32 [E], global to local or -1; the mask is 1 for local experts, with a 0 more for a sink."""
    meeting = Meeting(case, case.param)
    extras = meeting.offers.extras & {"expert_map", "expert_mask"}
    if not extras:
        raise CheckSkipped("it offers neither")
    for dropped in sorted(meeting.offers.dropped - {DroppedSlot.NEVER}):
        for space in sorted(meeting.offers.id_spaces):
            wants = meeting.wants(extras=frozenset(extras), dropped=(dropped,), id_spaces=(space,))
            for parallel in (None, *_ranks_of(case, "linear")):
                plan = meeting.plan(wants, parallel=parallel)
                call = meeting.call()
                plan(call.hidden, call.topk, phase=meeting.phase)  # the probe compares them


def _ranks_of(case: Case, placement: str) -> list[ParallelConfig]:
    low, high = case.component.support.ep_sizes
    if low > 2 or (high is not None and high < 2) or placement not in case.component.support.placements:
        return []
    experts = uneven_map(2) if placement == "map" else placement
    layout = ParallelConfig(ep_size=2, placement=experts, reduce="caller")
    return list(ranks(layout))


@check("dispatcher.expert_parallel", kind="dispatcher", each="placement", needs="run")
def expert_parallel(case: Case) -> None:
    """With this placement, the shares of all ranks sum to the weighted sum of all experts."""
    layouts = _ranks_of(case, case.param)
    if not layouts:
        raise CheckSkipped("it does not declare this with ep_size 2 (capability.refuses checks the refusal)")
    for format_id in dict.fromkeys(case.component.spec.formats.values()):
        meeting = Meeting(case, format_id)
        config = meeting.config(num_experts=8)
        call = meeting.call(pattern="dropped", config=config)
        for space in sorted(meeting.offers.id_spaces):
            total = None
            for rank in layouts:
                plan = meeting.plan(meeting.wants(id_spaces=(space,)), config, rank)
                part = plan(call.hidden, call.topk, phase=meeting.phase).double()
                total = part if total is None else total + part
            if total is not None:
                wanted = probe.expected(config, call.hidden, call.topk)
                assert_close(total, wanted, "float32", what=f"the sum over ranks, {format_id} in {IdSpace(space)} ids")


@check("dispatcher.whole_layer", kind="dispatcher", each="format", needs="run")
def whole_layer(case: Case) -> None:
    """With a real runner behind it, a layer gives what `standard` and the reference runner give."""
    registry, name = case.stage.registry, case.component.name
    phase = next(p for p, f in case.component.spec.formats.items() if f == case.param)
    runners = [r for f, r in (*registry.adapters, *registry.fused) if f == case.param and r in registry.runners]
    config = any_config(case.component, dtype="float32", scheme="bf16")
    for runner in sorted(set(runners), key=lambda r: (r != "reference", r)):
        settings = Settings(runner=runner, dispatcher=name)
        asked: dict[str, Any] = {"settings": settings, "registry": registry, "phases": (phase,), "max_tokens": 64}
        if moe_core.resolve(config, None, case.site.hardware, **asked).chosen is None:
            continue
        for pattern in ("uniform", "dropped"):
            layer = make_layer(config, 70, pattern=pattern, device=case.site.device)
            plan = moe_core.plan(config, layer.weights, None, case.site.hardware, **asked)
            result = plan(layer.hidden, layer.topk, phase=phase)
            wanted = dense(config, layer.weights, layer.hidden, layer.topk)
            assert_close(result, wanted, "float32", what=f"the layer of {name} and {runner}, {pattern} routing,")
        return
    raise CheckSkipped(f"no runner here takes the format {case.param!r} from it")
