"""Negotiation: a dispatcher's offers and a runner's wants become terms, or every reason why they cannot."""

from __future__ import annotations

from moe_core._frozen import FrozenDict
from moe_core.capability import Reason
from moe_core.specs import Offers, Terms, Wants
from moe_core.vocabulary import DroppedSlot, IdSpace, Owner, PayloadId, Step


def negotiate(
    offers: Offers,
    wants: Wants,
    *,
    subject: str,
    steps: frozenset[Step] = frozenset(),
    caller_does: frozenset[Step] = frozenset(),
    caller_can: frozenset[Step] = frozenset(),
    caller_drops_none: bool = False,
    partial: bool = False,
    admitted: frozenset[PayloadId] | None = None,
) -> Terms | list[Reason]:
    """The terms of a dispatcher's offer and a runner's wants, or every reason why there are none.

    `DroppedSlot.NEVER` is admitted only where the caller promises that no slot is dropped (`caller_drops_none`) and the
    rank either holds all experts or gets global ids (`partial`: it holds some). `admitted`: payloads that the
    layer's scheme can take (None: all). Each of `steps` gets one owner; who does it anyhow comes first, then the runner
    (its kernels do it for free), then the dispatcher, then the caller.
    """
    reasons: list[Reason] = []

    def first(code: str, what: str, wanted: tuple[str, ...], offered: frozenset[str]) -> str | None:
        for value in wanted:
            if value in offered:
                return value
        needed, found = (
            " or ".join(map(str, wanted)) or "nothing",
            ", ".join(sorted(map(str, offered))) or "none",
        )
        reasons.append(
            Reason(
                subject,
                code,
                f"the runner takes {what} {needed}; the dispatcher offers {found}",
                needed,
                found,
            )
        )
        return None

    space = first("contract.id_space", "ids that are", tuple(wants.id_spaces), frozenset(offers.id_spaces))
    none_dropped = caller_drops_none and (not partial or space == IdSpace.GLOBAL)
    dropped_offered = offers.dropped if none_dropped else offers.dropped - {DroppedSlot.NEVER}
    dropped = first("contract.dropped", "dropped slots written as", tuple(wants.dropped), frozenset(dropped_offered))
    offered = offers.payloads if admitted is None else offers.payloads & admitted
    payload = first("contract.payload", "payload", wants.payloads, offered)
    ids_dtype = first("contract.ids_dtype", "ids of", wants.ids_dtypes, offers.ids_dtypes)
    missing = wants.extras - offers.extras
    if missing:
        names = ", ".join(sorted(missing))
        reasons.append(Reason(subject, "contract.extras", f"the dispatcher does not offer {names}", names, None))
    owners = _assign_steps(offers, wants, steps, caller_does, caller_can, subject, reasons)
    if reasons or space is None or dropped is None or payload is None or ids_dtype is None:
        return reasons
    return Terms(
        id_space=IdSpace(space),
        dropped=DroppedSlot(dropped),
        payload=payload,
        ids_dtype=ids_dtype,
        extras=wants.extras | (wants.optional & offers.extras),
        steps=FrozenDict(owners),
    )


def _assign_steps(
    offers: Offers,
    wants: Wants,
    steps: frozenset[Step],
    caller_does: frozenset[Step],
    caller_can: frozenset[Step],
    subject: str,
    reasons: list[Reason],
) -> dict[Step, Owner]:
    owners: dict[Step, Owner] = {}
    sides = ((Owner.RUNNER, wants.always), (Owner.DISPATCHER, offers.always), (Owner.CALLER, caller_does))
    able = ((Owner.RUNNER, wants.can), (Owner.DISPATCHER, offers.can), (Owner.CALLER, caller_can))
    for step in sorted(Step):
        fixed = [owner for owner, does in sides if step in does]
        if len(fixed) > 1 and step in steps:
            names = " and ".join(fixed)
            reasons.append(Reason(subject, "step.twice", f"{step.value} would be done by {names}", "one", names))
        elif step not in steps:
            # A scaling that a kernel always applies is harmless by a factor of 1; a sum that nobody asked for is not.
            if step is Step.TOPK_SUM and any(owner is not Owner.CALLER for owner in fixed):
                reasons.append(
                    Reason(subject, "step.twice", "top-k slots would be summed, but no_combine was asked for")
                )
        else:
            willing = fixed or [owner for owner, can in able if step in can]
            if willing:
                owners[step] = willing[0]
            else:
                reasons.append(
                    Reason(
                        subject,
                        "step.never",
                        f"nobody would do {step.value}",
                        hint=f"do it in the caller and say so: caller_does={{Step.{step.name}}}",
                    )
                )
    if owners.get(Step.ROUTER_WEIGHT) is Owner.DISPATCHER and owners.get(Step.TOPK_SUM) is Owner.RUNNER:
        # Slots are weighted before they are summed, and the dispatcher sees them after the runner.
        if Step.TOPK_SUM in offers.can and Step.TOPK_SUM not in wants.always:
            owners[Step.TOPK_SUM] = Owner.DISPATCHER
        else:
            message = "nobody would do router_weight before the runner sums the top-k slots"
            reasons.append(Reason(subject, "step.never", message))
    return owners
