"""Grouped GEMMs for Hopper at prefill sizes: persistent, warp-specialised, in Gluon (sm_90a, Triton 3.6 and later).

One CTA an SM. A producer warpgroup fills a ring of slots in shared memory (weights by TMA; activations by
TMA, or gathered row by row with cp.async); two or three consumer warpgroups each own 64 rows of a tile and all of its
columns. The protocol of a slot is in `hopper_common.py`.

Roofline: the tensor cores at the clock that the power limit leaves, then the L2 cache. A step of 64 of K in a tile of
128 x 256 takes 48 KiB for 4.2 MFLOP, so the 790 TFLOP/s of a dense product need 9.0 TB/s from the L2 cache, which was
seen to give 9.4; in one of 192 x 256 it is 56 KiB for 6.3 MFLOP, 7.0 TB/s. 256 x 256 does not fit the registers.
"""

from __future__ import annotations

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
from moe_core_triton.kernels.hopper_common import (
    ROWS,
    acc_layout,
    descriptor,
    make_ring,
    pass_on,
    produce_gathered,
    produce_rows,
    store_layout,
)
from moe_core_triton.kernels.hopper_queue import first_column, hear, is_half, make_queue
from moe_core_triton.kernels.launching import processors
from moe_core_triton.row_table import RowTable

#: Columns of a tile, K of a slot; slots of the ring by the height of a tile, which is its table's.
BLOCK_N, BLOCK_K = 256, 64
STAGES = {128: 4, 192: 3}


@gluon.jit
def _multiply(ring, it, steps, PART: gl.constexpr, PARTS: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr,
              BN: gl.constexpr):  # fmt: skip
    """One consumer's rows of a tile of BN columns: their left and their right half, [64, BN / 2] each, in float32.

    A slot's products run while the next slot is waited for. Two consumers take one instruction for both halves; with
    three a thread has 128 registers at the start of the kernel, and ptxas refuses an instruction that names more.
    """
    a_ring, b_ring, full, empty = ring
    HALF: gl.constexpr = BN // 2
    WHOLE: gl.constexpr = PARTS == 2 or b_ring.shape[1] > BN
    whole = gl.zeros([ROWS, BN], gl.float32, acc_layout(BN, 16))
    left = gl.zeros([ROWS, HALF], gl.float32, acc_layout(HALF, 16))
    right = gl.zeros([ROWS, HALF], gl.float32, acc_layout(HALF, 16))
    for step in range(steps):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        if GATHERED:  # cp.async wrote the rows: by the generic proxy, and wgmma reads by the other
            fence_async_shared()
        a = a_ring.index(stage * PARTS + PART)
        b = b_ring.index(stage) if b_ring.shape[1] == BN else b_ring.index(stage).slice(0, BN)
        if WHOLE:
            whole = warpgroup_mma(a, b.permute((1, 0)), whole, use_acc=step > 0, is_async=True)
            whole = warpgroup_mma_wait(1, deps=(whole,))
        else:
            left = warpgroup_mma(a, b.slice(0, HALF).permute((1, 0)), left, use_acc=step > 0, is_async=True)
            right = warpgroup_mma(a, b.slice(HALF, HALF).permute((1, 0)), right, use_acc=step > 0, is_async=True)
            left, right = warpgroup_mma_wait(2, deps=(left, right))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=step > 0)
        it += 1
    if WHOLE:
        whole = warpgroup_mma_wait(0, deps=(whole,))
        # A thread holds the same places of both halves.
        left, right = gl.split(whole.reshape([ROWS, 2, HALF]).permute(0, 2, 1))
        left = gl.convert_layout(left, acc_layout(HALF, 16), assert_trivial=True)
        right = gl.convert_layout(right, acc_layout(HALF, 16), assert_trivial=True)
    else:
        left, right = warpgroup_mma_wait(0, deps=(left, right))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
    return left, right


