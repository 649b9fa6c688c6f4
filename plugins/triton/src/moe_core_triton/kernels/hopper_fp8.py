"""Grouped GEMMs for Hopper of the scheme fp8_block128 at prefill sizes: e4m3 with a float32 scale every 128 of K.

As in `hopper_gemm.py`: one persistent CTA an SM, producers that fill a ring, two consumer warpgroups of 64 rows each.
A slot is 128 of K, so both operands have one scale there (a row's of the activations, a block's of the weights), and
every slot's product is a fresh accumulation that is scaled into the total ("promoted"), one FMA an element.

A consumer's total is [64, 2 * 128], one product [64, 128]: 192 registers a thread. It takes the two halves of the
columns (gate and up; or the left and right block of w2) one after the other, so each half has one weight scale, and
while it promotes, the other consumer has the tensor cores: a product takes them 256 cycles, a promotion takes 64
issue cycles of each scheduler. A slot's scales are loaded by the consumer itself, while its first half is multiplied.

The first GEMM's tile makes 128 columns of h, a whole group of its quantization: h and its scales are written here.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from moe_core_triton.kernels.activation import activate
from moe_core_triton.kernels.hopper_common import (
    ROWS,
    acc_layout,
    copy_rows,
    descriptor,
    first_row,
    make_ring,
    pass_on,
    produce_tile,
    rows_from,
    store_layout,
)
from moe_core_triton.kernels.hopper_queue import draw, drawn, hear, locate, make_queue, tell, tiles_of
from moe_core_triton.kernels.launching import processors
from moe_core_triton.kernels.quantize import magnitude_bits
from moe_core_triton.row_table import RowTable

GROUP = 128
#: Consumers: a third has no registers left, with two accumulators each.
PARTS = gl.constexpr(2)
#: Slots of the ring.
STAGES = 4


@gluon.jit
def _multiply(ring, it, steps, x_scale, x_row, w_scale, w_row, w_row_2, PART: gl.constexpr, STAGES: gl.constexpr,
              GATHERED: gl.constexpr):  # fmt: skip
    """The two halves of the columns of a consumer's half of a tile: [64, BN / 2] each, in float32, scaled.

    x_row: offsets [64] of the rows' first scales; w_row, w_row_2: those of the two halves of the columns.
    """
    a_ring, b_ring, full, empty = ring
    COLS: gl.constexpr = b_ring.shape[1] // 2
    layout: gl.constexpr = acc_layout(COLS, 8)
    left = gl.zeros([ROWS, COLS], gl.float32, layout)
    right = gl.zeros([ROWS, COLS], gl.float32, layout)
    fresh = gl.zeros([ROWS, COLS], gl.float32, layout)
    for step in range(steps):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        if GATHERED:  # as in hopper_gemm.py
            fence_async_shared()
        # Eight steps share a sector of each row's scales; even where it comes from L2, the product takes as long.
        xs = gl.load(x_scale + (x_row + step))
        ws = gl.load(w_scale + (w_row + step))
        ws_2 = gl.load(w_scale + (w_row_2 + step))
        a = a_ring.index(stage * PARTS + PART)
        b = b_ring.index(stage)
        part = warpgroup_mma(a, b.slice(0, COLS).permute((1, 0)), fresh, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        left += part * (xs * ws)[:, None]
        # Waits for nothing; it only keeps ptxas from starting the next product, in other registers, before the sum.
        left = warpgroup_mma_wait(0, deps=(left,))
        part = warpgroup_mma(a, b.slice(COLS, COLS).permute((1, 0)), fresh, use_acc=False, is_async=True)
        part = warpgroup_mma_wait(0, deps=(part,))
        mbarrier.arrive(empty.index(stage), count=1)
        right += part * (xs * ws_2)[:, None]
        it += 1
    return left, right


@gluon.jit
def _next_tile(queue, turn, slots, rows, HAS_SLOTS: gl.constexpr):
    """What a consumer needs to know of a tile: expert, tile of columns, first position, count, slots of `rows`."""
    expert, n, start, count = hear(queue, turn)
    # Rows that do not exist stand in for the tile's first, so that every address is valid.
    slot = gl.maximum(start, 0) + gl.where(rows < count, rows, 0)
    if HAS_SLOTS:
        slot = gl.load(slots + slot)
    return expert, n, start, count, slot


@gluon.jit
def _schedule(ring, queue, rows_desc, w_desc, span, HAS_ROWS: gl.constexpr, GATED: gl.constexpr, GROUP_M: gl.constexpr,
              STAGES: gl.constexpr):  # fmt: skip
    """The scheduler: weights, and positions where they are contiguous (HAS_ROWS).

    It tells of a tile when it begins the one before: consumers load a tile's slots and scales beside their products.
    """
    BN: gl.constexpr = ring[1].shape[1]
    tile = gl.program_id(0)
    here = locate(queue, tile, PARTS * ROWS, GROUP_M, False)
    tell(queue, 0, here)
    number = draw(queue, tile < tiles_of(queue))
    it, turn = 0, 0
    while tile < tiles_of(queue):
        after = drawn(queue, number)
        there = locate(queue, after, PARTS * ROWS, GROUP_M, False)
        tell(queue, turn + 1, there)
        number = draw(queue, after < tiles_of(queue))
        row = first_row(here, span[0], BN, GATED, False)
        it = produce_tile(ring, it, here, row, rows_desc, w_desc, span, HAS_ROWS, GATED, STAGES, PARTS, BN)
        here, tile = there, after
        turn += 1


@gluon.jit
def _gather(ring, queue, given, K, TOP_K: gl.constexpr, STAGES: gl.constexpr):
    """Gathered rows of x."""
    a_ring, _, full, empty = ring
    slots, x, x_stride = given
    BK: gl.constexpr = a_ring.shape[2]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [512 // BK, BK // 16], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    x_stride, K = x_stride // 16 * 16, K // 16 * 16  # as in hopper_common.gather_tile
    it, turn = 0, 0
    expert, _, start, count = hear(queue, 0)
    while expert >= 0:
        first = rows_from(slots, start, count, x_stride, rows, cols, 0, TOP_K)
        second = rows_from(slots, start, count, x_stride, rows, cols, 1, TOP_K)
        for k in range(0, K, BK):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            copy_rows(x, first, k, rows, count, cols, K, a_ring.index(stage * PARTS), 0, True)
            if count > ROWS:
                copy_rows(x, second, k, rows, count, cols, K, a_ring.index(stage * PARTS + 1), 1, True)
            async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
            it += 1
        turn += 1
        expert, _, start, count = hear(queue, turn)


@gluon.jit
def _group_scales(value):
    """As `scale_of` in quantize.py, of whole rows: amax / 448, 1 where that is zero; a NaN stays one."""
    amax = gl.max(magnitude_bits(value), axis=1).to(gl.float32, bitcast=True)
    scale = gl.div_rn(amax, gl.full(amax.shape, 448.0, gl.float32, amax.type.layout))
    scale = gl.where(scale < 7.888609052210118e-31, 7.888609052210118e-31, scale)
    return gl.where(amax == 0, 1.0, scale)


@gluon.jit
def _consume_up(given, PART: gl.constexpr, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SLOTS: gl.constexpr,
                TOP_K: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ring, queue, slots, scales, out, span, act = given
    x_scale, x_scale_stride, w_scale = scales
    h, h_stride, h_scale, h_scale_stride = out
    inter, K = span
    BK: gl.constexpr = ring[0].shape[2]
    COLS: gl.constexpr = ring[1].shape[1] // 2
    mma: gl.constexpr = acc_layout(COLS, 8)
    layout: gl.constexpr = store_layout(COLS, 8)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    rows_mma = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    steps, blocks = K // BK, inter // COLS
    it, turn = 0, 0
    expert, n, start, count, slot = _next_tile(queue, 0, slots, rows_mma, HAS_SLOTS)
    while expert >= 0:
        x_row = (slot // TOP_K) * x_scale_stride
        w_row = (expert * (2 * blocks) + n) * steps
        here, first, last = n, start, count
        turn += 1
        expert, n, start, count, slot = _next_tile(queue, turn, slots, rows_mma, HAS_SLOTS)
        if last > PART * ROWS:
            w_row_2 = w_row + blocks * steps
            gate, up = _multiply(ring, it, steps, x_scale, x_row, w_scale, w_row, w_row_2, PART, STAGES, HAS_SLOTS)
            value = activate(gate, up, ACT, act[0], act[1], act[2], HAS_LIMIT)
            scale = _group_scales(value)
            target = h_scale + (first + rows_mma).to(gl.int64) * h_scale_stride + here
            gl.store(target, scale, mask=rows_mma < last)
            code = gl.convert_layout((value * (1.0 / scale)[:, None]).to(h.dtype.element_ty), layout)
            target = h + (first + rows).to(gl.int64)[:, None] * h_stride + (here * COLS + cols)[None, :]
            gl.store(target, code, mask=gl.expand_dims(rows < last, 1))
        else:
            pass_on(ring, it, steps, STAGES)
        it += steps


@gluon.jit
def _consume_down(given, PART: gl.constexpr, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    ring, queue, slots, scales, row_weights, y, y_stride, span, factor = given
    x_scale, x_scale_stride, w_scale = scales
    columns, K = span
    BK: gl.constexpr = ring[0].shape[2]
    COLS: gl.constexpr = ring[1].shape[1] // 2
    mma: gl.constexpr = acc_layout(COLS, 8)
    layout: gl.constexpr = store_layout(COLS, 16)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    rows_mma = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, mma))
    steps = K // BK
    blocks = columns // COLS
    it, turn = 0, 0
    expert, n, start, count, slot = _next_tile(queue, 0, slots, rows_mma, HAS_SLOTS)
    while expert >= 0:
        here, first, last = n, start, count
        x_row = (first + gl.where(rows_mma < last, rows_mma, 0)) * x_scale_stride
        block = expert * blocks + 2 * here
        w_row = block * steps
        w_row_2 = w_row + gl.where(2 * here + 1 < blocks, steps, 0)
        weight = gl.full([ROWS], factor, gl.float32, rows_mma.type.layout)
        if HAS_WEIGHTS:
            weight *= gl.load(row_weights + slot)
        turn += 1
        expert, n, start, count, slot = _next_tile(queue, turn, slots, rows_mma, HAS_SLOTS)
        if last > PART * ROWS:
            left, right = _multiply(ring, it, steps, x_scale, x_row, w_scale, w_row, w_row_2, PART, STAGES, False)
            target = first + rows
            if HAS_SLOTS:
                target = gl.load(slots + target, mask=rows < last, other=0)
            inside = gl.expand_dims(rows < last, 1)
            column = here * (2 * COLS) + cols
            line = y + target.to(gl.int64)[:, None] * y_stride + column[None, :]
            out = gl.convert_layout((left * weight[:, None]).to(y.dtype.element_ty), layout)
            gl.store(line, out, mask=inside)
            out = gl.convert_layout((right * weight[:, None]).to(y.dtype.element_ty), layout)
            gl.store(line + COLS, out, mask=inside & (column + COLS < columns)[None, :])
        else:
            pass_on(ring, it, steps, STAGES)
        it += steps


@gluon.jit(do_not_specialize=["tiles", "x_scale_stride", "h_scale_stride"])
def up_fp8_kernel(x, x_stride, x_desc, x_scale, x_scale_stride, w_desc, w_scale, h, h_stride, h_scale, h_scale_stride,
                  tile_expert, tile_start, starts, ends, ticket, slots, tiles, K, inter, alpha, beta, limit,
                  ACT: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SLOTS: gl.constexpr, TOP_K: gl.constexpr,
                  BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(w_desc.dtype, PARTS, BN, BK, STAGES, 65 if HAS_SLOTS else 1)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, inter // (BN // 2), STAGES, False)
    span = (inter, K)
    scales = (x_scale, x_scale_stride, w_scale)
    out = (h, h_stride, h_scale, h_scale_stride)
    given = (ring, queue, slots, scales, out, span, (alpha, beta, limit))
    if HAS_SLOTS:  # two warps gather rows, and a third fetches weights
        rows = (slots, x, x_stride)
        gl.warp_specialize(
            [
                (_consume_up, (given, 0, ACT, HAS_LIMIT, True, TOP_K, STAGES)),
                (_consume_up, (given, 1, ACT, HAS_LIMIT, True, TOP_K, STAGES)),
                (_gather, (ring, queue, rows, K, TOP_K, STAGES)),
                (_schedule, (ring, queue, w_desc, w_desc, span, False, True, GROUP_M, STAGES)),
            ],
            [4, 2, 1],
            [216, 72, 72],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_up, (given, 0, ACT, HAS_LIMIT, False, TOP_K, STAGES)),
                (_consume_up, (given, 1, ACT, HAS_LIMIT, False, TOP_K, STAGES)),
                (_schedule, (ring, queue, x_desc, w_desc, span, True, True, GROUP_M, STAGES)),
            ],
            [4, 4],
            [216, 72],
        )


@gluon.jit(do_not_specialize=["tiles", "h_scale_stride"])
def down_fp8_kernel(h_desc, h_scale, h_scale_stride, w_desc, w_scale, y, y_stride, tile_expert, tile_start, starts,
                    ends, ticket, slots, row_weights, factor, tiles, K, columns, HAS_SLOTS: gl.constexpr,
                    HAS_WEIGHTS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                    GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(h_desc.dtype, PARTS, BN, BK, STAGES, 1)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, gl.cdiv(columns, BN), STAGES, False)
    span = (columns, K)
    scales = (h_scale, h_scale_stride, w_scale)
    given = (ring, queue, slots, scales, row_weights, y, y_stride, span, factor)
    gl.warp_specialize(
        [
            (_consume_down, (given, 0, HAS_SLOTS, HAS_WEIGHTS, STAGES)),
            (_consume_down, (given, 1, HAS_SLOTS, HAS_WEIGHTS, STAGES)),
            (_schedule, (ring, queue, h_desc, w_desc, span, True, False, GROUP_M, STAGES)),
        ],
        [4, 4],
        [216, 72],
    )


def _check(x: Tensor, x_scale: Tensor, w: Tensor, w_scale: Tensor, table: RowTable) -> None:
    """ValueError for what the kernels would compute wrongly."""
    experts, rows, width = w.shape
    if table.block_m != PARTS.value * ROWS.value:
        raise ValueError(f"tiles have 128 rows, got {table.block_m}")
    if rows % GROUP or width % GROUP:
        raise ValueError(f"sizes must be multiples of {GROUP}, got weights {list(w.shape)}")
    if w_scale.shape != (experts, rows // GROUP, width // GROUP) or not w_scale.is_contiguous():
        raise ValueError(f"weights {list(w.shape)} need contiguous scales a block, got {list(w_scale.shape)}")
    if x.shape[1] != width or x_scale.shape != (x.shape[0], width // GROUP) or x_scale.stride(1) != 1 != width // GROUP:
        raise ValueError(f"rows {list(x.shape)} and scales {list(x_scale.shape)} do not fit weights {list(w.shape)}")


def up_gemm_fp8(x: Tensor, x_scale: Tensor, w13: Tensor, w13_scale: Tensor, table: RowTable, h: Tensor,
                h_scale: Tensor, *, top_k: int, act: str = "silu", alpha: float = 1.0, beta: float = 0.0,
                limit: float | None = None, group_m: int = 8) -> tuple[Tensor, Tensor]:  # fmt: skip
    """h[p], h_scale[p] = quantized act(gate, up) of x[table.slots[p] // top_k] and its expert's rows of w13, live p.

    x, h: e4m3 [T, H], [positions, I]; x_scale, h_scale: float32 [T, H / 128], [positions, I / 128]; w13: e4m3
    [E, 2 * I, H], gate first; w13_scale: float32 [E, 2 * I / 128, H / 128]. Without table.slots x[p] is the row.
    """
    experts, twice, K = w13.shape
    inter = twice // 2
    _check(x, x_scale, w13, w13_scale, table)
    if inter % GROUP or h_scale.shape[1] != inter // GROUP or h_scale.stride(1) != 1 != h_scale.shape[1]:
        raise ValueError(f"h {list(h.shape)} needs {inter / GROUP} scales a row, got {list(h_scale.shape)}")
    gathered = table.slots is not None
    if not gathered and top_k != 1:
        raise ValueError(f"without slots there is one row a position, got top_k {top_k}")
    grid = min(processors(x.device), table.tiles * (inter // GROUP))
    w_desc = descriptor(w13.view(experts * twice, K), GROUP, GROUP)
    up_fp8_kernel[(grid,)](
        x, x.stride(0), w_desc if gathered else descriptor(x, ROWS.value, GROUP), x_scale, x_scale.stride(0),
        w_desc, w13_scale, h, h.stride(0), h_scale, h_scale.stride(0), *table.drawing,
        table.slots if gathered else table.tile_start, table.tiles, K, inter, float(alpha), float(beta),
        float(limit or 0.0), ACT=act, HAS_LIMIT=limit is not None, HAS_SLOTS=gathered, TOP_K=top_k,
        BN=2 * GROUP, BK=GROUP, STAGES=STAGES, GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return h, h_scale


def down_gemm_fp8(h: Tensor, h_scale: Tensor, w2: Tensor, w2_scale: Tensor, table: RowTable, y: Tensor, *,
                  row_weights: Tensor | None = None, factor: float = 1.0, group_m: int = 8) -> Tensor:  # fmt: skip
    """y[table.slots[p]] = (h[p] times its expert's w2) * row_weights[table.slots[p]] * factor, for live p.

    h: e4m3 [positions, I], h_scale: float32 [positions, I / 128]; w2: e4m3 [E, H, I], w2_scale: float32
    [E, H / 128, I / 128]; y: 16 bits [.., H]. Without table.slots p stands for its slot.
    """
    experts, columns, K = w2.shape
    _check(h, h_scale, w2, w2_scale, table)
    grid = min(processors(h.device), table.tiles * -(-columns // (2 * GROUP)))
    down_fp8_kernel[(grid,)](
        descriptor(h, ROWS.value, GROUP), h_scale, h_scale.stride(0),
        descriptor(w2.view(experts * columns, K), 2 * GROUP, GROUP), w2_scale, y, y.stride(0), *table.drawing,
        table.tile_start if table.slots is None else table.slots,
        w2_scale if row_weights is None else row_weights, float(factor), table.tiles, K, columns,
        HAS_SLOTS=table.slots is not None, HAS_WEIGHTS=row_weights is not None, BN=2 * GROUP, BK=GROUP,
        STAGES=STAGES, GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return y
