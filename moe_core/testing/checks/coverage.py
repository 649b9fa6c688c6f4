"""Whether anything of a component can be computed on this machine, so that an absence is never silent."""

from __future__ import annotations

from moe_core.testing.case import Case
from moe_core.testing.registration import COMPUTING, CheckFailed, CheckSkipped, check


@check("coverage.runs_here", kind=(*COMPUTING, "dispatcher"), needs="run")
def runs_here(case: Case) -> None:
    """The component can run on this machine; where it cannot, the checks that compute are skipped for this reason."""
    if case.component.kind != "dispatcher" and not case.component.lanes:
        raise CheckFailed("no adapter or fused func of its plugin leads into it")


@check("coverage.lane", kind=COMPUTING, each="lane", needs="run")
def lane(case: Case) -> None:
    """A layer can be bound on this lane: some dispatcher of one process gives its format on terms that it takes."""
    setup = case.setup()
    plan = setup.plan(setup.layer().weights)
    paths = [choice for _, choice in plan.resolution.require().paths]
    if setup.lane.kind != "whole" and {choice.kind for choice in paths} != {setup.lane.kind}:
        raise CheckSkipped(f"asked for {setup.lane.label}, bound {plan!r}")
