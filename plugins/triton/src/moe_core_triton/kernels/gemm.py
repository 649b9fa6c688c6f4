"""The grouped matrix products of a layer: one kernel for GEMM1 (gather, activation) and GEMM2 (weigh, scatter).

Roofline. The larger of operations, 2 * rows * N * K at the tensor cores' rate, and bytes: every activated expert's
[N, K] weights once, rows * K input, rows * N output. Decode is bytes of weights (BLOCK_M = 16, weights on the 64-row
side of the instruction, so that no row is computed for padding), prefill operations.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_core_triton.kernels.activation import activate, activate_plain
from moe_core_triton.kernels.gemm_tile import accumulate, along_rows, along_weights, order, weight_rows
from moe_core_triton.kernels.launching import wait_for_inputs
from moe_core_triton.kernels.quantize import encode_e4m3, magnitude_bits, scale_of
from moe_core_triton.kernels.unpack import E2M1_WORDS_FACTOR


@triton.jit
def _prefetch(w_pointer, rows, row_bytes, early):
    """Ask for the first `early` bytes of a tile's rows of weights to be brought into L2.

    Weights are constants: this may run before the inputs are ready.
    """
    base = w_pointer.to(tl.pointer_type(tl.int8)) + rows.to(tl.int64) * row_bytes
    for offset in tl.range(0, tl.minimum(early, row_bytes), 128):
        pointers = base + offset
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def _tile(
    x,
    x_scale,
    w,
    w_scale,
    w_zero,
    bias,
    out,
    out_scale,
    slots,
    row_weights,
    ends,
    expert,
    position,
    n_block,
    alpha,
    beta,
    limit,
    factor,
    n_part,
    k,
    k_stored,
    stride_x,
    stride_xs,
    stride_out,
    stride_ws,
    TOP_K: tl.constexpr,
    SCATTER: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    OUT_QUANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    NATIVE: tl.constexpr,
):
    PER_PART: tl.constexpr = BLOCK_N // PARTS
    rows, _ = weight_rows(n_block, n_part, BLOCK_N, PARTS)
    end = tl.load(ends + expert)
    at = position + tl.arange(0, BLOCK_M)
    live = at < end
    # Rows past the expert's end are not stored, nor read in short tiles; their indices stay valid.
    at = tl.minimum(at, end - 1)
    slot = at
    if TOP_K > 0 or SCATTER or WEIGH != "":
        if slots is not None:
            slot = tl.load(slots + at)
    source = slot // TOP_K if TOP_K > 0 else at
    x_rows = x + source[:, None].to(tl.int64) * stride_x
    xs_rows = x_scale + source * stride_xs if X_SCALE == "group" else x_scale
    ws = w_scale
    if W_SCALE == "block":
        ws = w_scale + expert.to(tl.int64) * ((PARTS * n_part + 127) // 128) * stride_ws
    elif PACK != "":
        ws = w_scale + expert.to(tl.int64) * (PARTS * n_part) * stride_ws
    wz = w_zero
    if HAS_ZERO:
        wz = w_zero + expert.to(tl.int64) * (PARTS * n_part) * stride_ws
    INTEGER: tl.constexpr = x.dtype.element_ty == tl.int8
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.int32 if INTEGER else tl.float32)
    acc = accumulate(
        x_rows, live if BLOCK_M <= 64 else None, xs_rows, w, ws, wz, acc, expert, n_block, rows, n_part, k, k_stored,
        stride_ws, X_SCALE, W_GROUP, PACK, HAS_ZERO, PARTS, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, EVEN_K, UNIFORM,
    )  # fmt: skip
    acc = acc.to(tl.float32)
    if PACK == "mxfp4_words":
        acc *= E2M1_WORDS_FACTOR
    if W_SCALE == "row":
        acc *= along_weights(tl.load(w_scale + expert.to(tl.int64) * (PARTS * n_part) + rows), SWAP)
    elif W_SCALE == "part":
        # One scale an expert, or one for gate and one for up.
        acc *= along_weights(tl.load(w_scale + expert * stride_ws + tl.minimum(rows // n_part, stride_ws - 1)), SWAP)
    if X_SCALE == "row":
        acc *= along_rows(tl.load(x_scale + source * stride_xs), SWAP)
    elif X_SCALE == "expert":
        acc *= tl.load(x_scale + expert * stride_xs)
    if WEIGH == "in":
        acc *= along_rows(tl.load(row_weights + slot), SWAP)
    if HAS_BIAS:
        acc += along_weights(tl.load(bias + expert.to(tl.int64) * (PARTS * n_part) + rows).to(tl.float32), SWAP)
    if SWAP:
        acc = tl.trans(acc)
    columns = n_block * PER_PART + tl.arange(0, PER_PART)
    inside = live[:, None] & (columns < n_part)[None, :]
    target = slot if SCATTER else at
    out_rows = out + target[:, None].to(tl.int64) * stride_out
    if ACT == "":
        if WEIGH == "out":
            acc *= (tl.load(row_weights + slot) * factor)[:, None]
        elif WEIGH == "scale":
            acc *= factor
        if PARTS == 1:
            tl.store(out_rows + columns[None, :], acc.to(out.dtype.element_ty), mask=inside)
        else:
            gate, up = tl.split(acc.reshape(BLOCK_M, PARTS, PER_PART).permute(0, 2, 1))
            tl.store(out_rows + columns[None, :], gate.to(out.dtype.element_ty), mask=inside)
            tl.store(out_rows + (n_part + columns)[None, :], up.to(out.dtype.element_ty), mask=inside)
    else:
        if PARTS == 1:
            h = activate_plain(acc, ACT, alpha, limit, HAS_LIMIT)
        else:
            gate, up = tl.split(acc.reshape(BLOCK_M, PARTS, PER_PART).permute(0, 2, 1))
            h = activate(gate, up, ACT, alpha, beta, limit, HAS_LIMIT)
        if OUT_QUANT == "":
            tl.store(out_rows + columns[None, :], h.to(out.dtype.element_ty), mask=inside)
        else:
            if OUT_QUANT == "group":
                # The tile is exactly one group of 128: its scale is known here, and GEMM2 reads a byte a value.
                amax = tl.max(tl.where((columns < n_part)[None, :], magnitude_bits(h), 0), axis=1)
                scale = scale_of(amax, 448.0)
                tl.store(out_scale + target * ((n_part + 127) // 128) + n_block, scale, mask=live)
                h *= (1.0 / scale)[:, None]
            else:
                h *= 1.0 / tl.load(out_scale + expert)
            h = tl.clamp(h, -448.0, 448.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(out_rows + columns[None, :], encode_e4m3(h, NATIVE), mask=inside)


@triton.jit(do_not_specialize=["alpha", "beta", "limit", "factor", "tiles", "early_bytes"])
def grouped_gemm(
    x,
    x_scale,
    w,
    w_pointer,
    w_scale,
    w_zero,
    bias,
    out,
    out_scale,
    slots,
    row_weights,
    ends,
    tile_expert,
    tile_start,
    alpha,
    beta,
    limit,
    factor,
    tiles,
    n_part,
    k,
    k_stored,
    stride_x,
    stride_xs,
    stride_out,
    stride_ws,
    early_bytes,
    TOP_K: tl.constexpr,
    SCATTER: tl.constexpr,
    PARTS: tl.constexpr,
    ACT: tl.constexpr,
    HAS_LIMIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGH: tl.constexpr,
    X_SCALE: tl.constexpr,
    W_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    OUT_QUANT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNIFORM: tl.constexpr,
    NATIVE: tl.constexpr,
    PERSISTENT: tl.constexpr,
    TILES_POW2: tl.constexpr,
    PREFETCH: tl.constexpr,
    PDL: tl.constexpr,
):
    """out rows = epilogue(x rows @ w[expert].T), tile by tile; see `products.grouped_product` for the arguments.

    Grid: tiles * blocks of weight rows, or PERSISTENT programs that share the live tiles.
    """
    tiles_n = tl.cdiv(n_part, BLOCK_N // PARTS)
    if PREFETCH > 0:
        # Programs that are here before their inputs: the table is two kernels old, and so already visible, and the
        # weights never change. Later programs would ask for what they load the next moment.
        if tl.program_id(0) < PREFETCH:
            early, n_early = order(tl.program_id(0), tiles_n, tiles, GROUP_M)
            early_expert = tl.load(tile_expert + early)
            if early_expert >= 0:
                early_rows, _ = weight_rows(n_early, n_part, BLOCK_N, PARTS)
                row_bytes = k_stored * (w_pointer.dtype.element_ty.primitive_bitwidth // 8)
                first = early_expert.to(tl.int64) * (PARTS * n_part)
                _prefetch(w_pointer, first + early_rows, row_bytes, early_bytes)
    wait_for_inputs(PDL)
    if PERSISTENT:
        index = tl.arange(0, TILES_POW2)
        used = tl.load(tile_expert + index, mask=index < tiles, other=-1) >= 0
        live_tiles = tl.sum(used.to(tl.int32))
        for pid in tl.range(tl.program_id(0), live_tiles * tiles_n, tl.num_programs(0)):
            tile, n_block = order(pid, tiles_n, live_tiles, GROUP_M)
            expert = tl.load(tile_expert + tile)
            _tile(
                x, x_scale, w, w_scale, w_zero, bias, out, out_scale, slots, row_weights, ends, expert,
                tl.load(tile_start + tile), n_block, alpha, beta, limit, factor, n_part, k, k_stored, stride_x,
                stride_xs, stride_out, stride_ws, TOP_K, SCATTER, PARTS, ACT, HAS_LIMIT, HAS_BIAS, WEIGH, X_SCALE,
                W_SCALE, W_GROUP, PACK, HAS_ZERO, OUT_QUANT, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, EVEN_K, UNIFORM,
                NATIVE,
            )  # fmt: skip
    else:
        tile, n_block = order(tl.program_id(0), tiles_n, tiles, GROUP_M)
        expert = tl.load(tile_expert + tile)
        if expert >= 0:
            _tile(
                x, x_scale, w, w_scale, w_zero, bias, out, out_scale, slots, row_weights, ends, expert,
                tl.load(tile_start + tile), n_block, alpha, beta, limit, factor, n_part, k, k_stored, stride_x,
                stride_xs, stride_out, stride_ws, TOP_K, SCATTER, PARTS, ACT, HAS_LIMIT, HAS_BIAS, WEIGH, X_SCALE,
                W_SCALE, W_GROUP, PACK, HAS_ZERO, OUT_QUANT, BLOCK_M, BLOCK_N, BLOCK_K, SWAP, TMA, EVEN_K, UNIFORM,
                NATIVE,
            )  # fmt: skip
