"""Dispatchers keep nothing between their two calls: the handle travels in the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_core.moe_plan import MoePlan
from moe_core.protocols import RunningState
from moe_core.testing import probe
from moe_core.testing.case import Case
from moe_core.testing.dispatch_case import Meeting
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.vocabulary import Step


@check("dispatcher.zero_tokens", kind="dispatcher", each="format", needs="run")
def zero_tokens(case: Case) -> None:
    """A call without tokens gives a result without rows, and one token one row."""
    meeting = Meeting(case, case.param)
    plan = meeting.plan(meeting.wants())
    call = meeting.call(tokens=0)
    result = plan(call.hidden, call.topk, phase=meeting.phase)
    if tuple(result.shape) != tuple(call.hidden.shape):
        raise CheckFailed(f"got {tuple(result.shape)} for {tuple(call.hidden.shape)}")
    for pattern in ("uniform", "dropped"):
        meeting.verify(plan, meeting.call(tokens=1, pattern=pattern), f"one token, {pattern} routing")


@check("dispatcher.input_unchanged", kind="dispatcher", each="format", needs="run")
def input_unchanged(case: Case) -> None:
    """Neither the tokens nor the router's decision are changed."""
    meeting = Meeting(case, case.param)
    plan = meeting.plan(meeting.wants())
    call = meeting.call(pattern="dropped")
    given = {"hidden_states": call.hidden, "topk_ids": call.topk.topk_ids, "topk_weights": call.topk.topk_weights}
    before = {name: tensor.clone() for name, tensor in given.items()}
    plan(call.hidden, call.topk, phase=meeting.phase)
    for name, tensor in given.items():
        if not torch.equal(tensor.nan_to_num(nan=-7.0), before[name].nan_to_num(nan=-7.0)):
            raise CheckFailed(f"{name} was changed in place")


@check("dispatcher.output_buffer", kind="dispatcher", each="format", needs="run")
def output_buffer(case: Case) -> None:
    """Where the dispatcher makes the result (it sums or scales), it writes it into `state.output`."""
    meeting = Meeting(case, case.param)
    config = meeting.config(routed_scaling_factor=1.5)
    made, skipped = 0, ""
    for left in (frozenset(meeting.able), *(frozenset({step}) for step in sorted(meeting.able))):
        try:
            plan = meeting.plan(meeting.wants(can=meeting.able - left), config)
        except CheckSkipped as error:
            skipped = str(error)
            continue
        made += 1
        call = meeting.call(config=config)
        buffer = torch.full_like(call.hidden, float("nan"))
        result = plan(call.hidden, call.topk, state=RunningState(phase=meeting.phase, output=buffer))
        if result.data_ptr() != buffer.data_ptr():
            raise CheckFailed(f"with {', '.join(sorted(left))} left to it, it returned another tensor than the buffer")
        meeting.close(buffer, probe.expected(config, call.hidden, call.topk), "the buffer", plan)
    if not made:
        raise CheckSkipped(skipped)


@check("dispatcher.calls_in_flight", kind="dispatcher", each="format", needs="run")
def calls_in_flight(case: Case) -> None:
    """Two micro-batches may be in flight: dispatch, dispatch, combine, combine, in either order."""
    meeting = Meeting(case, case.param)
    config = meeting.config()
    for plan in _both_ways(meeting):
        calls = [meeting.call(9, "uniform", 1), meeting.call(13, "skewed", 2)]
        states = [RunningState(phase=meeting.phase) for _ in calls]
        dispatched = [plan.dispatcher.dispatch(c.hidden, c.topk, s) for c, s in zip(calls, states, strict=True)]
        for order in ((0, 1), (1, 0)):
            ran = [plan.run(d, s) for d, s in zip(dispatched, states, strict=True)]
            for i in order:
                result = plan.dispatcher.combine(ran[i], states[i])
                wanted = probe.expected(config, calls[i].hidden, calls[i].topk)
                meeting.close(result, wanted, f"call {i} of two in flight", plan)


@check("dispatcher.keeps_nothing", kind="dispatcher", each="format", needs="run")
def keeps_nothing(case: Case) -> None:
    """A call leaves the dispatcher object as it was: no attribute is added, replaced or written to."""
    meeting = Meeting(case, case.param)
    for plan in _both_ways(meeting):
        call = meeting.call()
        plan(call.hidden, call.topk, phase=meeting.phase)
        before = _attributes(plan.dispatcher)
        state = RunningState(phase=meeting.phase)
        dispatched = plan.dispatcher.dispatch(call.hidden, call.topk, state)
        between = _attributes(plan.dispatcher)
        plan.dispatcher.combine(plan.run(dispatched, state), state)
        for what, now in (("dispatch", between), ("combine", _attributes(plan.dispatcher))):
            changed = [name for name in before.keys() | now.keys() if not _same(before.get(name), now.get(name))]
            if changed:
                raise CheckFailed(f"{what} changed its attributes {', '.join(sorted(changed))}")


def _both_ways(meeting: Meeting) -> list[MoePlan]:
    """A plan in which the runner does every step that it can, and one in which the dispatcher does."""
    plans, skipped = [], ""
    for can in (meeting.able - meeting.offers.always, frozenset[Step]()):
        try:
            plans.append(meeting.plan(meeting.wants(can=can)))
        except CheckSkipped as error:
            skipped = str(error)
    if not plans:
        raise CheckSkipped(skipped)
    return plans


def _attributes(owner: Any) -> dict[str, tuple[int, Any]]:
    names = [n for c in type(owner).__mro__ for n in getattr(c, "__slots__", ())] + list(getattr(owner, "__dict__", {}))
    values = {name: getattr(owner, name) for name in names if hasattr(owner, name)}
    return {name: (id(v), v.clone() if isinstance(v, Tensor) else None) for name, v in values.items()}


def _same(one: tuple[int, Any] | None, other: tuple[int, Any] | None) -> bool:
    if one is None or other is None or one[0] != other[0]:
        return False
    return one[1] is None or bool(torch.equal(one[1], other[1]))