@gluon.jit
def _bias_of(row, first, size, COLS: gl.constexpr):
    """COLS numbers of a row of the bias from column `first` on, float32 [1, COLS] beside a product's halves."""
    column = first + gl.arange(0, COLS, layout=gl.SliceLayout(0, acc_layout(COLS, 16)))
    return gl.load(row + column, mask=column < size, other=0.0).to(gl.float32)[None, :]


@gluon.jit
def _tile_up(given, it, steps, entry, PART: gl.constexpr, PARTS: gl.constexpr, ACT: gl.constexpr,
             HAS_LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr,
             TAIL: gl.constexpr, BN: gl.constexpr):  # fmt: skip
    """A tile of BN columns, half of them of gate and half of up: BN / 2 of h."""
    ring, _, bias, h, h_stride, span, act = given
    expert, place, start, count = entry
    inter = span[0]
    COLS: gl.constexpr = BN // 2
    layout: gl.constexpr = store_layout(COLS, 16)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    first = first_column(place, ring[1].shape[1] // 2, TAIL)
    gate, up = _multiply(ring, it, steps, PART, PARTS, STAGES, GATHERED, BN)
    if HAS_BIAS:
        gate += _bias_of(bias + expert * (2 * inter), first, inter, COLS)
        up += _bias_of(bias + expert * (2 * inter) + inter, first, inter, COLS)
    out = activate(gate, up, ACT, act[0], act[1], act[2], HAS_LIMIT)
    out = gl.convert_layout(out.to(h.dtype.element_ty), layout)
    column = first + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    target = h + (start + rows).to(gl.int64)[:, None] * h_stride + column[None, :]
    gl.store(target, out, mask=(rows < count)[:, None] & (column < inter)[None, :])


@gluon.jit
def _consume_up(given, PART: gl.constexpr, PARTS: gl.constexpr, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr,
                HAS_BIAS: gl.constexpr, STAGES: gl.constexpr, GATHERED: gl.constexpr,
                TAIL: gl.constexpr):  # fmt: skip
    ring, queue = given[0], given[1]
    BN: gl.constexpr = ring[1].shape[1]
    steps = gl.cdiv(given[5][1], ring[0].shape[2])
    it, turn = 0, 0
    entry = hear(queue, 0)
    while entry[0] >= 0:
        if entry[3] <= PART * ROWS:
            pass_on(ring, it, steps, STAGES)
        elif TAIL and is_half(entry[1]):
            _tile_up(given, it, steps, entry, PART, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, GATHERED, TAIL, BN // 2)
        else:
            _tile_up(given, it, steps, entry, PART, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, GATHERED, TAIL, BN)
        it += steps
        turn += 1
        entry = hear(queue, turn)


@gluon.jit
def _tile_down(given, it, steps, entry, PART: gl.constexpr, PARTS: gl.constexpr, HAS_SLOTS: gl.constexpr,
               HAS_WEIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ring, _, slots, row_weights, bias, y, y_stride, span, scale = given
    expert, n, start, count = entry
    columns = span[0]
    BN: gl.constexpr = ring[1].shape[1]
    COLS: gl.constexpr = BN // 2
    layout: gl.constexpr = store_layout(COLS, 16)
    rows = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    rows_mma = PART * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, acc_layout(COLS, 16)))
    first = n * BN
    slot = start + rows
    slot_mma = start + rows_mma
    if HAS_SLOTS:
        slot = gl.load(slots + slot, mask=rows < count, other=0)
        slot_mma = gl.load(slots + slot_mma, mask=rows_mma < count, other=0)
    factor = gl.full([ROWS], scale, gl.float32, rows_mma.type.layout)
    if HAS_WEIGHTS:
        factor *= gl.load(row_weights + slot_mma, mask=rows_mma < count, other=0.0)
    left, right = _multiply(ring, it, steps, PART, PARTS, STAGES, False, BN)
    if HAS_BIAS:
        left += _bias_of(bias + expert * columns, first, columns, COLS)
        right += _bias_of(bias + expert * columns, first + COLS, columns, COLS)
    line = y + slot.to(gl.int64)[:, None] * y_stride
    column = first + gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    out = gl.convert_layout((left * factor[:, None]).to(y.dtype.element_ty), layout)
    gl.store(line + column[None, :], out, mask=(rows < count)[:, None] & (column < columns)[None, :])
    column += COLS
    out = gl.convert_layout((right * factor[:, None]).to(y.dtype.element_ty), layout)
    gl.store(line + column[None, :], out, mask=(rows < count)[:, None] & (column < columns)[None, :])


@gluon.jit
def _consume_down(given, PART: gl.constexpr, PARTS: gl.constexpr, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr,
                  HAS_BIAS: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    ring, queue = given[0], given[1]
    steps = gl.cdiv(given[7][1], ring[0].shape[2])
    it, turn = 0, 0
    entry = hear(queue, 0)
    while entry[0] >= 0:
        if entry[3] > PART * ROWS:
            _tile_down(given, it, steps, entry, PART, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)
        else:
            pass_on(ring, it, steps, STAGES)
        it += steps
        turn += 1
        entry = hear(queue, turn)


@gluon.jit(do_not_specialize=["tiles"])
def up_kernel(x, x_stride, x_desc, w_desc, bias, h, h_stride, tile_expert, tile_start, starts, ends, ticket, slots,
              tiles, K, inter, alpha, beta, limit, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_BIAS: gl.constexpr,
              HAS_SLOTS: gl.constexpr, TOP_K: gl.constexpr, EVEN_K: gl.constexpr, PARTS: gl.constexpr,
              TAIL: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
              GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(w_desc.dtype, PARTS, BN, BK, STAGES, 129 if HAS_SLOTS else 1)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, gl.cdiv(inter, BN // 2), STAGES, TAIL)
    span = (inter, K)
    given = (ring, queue, bias, h, h_stride, span, (alpha, beta, limit))
    rows = (slots, x, x_stride)
    if PARTS == 2:
        if HAS_SLOTS:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 1, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (
                        produce_gathered,
                        (ring, queue, rows, w_desc, span, TOP_K, EVEN_K, GROUP_M, STAGES, PARTS, TAIL),
                    ),
                ],
                [4, 4],
                [216, 72],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 1, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (produce_rows, (ring, queue, x_desc, w_desc, span, True, GROUP_M, STAGES, PARTS, TAIL)),
                ],
                [4, 4],
                [216, 72],
            )
    else:
        if HAS_SLOTS:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 1, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 2, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (
                        produce_gathered,
                        (ring, queue, rows, w_desc, span, TOP_K, EVEN_K, GROUP_M, STAGES, PARTS, TAIL),
                    ),
                ],
                [4, 4, 4],
                [160, 160, 32],
            )
        else:
            gl.warp_specialize(
                [
                    (_consume_up, (given, 0, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 1, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (_consume_up, (given, 2, PARTS, ACT, HAS_LIMIT, HAS_BIAS, STAGES, HAS_SLOTS, TAIL)),
                    (produce_rows, (ring, queue, x_desc, w_desc, span, True, GROUP_M, STAGES, PARTS, TAIL)),
                ],
                [4, 4, 4],
                [160, 160, 32],
            )


@gluon.jit(do_not_specialize=["tiles"])
def down_kernel(h_desc, w_desc, bias, y, y_stride, tile_expert, tile_start, starts, ends, ticket, slots, row_weights,
                scale, tiles, K, columns, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr, HAS_BIAS: gl.constexpr,
                PARTS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
                GROUP_M: gl.constexpr):  # fmt: skip
    ring = make_ring(h_desc.dtype, PARTS, BN, BK, STAGES, 1)
    queue = make_queue((tile_expert, tile_start, starts, ends), ticket, tiles, gl.cdiv(columns, BN), STAGES, False)
    span = (columns, K)
    given = (ring, queue, slots, row_weights, bias, y, y_stride, span, scale)
    if PARTS == 2:
        gl.warp_specialize(
            [
                (_consume_down, (given, 0, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 1, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (produce_rows, (ring, queue, h_desc, w_desc, span, False, GROUP_M, STAGES, PARTS, False)),
            ],
            [4, 4],
            [232, 40],
        )
    else:
        gl.warp_specialize(
            [
                (_consume_down, (given, 0, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 1, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (_consume_down, (given, 2, PARTS, HAS_SLOTS, HAS_WEIGHTS, HAS_BIAS, STAGES)),
                (produce_rows, (ring, queue, h_desc, w_desc, span, False, GROUP_M, STAGES, PARTS, False)),
            ],
            [4, 4, 4],
            [160, 160, 32],
        )


def _height(table: RowTable) -> tuple[int, int]:
    """The consumers that its tiles ask for, and the slots that fit. Raises ValueError where no kernel has so many."""
    if table.block_m not in STAGES:
        raise ValueError(f"tiles have {' or '.join(map(str, STAGES))} rows, got {table.block_m}")
    return table.block_m // ROWS.value, STAGES[table.block_m]


def up_gemm(x: Tensor, w13: Tensor, table: RowTable, h: Tensor, *, top_k: int, act: str = "silu", alpha: float = 1.0,
            beta: float = 0.0, limit: float | None = None, bias: Tensor | None = None,
            group_m: int = 8) -> Tensor:  # fmt: skip
    """h[p] = act(gate, up) of x[table.slots[p] // top_k] and its expert's rows of w13 [E, 2 * I, H], for live p.

    bias: [E, 2 * I], as w13: gate first. Without table.slots x[p] is the row.
    """
    parts, stages = _height(table)
    experts, twice, K = w13.shape
    inter = twice // 2
    gathered = table.slots is not None
    if not gathered and top_k != 1:
        raise ValueError(f"without slots there is one row a position, got top_k {top_k}")
    halves = 2 if parts == 2 else 1  # of a tile's columns, which the last tiles may have for themselves
    grid = min(processors(x.device), halves * table.tiles * -(-inter // (BLOCK_N // 2)))
    w_desc = descriptor(w13.view(experts * twice, K), BLOCK_N // 2 // halves, BLOCK_K)
    up_kernel[(grid,)](
        x, x.stride(0), w_desc if gathered else descriptor(x, ROWS.value, BLOCK_K), w_desc,
        w13 if bias is None else bias, h, h.stride(0), *table.drawing,
        table.slots if gathered else table.tile_start, table.tiles, K, inter, float(alpha), float(beta),
        float(limit or 0.0), ACT=act, HAS_LIMIT=limit is not None, HAS_BIAS=bias is not None, HAS_SLOTS=gathered,
        TOP_K=top_k, EVEN_K=K % BLOCK_K == 0, PARTS=parts, TAIL=halves == 2, BN=BLOCK_N, BK=BLOCK_K,
        STAGES=stages, GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return h


def down_gemm(h: Tensor, w2: Tensor, table: RowTable, y: Tensor, *, row_weights: Tensor | None = None,
              factor: float = 1.0, bias: Tensor | None = None, group_m: int = 8) -> Tensor:  # fmt: skip
    """y[table.slots[p]] = (h[p] times its expert's w2 [E, H, I], plus bias) * row_weights[..] * factor, for live p.

    row_weights: float32 [slots], of slot table.slots[p]; bias: [E, H]. Without table.slots p stands for its slot.
    """
    parts, stages = _height(table)
    experts, columns, K = w2.shape
    grid = min(processors(h.device), table.tiles * -(-columns // BLOCK_N))
    down_kernel[(grid,)](
        descriptor(h, ROWS.value, BLOCK_K),
        descriptor(w2.view(experts * columns, K), BLOCK_N, BLOCK_K), w2 if bias is None else bias, y, y.stride(0),
        *table.drawing, table.tile_start if table.slots is None else table.slots,
        table.ends if row_weights is None else row_weights, float(factor), table.tiles, K, columns,
        HAS_SLOTS=table.slots is not None, HAS_WEIGHTS=row_weights is not None, HAS_BIAS=bias is not None, PARTS=parts,
        BN=BLOCK_N, BK=BLOCK_K, STAGES=stages, GROUP_M=group_m, num_warps=4,
    )  # fmt: skip
    return y
