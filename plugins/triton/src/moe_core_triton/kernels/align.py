"""From the router's choice to rows sorted by expert, without the host ever seeing a count.

Every program knows the whole histogram, so none waits for another and no atomic is used: the order within an expert
is that of the slots, on every run. Below `ONE_LAUNCH` slots each program counts all ids itself (they sit in the L2);
above, a first kernel leaves one histogram a chunk, and above `TWO_LAUNCHES` a second one sums them up, once for all.
The rank of a slot in its piece of 128 comes from comparing all pairs, which is cheaper than any scan of that size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core_triton.kernels.launching import dependent_launch, wait_for_inputs
from moe_core_triton.row_table import RowTable, most_tiles

ONE_LAUNCH = 2048  # slots up to which recounting all ids in every program beats a second launch (at 8192 slots two
# launches take 7.7 us with 128 experts and 8.4 with 256 on an H200, one takes 8.9 and 12.9)
TWO_LAUNCHES = 8192  # slots up to which every program reads all histograms; they are 64 then
MOST_PROGRAMS = 1024  # beyond
CHUNKS, EXPERTS = 512, 8  # histograms summed up at a time, and experts a program of that
PIECE = 128  # slots ranked together, and threads a program: 128 x 128 pairs are 128 comparisons a thread
SCAN = 1024  # ids counted at a time
TILE_ROWS = 16  # tiles looked up at a time


@triton.jit
def _experts_of(
    ids, expert_map, p, limit, stride, num_experts, map_size, K: tl.constexpr, FLAT: tl.constexpr, MAPPED: tl.constexpr
):
    """The local experts of the slots `p` (any shape), int32; -1 for a dropped one and for p >= limit."""
    inside = p < limit
    if FLAT:
        e = tl.load(ids + p, mask=inside, other=-1)
    else:
        e = tl.load(ids + (p // K).to(tl.int64) * stride + p % K, mask=inside, other=-1)
    if MAPPED:
        e = tl.load(expert_map + e, mask=(e >= 0) & (e < map_size), other=-1)
    return tl.where((e >= 0) & (e < num_experts), e, -1).to(tl.int32)


@triton.jit
def _live_slots(num_valid, slots_total, K: tl.constexpr, HAS_VALID: tl.constexpr):
    limit = slots_total
    if HAS_VALID:
        limit = tl.minimum(tl.maximum(tl.load(num_valid), 0) * K, slots_total).to(tl.int32)
    return limit


@triton.jit
def _count(e, EB: tl.constexpr):
    """int32 [EB]: how many of `e` name each expert; -1 is not counted."""
    return tl.histogram(tl.maximum(e, 0), EB, mask=e >= 0)


@triton.jit
def _store_tiles(
    tile_expert, tile_start, starts, rows, first, step, tiles, block_m, EB: tl.constexpr, TB: tl.constexpr
):
    """This program's part of the tile table, of experts that own rows[e] positions from starts[e] on (int32 [EB])."""
    own = tl.cdiv(rows, block_m)
    last = tl.cumsum(own, 0)
    used = tl.sum(own, 0)
    e = tl.arange(0, EB)
    for at in range(first, tiles, step):
        i = at + tl.arange(0, TB)
        # Experts that end at or before tile i; those without a tile end where their predecessor does.
        passed = last[None, :] <= i[:, None]
        expert = tl.sum(passed.to(tl.int32), 1)
        begin = tl.max(tl.where(passed, last[None, :], 0), 1)
        start = tl.sum(tl.where(e[None, :] == expert[:, None], starts[None, :], 0), 1)
        live = i < used
        tl.store(tile_expert + i, tl.where(live, expert, -1), mask=i < tiles)
        tl.store(tile_start + i, tl.where(live, start + (i - begin) * block_m, 0), mask=i < tiles)


