"""Where the double's ranks live: a kind of device, and connections between real processes over gloo."""

from __future__ import annotations

import pickle
import tempfile
import uuid
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core_mori.testing.errors import DoubleError

BF16, F32, I32 = torch.bfloat16, torch.float32, torch.int32
FNUZ, FN, U8 = torch.float8_e4m3fnuz, torch.float8_e4m3fn, torch.uint8
#: Absent from older torch.
FP4: Final = getattr(torch, "float4_e2m1fn_x2", None)
#: What stands in ids that nobody wrote: out of every range, so whoever uses one notices.
NO_ID: Final = 1 << 30


#: Bytes of what ranks tell each other about a call.
_ROOM: Final = 4096


def need(holds: bool, message: str) -> None:
    """Raises DoubleError unless it holds."""
    if not holds:
        raise DoubleError(message)


def need_tensor(name: str, tensor: Any, dtypes: tuple[Any, ...], shape: tuple[int | None, ...]) -> None:
    """An argument's dtype, shape (None: any) and contiguity: MoRI takes the address and checks nothing."""
    found = getattr(tensor, "dtype", type(tensor).__name__)
    need(found in dtypes, f"{name} is {found}, not {' or '.join(map(str, dtypes))}")
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    need(fits, f"{name} is {list(tensor.shape)}, not {list(shape)}")
    need(tensor.is_contiguous(), f"{name} is not contiguous")


def poison(tensor: Tensor) -> None:
    """What memory holds that nobody wrote: NaN in floats, and ids out of every range."""
    if tensor.dtype.itemsize == 1:
        tensor.view(U8).fill_(0x80 if tensor.dtype is FNUZ else 0xFF)  # NaN in either flavor
    elif tensor.dtype.is_floating_point:
        tensor.fill_(float("nan"))
    else:
        tensor.fill_(NO_ID)


@dataclass(slots=True)
class Device:
    """What this process's device is. arch decides which eight-bit floats have kernels; compute_units bounds a grid.

    heap_bytes: the symmetric heap of a process, as MORI_SHMEM_HEAP_SIZE says; nothing of it is really allocated.
    """

    arch: str = "gfx950"
    compute_units: int = 256
    heap_bytes: int = 16 << 30
    used: int = 0
    ranks: Ranks | None = None
    open_operators: int = field(default=0)

    def row_dtypes(self) -> tuple[Any, ...]:
        """Of rows that dispatch has a kernel for."""
        if self.arch == "gfx942":
            return (BF16, F32, FNUZ)
        return (BF16, F32, FN, *(() if FP4 is None else (FP4,)))

    def allocate(self, size: int) -> int:
        """Count symmetric memory. Raises RuntimeError past the heap."""
        if self.used + size > self.heap_bytes:
            raise RuntimeError(f"symmetric heap: {size} bytes asked for, {self.heap_bytes - self.used} left")
        self.used += size
        return size


#: This process's. `moe_core_mori.testing.install` replaces it.
HERE = Device()


def device() -> Device:
    """This process's device."""
    return HERE


def new_unique_id() -> bytes:
    """A place where ranks meet: the name of a file."""
    return str(Path(tempfile.gettempdir()) / f"mori-double-{uuid.uuid4().hex}").encode()


class Ranks:
    """Connected processes. All of them make the same calls in the same order, which is checked too."""

    def __init__(self, unique_id: bytes, rank: int, size: int, patience_s: float = 60) -> None:
        need(isinstance(unique_id, bytes) and 0 <= rank < size, f"rank {rank} of {size}, unique id {unique_id!r}")
        self.rank, self.size = rank, size
        store = torch._C._distributed_c10d.FileStore(unique_id.decode(), size)
        self._group: Any = dist.ProcessGroupGloo(store, rank, size, timedelta(seconds=patience_s))
        self.gather(rank)  # nobody goes on, or away, before all are connected

    def gather(self, value: Any) -> list[Any]:
        """What every rank gave."""
        said = pickle.dumps(value)
        need(len(said) <= _ROOM, f"{len(said)} bytes to tell the others, past {_ROOM}")
        mine = torch.frombuffer(bytearray(said.ljust(_ROOM, b"\0")), dtype=U8)
        theirs = [torch.empty_like(mine) for _ in range(self.size)]
        self._group.allgather([theirs], [mine]).wait()
        return [pickle.loads(one.numpy().tobytes()) for one in theirs]

    def agree(self, call: str, *values: Any) -> None:
        """All ranks are in the same call with the same values."""
        said = self.gather((call, values))
        need(said == said[:1] * self.size, f"ranks differ: {said}")

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """rows: [S, W], those for each rank in turn -> the rows for this rank, by the rank that sent them."""
        payload = rows.contiguous().view(U8)
        got = payload.new_empty(sum(received), payload.shape[1])
        self._group.alltoall_base(got, payload, received, sent).wait()
        return got.view(rows.dtype)


@dataclass(slots=True)
class Routed:
    """Which rows went where. tokens: int64, the token of each row sent, by rank; sent, received: rows by rank.

    places: int64, where each row received lies, by the rank that sent it: in no order, as MoRI's atomics have it.
    """

    tokens: Tensor
    sent: list[int]
    received: list[int]
    places: Tensor

    @property
    def total(self) -> int:
        """Rows received."""
        return sum(self.received)

    def spread(self, ranks: Ranks, part: Tensor, into: Tensor) -> None:
        """Send the rows of `part` [T, W] and put what comes into the first rows of `into`; poison the others."""
        poison(into)
        as_bytes = into.view(U8) if into.dtype.itemsize == 1 else into  # not all indexing knows eight-bit floats
        given = part.view(U8) if part.dtype.itemsize == 1 else part
        as_bytes[self.places] = ranks.exchange(given[self.tokens], self.sent, self.received).view(as_bytes.dtype)

    def collect(self, ranks: Ranks, rows: Tensor, tokens: int) -> Tensor:
        """The rows sent back and added up in float32: [tokens, W]."""
        back = ranks.exchange(rows[self.places], self.received, self.sent)
        return torch.zeros(tokens, rows.shape[1]).index_add_(0, self.tokens, back.float())


def route(ranks: Ranks, ids: Tensor, experts_a_rank: int, calls: int) -> Routed:
    """ids: int32 [T, K]. A token goes once to each rank that has one of its experts."""
    owner = ids.long() // experts_a_rank
    goes = (owner.unsqueeze(-1) == torch.arange(ranks.size)).any(1)  # [T, ranks]
    sent = goes.sum(0)
    received = [one[ranks.rank] for one in ranks.gather(sent.tolist())]
    order = torch.Generator().manual_seed(1000 * calls + ranks.rank)
    places = torch.randperm(sum(received), generator=order)
    return Routed(goes.T.nonzero()[:, 1], sent.tolist(), received, places)
