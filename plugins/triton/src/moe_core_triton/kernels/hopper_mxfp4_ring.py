"""The ring of the kernels in `hopper_mxfp4.py`, and what fills it. The protocol of a slot is in `hopper_common.py`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, mbarrier, tma

from moe_core_triton.kernels.hopper_common import copy_rows, make_barriers, rows_from
from moe_core_triton.kernels.hopper_queue import draw, drawn, locate, tell, tiles_of
from moe_core_triton.kernels.hopper_unpack import HALF


@gluon.jit
def make_ring(BM: gl.constexpr, PARTS: gl.constexpr, BLOCKS: gl.constexpr, STAGES: gl.constexpr,
               FULL: gl.constexpr):  # fmt: skip
    """Tokens (128 at most, then 64 more), weights, barriers. FULL arrivals fill a slot, PARTS empty it."""
    FIRST: gl.constexpr = min(BM, 128)
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    tokens = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, FIRST, HALF], layout)
    more = tokens
    if BM > FIRST:
        more = gl.allocate_shared_memory(gl.bfloat16, [STAGES * 2, BM - FIRST, HALF], layout)
    w_layout: gl.constexpr = gl.NVMMASharedLayout(64, 8, 2)
    w_ring = gl.allocate_shared_memory(gl.uint8, [STAGES * 2, 32 * PARTS * BLOCKS, HALF], w_layout)
    full, empty = make_barriers(STAGES, FULL, PARTS)
    return tokens, more, w_ring, full, empty


@gluon.jit
def produce_gathered(ring, queue, given, w_desc, span, TOP_K: gl.constexpr, EVEN_K: gl.constexpr, BM: gl.constexpr,
                GROUP_M: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Gathered rows of x, and the gate and up rows of an expert for the same columns of h. The scheduler, too."""
    w_ring, full, empty = ring[2], ring[3], ring[4]
    slots, x, x_stride = given
    inter, K = span
    SIZE: gl.constexpr = min(BM, 64)
    BOX: gl.constexpr = w_ring.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, SIZE, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, HALF, layout=gl.SliceLayout(0, layout))
    it, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles_of(queue):
        entry = locate(queue, tile, BM, GROUP_M, False)
        tell(queue, turn, entry)
        number = draw(queue, True)
        expert, n, start, count = entry
        first = rows_from(slots, start, count, x_stride, rows, cols, 0, TOP_K)
        second = rows_from(slots, start, count, x_stride, rows, cols, min(BM // SIZE - 1, 1), TOP_K)
        third = rows_from(slots, start, count, x_stride, rows, cols, BM // SIZE - 1, TOP_K)
        gate_row = expert * (2 * inter) + n * BOX
        for step in range(gl.cdiv(K, 2 * HALF)):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            mbarrier.expect(ready, 2 * BOX * HALF)
            tma.async_copy_global_to_shared(w_desc, [gate_row, step * HALF], ready, w_ring.index(stage * 2))
            tma.async_copy_global_to_shared(w_desc, [gate_row + inter, step * HALF], ready, w_ring.index(stage * 2 + 1))
            for half in gl.static_range(2):
                k = step * (2 * HALF) + half * HALF
                at = stage * 2 + half
                copy_rows(x, first, k, rows, count, cols, K, ring[0].index(at).slice(0, SIZE), 0, EVEN_K)
                if BM > SIZE:
                    if count > SIZE:
                        copy_rows(x, second, k, rows, count, cols, K, ring[0].index(at).slice(SIZE, SIZE), 1, EVEN_K)
                if BM > 2 * SIZE:
                    if count > 2 * SIZE:
                        copy_rows(x, third, k, rows, count, cols, K, ring[1].index(at), 2, EVEN_K)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            it += 1
        turn += 1
        tile = drawn(queue, number)
    tell(queue, turn, (-1, 0, 0, 0))


@gluon.jit
def produce_rows(ring, queue, a_desc, w_desc, span, GATED: gl.constexpr, BM: gl.constexpr, GROUP_M: gl.constexpr,
                  STAGES: gl.constexpr):  # fmt: skip
    """Positions, which are contiguous, as far as the tile has any, and rows of weights. The scheduler, too."""
    w_ring, full, empty = ring[2], ring[3], ring[4]
    size, K = span
    SIZE: gl.constexpr = min(BM, 64)
    BOX: gl.constexpr = w_ring.shape[1]
    it, turn = 0, 0
    tile = gl.program_id(0)
    while tile < tiles_of(queue):
        entry = locate(queue, tile, BM, GROUP_M, False)
        tell(queue, turn, entry)
        number = draw(queue, True)
        expert, n, start, count = entry
        row = expert * (2 * size) + n * BOX if GATED else expert * size + n * (2 * BOX)
        other = row + size if GATED else row + BOX
        pieces = gl.cdiv(count, SIZE)
        for step in range(gl.cdiv(K, 2 * HALF)):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            for piece in gl.static_range(BM // SIZE):
                mbarrier.expect(ready, 2 * BOX * HALF + (piece + 1) * SIZE * HALF * 4, pred=pieces == piece + 1)
            tma.async_copy_global_to_shared(w_desc, [row, step * HALF], ready, w_ring.index(stage * 2))
            tma.async_copy_global_to_shared(w_desc, [other, step * HALF], ready, w_ring.index(stage * 2 + 1))
            for half in gl.static_range(2):
                k = step * (2 * HALF) + half * HALF
                at = stage * 2 + half
                for piece in gl.static_range(min(BM // SIZE, 2)):
                    tma.async_copy_global_to_shared(
                        a_desc, [start + piece * SIZE, k], ready, ring[0].index(at).slice(piece * SIZE, SIZE),
                        pred=piece < pieces,
                    )  # fmt: skip
                if BM > 2 * SIZE:
                    tma.async_copy_global_to_shared(
                        a_desc, [start + 2 * SIZE, k], ready, ring[1].index(at), pred=pieces > 2
                    )
            it += 1
        turn += 1
        tile = drawn(queue, number)
    tell(queue, turn, (-1, 0, 0, 0))
