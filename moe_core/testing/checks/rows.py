"""Rows that nobody may read: padding behind num_valid, above masked_m, and between groups."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from moe_core.protocols import RunningState
from moe_core.testing.case import Case
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
    """How many padding rows there are changes nothing, and the runner does not write into the rows that it got."""
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
        padded = _pad(given, extra)
        before = padded.hidden_states.clone()
        ran = plan.run(padded, state)
        if not torch.equal(_bits(before), _bits(padded.hidden_states)):
            raise CheckFailed("the runner wrote into the rows of the dispatch output")
        if lane.format == BATCHED:
            # The dispatcher's own M again; in the other formats it finds its rows at the start.
            ran = replace(ran, hidden_states=ran.hidden_states[:, : given.hidden_states.shape[1]].contiguous())
        setup.close(plan.dispatcher.combine(ran, state), expected, f"the result with {extra} more padding rows")


def _bits(rows: torch.Tensor) -> torch.Tensor:
    return rows.contiguous().view(torch.uint8)


def _pad(given: Any, extra: int) -> Any:
    """The same dispatch output with more rows of garbage."""
    if extra == 0 or given.hidden_scale is not None:
        return given
    if given.format == STANDARD:
        names = ("hidden_states", "topk_ids", "topk_weights")
        return replace(given, **{name: _longer(getattr(given, name), extra) for name in names})
    if given.format == BATCHED:
        weights = given.row_weights
        return replace(
            given,
            hidden_states=torch.stack([_longer(part, extra) for part in given.hidden_states]),
            row_weights=None if weights is None else torch.stack([_longer(part, extra) for part in weights]),
        )
    padding = torch.full((extra,), -1, dtype=torch.int32, device=given.hidden_states.device)
    return replace(
        given,
        hidden_states=_longer(given.hidden_states, extra),
        row_weights=None if given.row_weights is None else _longer(given.row_weights, extra),
        row_ids=torch.cat([given.row_ids, padding]),
    )


def _longer(rows: torch.Tensor, extra: int) -> torch.Tensor:
    where = torch.arange(rows.shape[0], device=rows.device)
    flat = rows.reshape(rows.shape[0], -1)
    return spread(flat, where, rows.shape[0] + extra).reshape(-1, *rows.shape[1:])
