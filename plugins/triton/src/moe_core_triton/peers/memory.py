"""Memory that the host's other GPUs write to: one allocation for all layers with equal needs, two windows in it."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core.errors import BindError, ContractViolation

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
    [2, PROGRAMS], how often each program has waited, for tokens and for results.
    """

    def __init__(self, local: Tensor, addresses: list[int], place: dict[str, int]) -> None:
        self.local, self.place = local, place
        self.bases = torch.tensor(addresses, dtype=torch.int64, device=local.device)
        self.epochs = torch.zeros(2, PROGRAMS, dtype=torch.int32, device=local.device)
        self._user: weakref.ref[Any] | None = None
        self._last: tuple[torch.cuda.Stream, torch.cuda.Event] | None = None

    @property
    def free(self) -> bool:
        """No dispatch waits for its combine here."""
        return self._user is None or self._user() is None

    def take(self, user: Any) -> None:
        """By a handle, until `give_back` or until nobody holds it any more."""
        self._user = weakref.ref(user)
        if self._last is not None and not torch.cuda.is_current_stream_capturing():
            stream, done = self._last
            if stream != torch.cuda.current_stream(self.local.device):
                torch.cuda.current_stream(self.local.device).wait_event(done)

    def give_back(self) -> None:
        """The combine was launched on the current stream."""
        self._user = None
        if self.local.is_cuda and not torch.cuda.is_current_stream_capturing():
            stream = torch.cuda.current_stream(self.local.device)
            self._last = stream, stream.record_event()

    def part(self, name: str, rows: int, dtype: torch.dtype, columns: int) -> Tensor:
        """[rows, columns] of a part."""
        begin = self.place[name]
        size = rows * columns * dtype.itemsize
        return self.local[begin : begin + size].view(dtype).view(rows, columns)


class Memory:
    """The windows, and the word in host memory that says for whom a kernel waited in vain (EP rank + 1)."""

    def __init__(self, group: Any, members: tuple[int, ...], need: Need, device: torch.device) -> None:
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
        """The first free one: ranks that make the same calls find the same. Raises ContractViolation."""
        for window in self.windows:
            if window.free:
                return window
        raise ContractViolation(
            f"{WINDOWS} results of dispatches wait for their combine; another dispatch would overwrite the first",
            hint=f"combine one before; at most {WINDOWS} micro-batches can be in flight, over all layers",
        )


#: Of a group, by need. Layers hold it, so it goes with the last of them.
_MADE: weakref.WeakKeyDictionary[Any, weakref.WeakValueDictionary[Need, Memory]] = weakref.WeakKeyDictionary()


def shared_memory(group: Any, members: tuple[int, ...], need: Need, device: torch.device) -> Memory:
    """For a layer; all ranks of `group` call this together. members: the rank in it of each EP rank."""
    made = _MADE.setdefault(group, weakref.WeakValueDictionary())
    # Ranks collect garbage at different times, so they agree on whether the memory is still there.
    mine = made.get(need)
    there = [False] * dist.get_world_size(group)
    dist.all_gather_object(there, mine is not None, group=group)
    if mine is None or not all(there):
        mine = made[need] = Memory(group, members, need, device)
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
