"""Who computes which tile: the Hopper kernels' CTAs draw tiles from one counter, in an order that shares weights.

A CTA stays for the whole kernel. Its first tile is its own number, every further one the next that nobody has: CTAs
that finish together get neighboring tiles, whose weights are the same, and start them together, so that what one
brought to the L2 cache is still there for the others. (Fixed shares drift apart: tiles differ in their rows. On an
H200, GEMM1 of DeepSeek-V3 at 4096 tokens then moved 9 GB from and to memory instead of the 2 GB that it has to.) They
also end together. Which CTA computes a tile changes nothing in its result.

The scheduler is one of the producers. It tells the other partitions of its CTA through shared memory: entry i of the
queue holds (expert, place, first position, positions) of the CTA's i-th tile, expert -1 behind the last.
An entry is used again 2 * STAGES tiles later. That is late enough without asking anybody: a tile has at least one step,
the scheduler fills slots at most STAGES steps ahead of any consumer, it tells of a tile at most one tile before it
begins (`hopper_fp8`), so it is at most STAGES + 1 tiles ahead, and who hears of a tile passes its slots on afterwards.
A second producer fills the same slots, so it cannot be further behind than the consumers.

Where TAIL, the last tiles, as many as there are CTAs, are halved in their columns: at the end of the kernel a CTA then
waits for half a tile of another one, not for a whole (Mixtral's GEMM1 at 1024 tokens: 900 -> 850 us). Of GEMM2, whose
halves take two thirds of a whole from the L2 cache, nothing was gained (482 -> 500 us).

The counter starts at zero and is zero again afterwards: every tile that is computed is followed by one draw, so the
last draw is the one that gets `total - 1`.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

# Triton 3.6 has the first, 3.7 the second.
_sync = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier


@gluon.jit
def count_live(tile_expert, tiles):
    """Tiles that have an expert: the unused ones, with -1, are the tail of the table."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 1024, layout=layout)
    seen = gl.zeros([1024], gl.int32, layout)
    for first in range(0, tiles, 1024):
        expert = gl.load(tile_expert + first + index, mask=first + index < tiles, other=-1)
        seen += (expert >= 0).to(gl.int32)
    return gl.sum(seen, axis=0)


