"""Grouped GEMMs for Hopper with mxfp4 weights and bfloat16 activations, from some tokens an expert to prefill.

As in `hopper_gemm.py`: one persistent CTA an SM, a producer that fills a ring, consumer warpgroups. Here the weights
are on the rows' side of the wgmma, in blocks of 64, and come to it in registers (`hopper_unpack.py`): a byte is read
once from shared memory, unpacked by the thread that feeds it to the tensor cores, and used for all tokens of the tile.

Roofline: weights once (0.53 bytes an element), or the tensor cores at 790 TFLOP/s over the tiles' tokens; and 1.4
integer operations an element that is unpacked, once a tile. Seen on an H200 (GPT-OSS-120B): 0.6 us a step of 256 rows
and 128 of K on one SM, and 10 ns more a token, which is the tensor cores' time: unpacking does not hide behind it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core_triton.kernels.activation import activate
from moe_core_triton.kernels.hopper_common import acc_layout, descriptor
from moe_core_triton.kernels.hopper_mxfp4_ring import make_ring, produce_gathered, produce_rows
from moe_core_triton.kernels.hopper_queue import hear, make_queue
from moe_core_triton.kernels.hopper_unpack import HALF, code_layout, operands
from moe_core_triton.kernels.launching import processors
from moe_core_triton.kernels.unpack import E2M1_WORDS_FACTOR
from moe_core_triton.row_table import RowTable

#: By the height of a tile, in tokens: consumers, blocks of 64 rows of weights for each, slots of the ring.
SHAPES = {32: (4, 1, 8), 64: (2, 2, 6), 192: (2, 1, 3)}


@gluon.jit
def _products(tokens, stage, low, high, acc, started, N: gl.constexpr):
    """Both halves of a step, not waited for."""
    first = tokens.index(stage * 2).slice(0, N).permute((1, 0))
    acc = warpgroup_mma(low, first, acc, use_acc=started, is_async=True)
    second = tokens.index(stage * 2 + 1).slice(0, N).permute((1, 0))
    return warpgroup_mma(high, second, acc, is_async=True)


@gluon.jit
def _multiply(ring, it, steps, scale_rows, PART: gl.constexpr, BLOCKS: gl.constexpr, GATED: gl.constexpr,
              N: gl.constexpr, MORE: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr):  # fmt: skip
    """Products [64, N] in float32: of two blocks of 64 rows, or of one with N tokens and, where MORE, with 64 others.

    The second block is unpacked while the first one's product runs.
    """
    tokens, more_tokens, w_ring, full, empty = ring
    WIDTH: gl.constexpr = 64 if MORE else N
    one = gl.zeros([64, N], gl.float32, acc_layout(N, 16))
    two = gl.zeros([64, WIDTH], gl.float32, acc_layout(WIDTH, 16))
    one_scales, two_scales = gl.load(scale_rows[0]), gl.load(scale_rows[BLOCKS - 1])
    for step in range(steps):
        stage = it % STAGES
        later = gl.minimum(step + 1, steps - 1)
        one_later, two_later = gl.load(scale_rows[0] + later), gl.load(scale_rows[BLOCKS - 1] + later)
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        if GATHERED:  # as in hopper_gemm.py
            fence_async_shared()
        low, high = operands(w_ring, stage, one_scales, PART * BLOCKS, GATED)
        one = _products(tokens, stage, low, high, one, step > 0, N)
        if BLOCKS == 2:
            more_low, more_high = operands(w_ring, stage, two_scales, PART * BLOCKS + 1, GATED)
            two = _products(tokens, stage, more_low, more_high, two, step > 0, N)
            one, two, low, high, more_low, more_high = warpgroup_mma_wait(
                0, deps=(one, two, low, high, more_low, more_high)
            )
        else:
            if MORE:
                two = _products(more_tokens, stage, low, high, two, step > 0, 64)
            one, two, low, high = warpgroup_mma_wait(0, deps=(one, two, low, high))
        mbarrier.arrive(empty.index(stage), count=1)
        one_scales, two_scales = one_later, two_later
        it += 1
    return one, two


@gluon.jit
def _row_of(r, GATED: gl.constexpr):
    """Row r of a consumer's operand -> (0 for gate, 1 for up; its row there). Not GATED: (0, r)."""
    return ((r >> 3) & 1, (r >> 4) * 8 + (r & 7)) if GATED else (r * 0, r)


