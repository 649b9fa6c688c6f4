"""Activations to fp8 or int8, bit for bit as the codecs of `moe_core.quant` do it.

The bits are why there are true divisions here and no multiplications by a reciprocal, and why magnitudes are compared
as the int32 of a nonnegative float: the order is the same, a maximum needs no rounding, and a NaN is the largest.

The epilogue of a GEMM that quantizes its own activations (`gemm.py`, `hopper_fp8.py`) multiplies by 1 / scale instead:
there a code may differ from the codec's by one step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core_triton.kernels.launching import dependent_launch, is_hopper_or_newer, processors, wait_for_inputs

_LARGEST = {"fp8_group128": 448.0, "fp8_token": 448.0, "fp8_tensor": 448.0, "int8_token": 127.0}


@triton.jit
def encode_e4m3(x, NATIVE: tl.constexpr):
    """uint8 e4m3 codes (OCP, saturating, to nearest even) of the float32 `x`. NATIVE: by the device's instruction."""
    if NATIVE:
        code = x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    else:
        size = tl.abs(x)
        size = tl.where(size > 448.0, 448.0, size)
        bits = size.to(tl.int32, bitcast=True)
        # Round 20 of 23 mantissa bits away, then move the exponent's bias from 127 to 7.
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - (120 << 3)
        # Under 2^-6 codes are multiples of 2^-9, which is the last place of a float32 at 2^14.
        small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
        magnitude = tl.where(x == x, tl.where(size < 0.015625, small, normal), 0x7F)
        code = (magnitude | ((x.to(tl.int32, bitcast=True) >> 24) & 0x80)).to(tl.uint8)
    return code


