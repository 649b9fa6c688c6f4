"""The process groups of a layer: who shares its experts, and who shares an expert's columns."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from moe_core.config import ParallelConfig
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


#: (EP subgroup, TP subgroup, members) of a group, by (ep_size, tp_size, ep_rank, tp_rank): a communicator costs memory
#: and seconds, and a model has many layers. All ranks fill it alike. It does not hold the group itself, to let it go.
_MADE: weakref.WeakKeyDictionary[Any, dict[tuple[int, ...], tuple[Any, Any, tuple[int, ...]]]]
_MADE = weakref.WeakKeyDictionary()


def make_groups(binding: Binding) -> Groups:
    """From the group of all ranks of the layer. Every rank of it calls this together. Raises BindError.

    Layers of one group that are split in the same way share what the first of them got.
    """
    group, parallel = binding.group, binding.parallel
    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        raise BindError(
            f"tokens of other ranks travel over a torch.distributed process group, got {type(group).__name__}",
            hint="pass plan(..., group=...), the group of all ranks of this layer",
        )
    key = parallel.ep_size, parallel.tp_size, parallel.ep_rank, parallel.tp_rank
    made = _MADE.setdefault(group, {})
    if key not in made:
        made[key] = _make(group, parallel)
    ep, tp, members = made[key]
    return Groups(group if ep is None else ep, tp, members)


def _make(group: Any, parallel: ParallelConfig) -> tuple[Any, Any, tuple[int, ...]]:
    """None for an EP subgroup that is the group itself."""
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
        return None, None, tuple(ordered[ep] for ep in range(parallel.ep_size))
    backend = dist.get_backend(group)
    ep_worlds = [found[ep, parallel.tp_rank] for ep in range(parallel.ep_size)]
    tp_worlds = [found[parallel.ep_rank, tp] for tp in range(parallel.tp_size)]
    ep = dist.new_group(ep_worlds, backend=backend, use_local_synchronization=True)
    tp = dist.new_group(tp_worlds, backend=backend, use_local_synchronization=True)
    return ep, tp, tuple(sorted(ep_worlds).index(world) for world in ep_worlds)
