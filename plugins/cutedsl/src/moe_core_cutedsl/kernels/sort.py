"""The router's choice as the tiles that FlashInfer's grouped GEMMs walk: slots sorted by expert, each expert's rows
beginning a tile of their own. In the place of FlashInfer's `moe_sort`, whose C++ module needs nvcc, headers from its
artifact server and minutes when it is first used.

Every program knows the whole histogram, so none waits for another: slots of an expert keep their order on every run,
and nothing is shared between calls. Up to `ONE_LAUNCH` slots each program counts all ids itself; above, a first kernel
leaves one histogram a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core_cutedsl.sm90_tactics import most_tiles

ONE_LAUNCH = 2048
MOST_PROGRAMS = 128
PIECE = 128  # slots ranked together, by comparing all pairs
SCAN = 1024  # ids counted at a time
TILES = 16  # tiles looked up at a time
MOST_EXPERTS = 1024


@dataclass(slots=True)
class Tiles:
    """Where the slots of a call went. S = T * K slots, N tiles at most, of `rows` rows each.

    tile_expert, tile_limit: int32 [N]; a tile's local expert, and the position behind its last live row. slots: int32
    [N * rows]; the slot at a position, undefined where there is none. used: int32 [1], tiles that hold something, all
    others being undefined. local_ids: int32 [T, K], -1 for a dropped slot. weights: float32 [T, K], the router's times
    the layer's factor, 0 for a dropped slot whatever stood there.
    """

    rows: int
    tile_expert: Tensor
    tile_limit: Tensor
    slots: Tensor
    used: Tensor
    local_ids: Tensor
    weights: Tensor


@triton.jit
def _experts_of(ids, expert_map, p, limit, num_experts, map_size, MAPPED: tl.constexpr):
    """The local experts of the slots `p`, int32; -1 for a dropped one and for p >= limit."""
    e = tl.load(ids + p, mask=p < limit, other=-1)
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


# A kernel has one form for every number of tokens, so that a plan can compile all that its calls will need. Tensors of
# the caller's may be views that begin anywhere.
_READ = ["ids", "expert_map", "num_valid"]


@triton.jit(do_not_specialize=["slots_total", "chunk", "num_experts", "map_size"], do_not_specialize_on_alignment=_READ)
def _count_chunks(
    ids, expert_map, num_valid, counts, slots_total, chunk, num_experts, map_size,
    K: tl.constexpr, EB: tl.constexpr, SCAN: tl.constexpr, MAPPED: tl.constexpr, HAS_VALID: tl.constexpr,
):  # fmt: skip
    """counts [programs, EB]: the histogram of each program's `chunk` slots."""
    pid = tl.program_id(0)
    limit = tl.minimum(_live_slots(num_valid, slots_total, K, HAS_VALID), (pid + 1) * chunk)
    total = tl.zeros((EB,), tl.int32)
    for at in range(pid * chunk, limit, SCAN):
        e = _experts_of(ids, expert_map, at + tl.arange(0, SCAN), limit, num_experts, map_size, MAPPED)
        total += _count(e, EB)
    tl.store(counts + pid * EB + tl.arange(0, EB), total)


