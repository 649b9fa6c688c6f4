"""MoRI's operators: symmetric buffers that layers with equal needs share, until the last of their plans is closed.

An operator holds the rows of one dispatch until its combine: MoRI counts received rows from one combine to the next,
and a second dispatch in between would spoil both. So there is one operator for each micro-batch that may be in flight,
and the lowest free one is taken, which is the same on all ranks. Making and closing them is collective.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass, field
from typing import Any, Final

import torch
import torch.distributed as dist

from moe_core.dispatchers.torch_distributed.groups import make_groups
from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding
from moe_core_mori import calls
from moe_core_mori.launch import Launch
from moe_core_mori.machines import check_nodes

#: Operators made for fewer tokens a rank were reported to corrupt rows (ROCm/mori issue 356).
FEWEST_TOKENS: Final = 256
_FORGOTTEN = "a plan with MoRI's buffers was dropped without close(): they stay until the process ends"


@dataclass(frozen=True, slots=True)
class Need:
    """What an operator is made for; equal needs share.

    dtype: of the layer, and of combine. sent_dtype: of rows as they travel. most: tokens of a rank in one call.
    launch: of the first interface, or None for the second one, whose `backend` may be named.
    """

    rank: int
    ranks: int
    dtype: torch.dtype
    sent_dtype: torch.dtype
    hidden: int
    scale_words: int
    most: int
    experts_a_rank: int
    top_k: int
    micro_batches: int
    launch: Launch | None = None
    backend: str | None = None


@dataclass(slots=True)
class Slot:
    """An operator, and the handle of the dispatch whose rows it holds."""

    op: Any
    holder: Any = None


@dataclass(slots=True)
class Shared:
    """The operators of one need, and how many plans use them."""

    group: Any
    need: Need
    slots: list[Slot] = field(default_factory=list)
    communicator: Any = None
    users: int = 0

    def take(self, handle: Any) -> Slot:
        """The lowest free operator, for the rows of `handle`. Raises ContractViolation where none is free."""
        for slot in self.slots:
            if slot.holder is None:
                slot.holder = handle
                return slot
        raise ContractViolation(
            f"{len(self.slots)} results of MoRI's dispatch wait for their combine, over all layers; another dispatch "
            "would spoil one",
            hint="combine one before, or raise the option micro_batches; if a call failed between dispatch and "
            "combine, call plan.dispatcher.reset() on all ranks together",
        )

    def holds(self, slot: Slot | None, handle: Any) -> Slot:
        """`slot`. Raises ContractViolation unless it still has the rows of `handle`."""
        if slot is not None and slot.holder is handle:
            return slot
        raise ContractViolation(
            "this result of MoRI's dispatch was combined already, or given up by reset()",
            hint="finish and combine each result once",
        )

    def make(self) -> None:
        """Make all operators. Raises BindError."""
        need, ranks = self.need, self.need.ranks
        try:
            if need.launch is not None:
                calls.join_symmetric_memory(need.rank, ranks, self._share)
            else:
                room = _bytes_v2(need) * need.micro_batches
                self.communicator = calls.make_communicator(need.rank, ranks, room, self._share)
            self.slots = [Slot(self._op()) for _ in range(need.micro_batches)]
            self._meet()  # a rank clears its buffers when it makes them, and must not clear what a peer has sent
        except (RuntimeError, ValueError, AssertionError, TypeError, ImportError, OSError) as error:
            raise BindError(
                f"MoRI made no operator for {need.most} tokens a rank of {need.hidden} values on {ranks} ranks, "
                f"{need.micro_batches} times: {type(error).__name__}: {error}",
                hint="lower max_tokens or the option micro_batches, or raise MORI_SHMEM_HEAP_SIZE before the process "
                "starts",
            ) from error

    def reset(self) -> None:
        """Give up all results that wait for a combine. On all ranks together.

        The first interface's own reset() does nothing in the published versions, so its operators are made anew.
        """
        self._meet()
        if self.need.launch is None:
            for slot in self.slots:
                slot.holder = None
                slot.op.reset()
            self._meet()
            return
        self._drop()  # their memory first: the heap may not hold both
        self.make()

    def close(self) -> None:
        """On all ranks together: nobody's kernels may still write into memory that goes."""
        self._meet()
        if self.need.launch is None:
            for slot in self.slots:
                slot.op.close()
        self._drop()
        if self.communicator is not None:
            self.communicator.destroy()

    def _drop(self) -> None:
        """Let the operators go, which frees those of the first interface; a caller may still hold handles."""
        for slot in self.slots:
            slot.op = slot.holder = None
        self.slots.clear()

    def _op(self) -> Any:
        need, launch = self.need, self.need.launch
        shape: dict[str, Any] = {
            "dtype": need.dtype,
            "rank": need.rank,
            "ranks": need.ranks,
            "hidden": need.hidden,
            "scale_words": need.scale_words,
            "most": need.most,
            "experts_a_rank": need.experts_a_rank,
            "top_k": need.top_k,
        }
        if launch is None:
            return calls.make_v2(self.communicator, sent_dtype=need.sent_dtype, backend=need.backend, **shape)
        return calls.make_v1(
            kernel=launch.kernel,
            warps=launch.warps,
            blocks=launch.blocks,
            rdma_blocks=launch.rdma_blocks,
            gpus_per_node=launch.gpus_per_node,
            **shape,
        )

    def _share(self, value: Any) -> Any:
        said = [value]
        dist.broadcast_object_list(said, src=dist.get_global_rank(self.group, 0), group=self.group)
        return said[0]

    def _meet(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        dist.barrier(group=self.group)


def _bytes_v2(need: Need) -> int:
    """Addresses for the arena of an operator: rows received and rows for combine, ids, weights, scales; and slack."""
    rows = need.ranks * need.most
    row = need.hidden * (need.sent_dtype.itemsize + need.dtype.itemsize) + need.top_k * 8 + 4
    return 2 * rows * (row + -(-need.scale_words * 4 // 128) * 128) + (1 << 28)


_OPEN: list[Shared] = []


class Lease:
    """One plan's share of operators, until `close`. Garbage collection ends none: ranks collect at different times."""

    def __init__(self, group: Any, need: Need) -> None:
        self._shared = _take(group, need)
        self._forgotten = weakref.finalize(self, warnings.warn, _FORGOTTEN, ResourceWarning)
        self._forgotten.atexit = False

    @property
    def shared(self) -> Shared:
        """Raises ContractViolation once it is closed."""
        if not self._forgotten.alive:
            raise ContractViolation("the plan was closed, and MoRI's buffers with it", hint="make a new plan")
        return self._shared

    def close(self) -> None:
        """On all ranks together. Closing twice does nothing."""
        if self._forgotten.detach() is not None:
            self._shared.users -= 1
            if self._shared.users == 0:
                _OPEN.remove(self._shared)
                self._shared.close()


def _take(group: Any, need: Need) -> Shared:
    for shared in _OPEN:
        if shared.group is group and shared.need == need:
            shared.users += 1
            return shared
    check_nodes(group, need.ranks if need.launch is None else need.launch.gpus_per_node)
    made = Shared(group, need)
    made.make()
    made.users = 1
    _OPEN.append(made)
    return made


def ranks_of(binding: Binding) -> Any:
    """The process group whose rank r owns the experts of EP rank r, as MoRI has it. Raises BindError."""
    groups = make_groups(binding)
    if groups.members != tuple(range(binding.parallel.ep_size)):
        raise BindError(
            f"MoRI numbers experts by the rank within the process group, but EP ranks 0, 1, ... are its ranks "
            f"{list(groups.members)}",
            hint="make the group with its ranks in the order of ep_rank",
        )
    return groups.ep


def most_tokens(tokens: int) -> int:
    """Tokens a rank that an operator is made for, where so many come."""
    return max(tokens, FEWEST_TOKENS)


def micro_batches(binding: Binding) -> int:
    """The option, 2 where it is not given."""
    given = binding.options.get("micro_batches", 2)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise BindError(f"the option micro_batches is a positive number, got {given!r}")
    return given
