"""Memory that the host's other GPUs write to: one allocation for all layers with equal needs, two windows in it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core.errors import BindError, ContractViolation
from moe_core_triton.kernels.launching import processors
from moe_core_triton.peers.turns import Turns

#: Results of dispatch that may wait for their combine at a time, of all layers that share the memory.
WINDOWS: Final = 2
#: Programs of a launch at most: each has flags of its own.
PROGRAMS: Final = 8192
_ALIGN: Final = 256


@dataclass(frozen=True, slots=True)
class Need:
    """What a window must hold; equal needs share one. Bytes are of a row.

    ranks: of the EP group. rows: of one rank at most.
    """

    ranks: int
    rows: int
    hidden_bytes: int
    scale_bytes: int
    result_bytes: int
    top_k: int

    def places(self) -> tuple[dict[str, int], int]:
        """(offset of each part, bytes of a window). Everything a window has is [ranks * rows] rows, but the flags."""
        rows = self.ranks * self.rows
        sizes = {
            "sent": 4 * self.ranks * PROGRAMS,
            "returned": 4 * self.ranks * PROGRAMS,
            "ids": 4 * rows * self.top_k,
            "weights": 4 * rows * self.top_k,
            "scale": rows * self.scale_bytes,
            "hidden": rows * self.hidden_bytes,
            "results": rows * self.result_bytes,
        }
        found, end = {}, 0
        for name, size in sizes.items():
            found[name] = end
            end += -(-size // _ALIGN) * _ALIGN
        return found, end


class Window:
    """What one dispatch and its combine use. `place`: offsets of its parts, the same on every rank.

    bases: int64 [ranks], where it begins in each rank's memory as this GPU sees it, by EP rank. epochs: int32
    [2, PROGRAMS], how often each program has sent, tokens and results.
    """

    def __init__(self, local: Tensor, addresses: list[int], place: dict[str, int]) -> None:
        self.local, self.place = local, place
        self.bases = torch.tensor(addresses, dtype=torch.int64, device=local.device)
        self.epochs = torch.zeros(2, PROGRAMS, dtype=torch.int32, device=local.device)
        self._user: weakref.ref[Any] | None = None

    @property
    def free(self) -> bool:
        """No dispatch was left without its combine here."""
        return self._user is None

    @property
    def abandoned(self) -> bool:
        """The dispatch that took it will not be combined: nobody holds its handle."""
        return self._user is not None and self._user() is None

    def take(self, user: Any) -> None:
        """By a handle, until `give_back` or until nobody holds it any more."""
        self._user = weakref.ref(user)

    def give_back(self) -> None:
        """The combine was launched."""
        self._user = None

    def part(self, name: str, rows: int, dtype: torch.dtype, columns: int) -> Tensor:
        """[rows, columns] of a part."""
        begin = self.place[name]
        size = rows * columns * dtype.itemsize
        return self.local[begin : begin + size].view(dtype).view(rows, columns)


class Memory:
    """The windows, and the word in host memory that says for whom a kernel waited in vain (EP rank + 1).

    processors: of the smallest GPU, since all ranks must launch alike. turns: of the group.
    """

    def __init__(
        self, group: Any, members: tuple[int, ...], need: Need, device: torch.device, *, processors: int, turns: Turns
    ) -> None:
        self.processors, self.turns = processors, turns
        place, size = need.places()
        buffer, handle = _allocate(WINDOWS * size, group, device)
        self._held = buffer, handle
        self.failure = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        self.windows = [
            Window(
                buffer[number * size : (number + 1) * size],
                [int(handle.buffer_ptrs[member]) + number * size for member in members],
                place,
            )
            for number in range(WINDOWS)
        ]

    def window(self) -> Window:
        """The first free one: ranks that make the same calls find the same. Raises ContractViolation.

        An abandoned one only if there is no other: ranks notice at different times that a failed call's handle is gone.
        """
        for window in self.windows:
            if window.free:
                return window
        for window in self.windows:
            if window.abandoned:
                return window
        raise ContractViolation(
            f"{WINDOWS} results of dispatches wait for their combine; another dispatch would overwrite the first",
            hint=f"combine one before; at most {WINDOWS} micro-batches can be in flight, over all layers",
        )


@dataclass(slots=True)
class _Group:
    """What the layers of a group share. memories: by need; layers hold them, so each goes with the last of them."""

    turns: Turns
    memories: weakref.WeakValueDictionary[Need, Memory]


_MADE: weakref.WeakKeyDictionary[Any, _Group] = weakref.WeakKeyDictionary()


def shared_memory(group: Any, members: tuple[int, ...], need: Need, device: torch.device) -> Memory:
    """For a layer; all ranks of `group` call this together. members: the rank in it of each EP rank."""
    made = _MADE.setdefault(group, _Group(Turns(device), weakref.WeakValueDictionary()))
    # Ranks collect garbage at different times, so they agree on whether the memory is still there.
    mine = made.memories.get(need)
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, (mine is not None, processors(device)), group=group)
    if mine is None or not all(there for there, _ in said):
        smallest = min(count for _, count in said)
        mine = made.memories[need] = Memory(group, members, need, device, processors=smallest, turns=made.turns)
    return mine


def _allocate(size: int, group: Any, device: torch.device) -> tuple[Tensor, Any]:
    try:
        import torch.distributed._symmetric_memory as symmetric

        buffer = symmetric.empty(size, dtype=torch.uint8, device=device)
        handle = symmetric.rendezvous(buffer, group)
    except (ImportError, AttributeError, RuntimeError) as error:
        raise BindError(
            f"torch gave no memory that the GPUs of this group share ({size >> 20} MiB a rank): {error}",
            hint="all ranks must be on one host, with peer access between their GPUs; choose the dispatcher "
            "'allgather' otherwise",
        ) from error
    buffer.zero_()
    torch.cuda.synchronize(device)
    dist.barrier(group)
    return buffer, handle
