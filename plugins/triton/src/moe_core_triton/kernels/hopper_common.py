"""What the Hopper kernels of `hopper_gemm.py` (16 bits) and `hopper_fp8.py` share: ring and producers.

Protocol of a slot: `full[s]` completes when both operands have landed (the bytes that TMA announced, and for gathered
rows one arrival of each gathering thread, which the hardware makes when that thread's copies are done);
`empty[s]` completes when all consumers have arrived, each after the wgmma that read the slot has finished. Everybody
hears of the same tiles in the same order (`hopper_queue.py`) and counts slots with the same counter `it`: slot
it % stages, and the parity (it // stages) & 1 of its `full`; a producer waits for the parity before that one of
`empty`, which a fresh barrier passes. So a consumer is at most `stages` slots behind the other, and may run its
epilogue meanwhile.
A consumer whose rows of a tile do not exist only passes the slots on: the others then have the tensor cores alone,
and nobody fetches those rows.

Every barrier that is made here is used by the partitions, so its memory is its own as long as they run. One that is not
must not be made: the compiler gives its memory to the epilogue's tiles, which PTX forbids without mbarrier.inval. With
eight processes on one H200, the word of such a barrier was found in eight bytes of a tile, in 5 to 100 per cent of the
launches; never with one process. A GPU that comes back to an interrupted kernel seems to put its barriers back.
"""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_core_triton.kernels.hopper_queue import draw, drawn, first_column, is_half, locate, tell, tiles_of