@gluon.jit
def _biased(acc, bias, expert, first, size, HAS_BIAS: gl.constexpr, GATED: gl.constexpr):
    """The sums in their own size, and the bias [E, 2 * size] or [E, size] of rows from `first` on."""
    N: gl.constexpr = acc.shape[1]
    acc *= E2M1_WORDS_FACTOR
    if HAS_BIAS:
        part, row = _row_of(gl.arange(0, 64, layout=gl.SliceLayout(1, acc_layout(N, 16))), GATED)
        at = (expert * (2 if GATED else 1) + part) * size + first + row
        acc += gl.load(bias + at, mask=first + row < size, other=0.0).to(gl.float32)[:, None]
    return acc


@gluon.jit
def _store_up(acc, out, bias, expert, start, left, first, act, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr,
              HAS_BIAS: gl.constexpr):  # fmt: skip
    """h of N tokens (`left` of them there) and the consumer's 32 columns, in wide order."""
    h, h_stride, inter = out
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0])
    acc = _biased(acc, bias, expert, first, inter, HAS_BIAS, True)
    gate, up = gl.split(acc.reshape([4, 2, 8, N]).permute(0, 2, 3, 1))
    value = activate(gate, up, ACT, act[0], act[1], act[2], HAS_LIMIT).to(h.dtype.element_ty).reshape([32, N])
    value = value.reshape([2, 4, 2, 2, N]).permute(4, 0, 2, 1, 3).reshape([N, 32])
    rows = gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    column = first + gl.arange(0, 32, layout=gl.SliceLayout(0, layout))
    target = h + (start + rows).to(gl.int64)[:, None] * h_stride + column[None, :]
    gl.store(target, gl.convert_layout(value, layout), mask=(rows < left)[:, None] & (column < inter)[None, :])


@gluon.jit
def _store_down(acc, out, bias, expert, start, left, first, slots, row_weights, scale, HAS_SLOTS: gl.constexpr,
                HAS_WEIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr):  # fmt: skip
    """y of N tokens and the consumer's 64 columns."""
    y, y_stride, columns = out
    N: gl.constexpr = acc.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    acc = _biased(acc, bias, expert, first, columns, HAS_BIAS, False)
    tokens = gl.arange(0, N, layout=gl.SliceLayout(0, acc_layout(N, 16)))
    if HAS_WEIGHTS:
        slot = start + tokens
        if HAS_SLOTS:
            slot = gl.load(slots + slot, mask=tokens < left, other=0)
        acc *= (gl.load(row_weights + slot, mask=tokens < left, other=0.0) * scale)[None, :]
    else:
        acc *= scale
    value = gl.convert_layout(acc.to(y.dtype.element_ty).permute(1, 0), layout)
    rows = gl.arange(0, N, layout=gl.SliceLayout(1, layout))
    slot = start + rows
    if HAS_SLOTS:
        slot = gl.load(slots + slot, mask=rows < left, other=0)
    column = first + gl.arange(0, 64, layout=gl.SliceLayout(0, layout))
    target = y + slot.to(gl.int64)[:, None] * y_stride + column[None, :]
    gl.store(target, value, mask=(rows < left)[:, None] & (column < columns)[None, :])


@gluon.jit
def _tile_up(given, it, steps, scale_rows, at, PART: gl.constexpr, BLOCKS: gl.constexpr, N: gl.constexpr,
             MORE: gl.constexpr, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr,
             STAGES: gl.constexpr, GATHERED: gl.constexpr):  # fmt: skip
    ring, _, _, bias, out, _, act = given
    expert, start, count, first = at
    one, two = _multiply(ring, it, steps, scale_rows, PART, BLOCKS, True, N, MORE, STAGES, GATHERED)
    _store_up(one, out, bias, expert, start, count, first, act, ACT, HAS_LIMIT, HAS_BIAS)
    if BLOCKS == 2:
        _store_up(two, out, bias, expert, start, count, first + 32, act, ACT, HAS_LIMIT, HAS_BIAS)
    if MORE:
        _store_up(two, out, bias, expert, start + N, count - N, first, act, ACT, HAS_LIMIT, HAS_BIAS)