@triton.jit(
    do_not_specialize=["factor", "slots_total", "chunk", "num_experts", "map_size", "tiles", "tile_rows"],
    do_not_specialize_on_alignment=[*_READ, "given"],
)
def _place(
    ids, expert_map, num_valid, counts, given, tile_expert, tile_limit, slots, used, local_ids, weights, factor,
    slots_total, chunk, num_experts, map_size, tiles, tile_rows,
    K: tl.constexpr, EB: tl.constexpr, SCAN: tl.constexpr, PIECE: tl.constexpr, TILES: tl.constexpr,
    MAPPED: tl.constexpr, HAS_VALID: tl.constexpr, COUNTED: tl.constexpr,
):  # fmt: skip
    """Positions of each program's `chunk` slots, and its share of the tile table."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    first = pid * chunk
    limit = _live_slots(num_valid, slots_total, K, HAS_VALID)
    before = tl.zeros((EB,), tl.int32)  # slots of each expert before this chunk
    total = tl.zeros((EB,), tl.int32)
    e = tl.arange(0, EB)
    if COUNTED:
        for at in range(0, programs, 16):
            c = at + tl.arange(0, 16)
            table = tl.load(counts + c[:, None] * EB + e[None, :], mask=(c < programs)[:, None], other=0)
            total += tl.sum(table, 0)
            before += tl.sum(tl.where((c < pid)[:, None], table, 0), 0)
    else:
        for at in range(0, limit, SCAN):
            p = at + tl.arange(0, SCAN)
            mine = _experts_of(ids, expert_map, p, limit, num_experts, map_size, MAPPED)
            total += _count(mine, EB)
            before += _count(tl.where(p < first, mine, -1), EB)

    own = tl.cdiv(total, tile_rows)  # tiles of each expert
    last = tl.cumsum(own, 0)
    begin = (last - own) * tile_rows  # the position of its first row
    count = tl.sum(own, 0)
    if pid == 0:
        tl.store(used, count)

    base = begin + before
    piece = tl.arange(0, PIECE)
    earlier = piece[:, None] < piece[None, :]
    for at in range(first, tl.minimum(first + chunk, slots_total), PIECE):
        p = at + piece
        mine = _experts_of(ids, expert_map, p, limit, num_experts, map_size, MAPPED)
        rank = tl.sum(((mine[:, None] == mine[None, :]) & earlier).to(tl.int32), 0)
        to = tl.gather(base, tl.maximum(mine, 0), 0) + rank
        live = mine >= 0
        weight = tl.load(given + p, mask=live & (p < slots_total), other=0.0).to(tl.float32) * factor
        tl.store(slots + to, p, mask=live)
        tl.store(local_ids + p, mine, mask=p < slots_total)
        tl.store(weights + p, weight, mask=p < slots_total)
        base += _count(mine, EB)

    for at in range(pid * TILES, tiles, programs * TILES):
        i = at + tl.arange(0, TILES)
        # Experts that end at or before tile i; one without a tile ends where its predecessor does.
        expert = tl.sum((last[None, :] <= i[:, None]).to(tl.int32), 1)
        end = tl.sum(tl.where(e[None, :] == expert[:, None], (begin + total)[None, :], 0), 1)
        inside = i < tl.minimum(count, tiles)
        tl.store(tile_expert + i, expert, mask=inside)
        tl.store(tile_limit + i, tl.minimum((i + 1) * tile_rows, end), mask=inside)


def _slices(like: Tensor, *sizes: int) -> list[Tensor]:
    """int32 vectors of these sizes in one allocation, each on a 16-byte boundary."""
    padded = [-(-size // 4) * 4 for size in sizes]
    buffer = torch.empty(sum(padded), dtype=torch.int32, device=like.device)
    return [part[:size] for part, size in zip(buffer.split(padded), sizes, strict=True)]


def sort(
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    num_experts: int,
    rows: int,
    factor: float = 1.0,
    expert_map: Tensor | None = None,
    num_valid: Tensor | None = None,
) -> Tiles:
    """Sort the slots by local expert, in tiles of `rows` rows.

    topk_ids: int32 or int64 [T, K], T >= 1; local ids, or with expert_map (int32 [E]) global ones. topk_weights: float
    [T, K]. num_experts: of this rank, 1 to 1024. num_valid: int32 device scalar; rows from it on are dropped, as is
    every id that is, mapped, outside [0, num_experts). One launch up to `ONE_LAUNCH` slots, else two.
    """
    tokens, top_k = topk_ids.shape
    total = tokens * top_k
    ids, given = topk_ids.contiguous(), topk_weights.contiguous()
    tiles = most_tiles(total, num_experts, rows)
    # A histogram has at least one bin for each lane of a warp.
    bins = max(64, triton.next_power_of_2(num_experts))
    counted = total > ONE_LAUNCH
    chunk = PIECE * (triton.cdiv(total, PIECE * MOST_PROGRAMS) if counted else 1)
    programs = triton.cdiv(total, chunk)
    if not counted:
        programs = max(programs, min(MOST_PROGRAMS, triton.cdiv(tiles, TILES)))
    tile_expert, tile_limit, slots, used, local_ids, weights, counts = _slices(
        ids, tiles, tiles, tiles * rows, 1, total, total, programs * bins if counted else 0
    )
    made = Tiles(
        rows,
        tile_expert,
        tile_limit,
        slots,
        used,
        local_ids.view(tokens, top_k),
        weights.view(torch.float32).view(tokens, top_k),
    )
    read = (ids, ids if expert_map is None else expert_map, ids if num_valid is None else num_valid)
    map_size = 0 if expert_map is None else expert_map.shape[0]
    kinds = {
        "K": top_k,
        "EB": bins,
        "SCAN": SCAN,
        "MAPPED": expert_map is not None,
        "HAS_VALID": num_valid is not None,
        "num_warps": 4,
    }
    if counted:
        _count_chunks[(programs,)](*read, counts, total, chunk, num_experts, map_size, **kinds)
    _place[(programs,)](
        *read, counts, given, tile_expert, tile_limit, slots, used, local_ids, made.weights, factor,
        total, chunk, num_experts, map_size, tiles, rows,
        PIECE=PIECE, TILES=TILES, COUNTED=counted, **kinds,
    )  # fmt: skip
    return made