#: Rows of one consumer: those of a wgmma.
ROWS = gl.constexpr(64)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, FULL: gl.constexpr, EMPTY: gl.constexpr):
    """(full, empty), a barrier a slot; so many arrivals complete them."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FULL)
        mbarrier.init(empty.index(stage), count=EMPTY)
    fence_async_shared()
    return full, empty


@gluon.jit
def make_ring(dtype: gl.constexpr, PARTS: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
              FULL: gl.constexpr):  # fmt: skip
    """The slots and their barriers; FULL arrivals fill a slot, one of each consumer empties it.

    A slot is PARTS pieces of 64 rows (piece p of slot s is a_ring.index(s * PARTS + p)) and BN rows of weights.
    """
    a_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BK], dtype)
    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BN, BK], dtype)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES * PARTS, ROWS, BK], a_layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], b_layout)
    full, empty = make_barriers(STAGES, FULL, PARTS)
    return a_ring, b_ring, full, empty


@gluon.jit
def load_weights(w_desc, ready, slot, row, k, inter, COLUMNS: gl.constexpr, GATED: gl.constexpr):
    """COLUMNS rows of the weights from `row`; GATED: half of them from there, the others from `inter` rows on."""
    SIZE: gl.constexpr = w_desc.block_type.shape[0]
    PART: gl.constexpr = COLUMNS // 2 if GATED else COLUMNS
    for i in gl.static_range(PART // SIZE):
        tma.async_copy_global_to_shared(w_desc, [row + i * SIZE, k], ready, slot.slice(i * SIZE, SIZE))
    if GATED:
        for i in gl.static_range(PART // SIZE):
            tma.async_copy_global_to_shared(
                w_desc, [row + inter + i * SIZE, k], ready, slot.slice(PART + i * SIZE, SIZE)
            )


@gluon.jit
def rows_from(slots, start, count, x_stride, rows, cols, PART: gl.constexpr, TOP_K: gl.constexpr):
    """Offsets in x of a piece's elements [64, BK] at k = 0; rows that do not exist stand in for the tile's first."""
    row = PART * rows.shape[0] + rows
    token = gl.load(slots + (start + gl.where(row < count, row, 0))) // TOP_K
    return (token * x_stride)[:, None] + cols[None, :]


@gluon.jit
def copy_rows(x, offsets, k, rows, count, cols, K, piece, PART: gl.constexpr, EVEN_K: gl.constexpr):
    """One step of K of a piece; rows that do not exist are zeros, which cost no traffic.

    Pointers and masks are made here: what they take in registers would be spilled.
    """
    inside = gl.expand_dims(PART * rows.shape[0] + rows < count, 1)
    if not EVEN_K:
        inside = inside & gl.expand_dims(k + cols < K, 0)
    inside = inside.broadcast_to(offsets.shape)
    async_copy.async_copy_global_to_shared(piece, x + (offsets + k), mask=inside)


@gluon.jit
def first_row(entry, size, BN: gl.constexpr, GATED: gl.constexpr, TAIL: gl.constexpr):
    """Of the weights of a tile (the first one of its gate); see `hopper_queue.locate` for TAIL."""
    COLUMNS: gl.constexpr = BN // 2 if GATED else BN
    expert, place, _, _ = entry
    column = first_column(place, COLUMNS, TAIL)
    return expert * (2 * size) + column if GATED else expert * size + column


@gluon.jit
def gather_tile(ring, it, entry, rows, w_desc, span, TOP_K: gl.constexpr, EVEN_K: gl.constexpr, STAGES: gl.constexpr,
                PARTS: gl.constexpr, COLUMNS: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """All steps of a tile of COLUMNS: gathered rows of x, gate and up rows; the slots' counter behind them."""
    a_ring, b_ring, full, empty = ring
    slots, x, x_stride = rows
    inter, K = span
    BK: gl.constexpr = a_ring.shape[2]
    BYTES: gl.constexpr = w_desc.dtype.primitive_bitwidth // 8
    VEC: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    # Both are such multiples already. Triton knows of a divisor of an argument only where it is 16, and would copy
    # two bytes at a time, which does not compile.
    x_stride, K = x_stride // VEC * VEC, K // VEC * VEC
    layout: gl.constexpr = gl.BlockedLayout([1, VEC], [32 * VEC // BK, BK // VEC], [gl.num_warps(), 1], [1, 0])
    lines = gl.arange(0, ROWS, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    _, _, start, count = entry
    first = rows_from(slots, start, count, x_stride, lines, cols, 0, TOP_K)
    second = rows_from(slots, start, count, x_stride, lines, cols, 1, TOP_K)
    third = rows_from(slots, start, count, x_stride, lines, cols, PARTS - 1, TOP_K)
    row = first_row(entry, inter, b_ring.shape[1], True, TAIL)
    for k in range(0, K, BK):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
        ready = full.index(stage)
        mbarrier.expect(ready, COLUMNS * BK * BYTES)
        load_weights(w_desc, ready, b_ring.index(stage), row, k, inter, COLUMNS, True)
        copy_rows(x, first, k, lines, count, cols, K, a_ring.index(stage * PARTS), 0, EVEN_K)
        if count > ROWS:
            copy_rows(x, second, k, lines, count, cols, K, a_ring.index(stage * PARTS + 1), 1, EVEN_K)
        if PARTS == 3:
            if count > 2 * ROWS:
                copy_rows(x, third, k, lines, count, cols, K, a_ring.index(stage * PARTS + 2), 2, EVEN_K)
        async_copy.mbarrier_arrive(ready, increment_count=False)
        it += 1
    return it


@gluon.jit
def produce_gathered(ring, queue, rows, w_desc, span, TOP_K: gl.constexpr, EVEN_K: gl.constexpr, GROUP_M: gl.constexpr,
                     STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """Gathered rows of x, and gate and up rows of an expert for the same columns of h. The scheduler, too."""
    BN: gl.constexpr = ring[1].shape[1]
    it, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles_of(queue):
        entry = locate(queue, tile, PARTS * ROWS, GROUP_M, TAIL)
        tell(queue, turn, entry)
        number = draw(queue, True)
        if TAIL and is_half(entry[1]):
            it = gather_tile(ring, it, entry, rows, w_desc, span, TOP_K, EVEN_K, STAGES, PARTS, BN // 2, TAIL)
        else:
            it = gather_tile(ring, it, entry, rows, w_desc, span, TOP_K, EVEN_K, STAGES, PARTS, BN, TAIL)
        turn += 1
        tile = drawn(queue, number)
    tell(queue, turn, (-1, 0, 0, 0))


@gluon.jit
def produce_rows(ring, queue, a_desc, w_desc, span, GATED: gl.constexpr, GROUP_M: gl.constexpr,
                 STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr):  # fmt: skip
    """Positions, which are contiguous, as far as the tile has any, and rows of weights. The scheduler, too."""
    BN: gl.constexpr = ring[1].shape[1]
    it, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles_of(queue):
        entry = locate(queue, tile, PARTS * ROWS, GROUP_M, TAIL)
        tell(queue, turn, entry)
        number = draw(queue, True)
        row = first_row(entry, span[0], BN, GATED, TAIL)
        if TAIL and is_half(entry[1]):
            it = produce_tile(ring, it, entry, row, a_desc, w_desc, span, True, GATED, STAGES, PARTS, BN // 2)
        else:
            it = produce_tile(ring, it, entry, row, a_desc, w_desc, span, True, GATED, STAGES, PARTS, BN)
        turn += 1
        tile = drawn(queue, number)
    tell(queue, turn, (-1, 0, 0, 0))


@gluon.jit
def produce_tile(ring, it, entry, row, a_desc, w_desc, span, HAS_ROWS: gl.constexpr, GATED: gl.constexpr,
                 STAGES: gl.constexpr, PARTS: gl.constexpr, COLUMNS: gl.constexpr):  # fmt: skip
    """All steps of a tile of COLUMNS by TMA, without its rows unless HAS_ROWS; the slots' counter behind them."""
    a_ring, b_ring, full, empty = ring
    _, _, start, count = entry
    size, K = span
    BK: gl.constexpr = a_ring.shape[2]
    BYTES: gl.constexpr = w_desc.dtype.primitive_bitwidth // 8
    pieces = gl.cdiv(count, ROWS)
    for k in range(0, K, BK):
        stage = it % STAGES
        mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
        ready = full.index(stage)
        if HAS_ROWS:
            for part in gl.static_range(PARTS):
                mbarrier.expect(ready, (COLUMNS + (part + 1) * ROWS) * BK * BYTES, pred=pieces == part + 1)
            for part in gl.static_range(PARTS):
                piece = a_ring.index(stage * PARTS + part)
                tma.async_copy_global_to_shared(a_desc, [start + part * ROWS, k], ready, piece, pred=part < pieces)
        else:
            mbarrier.expect(ready, COLUMNS * BK * BYTES)
        load_weights(w_desc, ready, b_ring.index(stage), row, k, size, COLUMNS, GATED)
        it += 1
    return it


@gluon.jit
def pass_on(ring, it, steps, STAGES: gl.constexpr):
    """A consumer without rows in this tile: it frees each slot as soon as the slot is full."""
    full, empty = ring[2], ring[3]
    for _ in range(steps):
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        mbarrier.arrive(empty.index(it % STAGES), count=1)
        it += 1


@gluon.constexpr_function
def acc_layout(columns, bits):
    """Of one warpgroup's accumulator; bits: of an operand's element."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


@gluon.constexpr_function
def store_layout(columns, bits):
    """For a warpgroup's stores of elements of that many bits: sixteen bytes a thread, whole rows a warp."""
    each = 128 // bits
    lanes = min(columns // each, 32)
    return gl.BlockedLayout([1, each], [32 // lanes, lanes], [4, 1], [1, 0])


def descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """TMA boxes [rows, columns] of a matrix, for the ring's slots."""
    size = matrix.element_size()
    return TensorDescriptor.from_tensor(
        matrix, [rows, columns], gl.NVMMASharedLayout(min(128, columns * size), 8 * size, 2)
    )