@gluon.jit
def make_queue(table, ticket, tiles, n_tiles, STAGES: gl.constexpr, TAIL: gl.constexpr):
    """What the functions below take: entries, barriers, the table, the counter, and how many tiles there are.

    table: (tile_expert, tile_start, starts, ends), ticket: the counter, n_tiles: tiles of columns of a tile of rows.
    Made before the partitions are, by all warps.
    """
    gl.static_assert(STAGES >= 2, "the scheduler is up to STAGES + 1 tiles ahead")
    LENGTH: gl.constexpr = 2 * STAGES
    entries = gl.allocate_shared_memory(gl.int32, [LENGTH, 4], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    known = gl.allocate_shared_memory(gl.int64, [LENGTH, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(LENGTH):
        mbarrier.init(known.index(i), count=1)
    fence_async_shared()
    total = count_live(table[0], tiles) * n_tiles
    tail = gl.minimum(total, gl.num_programs(0)) if TAIL else 0
    return entries, known, table, ticket, total + tail, n_tiles, tail


@gluon.jit
def tiles_of(queue):
    """How many tiles all CTAs compute together, halved ones counted by themselves."""
    _, _, _, _, total, _, _ = queue
    return total


@gluon.jit
def locate(queue, tile, BM: gl.constexpr, GROUP_M: gl.constexpr, TAIL: gl.constexpr):
    """(expert, place, first position, positions) of a tile; expert -1 behind the last.

    place: the tile of columns; where TAIL, 4 times that, plus 1 for its left half alone, and 3 for its right one.
    An expert's tiles are neighbors: all its rows, GROUP_M tiles at most, under one tile of columns after the other.
    """
    _, _, table, _, total, n_tiles, tail = queue
    tile_expert, tile_start, starts, ends = table
    index, part = tile, 0
    if TAIL:
        beyond = tile - (total - 2 * tail)
        index = gl.where(beyond < 0, tile, tile - (beyond + 1) // 2)
        part = gl.where(beyond < 0, 0, 1 + beyond % 2 * 2)
    index = gl.maximum(gl.minimum(index, total - tail - 1), 0)
    some = index // n_tiles
    expert = gl.maximum(gl.load(tile_expert + some), 0)
    at = gl.load(tile_start + some)
    begin, end = gl.load(starts + expert), gl.load(ends + expert)
    first = some - (at - begin) // BM
    own = gl.maximum(gl.cdiv(end - begin, BM), 1)
    size = gl.cdiv(own, gl.cdiv(own, GROUP_M))
    within = index - first * n_tiles
    group = within // (size * n_tiles)
    within -= group * size * n_tiles
    rows = gl.minimum(own - group * size, size)
    start = begin + (group * size + within % rows) * BM
    place = within // rows
    if TAIL:
        place = place * 4 + part
    return gl.where(tile < total, expert, -1), place, start, gl.minimum(end - start, BM)


@gluon.jit
def is_half(place):
    """Of a `place` where TAIL: whether the tile is half as wide."""
    return place & 1


@gluon.jit
def first_column(place, COLUMNS: gl.constexpr, TAIL: gl.constexpr):
    """Of a tile at `place`, in units in which a whole one has COLUMNS columns."""
    if TAIL:
        return (place >> 2) * COLUMNS + ((place >> 1) & 1) * (COLUMNS // 2)
    else:
        return place * COLUMNS


@gluon.jit
def tell(queue, turn, entry):
    """The scheduler writes the entry of its `turn`-th tile."""
    entries, known, _, _, _, _, _ = queue
    LENGTH: gl.constexpr = entries.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 4, layout=layout)
    low = gl.where(index == 0, entry[0], entry[1])
    high = gl.where(index == 2, entry[2], entry[3])
    entries.index(turn % LENGTH).store(gl.where(index < 2, low, high))
    _sync()
    mbarrier.arrive(known.index(turn % LENGTH), count=1)


@gluon.jit
def hear(queue, turn):
    """Everybody else reads the entry of the CTA's `turn`-th tile, once it is there."""
    entries, known, _, _, _, _, _ = queue
    LENGTH: gl.constexpr = entries.shape[0]
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    mbarrier.wait(known.index(turn % LENGTH), (turn // LENGTH) & 1)
    entry = entries.index(turn % LENGTH).load(layout)
    index = gl.arange(0, 4, layout=layout)
    expert = gl.sum(gl.where(index == 0, entry, 0), axis=0)
    place = gl.sum(gl.where(index == 1, entry, 0), axis=0)
    start = gl.sum(gl.where(index == 2, entry, 0), axis=0)
    count = gl.sum(gl.where(index == 3, entry, 0), axis=0)
    return expert, place, start, count


@gluon.jit
def draw(queue, wanted):
    """Ask for the next tile if it is wanted, and do not wait: a number in the first thread, which `drawn` reads.

    A tensor of one element a thread, of which one asks: a scalar's atomic would be waited for and broadcast here.
    """
    _, _, _, ticket, _, _, _ = queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, 32 * gl.num_warps(), layout=layout)
    one = gl.full(lane.shape, 1, gl.int32, layout)
    return gl.atomic_add(ticket + lane * 0, one, mask=(lane == 0) & wanted, sem="relaxed")


@gluon.jit
def drawn(queue, number):
    """The tile that was drawn; the last one to draw in this launch puts the counter back."""
    _, _, _, ticket, total, _, _ = queue
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    lane = gl.arange(0, 32 * gl.num_warps(), layout=layout)
    zero = gl.zeros(lane.shape, gl.int32, layout)
    gl.store(ticket + lane * 0, zero, mask=(lane == 0) & (number == total - 1))
    return gl.num_programs(0) + gl.sum(gl.where(lane == 0, number, 0), axis=0)
