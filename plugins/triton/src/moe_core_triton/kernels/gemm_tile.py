"""One tile of a grouped matrix product: device functions shared by the kernels in `gemm.py`.

A tile is BLOCK_M positions (rows of one expert) by BLOCK_N weight rows. Weights are seen as [E, PARTS, n_part, K]: a
gated first product has two parts, gate and up, and a tile takes the same rows of both, so that the partners of the
activation meet in the registers of one thread and canonical weights need no repacking.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_core_triton.kernels.unpack import e2m1, e2m1_words, e8m0, e8m0_for_words, int4, int8


@triton.jit
def order(pid, tiles_n, live_tiles, GROUP_M: tl.constexpr):
    """Program number -> (tile, block of weight rows). GROUP_M neighbors share a weight block while it is in L2."""
    if GROUP_M == 1:
        return pid // tiles_n, pid % tiles_n
    per_group = GROUP_M * tiles_n
    group = pid // per_group
    first = group * GROUP_M
    size = tl.minimum(live_tiles - first, GROUP_M)
    within = pid % per_group
    return first + within % size, within // size


@triton.jit
def weight_rows(n_block, n_part, BLOCK_N: tl.constexpr, PARTS: tl.constexpr):
    """Rows of this tile in [PARTS * n_part), and which of them exist."""
    PER_PART: tl.constexpr = BLOCK_N // PARTS
    r = tl.arange(0, BLOCK_N)
    row = n_block * PER_PART + r % PER_PART
    return (r // PER_PART) * n_part + tl.minimum(row, n_part - 1), row < n_part


@triton.jit
def load_weights(
    w,
    expert,
    n_block,
    rows,
    k0,
    n_part,
    k_stored,
    BLOCK_N: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
):
    """[BLOCK_N, WIDTH] stored items of the weights from column k0."""
    if TMA:
        return w.load([expert, 0, n_block * (BLOCK_N // PARTS), k0]).reshape(BLOCK_N, WIDTH)
    else:
        columns = k0 + tl.arange(0, WIDTH)
        base = w + expert.to(tl.int64) * (PARTS * n_part) * k_stored
        pointers = base + rows[:, None].to(tl.int64) * k_stored + columns[None, :]
        if EVEN_K:
            return tl.load(pointers)
        else:
            return tl.load(pointers, mask=columns[None, :] < k_stored, other=0.0)


@triton.jit
def load_rows(x, live, k0, k, WIDTH: tl.constexpr, EVEN_K: tl.constexpr):
    """[BLOCK_M, WIDTH] of the input from column k0; x: pointers to the rows, [BLOCK_M, 1].

    live: rows that count, or None. In a short tile the others would be most of its traffic; in a long one the masks
    would cost more registers than they save reads.
    """
    columns = k0 + tl.arange(0, WIDTH)[None, :]
    if live is None:
        if EVEN_K:
            return tl.load(x + columns)
        else:
            return tl.load(x + columns, mask=columns < k, other=0.0)
    elif EVEN_K:
        return tl.load(x + columns, mask=live[:, None], other=0.0)
    else:
        return tl.load(x + columns, mask=live[:, None] & (columns < k), other=0.0)


@triton.jit
def product(rows, weights, acc, SWAP: tl.constexpr):
    """acc + rows @ weights.T, or its transpose. SWAP puts the weights on the 64-row side of the instruction."""
    if SWAP:
        return tl.dot(weights, tl.trans(rows), acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(rows, tl.trans(weights), acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def along_rows(v, SWAP: tl.constexpr):
    """[BLOCK_M] -> broadcastable against an accumulator."""
    return v[None, :] if SWAP else v[:, None]


@triton.jit
def along_weights(v, SWAP: tl.constexpr):
    """[BLOCK_N] -> broadcastable against an accumulator."""
    return v[:, None] if SWAP else v[None, :]


@triton.jit
def block_scales(
    x_scale,
    w_scale,
    rows,
    n_block,
    block,
    n_part,
    stride_ws,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """The scales of step `block` of K: of the input's rows, and of one or two segments of weight rows (or each row)."""
    xs = tl.load(x_scale + block)
    if UNIFORM == 0:
        one = tl.load(w_scale + (rows // 128) * stride_ws + block)
        two = one
    else:
        first = (n_block * (BLOCK_N // PARTS)) // 128
        one = tl.load(w_scale + first * stride_ws + block)
        two = one
        if UNIFORM == 2:
            second = first + (n_part // 128 if PARTS == 2 else 1)
            two = tl.load(w_scale + second * stride_ws + block)
    return xs, one, two


@triton.jit
def accumulate(
    x,
    live,
    x_scale,
    w,
    w_scale,
    w_zero,
    acc,
    expert,
    n_block,
    rows,
    n_part,
    k,
    k_stored,
    stride_ws,
    X_SCALE: tl.constexpr,
    W_GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SWAP: tl.constexpr,
    TMA: tl.constexpr,
    EVEN_K: tl.constexpr,
    UNIFORM: tl.constexpr,
):
    """The loop over K.

    x: pointers to the rows, live: which of them count. x_scale: pointers to their scales. w: descriptor or pointer.
    w_scale: pointer to the scales of this expert. PACK: "" (a number an item), "int4", "mxfp4", or "mxfp4_words", whose
    result is E2M1_WORDS_FACTOR too small. W_GROUP: K under one weight scale that is applied inside the loop, else 0.
    X_SCALE: "group" where input and weights have a scale every 128 of K, anything else for scales that can wait.
    """
    if X_SCALE == "group":
        # Two levels: the scales change every 128 of K, so each block is summed by itself first. Scales are loaded a
        # step ahead: nothing else would hide their latency.
        blocks = tl.cdiv(k, 128)
        xs, one, two = block_scales(x_scale, w_scale, rows, n_block, 0, n_part, stride_ws, PARTS, BLOCK_N, UNIFORM)
        for k0 in tl.range(0, k, BLOCK_K):
            later = tl.minimum(k0 // 128 + 1, blocks - 1)
            xs_later, one_later, two_later = block_scales(
                x_scale, w_scale, rows, n_block, later, n_part, stride_ws, PARTS, BLOCK_N, UNIFORM
            )
            tile = load_weights(w, expert, n_block, rows, k0, n_part, k_stored, BLOCK_N, BLOCK_K, PARTS, TMA, EVEN_K)
            a = load_rows(x, live, k0, k, BLOCK_K, EVEN_K)
            part = product(a, tile, tl.zeros_like(acc), SWAP)
            if UNIFORM == 1:
                scale = along_rows(xs * one, SWAP)
            elif UNIFORM == 2:
                # A select on a constant index: each thread multiplies its rows' scales by two numbers, not by BLOCK_N.
                ws = tl.where(tl.arange(0, BLOCK_N) < BLOCK_N // 2, one, two)
                scale = along_rows(xs, SWAP) * along_weights(ws, SWAP)
            else:
                scale = along_rows(xs, SWAP) * along_weights(one, SWAP)
            acc += part * scale
            xs, one, two = xs_later, one_later, two_later
    elif PACK == "":
        for k0 in tl.range(0, k, BLOCK_K):
            tile = load_weights(w, expert, n_block, rows, k0, n_part, k_stored, BLOCK_N, BLOCK_K, PARTS, TMA, EVEN_K)
            a = load_rows(x, live, k0, k, BLOCK_K, EVEN_K)
            if tile.dtype == tl.int8 and a.dtype != tl.int8:
                tile = int8(tile, a.dtype)
            elif tile.dtype != a.dtype:
                tile = tile.to(a.dtype)
            acc = product(a, tile, acc, SWAP)
    elif PACK == "mxfp4_words":
        HALF: tl.constexpr = BLOCK_K // 2
        GROUPS: tl.constexpr = HALF // W_GROUP
        powers = w_scale + rows[:, None] * stride_ws + tl.arange(0, GROUPS)[None, :]
        low_byte, high_byte = tl.load(powers), tl.load(powers + GROUPS)
        last = tl.cdiv(k, BLOCK_K) - 1
        for k0 in tl.range(0, k, BLOCK_K):
            # A step ahead: bytes are too narrow for the asynchronous copies that hide the other loads.
            ahead = powers + tl.minimum(k0 // BLOCK_K + 1, last) * (2 * GROUPS)
            low_later, high_later = tl.load(ahead), tl.load(ahead + GROUPS)
            tile = load_weights(w, expert, n_block, rows, k0 // 2, n_part, k_stored, BLOCK_N, HALF, PARTS, TMA, EVEN_K)
            low_power = tl.broadcast_to(e8m0_for_words(low_byte)[:, :, None], (BLOCK_N, GROUPS, W_GROUP))
            high_power = tl.broadcast_to(e8m0_for_words(high_byte)[:, :, None], (BLOCK_N, GROUPS, W_GROUP))
            low, high = e2m1_words(tile, low_power.reshape(BLOCK_N, HALF), high_power.reshape(BLOCK_N, HALF))
            acc = product(load_rows(x, live, k0, k, HALF, EVEN_K), low, acc, SWAP)
            acc = product(load_rows(x, live, k0 + HALF, k, HALF, EVEN_K), high, acc, SWAP)
            low_byte, high_byte = low_later, high_later
    else:
        HALF: tl.constexpr = BLOCK_K // 2
        GROUPS: tl.constexpr = HALF // W_GROUP if HALF > W_GROUP else 1
        SPAN: tl.constexpr = HALF // GROUPS
        for k0 in tl.range(0, k, BLOCK_K):
            tile = load_weights(w, expert, n_block, rows, k0 // 2, n_part, k_stored, BLOCK_N, HALF, PARTS, TMA, EVEN_K)
            for half in tl.static_range(2):
                a = load_rows(x, live, k0 + half * HALF, k, HALF, EVEN_K)
                code = (tile & 15) if half == 0 else (tile >> 4)
                group = (k0 + half * HALF) // W_GROUP
                if PACK == "mxfp4" and SPAN < HALF:
                    at = group + tl.arange(0, GROUPS)
                    power = e8m0(tl.load(w_scale + rows[:, None] * stride_ws + at[None, :]), a.dtype)
                    power = tl.broadcast_to(power[:, :, None], (BLOCK_N, GROUPS, SPAN))
                    value = e2m1(code, a.dtype) * power.reshape(BLOCK_N, HALF)
                    acc = product(a, value, acc, SWAP)
                else:
                    # One scale a row and half: it multiplies the half's product, and the numbers stay exact.
                    scale = tl.load(w_scale + rows * stride_ws + group)
                    if PACK == "mxfp4":
                        scale = e8m0(scale, tl.float32)
                        value = e2m1(code, a.dtype)
                    elif HAS_ZERO:
                        zero = tl.load(w_zero + rows * stride_ws + group)[:, None]
                        value = int4(code, a.dtype) - int4(zero, a.dtype)
                    else:
                        value = int4(code, a.dtype)
                    part = product(a, value, tl.zeros_like(acc), SWAP)
                    acc += part * along_weights(scale, SWAP)
    return acc
