"""Dispatchers keep the terms that were agreed on: steps, payloads, dtypes."""

from __future__ import annotations

from moe_core.testing.case import Case
from moe_core.testing.dispatch_case import ALL_STEPS, Meeting, scheme_of
from moe_core.testing.registration import CheckSkipped, check
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Step


@check("dispatcher.steps", kind="dispatcher", each="format", needs="run")
def steps(case: Case) -> None:
    """The dispatcher does the steps that the terms give it (weight, sum, scaling), each alone or all, and no other."""
    meeting = Meeting(case, case.param)
    skipped, made = "", 0
    for mine in (frozenset[Step](), *(frozenset({s}) for s in sorted(ALL_STEPS)), ALL_STEPS):
        for config in (meeting.config(routed_scaling_factor=1.5), meeting.config(no_combine=True)):
            try:
                plan = meeting.plan(meeting.wants(can=meeting.able - mine), config)
            except CheckSkipped as error:
                skipped = str(error)
                continue
            made += 1
            what = f"the result where the runner leaves {', '.join(sorted(mine)) or 'nothing'} to others"
            meeting.verify(plan, meeting.call(config=config), what, config)
            meeting.verify(plan, meeting.call(config=config, pattern="dropped"), what + ", with dropped slots", config)
    if not made:
        raise CheckSkipped(skipped)


@check("dispatcher.payloads", kind="dispatcher", each="format", needs="run")
def payloads(case: Case) -> None:
    """Every payload that it offers holds the tokens, with scales as the payload's name says."""
    meeting = Meeting(case, case.param)
    made = 0
    for payload in sorted(meeting.offers.payloads):
        scheme = "bf16" if payload == "bf16" else scheme_of(payload)
        if scheme is None:
            continue  # a payload of a plugin's own scheme
        config = meeting.config(scheme=scheme)
        plan = meeting.plan(meeting.wants(payloads=(payload,)), config)
        made += 1
        for pattern in ("uniform", "dropped"):
            meeting.verify(
                plan, meeting.call(pattern=pattern, config=config), f"payload {payload}, {pattern} routing", config
            )
    if not made:
        raise CheckSkipped("no scheme of the core goes with its payloads")


@check("dispatcher.ids_dtypes", kind="dispatcher", each="format", needs="run")
def ids_dtypes(case: Case) -> None:
    """Ids come in the agreed dtype, whichever of int32 and int64 the caller has."""
    meeting = Meeting(case, case.param)
    for dtype in sorted(meeting.offers.ids_dtypes):
        plan = meeting.plan(meeting.wants(ids_dtypes=(dtype,)))
        call = meeting.call()
        meeting.verify(plan, call, f"ids agreed as {dtype}")
        wide = call._replace(topk=TopKOutput(call.topk.topk_ids.long(), call.topk.topk_weights))
        meeting.verify(plan, wide, f"int64 ids, agreed as {dtype}")
