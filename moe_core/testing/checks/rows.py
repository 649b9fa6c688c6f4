"""Rows that nobody may read: padding behind num_valid, above masked_m, and between groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_core.protocols import RunningState
from moe_core.testing.case import Case, Setup
from moe_core.testing.dispatching import spread
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD


@check("contract.padding_rows", each="lane", needs="run")
def padding_rows(case: Case) -> None:
    """Rows that do not count may hold anything, NaN and ids out of range included, and change nothing.

    `standard`: at and above num_valid; `batched`: at and above masked_m; `grouped`: where row_ids is -1.
    """
    lane = case.lane
    if lane.format not in (STANDARD, BATCHED, GROUPED):
        raise CheckSkipped(f"the kit has no dispatcher for the format {lane.format!r}")
    setup = case.setup(dispatcher=f"testing_{lane.format}")
    for pattern in ("uniform", "dropped", "one_hot"):
        layer = setup.layer(pattern=pattern)
        result = setup.plan(layer.weights)(layer.hidden, layer.topk)
        setup.close(result, setup.expected(layer), f"the result with padding rows, routing {pattern!r}")


@check("contract.only_padding", each="lane", needs="run")
def only_padding(case: Case) -> None:
    """A dispatch output in which no row counts is legal: all that a rank received may be padding."""
    lane = case.lane
    if lane.format not in (STANDARD, BATCHED, GROUPED):
        raise CheckSkipped(f"the kit has no dispatcher for the format {lane.format!r}")
    setup = case.setup(dispatcher=f"testing_{lane.format}")
    layer = setup.layer(tokens=0)
    result = setup.plan(layer.weights)(layer.hidden, layer.topk)
    if tuple(result.shape) != (0, setup.config.hidden_size):
        raise CheckFailed(f"got {tuple(result.shape)}")


@check("contract.padding_is_not_counted", each="lane", needs="run")
def more_padding(case: Case) -> None:
    """How many padding rows there are changes nothing, and the runner does not write into the rows that it was given."""
    lane = case.lane
    if lane.format not in (STANDARD, BATCHED, GROUPED):
        raise CheckSkipped(f"the kit has no dispatcher for the format {lane.format!r}")
    setup = case.setup(dispatcher=f"testing_{lane.format}")
    layer = setup.layer()
    plan = setup.plan(layer.weights)
    expected = setup.expected(layer)
    for extra in (0, 40):
        state = RunningState()
        given = plan.dispatcher.dispatch(layer.hidden, layer.topk, state)
        given = _pad(given, extra, setup)
        before = given.hidden_states.clone()
        result = plan.dispatcher.combine(_trim(plan.run(given, state), given), state)
        setup.close(result, expected, f"the result with {extra} more padding rows")
        if not torch.equal(_bits(before), _bits(given.hidden_states)):
            raise CheckFailed("the runner wrote into the rows of the dispatch output")


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8)


def _pad(given: Any, extra: int, setup: Setup) -> Any:
    """The same dispatch output with more rows of garbage."""
    if extra == 0 or given.hidden_scale is not None:
        return given

    def longer(rows: torch.Tensor | None, axis: int = 0) -> torch.Tensor | None:
        if rows is None:
            return None
        flat = rows.reshape(rows.shape[0], -1) if axis == 0 else rows.reshape(-1, rows.shape[-1])
        if axis == 0:
            where = torch.arange(rows.shape[0], device=rows.device)
            return spread(flat, where, rows.shape[0] + extra).reshape(-1, *rows.shape[1:])
        return torch.stack([_longer_rows(part, extra) for part in rows])

    if setup.lane.format == STANDARD:
        return replace(
            given,
            hidden_states=longer(given.hidden_states),
            topk_ids=longer(given.topk_ids),
            topk_weights=longer(given.topk_weights),
        )
    if setup.lane.format == BATCHED:
        return replace(
            given, hidden_states=longer(given.hidden_states, 1), row_weights=longer(given.row_weights, 1)
        )
    padding = torch.full((extra,), -1, dtype=torch.int32, device=given.hidden_states.device)
    return replace(
        given,
        hidden_states=longer(given.hidden_states),
        row_weights=longer(given.row_weights),
        row_ids=torch.cat([given.row_ids, padding]),
    )


def _longer_rows(rows: torch.Tensor, extra: int) -> torch.Tensor:
    where = torch.arange(rows.shape[0], device=rows.device)
    flat = rows.reshape(rows.shape[0], -1)
    return spread(flat, where, rows.shape[0] + extra).reshape(-1, *rows.shape[1:])


def _trim(combine: Any, given: Any) -> Any:
    """`batched` rows must have the dispatcher's own M again; the other formats ignore rows at the end."""
    if given.format != BATCHED:
        return combine
    m = given.handle.where
    experts = given.masked_m.shape[0]
    rows = combine.hidden_states
    slots = -(-(m.shape[0] + 3) // 8) * 8  # the kit's dispatcher: see BatchedDispatcher.dispatch
    return replace(combine, hidden_states=rows[:experts, :slots].contiguous())