@gluon.jit
def _consume_up(given, PART: gl.constexpr, BLOCKS: gl.constexpr, BM: gl.constexpr, ACT: gl.constexpr,
                HAS_LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr,
                GATHERED: gl.constexpr):  # fmt: skip
    ring, queue, w_scale, _, _, span, _ = given
    inter, K = span
    COLUMNS: gl.constexpr = ring[2].shape[1]
    FIRST: gl.constexpr = min(BM, 128)
    steps = gl.cdiv(K, 2 * HALF)
    part, row = _row_of(gl.arange(0, 64, layout=gl.SliceLayout(1, code_layout(64))), True)
    it, turn = 0, 0
    expert, n, start, count = hear(queue, 0)
    while expert >= 0:
        first = n * COLUMNS + PART * BLOCKS * 32
        at = (expert, start, count, first)
        above = (expert * 2 + part) * inter
        one = w_scale + (above + gl.minimum(first + row, inter - 1)) * steps
        two = w_scale + (above + gl.minimum(first + 32 + row, inter - 1)) * steps
        if count <= FIRST // 2:
            _tile_up(given, it, steps, (one, two), at, PART, BLOCKS, FIRST // 2, False, ACT, HAS_LIMIT, HAS_BIAS,
                     STAGES, GATHERED)  # fmt: skip
        elif (BM == FIRST) or (count <= FIRST):
            _tile_up(given, it, steps, (one, two), at, PART, BLOCKS, FIRST, False, ACT, HAS_LIMIT, HAS_BIAS, STAGES,
                     GATHERED)  # fmt: skip
        else:
            _tile_up(given, it, steps, (one, two), at, PART, BLOCKS, FIRST, True, ACT, HAS_LIMIT, HAS_BIAS, STAGES,
                     GATHERED)  # fmt: skip
        it += steps
        turn += 1
        expert, n, start, count = hear(queue, turn)


@gluon.jit
def _tile_down(given, it, steps, scale_rows, at, PART: gl.constexpr, BLOCKS: gl.constexpr, N: gl.constexpr,
               MORE: gl.constexpr, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr,
               STAGES: gl.constexpr):  # fmt: skip
    ring, _, _, bias, out, _, slots, weights, scale = given
    expert, start, count, first = at
    one, two = _multiply(ring, it, steps, scale_rows, PART, BLOCKS, False, N, MORE, STAGES, False)
    _store_down(one, out, bias, expert, start, count, first, slots, weights, scale, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS)
    if BLOCKS == 2:
        _store_down(two, out, bias, expert, start, count, first + 64, slots, weights, scale, HAS_SLOTS, HAS_WEIGHTS,
                    HAS_BIAS)  # fmt: skip
    if MORE:
        _store_down(two, out, bias, expert, start + N, count - N, first, slots, weights, scale, HAS_SLOTS, HAS_WEIGHTS,
                    HAS_BIAS)  # fmt: skip