@triton.jit(do_not_specialize=["slots_total", "chunk", "stride", "num_experts", "map_size"])
def _count_chunks(
    ids, expert_map, num_valid, counts, slots_total, chunk, stride, num_experts, map_size,
    K: tl.constexpr, EB: tl.constexpr, SCAN: tl.constexpr, FLAT: tl.constexpr, MAPPED: tl.constexpr,
    HAS_VALID: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """counts [programs, EB]: the histogram of each program's `chunk` slots."""
    wait_for_inputs(PDL)
    pid = tl.program_id(0)
    limit = tl.minimum(_live_slots(num_valid, slots_total, K, HAS_VALID), (pid + 1) * chunk)
    total = tl.zeros((EB,), tl.int32)
    for at in range(pid * chunk, limit, SCAN):
        p = at + tl.arange(0, SCAN)
        total += _count(_experts_of(ids, expert_map, p, limit, stride, num_experts, map_size, K, FLAT, MAPPED), EB)
    tl.store(counts + pid * EB + tl.arange(0, EB), total)


@triton.jit(do_not_specialize=["chunks"])
def _scan_chunks(counts, chunks, EB: tl.constexpr, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr, PDL: tl.constexpr):
    """counts [chunks + 1, EB]: each histogram becomes the sum of those before it; the last row is the sum of all."""
    wait_for_inputs(PDL)
    e = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros((EXPERTS,), tl.int32)
    for at in range(0, chunks, CHUNKS):
        c = at + tl.arange(0, CHUNKS)
        own = tl.load(counts + c[:, None] * EB + e[None, :], mask=(c < chunks)[:, None], other=0)
        before = tl.cumsum(own, 0) - own + total[None, :]
        tl.store(counts + c[:, None] * EB + e[None, :], before, mask=(c < chunks)[:, None])
        total += tl.sum(own, 0)
    tl.store(counts + chunks * EB + e, total)


@triton.jit(do_not_specialize=["slots_total", "chunk", "stride", "num_experts", "map_size", "tiles", "block_m"])
def _place(
    ids, expert_map, num_valid, counts, starts, ends, tile_expert, tile_start, slots, local_ids, ticket,
    slots_total, chunk, stride, num_experts, map_size, tiles, block_m,
    K: tl.constexpr, EB: tl.constexpr, SCAN: tl.constexpr, PIECE: tl.constexpr, TB: tl.constexpr, FLAT: tl.constexpr,
    MAPPED: tl.constexpr, HAS_VALID: tl.constexpr, COUNTED: tl.constexpr, SCANNED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Positions of each program's `chunk` slots, and its share of the tile table."""
    wait_for_inputs(PDL)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    first = pid * chunk
    limit = _live_slots(num_valid, slots_total, K, HAS_VALID)
    e = tl.arange(0, EB)
    before = tl.zeros((EB,), tl.int32)  # slots of each expert before this chunk
    total = tl.zeros((EB,), tl.int32)
    if SCANNED:
        before = tl.load(counts + pid * EB + e)
        total = tl.load(counts + programs * EB + e)
    elif COUNTED:
        for at in range(0, programs, 16):
            c = at + tl.arange(0, 16)
            table = tl.load(counts + c[:, None] * EB + e[None, :], mask=(c < programs)[:, None], other=0)
            total += tl.sum(table, 0)
            before += tl.sum(tl.where((c < pid)[:, None], table, 0), 0)
    else:
        # The next ids are loaded while these are counted: one trip to the L2 costs more than the counting.
        lane = tl.arange(0, SCAN)
        bound = tl.minimum(first, limit)
        now = _experts_of(ids, expert_map, lane, bound, stride, num_experts, map_size, K, FLAT, MAPPED)
        for at in range(0, bound, SCAN):
            p = at + SCAN + lane
            following = _experts_of(ids, expert_map, p, bound, stride, num_experts, map_size, K, FLAT, MAPPED)
            before += _count(now, EB)
            now = following
        now = _experts_of(ids, expert_map, first + lane, limit, stride, num_experts, map_size, K, FLAT, MAPPED)
        for at in range(first, limit, SCAN):
            p = at + SCAN + lane
            following = _experts_of(ids, expert_map, p, limit, stride, num_experts, map_size, K, FLAT, MAPPED)
            total += _count(now, EB)
            now = following
        total += before

    begin = tl.cumsum(total, 0) - total
    if pid == 0:
        tl.store(starts + e, begin, mask=e < num_experts)
        tl.store(ends + e, begin + total, mask=e < num_experts)
        tl.store(ticket, 0)
    # Where the next slot of each expert goes; dropped slots share the positions behind the last live one.
    base = begin + before
    dropped = tl.sum(total, 0) + first - tl.sum(before, 0)
    lane_of_piece = tl.arange(0, PIECE)
    earlier = lane_of_piece[:, None] < lane_of_piece[None, :]
    for at in range(first, tl.minimum(first + chunk, slots_total), PIECE):
        p = at + lane_of_piece
        mine = _experts_of(ids, expert_map, p, limit, stride, num_experts, map_size, K, FLAT, MAPPED)
        rank = tl.sum(((mine[:, None] == mine[None, :]) & earlier).to(tl.int32), 0)
        live = mine >= 0
        to = tl.where(live, tl.gather(base, tl.maximum(mine, 0), 0), dropped) + rank
        tl.store(local_ids + p, mine, mask=p < slots_total)
        # A dropped slot leaves 0, which is safe to follow, in the position that it takes.
        tl.store(slots + to, tl.where(live, p, 0), mask=p < slots_total)
        if COUNTED:
            own = _count(mine, EB)
            base += own
            dropped += PIECE - tl.sum(own, 0)
    _store_tiles(tile_expert, tile_start, begin, total, pid * TB, programs * TB, tiles, block_m, EB, TB)


@triton.jit(do_not_specialize=["num_experts", "tiles", "block_m"])
def _cover(
    starts, ends, tile_expert, tile_start, ticket, num_experts, tiles, block_m,
    EB: tl.constexpr, TB: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The tile table of ranges that are there already."""
    wait_for_inputs(PDL)
    if tl.program_id(0) == 0:
        tl.store(ticket, 0)
    e = tl.arange(0, EB)
    begin = tl.load(starts + e, mask=e < num_experts, other=0)
    rows = tl.maximum(tl.load(ends + e, mask=e < num_experts, other=0) - begin, 0)
    first, step = tl.program_id(0) * TB, tl.num_programs(0) * TB
    _store_tiles(tile_expert, tile_start, begin, rows, first, step, tiles, block_m, EB, TB)


def _slices(like: Tensor, *sizes: int) -> list[Tensor]:
    """int32 vectors of these sizes in one allocation, each on a 16-byte boundary."""
    padded = [-(-size // 4) * 4 for size in sizes]
    buffer = torch.empty(sum(padded), dtype=torch.int32, device=like.device)
    return [part[:size] for part, size in zip(buffer.split(padded), sizes, strict=True)]


def _bins(num_experts: int) -> int:
    # Never under a wavefront of AMD: a histogram has at least one bin a lane.
    return max(64, triton.next_power_of_2(num_experts))


def _warps() -> int:
    """Warps of a program of 128 threads: a histogram of a block smaller than the program is left to nobody's care."""
    return 2 if torch.version.hip is not None else 4


def align(
    topk_ids: Tensor,
    *,
    num_experts: int,
    block_m: int,
    expert_map: Tensor | None = None,
    num_valid: Tensor | None = None,
) -> RowTable:
    """Sort the slots of `topk_ids` by local expert; dropped ones get no position.

    topk_ids: int32 or int64 [T, K], columns contiguous. Local ids, or with expert_map (int32 [E_global]) global ones.
    num_experts: local experts, 1 to 1024. num_valid: int32 device scalar (or [1]); rows from it on are dropped, as is
    every id that is, mapped, outside [0, num_experts). Slots of one expert keep their order. `slots` holds 0 behind
    the last live position. One launch up to ONE_LAUNCH slots, two up to TWO_LAUNCHES, else three; none for T = 0 (no
    tiles then).

    Roofline: 4 bytes a slot in, 8 out and 8 a tile (131072 slots: 1.6 MB, 0.4 us at 4.3 TB/s): latency alone counts.
    Seen on an H200: 4 us at 512 slots, 8 at 8192; expected beyond: 10, of which about 3 are launches.

    Raises ValueError for a shape, dtype or number of experts that it does not take.
    """
    if topk_ids.dim() != 2 or topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"topk_ids must be int32 or int64 [T, K], got {topk_ids.dtype} {list(topk_ids.shape)}")
    if not 1 <= num_experts <= 1024:
        raise ValueError(f"align takes 1 to 1024 local experts, got {num_experts}")
    if block_m < 1:
        raise ValueError(f"block_m must be positive, got {block_m}")
    tokens, top_k = topk_ids.shape
    slots_total = tokens * top_k
    if slots_total == 0:
        starts, ends = topk_ids.new_zeros((2, num_experts), dtype=torch.int32)
        tile_expert, tile_start, ticket, slots, local_ids = _slices(topk_ids, 0, 0, 1, 0, 0)
        return RowTable(0, block_m, starts, ends, tile_expert, tile_start, ticket.zero_(), slots, local_ids)
    if top_k > 1 and topk_ids.stride(1) != 1:
        topk_ids = topk_ids.contiguous()

    bins, tiles = _bins(num_experts), most_tiles(slots_total, num_experts, block_m)
    counted, scanned = slots_total > ONE_LAUNCH, slots_total > TWO_LAUNCHES
    chunk = PIECE * (triton.cdiv(slots_total, PIECE * MOST_PROGRAMS) if counted else 1)
    programs = triton.cdiv(slots_total, chunk)
    if not counted:
        # With few slots the tile table is the longer part: programs without a slot of their own help to write it.
        programs = max(programs, triton.cdiv(tiles, TILE_ROWS))
    starts, ends, tile_expert, tile_start, slots, local_ids, ticket, counts = _slices(
        topk_ids, num_experts, num_experts, tiles, tiles, slots_total, slots_total, 1,
        (programs + 1) * bins if counted else 0,
    )  # fmt: skip
    # Both lists of keywords say how ids are read; a map and a count that are absent are never dereferenced.
    ids = (topk_ids, topk_ids if expert_map is None else expert_map, topk_ids if num_valid is None else num_valid)
    sizes = (slots_total, chunk, topk_ids.stride(0), num_experts, 0 if expert_map is None else expert_map.shape[0])
    kinds = {
        "K": top_k,
        "EB": bins,
        "FLAT": tokens == 1 or topk_ids.stride(0) == top_k,
        "MAPPED": expert_map is not None,
        "HAS_VALID": num_valid is not None,
        "num_warps": _warps(),
        **dependent_launch(topk_ids),
    }
    scan = max(PIECE, min(SCAN, triton.next_power_of_2(chunk if counted else slots_total)))
    if counted:
        _count_chunks[(programs,)](*ids, counts, *sizes, SCAN=scan, **kinds)
    if scanned:
        _scan_chunks[(bins // EXPERTS,)](
            counts, programs, EB=bins, CHUNKS=CHUNKS, EXPERTS=EXPERTS, num_warps=4, **dependent_launch(counts)
        )
    _place[(programs,)](
        *ids, counts, starts, ends, tile_expert, tile_start, slots, local_ids, ticket, *sizes, tiles, block_m,
        SCAN=scan, PIECE=PIECE, TB=TILE_ROWS, COUNTED=counted, SCANNED=scanned, **kinds,
    )  # fmt: skip
    return RowTable(slots_total, block_m, starts, ends, tile_expert, tile_start, ticket, slots, local_ids)


def cover(starts: Tensor, ends: Tensor, *, positions: int, block_m: int, tiles: int | None = None) -> RowTable:
    """The tiles of expert ranges that exist already; positions are then the rows of the input (`slots` is None).

    starts, ends: int32 [E], E up to 1024: batched, starts[e] = e * M and ends[e] = starts[e] + masked_m[e]; grouped,
    offsets[:-1] and offsets[1:]. positions: the rows of the input. tiles: the host's bound on their number, by default
    most_tiles(positions, E, block_m), which needs ranges that do not overlap; batched has E * ceil(M / block_m).
    One launch. Roofline: 8 bytes an expert and a tile, so latency alone: about 2.5 us on an H200.

    Raises ValueError for a shape or dtype that it does not take.
    """
    experts = starts.shape[0]
    if starts.dtype != torch.int32 or ends.dtype != torch.int32 or starts.dim() != 1 or ends.shape != starts.shape:
        raise ValueError(f"starts and ends must be int32 [E], got {starts.dtype} {list(starts.shape)} and {ends.dtype}")
    if not 1 <= experts <= 1024 or block_m < 1:
        raise ValueError(f"cover takes 1 to 1024 experts and a positive block_m, got {experts} and {block_m}")
    if tiles is None:
        tiles = most_tiles(positions, experts, block_m) if positions else 0
    tile_expert, tile_start, ticket = _slices(starts, tiles, tiles, 1)
    if tiles:
        _cover[(triton.cdiv(tiles, TILE_ROWS),)](
            starts, ends, tile_expert, tile_start, ticket, experts, tiles, block_m,
            EB=_bins(experts), TB=TILE_ROWS, num_warps=4, **dependent_launch(starts),
        )  # fmt: skip
    return RowTable(positions, block_m, starts, ends, tile_expert, tile_start, ticket)
