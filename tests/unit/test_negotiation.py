"""Negotiation of terms: preferences, every way to fail, and one owner for every step."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest

from moe_core.capability import Reason
from moe_core.negotiation import negotiate
from moe_core.specs import Offers, Terms, Wants
from moe_core.vocabulary import DroppedSlot, IdSpace, Owner, Step

GLOBAL, LOCAL = IdSpace.GLOBAL, IdSpace.LOCAL
NEVER, NEGATIVE, SINK = DroppedSlot.NEVER, DroppedSlot.NEGATIVE, DroppedSlot.SINK
BASIC = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM})

#: Offers everything that the core knows, and does nothing of its own accord.
OFFERS = Offers(
    id_spaces=frozenset(IdSpace),
    dropped=frozenset(DroppedSlot),
    payloads=frozenset({"bf16", "fp8_group128", "nvfp4"}),
    ids_dtypes=frozenset({"int32", "int64"}),
    extras=frozenset({"expert_map", "host_counts"}),
    can=frozenset(Step),
)
WANTS = Wants()


def outcome(
    offers: dict[str, Any] | None = None, wants: dict[str, Any] | None = None, **given: Any
) -> Terms | list[Reason]:
    found = replace(OFFERS, **(offers or {}))
    return negotiate(found, replace(WANTS, **(wants or {})), subject="path:a+b/split[standard]", **given)


def agreed(offers: dict[str, Any] | None = None, wants: dict[str, Any] | None = None, **given: Any) -> Terms:
    terms = outcome(offers, wants, **given)
    assert isinstance(terms, Terms), terms
    return terms


def refused(offers: dict[str, Any] | None = None, wants: dict[str, Any] | None = None, **given: Any) -> list[Reason]:
    reasons = outcome(offers, wants, **given)
    assert isinstance(reasons, list), reasons
    assert reasons
    return reasons


@pytest.mark.parametrize(
    ("field", "given", "order"),
    [
        ("id_space", "id_spaces", (GLOBAL, LOCAL)),
        ("id_space", "id_spaces", (LOCAL, GLOBAL)),
        ("dropped", "dropped", (NEGATIVE, SINK)),
        ("dropped", "dropped", (SINK, NEGATIVE)),
        ("payload", "payloads", ("nvfp4", "bf16")),
        ("payload", "payloads", ("bf16", "nvfp4")),
        ("ids_dtype", "ids_dtypes", ("int64", "int32")),
        ("ids_dtype", "ids_dtypes", ("int32", "int64")),
    ],
)
def test_the_runners_order_of_preference_decides(field: str, given: str, order: tuple[str, ...]) -> None:
    assert getattr(agreed(wants={given: order}), field) == order[0]
    second = agreed(offers={given: frozenset({order[1]})}, wants={given: order})
    assert getattr(second, field) == order[1]


@pytest.mark.parametrize(
    ("code", "offers", "wants", "message"),
    [
        ("contract.id_space", {"id_spaces": frozenset({GLOBAL})}, {}, "takes ids that are local; .* offers global"),
        ("contract.dropped", {"dropped": frozenset({SINK})}, {}, "as negative or never; .* offers sink"),
        ("contract.payload", {}, {"payloads": ("mxfp4", "mxfp8")}, "payload mxfp4 or mxfp8; .* bf16, fp8_group128"),
        ("contract.ids_dtype", {}, {"ids_dtypes": ("int16",)}, "ids of int16; the dispatcher offers int32, int64"),
        ("contract.extras", {}, {"extras": frozenset({"expert_mask", "num_valid"})}, "expert_mask, num_valid"),
    ],
)
def test_every_term_that_fails_has_its_code_and_both_sides(
    code: str, offers: dict[str, Any], wants: dict[str, Any], message: str
) -> None:
    (reason,) = refused(offers, wants)
    assert reason.code == code
    assert reason.subject == "path:a+b/split[standard]"
    assert re.search(message, reason.message), reason.message


def test_all_failing_terms_are_told_at_once() -> None:
    reasons = refused(
        {
            "id_spaces": frozenset(),
            "dropped": frozenset(),
            "payloads": frozenset(),
            "ids_dtypes": frozenset(),
            "can": frozenset(),
        },
        {"extras": frozenset({"x"}), "can": frozenset()},
        steps=BASIC,
    )
    assert [r.code for r in reasons] == [
        "contract.id_space",
        "contract.dropped",
        "contract.payload",
        "contract.ids_dtype",
        "contract.extras",
        "step.never",
        "step.never",
    ]


def test_optional_extras_are_taken_where_they_are_offered() -> None:
    wants = {"extras": frozenset({"expert_map"}), "optional": frozenset({"host_counts", "num_valid"})}
    assert agreed(wants=wants).extras == {"expert_map", "host_counts"}
    assert agreed().extras == frozenset()


@pytest.mark.parametrize(
    ("drops_none", "partial", "spaces", "expected"),
    [
        (False, False, (LOCAL,), NEGATIVE),  # the caller may drop: never is not to be had
        (True, False, (LOCAL,), NEVER),
        (True, True, (LOCAL,), NEGATIVE),  # experts of other ranks are dropped slots among local ids
        (True, True, (GLOBAL,), NEVER),
        (False, True, (GLOBAL,), NEGATIVE),
    ],
)
def test_no_dropped_slots_is_believed_only_where_it_is_true(
    drops_none: bool, partial: bool, spaces: tuple[IdSpace, ...], expected: DroppedSlot
) -> None:
    wants = {"dropped": (NEVER, NEGATIVE), "id_spaces": spaces}
    assert agreed(wants=wants, caller_drops_none=drops_none, partial=partial).dropped is expected


def test_a_runner_that_cannot_drop_is_refused_where_slots_may_be_dropped() -> None:
    (reason,) = refused(wants={"dropped": (NEVER,)})
    assert (reason.code, reason.needed, reason.found) == ("contract.dropped", "never", "negative, sink")
    assert agreed(wants={"dropped": (NEVER,)}, caller_drops_none=True).dropped is NEVER


def test_a_promise_of_the_caller_does_not_help_a_dispatcher_that_cannot_keep_it() -> None:
    (reason,) = refused({"dropped": frozenset({NEGATIVE})}, {"dropped": (NEVER,)}, caller_drops_none=True)
    assert reason.code == "contract.dropped"


def test_a_payload_is_admitted_only_if_it_belongs_to_the_scheme() -> None:
    wants = {"payloads": ("nvfp4", "fp8_group128", "bf16")}
    assert agreed(wants=wants).payload == "nvfp4"
    assert agreed(wants=wants, admitted=frozenset({"bf16", "fp8_group128"})).payload == "fp8_group128"
    assert agreed(wants=wants, admitted=frozenset({"bf16"})).payload == "bf16"
    (reason,) = refused(wants={"payloads": ("nvfp4",)}, admitted=frozenset({"bf16"}))
    assert reason.code == "contract.payload"


def steps_of(**given: Any) -> dict[Step, Owner]:
    offers = {key: given.pop(key) for key in ("can", "always") if key in given}
    wants = {key.removeprefix("runner_"): given.pop(key) for key in ("runner_can", "runner_always") if key in given}
    return dict(agreed(offers, wants, **given).steps)


def test_the_runner_comes_first_then_the_dispatcher_then_the_caller() -> None:
    every = frozenset(Step)
    free = {"steps": every, "caller_can": every}
    assert set(steps_of(**free, runner_can=every).values()) == {Owner.RUNNER}
    assert set(steps_of(**free, runner_can=frozenset()).values()) == {Owner.DISPATCHER}
    assert set(steps_of(**free, runner_can=frozenset(), can=frozenset()).values()) == {Owner.CALLER}


@pytest.mark.parametrize(
    ("given", "owner"),
    [
        ({"runner_always": frozenset({Step.TOPK_SUM})}, Owner.RUNNER),
        ({"always": frozenset({Step.TOPK_SUM})}, Owner.DISPATCHER),
        ({"caller_does": frozenset({Step.TOPK_SUM})}, Owner.CALLER),
    ],
)
def test_who_does_a_step_anyhow_owns_it(given: dict[str, Any], owner: Owner) -> None:
    owners = steps_of(steps=BASIC, caller_can=frozenset(Step), **given)
    assert owners[Step.TOPK_SUM] is owner
    assert owners[Step.ROUTER_WEIGHT] is Owner.RUNNER


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"offers": {"always": frozenset({Step.EP_REDUCE})}, "caller_does": {Step.EP_REDUCE}}, "dispatcher and caller"),
        ({"wants": {"always": frozenset({Step.EP_REDUCE})}, "caller_does": {Step.EP_REDUCE}}, "runner and caller"),
        (
            {
                "wants": {"always": frozenset({Step.EP_REDUCE})},
                "offers": {"always": frozenset({Step.EP_REDUCE})},
                "caller_does": {Step.EP_REDUCE},
            },
            "runner and dispatcher and caller",
        ),
    ],
)
def test_a_step_that_two_do_is_refused(given: dict[str, Any], names: str) -> None:
    caller = frozenset(given.pop("caller_does"))
    (reason,) = refused(**given, steps=BASIC | {Step.EP_REDUCE}, caller_does=caller)
    assert reason.code == "step.twice"
    assert reason.message == f"ep_reduce would be done by {names}"


def test_a_step_that_nobody_does_is_refused_with_what_the_caller_can_say() -> None:
    (reason,) = refused({"can": frozenset()}, steps=BASIC | {Step.TP_REDUCE})
    assert (reason.code, reason.message) == ("step.never", "nobody would do tp_reduce")
    assert "caller_does={Step.TP_REDUCE}" in (reason.hint or "")
    assert steps_of(can=frozenset(), steps=BASIC | {Step.TP_REDUCE}, caller_does=frozenset({Step.TP_REDUCE}))


def test_steps_that_the_layer_has_not_get_no_owner() -> None:
    terms = agreed(wants={"always": frozenset({Step.ROUTED_SCALING})}, steps=BASIC)
    assert set(terms.steps) == BASIC
    assert terms.owner(Step.ROUTED_SCALING) is None
    assert not terms.runner_does(Step.ROUTED_SCALING)
    assert terms.runner_does(Step.TOPK_SUM)


@pytest.mark.parametrize("side", ["offers", "wants"])
def test_a_sum_that_cannot_be_left_out_is_refused_where_none_is_wanted(side: str) -> None:
    (reason,) = refused(**{side: {"always": frozenset({Step.TOPK_SUM})}}, steps=frozenset({Step.ROUTER_WEIGHT}))
    assert reason.code == "step.twice"
    assert "no_combine" in reason.message


def test_a_scaling_that_is_always_applied_does_no_harm_without_a_factor() -> None:
    both = frozenset({Step.ROUTED_SCALING})
    assert agreed({"always": both}, {"always": both}, steps=BASIC).steps.keys() == BASIC


def test_terms_are_frozen_hashable_and_equal_by_content() -> None:
    one, two = agreed(steps=BASIC), agreed(steps=BASIC)
    assert one == two
    assert hash(one) == hash(two)