@gluon.jit
def _consume_down(given, PART: gl.constexpr, BLOCKS: gl.constexpr, BM: gl.constexpr, HAS_SLOTS: gl.constexpr,
                  HAS_WEIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ring, queue, w_scale, _, _, span, _, _, _ = given
    columns, K = span
    COLUMNS: gl.constexpr = 2 * ring[2].shape[1]
    FIRST: gl.constexpr = min(BM, 128)
    steps = gl.cdiv(K, 2 * HALF)
    row = gl.arange(0, 64, layout=gl.SliceLayout(1, code_layout(64)))
    it, turn = 0, 0
    expert, n, start, count = hear(queue, 0)
    while expert >= 0:
        first = n * COLUMNS + PART * BLOCKS * 64
        at = (expert, start, count, first)
        one = w_scale + (expert * columns + gl.minimum(first + row, columns - 1)) * steps
        two = w_scale + (expert * columns + gl.minimum(first + 64 + row, columns - 1)) * steps
        if count <= FIRST // 2:
            _tile_down(given, it, steps, (one, two), at, PART, BLOCKS, FIRST // 2, False, HAS_SLOTS, HAS_WEIGHTS,
                       HAS_BIAS, STAGES)  # fmt: skip
        elif (BM == FIRST) or (count <= FIRST):
            _tile_down(given, it, steps, (one, two), at, PART, BLOCKS, FIRST, False, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS,
                       STAGES)  # fmt: skip
        else:
            _tile_down(given, it, steps, (one, two), at, PART, BLOCKS, FIRST, True, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS,
                       STAGES)  # fmt: skip
        it += steps
        turn += 1
        expert, n, start, count = hear(queue, turn)


@gluon.jit(do_not_specialize=["tiles"])
def up_mxfp4_kernel(x, x_stride, x_desc, w_desc, w_scale, bias, h, h_stride, tile_expert, tile_start, starts, ends,
                    ticket, slots, tiles, K, inter, alpha, beta, limit, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr,
                    HAS_BIAS: gl.constexpr, HAS_SLOTS: gl.constexpr, TOP_K: gl.constexpr, EVEN_K: gl.constexpr,
                    BM: gl.constexpr, PARTS: gl.constexpr, BLOCKS: gl.constexpr,
                    STAGES: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(BM, PARTS, BLOCKS, STAGES, 129 if HAS_SLOTS else 1)
    n_tiles = gl.cdiv(inter, 32 * PARTS * BLOCKS)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, n_tiles, STAGES, False)
    span = (inter, K)
    given = (ring, queue, w_scale, bias, (h, h_stride, inter), span, (alpha, beta, limit))
    rows = (slots, x, x_stride)
    if PARTS == 2:
        if HAS_SLOTS:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 1, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (produce_gathered, (ring, queue, rows, w_desc, span, TOP_K, EVEN_K, BM, GROUP_M, STAGES)),
                ],
                [4, 4],
                [208, 88],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 1, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (produce_rows, (ring, queue, x_desc, w_desc, span, True, BM, GROUP_M, STAGES)),
                ],
                [4, 4],
                [232, 40],
            )
    else:
        if HAS_SLOTS:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 1, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 2, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 3, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (produce_gathered, (ring, queue, rows, w_desc, span, TOP_K, EVEN_K, BM, GROUP_M, STAGES)),
                ],
                [4, 4, 4, 4],
                [104, 104, 104, 64],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 1, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 2, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (_consume_up, (given, 3, BLOCKS, BM, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS)),
                    (produce_rows, (ring, queue, x_desc, w_desc, span, True, BM, GROUP_M, STAGES)),
                ],
                [4, 4, 4, 4],
                [112, 112, 112, 32],
            )


@gluon.jit(do_not_specialize=["tiles"])
def down_mxfp4_kernel(h_desc, w_desc, w_scale, bias, y, y_stride, tile_expert, tile_start, starts, ends, ticket, slots,
                      row_weights, scale, tiles, K, columns, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
                      HAS_BIAS: gl.constexpr, BM: gl.constexpr, PARTS: gl.constexpr, BLOCKS: gl.constexpr,
                      STAGES: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(BM, PARTS, BLOCKS, STAGES, 1)
    n_tiles = gl.cdiv(columns, 64 * PARTS * BLOCKS)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, n_tiles, STAGES, False)
    span = (columns, K)
    given = (ring, queue, w_scale, bias, (y, y_stride, columns), span, slots, row_weights, scale)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume_down, (given, 0, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 1, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (produce_rows, (ring, queue, h_desc, w_desc, span, False, BM, GROUP_M, STAGES)),
            ],
            [4, 4],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_down, (given, 0, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 1, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 2, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 3, BLOCKS, BM, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (produce_rows, (ring, queue, h_desc, w_desc, span, False, BM, GROUP_M, STAGES)),
            ],
            [4, 4, 4, 4],
            [112, 112, 112, 32],
        )


