"""The process groups of a layer: who shares its experts, and who shares an expert's columns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_core.errors import BindError
from moe_core.protocols import Binding


@dataclass(frozen=True, slots=True)
class Groups:
    """ep: the ranks with this rank's tp_rank; tp: those with its ep_rank, None without TP.

    members: the rank within `ep` of each EP rank.
    """

    ep: Any
    tp: Any
    members: tuple[int, ...]


def make_groups(binding: Binding) -> Groups:
    """From the group of all ranks of the layer. Every rank of it calls this together. Raises BindError."""
    group, parallel = binding.group, binding.parallel
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise BindError(
            f"tokens of other ranks travel over a torch.distributed process group, got {type(group).__name__}",
            hint="pass plan(..., group=...), the group of all ranks of this layer",
        )
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, (parallel.ep_rank, parallel.tp_rank, dist.get_rank()), group=group)
    wanted = {(ep, tp) for ep in range(parallel.ep_size) for tp in range(parallel.tp_size)}
    found = {(ep, tp): world for ep, tp, world in places}
    if set(found) != wanted or len(places) != len(wanted):
        raise BindError(
            f"the group's ranks are (ep_rank, tp_rank) {[place[:2] for place in places]}, "
            f"expected each of {parallel.ep_size} x {parallel.tp_size} once"
        )
    if parallel.tp_size == 1:
        ordered = {ep: rank for rank, (ep, _, _) in enumerate(places)}
        return Groups(group, None, tuple(ordered[ep] for ep in range(parallel.ep_size)))
    backend = dist.get_backend(group)
    ep_worlds = [found[ep, parallel.tp_rank] for ep in range(parallel.ep_size)]
    tp_worlds = [found[parallel.ep_rank, tp] for tp in range(parallel.tp_size)]
    ep = dist.new_group(ep_worlds, backend=backend, use_local_synchronization=True)
    tp = dist.new_group(tp_worlds, backend=backend, use_local_synchronization=True)
    return Groups(ep, tp, tuple(sorted(ep_worlds).index(world) for world in ep_worlds))
