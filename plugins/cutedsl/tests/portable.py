"""In plain torch what the kernels of this plugin compute: where there is no GPU, and to compare them with."""

from __future__ import annotations

import torch
from moe_core_cutedsl.sm90_tactics import most_tiles
from torch import Tensor

GARBAGE = -(2**30)


class Tiles:
    """The fields of `moe_core_cutedsl.kernels.sort.Tiles`."""

    def __init__(self, **fields: object) -> None:
        self.__dict__.update(fields)


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
    """As the kernel, with garbage in all that is undefined."""
    tokens, top_k = topk_ids.shape
    ids = topk_ids.reshape(-1).long()
    if expert_map is not None:
        known = (ids >= 0) & (ids < expert_map.shape[0])
        ids = torch.where(known, expert_map.long()[torch.where(known, ids, 0)], -1)
    ids = torch.where((ids >= 0) & (ids < num_experts), ids, -1)
    if num_valid is not None:
        ids = torch.where(torch.arange(tokens).repeat_interleave(top_k) < num_valid, ids, -1)
    tiles = most_tiles(ids.numel(), num_experts, rows)
    tile_expert, tile_limit = (torch.full((tiles,), GARBAGE, dtype=torch.int32) for _ in range(2))
    slots = torch.full((tiles * rows,), GARBAGE, dtype=torch.int32)
    used = 0
    for expert in range(num_experts):
        mine = (ids == expert).nonzero().flatten()
        own = -(-mine.numel() // rows)
        begin = used * rows
        slots[begin : begin + mine.numel()] = mine.int()
        for tile in range(used, used + own):
            tile_expert[tile], tile_limit[tile] = expert, min((tile + 1) * rows, begin + mine.numel())
        used += own
    live = (ids >= 0).view(tokens, top_k)
    return Tiles(
        rows=rows,
        tile_expert=tile_expert,
        tile_limit=tile_limit,
        slots=slots,
        used=torch.tensor([used], dtype=torch.int32),
        local_ids=ids.int().view(tokens, top_k),
        weights=torch.where(live, topk_weights.float(), 0.0) * factor,
    )


def combine(rows: Tensor, weights: Tensor, local_ids: Tensor, out: Tensor) -> None:
    """As the kernel."""
    slots = rows.view(*local_ids.shape, -1).float()
    live = (local_ids >= 0)[..., None]
    out.copy_((torch.where(live, slots, 0.0) * weights[..., None]).sum(1))
