"""The rows of a token's slots, weighed and summed in a fixed order: what makes the result the same on every run."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def _combine(rows, weights, local_ids, out, hidden, stride, K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for k in range(K):
        slot = token * K + k
        live = tl.load(local_ids + slot) >= 0
        weight = tl.load(weights + slot)
        row = tl.load(rows + slot * hidden + h, mask=live & (h < hidden), other=0.0)
        total += row.to(tl.float32) * weight
    tl.store(out + token * stride + h, total.to(out.dtype.element_ty), mask=h < hidden)


def combine(rows: Tensor, weights: Tensor, local_ids: Tensor, out: Tensor) -> None:
    """out [T, H] = sum over k of weights [T, K] (float32) times rows [T * K, H], of slots with local_ids [T, K] >= 0.

    Rows of dropped slots are not read. Sums in float32, in the order of the slots. columns of `out` are contiguous.
    """
    tokens, top_k = local_ids.shape
    hidden = rows.shape[1]
    if tokens:
        grid = (tokens, triton.cdiv(hidden, BLOCK))
        _combine[grid](rows, weights, local_ids, out, hidden, out.stride(0), K=top_k, BLOCK=BLOCK, num_warps=4)
