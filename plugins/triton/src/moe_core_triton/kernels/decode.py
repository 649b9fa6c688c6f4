"""A layer for a handful of tokens, in two launches: matrix-vector products, a program a slot (or token) and row block.

At one token the layer is a stream of the chosen experts' weights and nothing else, so nothing is sorted, padded or
gathered: a program reads its experts from the ids, multiplies on the ordinary units and keeps whole rows of partial
sums in registers until the end. The second kernel takes all slots of a token at once (LANES), so that their loads are
in flight together, and writes the finished sum.

Roofline: T * K * (N13 * H + H * I) weights once, e.g. 75.5 MB for Qwen3-30B at T = 1, 17.6 us at 4.3 TB/s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_core_triton.kernels.activation import activate, activate_plain
from moe_core_triton.kernels.launching import wait_for_inputs
from moe_core_triton.kernels.quantize import encode, magnitude_bits, scale_of
from moe_core_triton.kernels.unpack import e2m1, e8m0, int4, int8


@triton.jit
def local_expert(ids, index, expert_map, num_experts, num_mapped):
    """The local expert of a slot, or -1."""
    expert = tl.load(ids + index).to(tl.int32)
    if expert_map is not None:
        known = (expert >= 0) & (expert < num_mapped)
        expert = tl.load(expert_map + tl.where(known, expert, 0), mask=known, other=-1)
    return tl.where((expert >= 0) & (expert < num_experts), expert, -1)


@triton.jit
def _there_and_back(v, scale, INT8: tl.constexpr, NATIVE: tl.constexpr):
    """v as its codes under `scale` (of the same shape) give it back."""
    code = encode(v, scale, INT8, NATIVE)
    if not INT8:
        code = code.to(tl.float8e4nv, bitcast=True)
    return code.to(tl.float32) * scale


@triton.jit
def quantized(v, QUANT: tl.constexpr, NATIVE: tl.constexpr, scale, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """v: float32 [LANES, WIDTH], as the scheme's activation payload gives it back. scale: [LANES], where it has one."""
    if QUANT == "":
        return v
    elif QUANT == "group":
        grouped = tl.reshape(v, (LANES, WIDTH // 128, 128))
        s = scale_of(tl.max(magnitude_bits(grouped), axis=2), 448.0)
        back = _there_and_back(grouped, tl.broadcast_to(s[:, :, None], grouped.shape), False, NATIVE)
        return tl.reshape(back, (LANES, WIDTH))
    else:
        return _there_and_back(v, tl.broadcast_to(scale[:, None], v.shape), QUANT == "int8", NATIVE)


@triton.jit
def row_scales(x_rows, live, k, QUANT: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """The scales of whole rows, float32 [LANES], for payloads that have one a row."""
    amax = tl.zeros((LANES, WIDTH), tl.int32)
    for k0 in range(0, k, WIDTH):
        c = k0 + tl.arange(0, WIDTH)[None, :]
        v = tl.load(x_rows[:, None] + c, mask=live[:, None] & (c < k), other=0.0).to(tl.float32)
        amax = tl.maximum(amax, magnitude_bits(v))
    return scale_of(tl.max(amax, axis=1), 448.0 if QUANT == "fp8" else 127.0)


@triton.jit
def lane_products(
    w,
    w_scale,
    w_zero,
    row_items,
    row_scale_items,
    x_rows,
    x_scale,
    live,
    k,
    k_stored,
    scales_a_row,
    QUANT: tl.constexpr,
    NATIVE: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    PACK_HALF: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Products of weight rows with input rows, float32 [ROWS, LANES].

    row_items: int64 [ROWS, LANES], where each weight row starts; row_scale_items: where its scales do. x_rows: pointers
    [LANES]; live: [LANES], lanes that are computed (the others give 0).
    """
    ITEMS: tl.constexpr = WIDTH if PACK == "" else WIDTH // 2
    acc = tl.zeros((ROWS, LANES, ITEMS), tl.float32)
    for k0 in tl.range(0, k, WIDTH, num_stages=STAGES):
        if PACK == "":
            c = k0 + tl.arange(0, WIDTH)
            mask = live[:, None] & (c < k)[None, :]
            weights = tl.load(w + row_items[:, :, None] + c[None, None, :], mask=mask[None, :, :], other=0.0)
            weights = int8(weights, tl.float32) if weights.dtype == tl.int8 else weights.to(tl.float32)
            v = tl.load(x_rows[:, None] + c[None, :], mask=mask, other=0.0).to(tl.float32)
            v = quantized(v, QUANT, NATIVE, x_scale, LANES, WIDTH)
            if W_SCALE == "block":
                BLOCKS: tl.constexpr = WIDTH // 128
                block = tl.minimum(k0 // 128 + tl.arange(0, BLOCKS), scales_a_row - 1)
                s = tl.load(w_scale + row_scale_items[:, :, None] + block[None, None, :])
                s = tl.broadcast_to(s[:, :, :, None], (ROWS, LANES, BLOCKS, 128)).reshape(ROWS, LANES, WIDTH)
                acc += weights * s * v[None, :, :]
            else:
                acc += weights * v[None, :, :]
        else:
            GROUPS: tl.constexpr = PACK_HALF // W_GROUP if PACK_HALF > W_GROUP else 1
            BLOCKS: tl.constexpr = ITEMS // PACK_HALF
            SPAN: tl.constexpr = PACK_HALF // GROUPS
            SPANS: tl.constexpr = BLOCKS * GROUPS
            j = tl.arange(0, ITEMS)
            b = tl.arange(0, SPANS)
            byte = k0 // 2 + j
            low = k0 + (j // PACK_HALF) * (2 * PACK_HALF) + j % PACK_HALF
            stored = live[:, None] & (byte < k_stored)[None, :]
            codes = tl.load(w + row_items[:, :, None] + byte[None, None, :], mask=stored[None, :, :], other=0)
            for half in tl.static_range(2):
                c = low + half * PACK_HALF
                v = tl.load(x_rows[:, None] + c[None, :], mask=live[:, None] & (c < k)[None, :], other=0.0)
                code = (codes & 15) if half == 0 else (codes >> 4)
                start = k0 + (b // GROUPS) * (2 * PACK_HALF) + half * PACK_HALF + (b % GROUPS) * SPAN
                at = row_scale_items[:, :, None] + tl.minimum(start // W_GROUP, scales_a_row - 1)[None, None, :]
                if PACK == "mxfp4":
                    s = e8m0(tl.load(w_scale + at), tl.float32)
                    value = e2m1(code, tl.float32)
                else:
                    s = tl.load(w_scale + at)
                    value = int4(code, tl.float32)
                    if HAS_ZERO:
                        z = int4(tl.load(w_zero + at), tl.float32)
                        value -= tl.broadcast_to(z[:, :, :, None], (ROWS, LANES, SPANS, SPAN)).reshape(
                            ROWS, LANES, ITEMS
                        )
                s = tl.broadcast_to(s[:, :, :, None], (ROWS, LANES, SPANS, SPAN)).reshape(ROWS, LANES, ITEMS)
                acc += value * s * v.to(tl.float32)[None, :, :]
    return tl.sum(acc, axis=2)


@triton.jit(do_not_specialize=["alpha", "beta", "limit"])
def decode_up(
    x,
    w,
    w_scale,
    w_zero,
    bias,
    static_scale,
    ids,
    row_weights,
    expert_map,
    h,
    alpha,
    beta,
    limit,
    num_experts,
    num_mapped,
    n_part,
    k,
    k_stored,
    stride_x,
    stride_ws,
    TOP_K: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH_IN: tl.constexpr,
    QUANT: tl.constexpr,
    NATIVE: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    PACK_HALF: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """h[slot] = act(x[slot // TOP_K] @ w[expert].T): GEMM1 of a slot and ROWS rows of each part. Grid (rows, slots)."""
    wait_for_inputs(PDL)
    slot = tl.program_id(1)
    expert = local_expert(ids, slot, expert_map, num_experts, num_mapped)
    if expert >= 0:
        n = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        part = tl.arange(0, PARTS)
        rows = part[None, :] * n_part + tl.minimum(n, n_part - 1)[:, None]
        matrix = expert.to(tl.int64) * (PARTS * n_part)
        x_rows = x + (slot // TOP_K) * stride_x + tl.zeros((PARTS,), tl.int32)
        live = part >= 0
        scale = tl.full((PARTS,), 1.0, tl.float32)
        if QUANT == "fp8" or QUANT == "int8":
            if static_scale is not None:
                scale = tl.load(static_scale + expert) * scale
            else:
                scale = row_scales(x_rows, live, k, QUANT, PARTS, WIDTH)
        if W_SCALE == "block":
            scale_items = (expert.to(tl.int64) * ((PARTS * n_part + 127) // 128) + rows // 128) * stride_ws
        else:
            scale_items = (matrix + rows) * stride_ws
        sums = lane_products(
            w, w_scale, w_zero, (matrix + rows) * k_stored, scale_items, x_rows, scale, live, k, k_stored, stride_ws,
            QUANT, NATIVE, W_SCALE, W_GROUP, PACK, PACK_HALF, HAS_ZERO, ROWS, PARTS, WIDTH, STAGES,
        )  # fmt: skip
        if WEIGH_IN:
            sums *= tl.load(row_weights + slot)
        if W_SCALE == "row":
            sums *= tl.load(w_scale + matrix + rows)
        elif W_SCALE == "part":
            sums *= tl.load(w_scale + expert * stride_ws + tl.minimum(part, stride_ws - 1))[None, :]
        if HAS_BIAS:
            sums += tl.load(bias + matrix + rows).to(tl.float32)
        if PARTS == 2:
            gate, up = tl.split(sums)
            result = activate(gate, up, ACT, alpha, beta, limit, HAS_LIMIT)
        else:
            result = activate_plain(tl.sum(sums, axis=1), ACT, alpha, limit, HAS_LIMIT)
        tl.store(h + slot.to(tl.int64) * n_part + n, result.to(h.dtype.element_ty), mask=n < n_part)


@triton.jit
def prefetch_rows(w, row_items, live, row_bytes, early, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Bring the first `early` bytes of weight rows to L2."""
    line = tl.arange(0, 8) * 128
    for offset in tl.range(0, tl.minimum(early, row_bytes), 8 * 128):
        at = tl.minimum(offset + line, row_bytes - 1)
        item_bytes: tl.constexpr = w.dtype.element_ty.primitive_bitwidth // 8
        rows = w.to(tl.pointer_type(tl.int8)) + row_items[:, :, None] * item_bytes
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [tl.where(live[None, :, None], rows + at[None, None, :], w.to(tl.pointer_type(tl.int8)))],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit(do_not_specialize=["factor", "early_bytes"])
def decode_down(
    h,
    w,
    w_scale,
    w_zero,
    bias,
    static_scale,
    ids,
    row_weights,
    expert_map,
    out,
    factor,
    num_experts,
    num_mapped,
    n,
    k,
    k_stored,
    stride_out,
    stride_ws,
    early_bytes,
    TOP_K: tl.constexpr,
    LANES: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    QUANT: tl.constexpr,
    NATIVE: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    PACK_HALF: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out[row] = factor * sum of weight * (h[slot] @ w[expert].T) over TOP_K slots of a row. Grid (rows of w, rows).

    TOP_K is 1 where the slots are not to be summed; LANES is the power of two above it. The order of the sum is fixed.
    """
    token = tl.program_id(1)
    columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    rows = tl.minimum(columns, n - 1)
    lane = tl.arange(0, LANES)
    slot = token * TOP_K + tl.minimum(lane, TOP_K - 1)
    # The ids are two kernels old, and so visible before our inputs are; the weights never change.
    expert = local_expert(ids, slot, expert_map, num_experts, num_mapped)
    live = (expert >= 0) & (lane < TOP_K)
    expert = tl.where(live, expert, 0)
    matrix = expert.to(tl.int64) * n
    row_items = (matrix[None, :] + rows[:, None]) * k_stored
    if PREFETCH:
        row_bytes = k_stored * (w.dtype.element_ty.primitive_bitwidth // 8)
        prefetch_rows(w, row_items, live, row_bytes, early_bytes, ROWS, LANES)
    wait_for_inputs(PDL)
    x_rows = h + slot.to(tl.int64) * k
    scale = tl.full((LANES,), 1.0, tl.float32)
    if QUANT == "fp8" or QUANT == "int8":
        if static_scale is not None:
            scale = tl.load(static_scale + expert)
        else:
            scale = row_scales(x_rows, live, k, QUANT, LANES, WIDTH)
    if W_SCALE == "block":
        scale_items = ((expert.to(tl.int64) * ((n + 127) // 128))[None, :] + (rows // 128)[:, None]) * stride_ws
    else:
        scale_items = (matrix[None, :] + rows[:, None]) * stride_ws
    sums = lane_products(
        w, w_scale, w_zero, row_items, scale_items, x_rows, scale, live, k, k_stored, stride_ws, QUANT, NATIVE,
        W_SCALE, W_GROUP, PACK, PACK_HALF, HAS_ZERO, ROWS, LANES, WIDTH, STAGES,
    )  # fmt: skip
    if W_SCALE == "row":
        sums *= tl.load(w_scale + matrix[None, :] + rows[:, None])
    elif W_SCALE == "part":
        sums *= tl.load(w_scale + expert * stride_ws)[None, :]
    if HAS_BIAS:
        sums += tl.load(bias + matrix[None, :] + rows[:, None]).to(tl.float32)
    if WEIGH:
        sums *= tl.load(row_weights + slot)[None, :]
    # A dropped slot adds exactly nothing, whatever its weight holds.
    total = tl.sum(tl.where(live[None, :], sums, 0.0), axis=1) * factor
    tl.store(out + token.to(tl.int64) * stride_out + columns, total.to(out.dtype.element_ty), mask=columns < n)
