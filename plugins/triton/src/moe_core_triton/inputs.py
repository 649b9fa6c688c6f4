"""The input of GEMM1 as the scheme wants it: as it is, as it came quantized, or quantized here once a token."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.protocols import Binding, BoundQuantizer
from moe_core.quant import quantize_activation
from moe_core_triton.calls import ExpertRows
from moe_core_triton.kernels.quantize import quantize_rows
from moe_core_triton.products import Rows
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection

#: How the scales of a payload lie, in the words of `products.Rows.kind`.
KINDS = {"fp8_group128": "group", "fp8_token": "row", "int8_token": "row", "fp8_tensor": "expert"}


def input_rows(
    rows: ExpertRows, table: RowTable, w: Projection, payload: str | None, top_k: int, *, weigh: bool
) -> tuple[Rows, bool]:
    """(what GEMM1 multiplies, whether the router weight is in it already).

    payload: the scheme's, None for plain activations. weigh: the layer multiplies its input by the router weight.
    A scale that follows the data (a token's, a group's) follows that factor too, so it can wait for the epilogue. One
    that does not - calibrated, or of the whole tensor - has to see the weighed rows: then one row a slot is made.
    """
    divisor = top_k if table.slots is not None else 0
    if payload is None:
        return Rows(rows.data, divisor), False
    if rows.scale is not None:
        return Rows(rows.data, divisor, rows.scale, KINDS[payload]), False
    if payload != "fp8_tensor":
        data, scale = quantize_rows(rows.data, payload, **rows.batches)
        return Rows(data, divisor, scale, KINDS[payload]), False
    static = w.input_scale
    by_slot = weigh or (static is not None and not w.one_input_scale)
    if not by_slot:
        live = None if static is not None else live_rows(rows, table)
        data, scale = quantize_rows(rows.data, payload, scale=None if static is None else static[:1], live=live)
        return Rows(data, divisor, scale, "expert"), False
    slots, weights = table.slots, rows.weights if weigh else None
    experts = None if static is None else position_experts(table)
    if slots is None:
        slots = torch.arange(table.positions, device=rows.data.device, dtype=torch.int32)
    data, scale = quantize_rows(
        rows.data,
        payload,
        slots=slots,
        top_k=max(divisor, 1),
        row_weights=None if weights is None else weights.reshape(-1),
        scale=static,
        row_experts=experts,
        live=None if static is not None else live_positions(rows, table),
    )
    return Rows(data, 0, scale, "expert"), weights is not None


def quantizer(binding: Binding) -> BoundQuantizer:
    """For dispatchers: by our kernel what it takes, by the core's torch code what it does not."""

    def bound(rows: Tensor, payload: str) -> tuple[Tensor, Tensor]:
        if payload in KINDS and rows.shape[1] % 8 == 0:
            return quantize_rows(rows, payload)
        data, scale = quantize_activation(rows, payload)
        if not isinstance(scale, Tensor):
            raise ContractViolation(f"payload {payload!r} has no scale a row")
        return data, scale

    return bound


def position_experts(table: RowTable) -> Tensor:
    """int32 [positions]: the local expert of each position (any valid one for positions that nobody owns)."""
    position = torch.arange(table.positions, device=table.starts.device, dtype=torch.int32)
    return (torch.searchsorted(table.starts, position, right=True) - 1).clamp_min_(0).to(torch.int32)


def live_positions(rows: ExpertRows, table: RowTable) -> Tensor:
    """int32 [positions]: 1 where a position holds a row that counts."""
    expert = position_experts(table).long()
    position = torch.arange(table.positions, device=table.starts.device)
    live = (position >= table.starts[expert]) & (position < table.ends[expert])
    if rows.live is not None:
        live &= rows.live
    return live.to(torch.int32)


def live_rows(rows: ExpertRows, table: RowTable) -> Tensor:
    """int32 [R]: 1 for every input row that some expert gets."""
    if table.local_ids is None:
        return live_positions(rows, table)
    return (table.local_ids.view(rows.data.shape[0], -1) >= 0).any(dim=1).to(torch.int32)
