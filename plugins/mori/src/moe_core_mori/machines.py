"""Which ranks share a machine: MoRI believes what it is told of nodes, and hangs or faults where it is not so."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moe_core.errors import BindError

_BOOT = Path("/proc/sys/kernel/random/boot_id")


def here() -> str:
    """The same in all processes of a machine, in containers with names of their own too."""
    try:
        return _BOOT.read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()


def check_nodes(group: Any, node: int) -> None:
    """Every `node` ranks of `group`, in turn, must be on one machine. Collective. Raises BindError, on all ranks."""
    places: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(places, here(), group=group)
    for first in range(0, len(places), node):
        machines = len(set(places[first : first + node]))
        if machines > 1:
            raise BindError(
                f"MoRI is told that EP ranks {first} to {first + node - 1} are on one node, and they are on "
                f"{machines} machines",
                hint="say how many GPUs a node has (the option gpus_per_node of mori and of mori_ll), and number the "
                "ranks of a machine one after another; mori_v2 runs within a node only",
            )
