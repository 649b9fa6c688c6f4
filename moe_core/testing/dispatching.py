"""The code of the kit's dispatchers, see `moe_core.testing.dispatchers`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import StandardDispatcher, expert_map
from moe_core.formats import (
    BatchedCombineInput,
    BatchedDispatchOutput,
    GroupedCombineInput,
    GroupedDispatchOutput,
    StandardCombineInput,
    StandardDispatchOutput,
)
from moe_core.protocols import Binding, RunningState
from moe_core.quant import quantize_activation
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, IdSpace, Owner, Step

ALIGNMENT = 8
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz)


@dataclass(slots=True)
class Handle:
    """What travels to `combine`. where: [T * K], the row of each slot, one past the last for a slot not computed here.

    output: the caller's output tensor, taken out of the running state: the runner's rows are not the result.
    """

    where: Tensor
    live: Tensor
    weights: Tensor
    output: Tensor | None
    inner: Any = None


class _RowDispatcher:
    """What `batched` and `grouped` share: one row a slot, and its way back."""

    def __init__(self, binding: Binding) -> None:
        if binding.terms is None:
            raise TypeError("a dispatcher is bound with terms")
        self._binding, self._terms = binding, binding.terms
        self._local = torch.cat([expert_map(binding).long(), torch.full((1,), -1, device=binding.device)])
        mine = {step for step, owner in self._terms.steps.items() if owner is Owner.DISPATCHER}
        self._weigh, self._sum = Step.ROUTER_WEIGHT in mine, Step.TOPK_SUM in mine
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in mine else 1.0
        self._gives_weights = self._terms.runner_does(Step.ROUTER_WEIGHT)
        self._padding = int(binding.options.get("padding", 3))

    def _experts(self, topk: TopKOutput) -> Tensor:
        """[T * K]: the local expert of each slot, -1 for those not computed here (the last entry of the table)."""
        return self._local[topk.topk_ids.reshape(-1).long()]

    def _rows(self, hidden: Tensor, topk: TopKOutput) -> tuple[Tensor, Tensor | None]:
        """[T * K, H] tokens in the agreed payload, and their scales."""
        rows = hidden.repeat_interleave(topk.topk_ids.shape[1], dim=0)
        if self._terms.payload == "bf16":
            return rows, None
        data, scale = quantize_activation(rows, self._terms.payload)
        if not isinstance(scale, Tensor):
            raise TypeError(f"payload {self._terms.payload!r} has no scale a row")
        return data, scale

    def _order(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """The place of each slot among the rows of its expert, and the number of rows of each expert."""
        hits = experts[:, None] == torch.arange(self._binding.num_local_experts, device=experts.device)
        place = (hits.long().cumsum(0) - 1).gather(1, experts.clamp(min=0)[:, None])[:, 0]
        return place, hits.sum(0)

    def _row_weights(self, topk: TopKOutput, where: Tensor, rows: int) -> Tensor | None:
        if not self._gives_weights:
            return None
        return spread(topk.topk_weights.reshape(-1, 1).float(), where, rows)[:, 0].contiguous()

    def _handle(self, where: Tensor, live: Tensor, topk: TopKOutput, state: RunningState) -> Handle:
        handle = Handle(where, live, topk.topk_weights, state.output)
        state.output = None
        return handle

    def _gather(self, rows: Tensor, handle: Handle) -> Tensor:
        """[rows, H] -> the result of the layer, after the steps that the terms give to the dispatcher."""
        shape = (*handle.weights.shape, rows.shape[-1])
        slots = torch.cat([rows, rows.new_zeros(1, rows.shape[-1])])[handle.where].reshape(shape)
        live = handle.live.reshape(shape[:2])
        wide = torch.where(live[..., None], slots, 0.0)
        wide = wide if wide.dtype is torch.float64 else wide.float()
        if self._weigh:
            wide = wide * torch.where(live, handle.weights, 0.0)[..., None]
        wide = (wide.sum(dim=1) if self._sum else wide) * self._scale
        result = wide.to(rows.dtype)
        return result if handle.output is None else handle.output.copy_(result)


class BatchedDispatcher(_RowDispatcher):
    """`batched`: [E_local, M, H] with M from the shapes alone, so that nothing waits for the device."""

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self._agreed = agreed_ids(binding)

    def dispatch(self, hidden: Tensor, topk: TopKOutput, state: RunningState) -> BatchedDispatchOutput:
        """Slot i of expert e goes to row (e, i)."""
        experts = self._experts(topk)
        place, counts = self._order(experts)
        count, live = self._binding.num_local_experts, experts >= 0
        m = -(-(experts.shape[0] + self._padding) // ALIGNMENT) * ALIGNMENT
        where = torch.where(live, experts * m + place, count * m)
        data, scale = self._rows(hidden, topk)
        weights = self._row_weights(topk, where, count * m)
        return BatchedDispatchOutput(
            spread(data, where, count * m).reshape(count, m, -1),
            counts.to(torch.int32),
            expected_m=max(1, experts.shape[0] // count),
            hidden_scale=None if scale is None else spread(scale, where, count * m).reshape(count, m, -1),
            topk_ids=self._agreed[topk.topk_ids.long()],
            topk_weights=topk.topk_weights,
            row_weights=None if weights is None else weights.reshape(count, m),
            handle=self._handle(where, live, topk, state),
        )

    def combine(self, combine_input: BatchedCombineInput, state: RunningState) -> Tensor:
        """Rows back to their slots."""
        rows = combine_input.hidden_states
        return self._gather(rows.reshape(-1, rows.shape[-1]), combine_input.handle)


class GroupedDispatcher(_RowDispatcher):
    """`grouped`: every expert's rows padded to the alignment, and a tail that belongs to nobody."""

    def dispatch(self, hidden: Tensor, topk: TopKOutput, state: RunningState) -> GroupedDispatchOutput:
        """Slot i of expert e goes to row offsets[e] + i."""
        experts = self._experts(topk)
        place, counts = self._order(experts)
        live, slots = experts >= 0, experts.shape[0]
        padded = (counts + self._padding + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
        offsets = torch.cat([padded.new_zeros(1), padded.cumsum(0)])
        # From the shapes alone: the most rows that any routing can need.
        extra = self._binding.num_local_experts * (self._padding + ALIGNMENT - 1)
        total = -(-(slots + extra) // ALIGNMENT) * ALIGNMENT + ALIGNMENT
        where = torch.where(live, offsets[experts.clamp(min=0)] + place, total)
        data, scale = self._rows(hidden, topk)
        ids = torch.full((total + 1,), -1, dtype=torch.int32, device=experts.device)
        ids[where] = torch.arange(slots, dtype=torch.int32, device=experts.device)
        return GroupedDispatchOutput(
            spread(data, where, total),
            offsets.to(torch.int32),
            ALIGNMENT,
            ids[:-1],
            row_weights=self._row_weights(topk, where, total),
            hidden_scale=None if scale is None else spread(scale, where, total),
            host_counts=counts.tolist() if "host_counts" in self._terms.extras else None,
            handle=self._handle(where, live, topk, state),
        )

    def combine(self, combine_input: GroupedCombineInput, state: RunningState) -> Tensor:
        """Rows back to their slots."""
        return self._gather(combine_input.hidden_states, combine_input.handle)


class PaddedDispatcher:
    """`standard` behind padding rows: tokens, ids and weights at and above `num_valid` are garbage."""

    def __init__(self, binding: Binding) -> None:
        self._inner, self._binding, terms = StandardDispatcher(binding), binding, binding.terms
        self._payload = terms.payload if terms is not None else "bf16"
        self._counts = terms is not None and "host_counts" in terms.extras
        self._padding = int(binding.options.get("padding", 3))
        self._local = torch.cat([expert_map(binding).long(), torch.full((1,), -1, device=binding.device)])

    def dispatch(self, hidden: Tensor, topk: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """As `standard`, and some rows more."""
        d = self._inner.dispatch(hidden, topk, state)
        tokens, output, state.output = hidden.shape[0], state.output, None
        where, rows = torch.arange(tokens, device=hidden.device), tokens + self._padding
        data, scale = (hidden, None) if self._payload == "bf16" else quantize_activation(hidden, self._payload)
        if d.topk_ids is None or d.topk_weights is None:
            raise TypeError("this dispatcher takes top-k ids")
        counts = None
        if self._counts:
            local = self._local[topk.topk_ids.reshape(-1).long()]
            counts = torch.bincount(local[local >= 0], minlength=self._binding.num_local_experts).tolist()
        return replace(
            d,
            hidden_states=spread(data, where, rows),
            hidden_scale=spread(scale, where, rows) if isinstance(scale, Tensor) else None,
            topk_ids=spread(d.topk_ids, where, rows),
            topk_weights=spread(d.topk_weights, where, rows),
            num_valid=torch.full((), tokens, dtype=torch.int32, device=hidden.device),
            host_counts=counts,
            handle=Handle(where, where >= 0, topk.topk_weights, output, d.handle),
        )

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """The rows of the tokens, after the steps that the terms give to the dispatcher."""
        handle: Handle = combine_input.handle
        rows = combine_input.hidden_states[: handle.where.shape[0]].contiguous()
        result = self._inner.combine(StandardCombineInput(rows, handle.inner), state)
        return result if handle.output is None else handle.output.copy_(result)


def spread(rows: Tensor, where: Tensor, total: int) -> Tensor:
    """[total, width] with rows[i] at where[i] (total itself: nowhere) and garbage elsewhere, NaN where there is one."""
    raw = rows.view(torch.uint8) if rows.dtype in _FLOAT8 else rows
    if raw.is_floating_point():
        garbage = float("nan")
    elif rows.dtype in _FLOAT8:
        garbage = 0x7F  # NaN in e4m3 and e5m2
    else:
        garbage = min(torch.iinfo(raw.dtype).max, 2**30)  # 255 is NaN as an e8m0 scale
    out = torch.full((total + 1, raw.shape[-1]), garbage, dtype=raw.dtype, device=raw.device)
    out[where] = raw
    return out[:-1].view(rows.dtype)


def agreed_ids(binding: Binding) -> Tensor:
    """[E + 1] in the agreed dtype: the agreed id of each global one, and at the end that of a dropped slot.

    For the factory: a dispatch that copied this from the host could not be captured in a graph.
    """
    terms, experts = binding.terms, binding.config.num_experts
    if terms is None:
        raise TypeError("a dispatcher is bound with terms")
    table = expert_map(binding).long()
    count = binding.num_local_experts
    if terms.id_space is IdSpace.GLOBAL:
        table, count = torch.arange(experts, device=binding.device), experts
    dropped = count if terms.dropped is DroppedSlot.SINK else -1
    table = torch.cat([torch.where(table < 0, dropped, table), table.new_full((1,), dropped)])
    return table.to(getattr(torch, terms.ids_dtype))
