"""Absolute maxima and scales over the regions of a `ScaleLayout`, shared by all codecs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_core.quant.schemes import ScaleLayout

SMALLEST_SCALE = 2.0**-100
"""Floor of every float32 scale: keeps the scale, its reciprocal and its product with an e4m3 scale normal."""


def region_amax(x: Tensor, layout: ScaleLayout, parts: int = 1) -> Tensor:
    """max(abs(x)) over each region of x [..., N, K], in float32, shaped [..., *layout.shape(N, K, parts)]."""
    if layout.granularity == "tensor":
        whole = x.reshape(*x.shape[:-2], parts, x.shape[-2] // parts * x.shape[-1]).abs()
        return whole.amax(-1) if whole.shape[-1] else whole.new_zeros(whole.shape[:-1])
    n, k = x.shape[-2:]
    blocks_n, blocks_k = layout.shape(n, k)
    rows, columns = layout.rows or n, layout.columns or k
    if blocks_n * rows != n or blocks_k * columns != k:
        x = pad(x, (0, blocks_k * columns - k, 0, blocks_n * rows - n))
    tiles = x.reshape(*x.shape[:-2], blocks_n, rows, blocks_k, columns)
    return tiles.abs().amax((-3, -1))


def spread(scale: Tensor, layout: ScaleLayout, n: int, k: int) -> Tensor:
    """Per-region values -> a tensor that broadcasts against [..., n, k]. Inverse of `region_amax`'s shape."""
    if layout.granularity == "tensor":
        return scale.repeat_interleave(n // scale.shape[-1], dim=-1).unsqueeze(-1)
    if layout.rows > 1:
        scale = scale.repeat_interleave(layout.rows, dim=-2)[..., :n, :]
    if layout.columns > 1:
        scale = scale.repeat_interleave(layout.columns, dim=-1)[..., :k]
    return scale


def divide_exact(x: Tensor, divisor: float) -> Tensor:
    """x / divisor, correctly rounded on every device."""
    # By a Python number, torch on CUDA multiplies with the rounded reciprocal: other bits than on CPU.
    return x / torch.full_like(x, divisor)


def float_scale(amax: Tensor, largest: float) -> Tensor:
    """float32 scale amax / largest, at least SMALLEST_SCALE; 1 for an all-zero region, so never a zero."""
    scale = divide_exact(amax, largest).clamp(min=SMALLEST_SCALE)
    return torch.where(amax == 0, torch.ones_like(scale), scale)