def _words(data: Tensor, scale: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """(weights [E * n, bytes], scales int32 [E * n, steps]); ValueError for what the kernels would compute wrongly."""
    experts, n, width = data.shape
    steps = -(-rows.shape[1] // 128)
    if width != 64 * steps or tuple(scale.shape) != (experts, n, 4 * steps) or not scale.is_contiguous():
        raise ValueError(
            f"weights {list(data.shape)} and scales {list(scale.shape)} do not fit rows {list(rows.shape)}"
        )
    if rows.shape[1] % 16 or n % 16:
        raise ValueError(f"sizes must be multiples of 16, got rows {list(rows.shape)} and weights {list(data.shape)}")
    return data.view(experts * n, width), scale.view(torch.int32).view(experts * n, steps)


def _shape(table: RowTable) -> tuple[int, int, int, int]:
    """Height of the tiles, consumers, blocks of each, slots of the ring."""
    if table.block_m not in SHAPES:
        raise ValueError(f"tiles have {', '.join(map(str, SHAPES))} tokens, got {table.block_m}")
    return table.block_m, *SHAPES[table.block_m]


def up_gemm_mxfp4(x: Tensor, w13: Tensor, scale: Tensor, table: RowTable, h: Tensor, *, top_k: int,
                  bias: Tensor | None = None, act: str = "silu", alpha: float = 1.0, beta: float = 0.0,
                  limit: float | None = None, group_m: int = 8) -> Tensor:  # fmt: skip
    """h[p] = act(gate, up) of x[table.slots[p] // top_k] and its expert's rows of w13, for live p.

    x, h: bfloat16 [T, H], [positions, I], in `wide_order`. w13: uint8 [E, 2 * I, bytes], gate first, as
    `packing.halves(words=True)` makes it; scale: uint8 [E, 2 * I, groups of 32], padded; bias: [E, 2 * I]. Without
    table.slots x[p] is the row.
    """
    block_m, parts, blocks, stages = _shape(table)
    data, scales = _words(w13, scale, x)
    inter, gathered = w13.shape[1] // 2, table.slots is not None
    if not gathered and top_k != 1:
        raise ValueError(f"without slots there is one row a position, got top_k {top_k}")
    grid = min(processors(x.device), table.tiles * -(-inter // (32 * parts * blocks)))
    w_desc = descriptor(data, 32 * parts * blocks, 64)
    up_mxfp4_kernel[(grid,)](
        x, x.stride(0), w_desc if gathered else descriptor(x, min(block_m, 64), 64), w_desc, scales,
        scales if bias is None else bias, h, h.stride(0), *table.drawing,
        table.slots if gathered else table.tile_start, table.tiles, x.shape[1], inter, float(alpha), float(beta),
        float(limit or 0.0), ACT=act, HAS_LIMIT=limit is not None, HAS_BIAS=bias is not None, HAS_SLOTS=gathered,
        TOP_K=top_k, EVEN_K=x.shape[1] % 128 == 0, BM=block_m, PARTS=parts, BLOCKS=blocks, STAGES=stages,
        GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return h


def down_gemm_mxfp4(h: Tensor, w2: Tensor, scale: Tensor, table: RowTable, y: Tensor, *, bias: Tensor | None = None,
                    row_weights: Tensor | None = None, factor: float = 1.0,
                    group_m: int = 8) -> Tensor:  # fmt: skip
    """y[table.slots[p]] = (h[p] times its expert's w2, plus bias) * row_weights[table.slots[p]] * factor, for live p.

    h: bfloat16 [positions, I], in `wide_order`; w2: uint8 [E, H, bytes], scale: uint8 [E, H, groups]; bias: [E, H].
    """
    block_m, parts, blocks, stages = _shape(table)
    data, scales = _words(w2, scale, h)
    columns = w2.shape[1]
    grid = min(processors(h.device), table.tiles * -(-columns // (64 * parts * blocks)))
    down_mxfp4_kernel[(grid,)](
        descriptor(h, min(block_m, 64), 64), descriptor(data, 32 * parts * blocks, 64), scales,
        scales if bias is None else bias, y, y.stride(0), *table.drawing,
        table.tile_start if table.slots is None else table.slots, table.ends if row_weights is None else row_weights,
        float(factor), table.tiles, h.shape[1], columns, HAS_SLOTS=table.slots is not None,
        HAS_WEIGHTS=row_weights is not None, HAS_BIAS=bias is not None, BM=block_m, PARTS=parts, BLOCKS=blocks,
        STAGES=stages, GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return y