@triton.jit
def magnitude_bits(x):
    """int32 of |x| (float32): ordered as |x| is, a NaN above all."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def scale_of(amax_bits, LARGEST: tl.constexpr):
    """float32 scale of a region with that largest magnitude: amax / LARGEST, 1 where it is zero, at least 2^-100."""
    amax = amax_bits.to(tl.float32, bitcast=True)
    scale = tl.div_rn(amax, tl.full(amax.shape, LARGEST, tl.float32))
    scale = tl.where(scale < 7.888609052210118e-31, 7.888609052210118e-31, scale)
    return tl.where(amax == 0, 1.0, scale)


@triton.jit
def encode(x, scale, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """Codes of x / scale (one shape, float32): int8 in -127 to 127, or e4m3 in uint8."""
    x = tl.div_rn(x, scale)
    if INT8:
        # Adding 1.5 * 2^23 leaves no bits behind the point: rounded to nearest even.
        x = (x + 12582912.0) - 12582912.0
        x = tl.where(x > 127.0, 127.0, tl.where(x < -127.0, -127.0, x))
        code = tl.where(x == x, x, 0.0).to(tl.int8)
    else:
        code = encode_e4m3(x, NATIVE)
    return code


@triton.jit
def _tile(
    x, slots, row_weights, row, there, column, width, stride, top_k, GATHERED: tl.constexpr, WEIGHTED: tl.constexpr
):
    """float32 [BR, BC]: columns [BR or 1, BC] of the sources of output rows `row` [BR], 0 where not `there` [BR]."""
    slot = row
    source = row
    if GATHERED:
        slot = tl.load(slots + row, mask=there, other=0).to(tl.int64)
        source = slot // top_k
    inside = there[:, None] & (column < width)
    v = tl.load(x + (source * stride)[:, None] + column, mask=inside, other=0.0).to(tl.float32)
    if WEIGHTED:
        v *= tl.load(row_weights + slot, mask=there, other=0.0).to(tl.float32)[:, None]
    return v


@triton.jit(do_not_specialize=["regions", "parts", "top_k", "expert_rows"])
def _quantize_regions(
    x, slots, row_weights, ends, q, s, regions, parts, width, stride, top_k, expert_rows,
    LARGEST: tl.constexpr, REGION: tl.constexpr, BR: tl.constexpr, INT8: tl.constexpr, GATHERED: tl.constexpr,
    WEIGHTED: tl.constexpr, BATCHED: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [R, width], s [R * parts]: BR regions, of which a row has `parts`, a program; each is REGION wide at most."""
    wait_for_inputs(PDL)
    region = tl.program_id(0).to(tl.int64) * BR + tl.arange(0, BR)
    there = region < regions
    row = region // parts
    if BATCHED:
        there = row < tl.load(ends + row // expert_rows, mask=there, other=0)
        if tl.max(there.to(tl.int32), axis=0) == 0:
            return
    column = (region % parts)[:, None] * REGION + tl.arange(0, REGION)[None, :]
    v = _tile(x, slots, row_weights, row, there, column, width, stride, top_k, GATHERED, WEIGHTED)
    scale = scale_of(tl.max(magnitude_bits(v), 1), LARGEST)
    code = encode(v, tl.broadcast_to(scale[:, None], v.shape), INT8, NATIVE)
    tl.store(q + (row * width)[:, None] + column, code, mask=there[:, None] & (column < width))
    tl.store(s + region, scale, mask=there)


@triton.jit(do_not_specialize=["rows", "blocks", "tiles", "top_k"])
def _tensor_amax(
    x, slots, row_weights, live, partial, rows, width, blocks, tiles, stride, top_k,
    BR: tl.constexpr, BC: tl.constexpr, GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, HAS_LIVE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """partial [programs]: the largest magnitude, as int32, of each program's tiles, counting live rows."""
    wait_for_inputs(PDL)
    best = tl.zeros((BR, BC), tl.int32)
    for t in range(tl.program_id(0), tiles, tl.num_programs(0)):
        row = (t // blocks).to(tl.int64) * BR + tl.arange(0, BR)
        column = (t % blocks) * BC + tl.arange(0, BC)[None, :]
        counts = row < rows
        if HAS_LIVE:
            counts = tl.load(live + row, mask=counts, other=0) != 0
        v = _tile(x, slots, row_weights, row, counts, column, width, stride, top_k, GATHERED, WEIGHTED)
        best = tl.maximum(best, magnitude_bits(v))
    tl.store(partial + tl.program_id(0), tl.max(tl.max(best, 1), 0))


@triton.jit(do_not_specialize=["rows", "blocks", "partials", "top_k"])
def _quantize_tensor(
    x, slots, row_weights, row_experts, partial, q, s, rows, width, blocks, partials, stride, top_k,
    PB: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr, STATIC: tl.constexpr, BY_EXPERT: tl.constexpr,
    GATHERED: tl.constexpr, WEIGHTED: tl.constexpr, NATIVE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """q [rows, width] under the scales s, given (STATIC: one, or one an expert) or made of `partial` and written."""
    wait_for_inputs(PDL)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BR + tl.arange(0, BR)
    column = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]
    there = row < rows
    v = _tile(x, slots, row_weights, row, there, column, width, stride, top_k, GATHERED, WEIGHTED)
    if BY_EXPERT:
        # A row of no expert (-1) takes the first scale; nobody reads it.
        e = tl.maximum(tl.load(row_experts + row, mask=there, other=0), 0)
        scale = tl.broadcast_to(tl.load(s + e)[:, None], (BR, BC))
    elif STATIC:
        scale = tl.full((BR, BC), 1.0, tl.float32) * tl.load(s)
    else:
        p = tl.arange(0, PB)
        amax = tl.max(tl.load(partial + p, mask=p < partials, other=0), 0)
        one = scale_of(tl.full((1,), 0, tl.int32) + amax, 448.0)
        tl.store(s + tl.arange(0, 1), one, mask=tl.full((1,), 0, tl.int32) == tl.program_id(0))
        scale = tl.broadcast_to(one[:, None], (BR, BC))
    inside = there[:, None] & (column < width)
    tl.store(q + (row * width)[:, None] + column, encode(v, scale, False, NATIVE), mask=inside)


def _check(
    x: Tensor, payload: str, row_weights: Tensor | None, scale: Tensor | None, row_experts: Tensor | None, rows: int
) -> None:
    if payload not in _LARGEST:
        raise ValueError(f"quantize_rows has the payloads {', '.join(sorted(_LARGEST))}, got {payload!r}")
    if x.dim() != 2 or not x.is_floating_point() or (x.stride(1) != 1 and x.shape[1] > 1):
        raise ValueError(f"x must be floating point [rows, N], columns contiguous, got {x.dtype} {list(x.shape)}")
    if x.shape[1] == 0 or x.shape[1] % 8:
        raise ValueError(f"N must be a positive multiple of 8, got {x.shape[1]}")
    if row_weights is not None and not (row_weights.is_floating_point() and row_weights.is_contiguous()):
        raise ValueError(f"row_weights must be floating point and contiguous, got {row_weights.dtype}")
    if scale is None:
        return
    if payload != "fp8_tensor" or scale.dtype != torch.float32 or scale.dim() != 1:
        raise ValueError(f"scale must be float32 [1] or [E] of fp8_tensor, got {scale.dtype} of {payload!r}")
    if scale.numel() != 1 and (row_experts is None or row_experts.numel() != rows):
        raise ValueError(f"{scale.numel()} scales need row_experts int32 [{rows}]")


def quantize_rows(
    x: Tensor,
    payload: str,
    *,
    slots: Tensor | None = None,
    top_k: int = 1,
    row_weights: Tensor | None = None,
    scale: Tensor | None = None,
    row_experts: Tensor | None = None,
    live: Tensor | None = None,
    ends: Tensor | None = None,
    rows_per_expert: int = 1,
) -> tuple[Tensor, Tensor]:
    """Quantize the rows of x, or one row a position: output row r is x[r], or x[slots[r] // top_k] with slots.

    x: floating point [rows, N], N a multiple of 8, rows of any stride. payload: fp8_group128, fp8_token, fp8_tensor or
    int8_token. slots: int32 [R], each in [0, rows * top_k). row_weights: floating point, contiguous; a row is
    multiplied in float32 by row_weights[slots[r]] (or [r]) first. Only for fp8_tensor: scale, static and positive,
    float32 [1], or [E] with row_experts (int32 [R], -1 for none); live, int32 [R], zero for rows that must not count
    for the dynamic scale (they are quantized like all others). Of the other payloads, without slots: ends, int32 [E],
    with rows_per_expert; expert e has rows e * rows_per_expert to ends[e], and those behind are left undefined.

    Returns q (float8_e4m3fn, or int8 for int8_token) [R, N] and s, float32: [R, ceil(N / 128)] for fp8_group128, [R, 1]
    for the token payloads, `scale` or a new [1] for fp8_tensor. One launch; two for a dynamic fp8_tensor.

    Roofline: (itemsize + 1) * N bytes a row (R = 16384, N = 7168, bf16: 356 MB, 83 us at 4.3 TB/s; a dynamic fp8_tensor
    reads x twice: 137 us). R = 1: latency alone, about 2.5 us.

    Raises ValueError for a payload, shape or dtype that it does not take.
    """
    rows = x.shape[0] if slots is None else slots.numel()
    _check(x, payload, row_weights, scale, row_experts, rows)
    width = x.shape[1]
    int8 = payload == "int8_token"
    q = x.new_empty((rows, width), dtype=torch.int8 if int8 else torch.float8_e4m3fn)
    if payload == "fp8_tensor":
        s = x.new_ones(1, dtype=torch.float32) if scale is None and rows == 0 else scale
        s = x.new_empty(1, dtype=torch.float32) if s is None else s.contiguous()
    else:
        s = x.new_empty((rows, triton.cdiv(width, 128) if payload == "fp8_group128" else 1), dtype=torch.float32)
    if rows == 0:
        return q, s
    # Bytes: not every target and not the interpreter can store an e4m3, and all can store its bits.
    codes = q if int8 else q.view(torch.uint8)
    inputs = (x, x if slots is None else slots, x if row_weights is None else row_weights)
    kinds = {"GATHERED": slots is not None, "WEIGHTED": row_weights is not None, **dependent_launch(x)}
    native = is_hopper_or_newer(x.device)
    many = 4 * processors(x.device)
    if payload != "fp8_tensor":
        parts = s.shape[1]
        region = 128 if payload == "fp8_group128" else triton.next_power_of_2(width)
        # 16 elements a thread; small regions share a program once all processors have one.
        together = max(1, 2048 // region) if rows * parts * region >= 2048 * many else max(1, 512 // region)
        _quantize_regions[(triton.cdiv(rows * parts, together),)](
            *inputs, x if ends is None else ends, codes, s, rows * parts, parts, width, x.stride(0), top_k,
            rows_per_expert, LARGEST=_LARGEST[payload], REGION=region, BR=together, INT8=int8,
            BATCHED=ends is not None, NATIVE=native, num_warps=min(16, max(1, together * region // 512)), **kinds,
        )  # fmt: skip
        return q, s
    columns = min(1024, triton.next_power_of_2(width))
    together = max(1, 2048 // columns) if rows * width >= 2048 * many else 1
    blocks = triton.cdiv(width, columns)
    tiles = triton.cdiv(rows, together) * blocks
    shape = {"BR": together, "BC": columns, "num_warps": max(1, together * columns // 512), **kinds}
    partials = min(tiles, many)
    partial = s
    if scale is None:
        partial = x.new_empty(partials, dtype=torch.int32)
        _tensor_amax[(partials,)](
            *inputs, x if live is None else live, partial, rows, width, blocks, tiles, x.stride(0), top_k,
            HAS_LIVE=live is not None, **shape,
        )  # fmt: skip
    _quantize_tensor[(tiles,)](
        *inputs, x if row_experts is None else row_experts, partial, codes, s, rows, width, blocks, partials,
        x.stride(0), top_k, PB=triton.next_power_of_2(partials), STATIC=scale is not None,
        BY_EXPERT=scale is not None and scale.numel() > 1, NATIVE=native, **shape,
    )  # fmt: skip
    return q, s
