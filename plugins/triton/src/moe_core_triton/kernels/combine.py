"""The last step: the rows of a token's slots, weighted, summed in slot order; or weighted and kept apart.

A dropped slot has an id below zero. Nothing of it is read: its row was never written and may hold anything, and its
weight may be NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core_triton.kernels.launching import dependent_launch, processors, wait_for_inputs


@triton.jit(do_not_specialize=["blocks", "scale"])
def _combine(
    y, out, local_ids, weights, width, out_stride, blocks, scale,
    K: tl.constexpr, BH: tl.constexpr, WEIGHTED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [T, width] from y [T * K, width]: BH columns of one token a program."""
    wait_for_inputs(PDL)
    token = (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    inside = h < width
    total = tl.zeros((BH,), tl.float32)
    # Unrolled, so that the loads of all slots are under way together.
    for k in tl.static_range(K):
        slot = token * K + k
        live = tl.load(local_ids + slot) >= 0
        row = tl.load(y + slot * width + h, mask=inside & live, other=0.0).to(tl.float32)
        if WEIGHTED:
            row *= tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)
        total += row
    tl.store(out + token * out_stride + h, (total * scale).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["blocks", "scale"])
def _weigh(
    y, out, local_ids, weights, width, blocks, scale, BH: tl.constexpr, WEIGHTED: tl.constexpr, PDL: tl.constexpr
):
    """out [T * K, width] from y [T * K, width]: BH columns of one slot a program."""
    wait_for_inputs(PDL)
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    h = (tl.program_id(0) % blocks) * BH + tl.arange(0, BH)
    inside = h < width
    live = tl.load(local_ids + slot) >= 0
    row = tl.load(y + slot * width + h, mask=inside & live, other=0.0).to(tl.float32)
    if WEIGHTED:
        row *= tl.load(weights + slot, mask=live, other=0.0).to(tl.float32)
    tl.store(out + slot * width + h, (row * scale).to(out.dtype.element_ty), mask=inside)


def _block(rows: int, width: int, device: torch.device) -> tuple[int, int]:
    """(columns, warps) of a program: 8 columns a thread, 16 bytes of a half; wide blocks once all are busy."""
    most = triton.next_power_of_2(width)
    for columns in (1024, 512):
        if rows * triton.cdiv(width, columns) >= 2 * processors(device):
            columns = min(columns, most)
            return columns, max(1, columns // 256)
    return min(256, most), 1


def _check(y: Tensor, out: Tensor, local_ids: Tensor, weights: Tensor | None, slots: int, width: int) -> None:
    if not y.is_contiguous() or y.numel() != slots * width:
        raise ValueError(f"y must be contiguous [{slots}, {width}], got {list(y.shape)} with strides {y.stride()}")
    if local_ids.dtype != torch.int32 or not local_ids.is_contiguous() or local_ids.numel() != slots:
        raise ValueError(f"local_ids must be contiguous int32 [{slots}], got {local_ids.dtype} {list(local_ids.shape)}")
    if weights is not None and (weights.numel() != slots or not weights.is_floating_point()):
        raise ValueError(f"weights must be floating point of {slots} slots, got {weights.dtype} {list(weights.shape)}")
    if out.stride(-1) != 1 and width > 1:
        raise ValueError(f"the columns of out must be contiguous, got strides {out.stride()}")


def combine(y: Tensor, out: Tensor, *, local_ids: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> None:
    """out[t] = scale * sum over live slots k, in order, of (weights[t, k] *) y[t * K + k], summed in float32.

    y: floating point [T * K, H] or [T, K, H], contiguous; out: floating point [T, H], rows of any stride, written
    whole; local_ids: int32 [T * K] (or [T, K]), below 0 for a dropped slot, which adds exactly zero whatever its row
    and weight hold; weights: [T, K] or [T * K] floating point.

    Roofline: (K + 1) * H * itemsize a token (T = 16384, K = 8, H = 2048, bf16: 604 MB, 140 us at 4.3 TB/s; T = 1:
    37 KB, latency alone, about 2.5 us).

    Raises ValueError for a shape, dtype or stride that it does not take.
    """
    if out.dim() != 2 or (out.shape[0] and local_ids.numel() % out.shape[0]):
        raise ValueError(
            f"out must be [T, H] with T dividing the slots, got {list(out.shape)}, {local_ids.numel()} slots"
        )
    tokens, width = out.shape
    _check(y, out, local_ids, weights, local_ids.numel(), width)
    if tokens == 0 or width == 0:
        return
    columns, warps = _block(tokens, width, y.device)
    blocks = triton.cdiv(width, columns)
    _combine[(tokens * blocks,)](
        y, out, local_ids, local_ids if weights is None else weights.contiguous(), width, out.stride(0), blocks,
        float(scale), K=local_ids.numel() // tokens, BH=columns, WEIGHTED=weights is not None, num_warps=warps,
        **dependent_launch(y),
    )  # fmt: skip


def weigh(y: Tensor, out: Tensor, *, local_ids: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> None:
    """out[t, k] = scale * (weights[t, k] *) y[t * K + k], and zeros for a dropped slot: the result without a sum.

    As `combine`, but out is contiguous [T, K, H] (or [T * K, H]); it may be y itself.

    Roofline: 2 * H * itemsize a slot (131072 slots, H = 2048, bf16: 1.07 GB, 250 us at 4.3 TB/s).

    Raises ValueError for a shape, dtype or stride that it does not take.
    """
    slots, width = local_ids.numel(), out.shape[-1]
    if not out.is_contiguous() or out.numel() != slots * width:
        raise ValueError(f"out must be contiguous with {slots} rows, got {list(out.shape)}, strides {out.stride()}")
    _check(y, out, local_ids, weights, slots, width)
    if slots == 0 or width == 0:
        return
    columns, warps = _block(slots, width, y.device)
    blocks = triton.cdiv(width, columns)
    _weigh[(slots * blocks,)](
        y, out, local_ids, local_ids if weights is None else weights.contiguous(), width, blocks, float(scale),
        BH=columns, WEIGHTED=weights is not None, num_warps=warps, **dependent_launch(y),
    )  # fmt: skip
