"""DeepEP's communication buffers: shared by the layers of a model, destroyed when the last of their plans is closed.

A buffer takes gigabytes and its construction is a collective, so layers with equal needs share one. Destruction is a
collective too: close plans on all ranks in the same order. What is not closed lives until the process ends.
"""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist

from moe_core.dispatchers.torch_distributed.groups import make_groups
from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding

#: Ranks that reach each other over NVLink, as DeepEP sees it.
NODE = 8
_QUEUE_DEPTH = "NVSHMEM_QP_DEPTH"
_FORGOTTEN = "a plan with a DeepEP buffer was dropped without close(): the buffer stays until the process ends"


class BufferNeed(Protocol):
    """What a buffer must hold; equal needs (`==`) of one group share one."""

    def make(self, group: Any) -> Any:
        """The buffer, on all ranks together. Raises BindError."""

    def beside(self, other: Any, *, same_group: bool) -> None:
        """Raises BindError where a process cannot have a buffer for this one and one for `other`, which is open."""


@dataclass(frozen=True, slots=True)
class Need:
    """What a buffer of V1 must hold.

    nvl_bytes: for the normal kernels within a node. rdma_bytes: NVSHMEM's heap, for the low-latency kernels and for
    normal ones across nodes. low_latency: (M, H, E) of the low-latency calls, to which the heap is laid out, or None.
    """

    nvl_bytes: int = 0
    rdma_bytes: int = 0
    low_latency: tuple[int, int, int] | None = None
    queue_pairs: int = 1

    def make(self, group: Any) -> Any:
        """A `deep_ep.Buffer`."""
        return _make(group, self)

    def beside(self, other: Any, *, same_group: bool) -> None:
        """A process has one heap of NVSHMEM's."""
        if not (isinstance(other, Need) and other.rdma_bytes and self.rdma_bytes):
            return
        theirs, mine = (_said(one) for one in (other, self))
        raise BindError(
            f"a plan holds DeepEP's NVSHMEM buffer for {theirs}; this one needs it for {mine} "
            f"on {'the same' if same_group else 'another'} group, and a process has one",
            hint="give all layers the same dispatcher, group and max_tokens (or decode_max_tokens), or close the "
            "other plan",
        )


class Receive:
    """The second half of a low-latency call: launched once, on the stream of whoever asks first."""

    def __init__(self, hook: Callable[[], None]) -> None:
        self._hook: Callable[[], None] | None = hook
        self._done: torch.cuda.Event | None = None

    def __call__(self) -> None:
        """What the current stream does next comes after it."""
        hook, self._hook = self._hook, None
        if hook is not None:
            hook()
        elif self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def early(self) -> None:
        """On the current stream, before its owner asks, perhaps on another one."""
        if self._hook is not None:
            self()
            if torch.cuda.is_available():
                self._done = torch.cuda.current_stream().record_event()


@dataclass(slots=True)
class Shared:
    """A buffer and its users.

    warm: shapes of calls whose kernels were compiled (V2). flying: low-latency results that were not combined yet, of
    all layers. receive: that of the last low-latency call. A further call clears the flags that it waits for, so it
    comes first.
    """

    buffer: Any
    group: Any
    need: Any
    users: int = 0
    warm: set[Any] = field(default_factory=set)
    flying: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)
    receive: Receive | None = None

    def settle(self) -> None:
        """Before each low-latency call."""
        if self.receive is not None:
            self.receive.early()
            self.receive = None


_OPEN: list[Shared] = []


class Lease:
    """One plan's share of a buffer, until `close`. Garbage collection ends none: ranks collect at different times."""

    def __init__(self, group: Any, need: BufferNeed) -> None:
        self._shared: Shared | None = _take(group, need)
        self._forgotten = weakref.finalize(self, warnings.warn, _FORGOTTEN, ResourceWarning)
        self._forgotten.atexit = False

    @property
    def shared(self) -> Shared:
        """Raises ContractViolation once it is closed."""
        if self._shared is None:
            raise ContractViolation("the plan was closed, and its DeepEP buffer with it", hint="make a new plan")
        return self._shared

    def close(self) -> None:
        """On all ranks together. Closing twice does nothing."""
        shared, self._shared = self._shared, None
        if shared is not None:
            self._forgotten.detach()
            _give_back(shared)


def _take(group: Any, need: BufferNeed) -> Shared:
    for shared in _OPEN:
        if shared.group is group and shared.need == need:
            shared.users += 1
            return shared
        need.beside(shared.need, same_group=shared.group is group)
    shared = Shared(need.make(group), group, need, users=1)
    _OPEN.append(shared)
    return shared


def _said(need: Need) -> str:
    if need.low_latency is None:
        return f"normal kernels across nodes with {need.rdma_bytes >> 20} MiB"
    tokens, hidden, experts = need.low_latency
    return f"{tokens} low-latency tokens a rank of {hidden} and {experts} experts"


def _make(group: Any, need: Need) -> Any:
    if need.nvl_bytes and need.rdma_bytes >= 1 << 31:
        raise BindError(
            f"DeepEP's normal kernels across nodes address less than 2 GiB of NVSHMEM's heap, and the low-latency "
            f"calls of this plan need {need.rdma_bytes >> 20} MiB of the same one",
            hint="lower decode_max_tokens, or plan prefill and decode on separate machines",
        )
    before = os.environ.get(_QUEUE_DEPTH)
    if need.low_latency is not None:
        _deepen_queues(need.low_latency[0])
    try:
        return deep_ep().Buffer(
            group,
            num_nvl_bytes=need.nvl_bytes,
            num_rdma_bytes=need.rdma_bytes,
            low_latency_mode=need.low_latency is not None,
            num_qps_per_rank=need.queue_pairs,
            explicitly_destroy=True,
        )
    except (RuntimeError, AssertionError, TypeError) as error:
        raise BindError(
            f"DeepEP made no buffer with {need.nvl_bytes >> 20} MiB over NVLink and {need.rdma_bytes >> 20} MiB of "
            f"NVSHMEM's for {dist.get_world_size(group)} ranks: {error}",
            hint="its memory grows with max_tokens, hidden size and experts; every pair of GPUs needs peer access or "
            "InfiniBand, and DeepEP must be built against the installed torch",
        ) from error
    finally:  # DeepEP writes it too; the next buffer may need another
        if before is None:
            os.environ.pop(_QUEUE_DEPTH, None)
        else:
            os.environ[_QUEUE_DEPTH] = before


def _deepen_queues(tokens: int) -> None:
    """DeepEP asserts in each low-latency call that NVSHMEM's queues, 1024 deep by default, hold 2 * (tokens + 1).

    NVSHMEM reads the variable when the buffer is made.
    """
    needed, given = 2 * (tokens + 1), os.environ.get(_QUEUE_DEPTH)
    if given is None and needed > 1024:
        os.environ[_QUEUE_DEPTH] = str(needed)
    elif given is not None and not (given.isdecimal() and int(given) >= needed):
        raise BindError(
            f"{tokens} tokens a rank need queues of {needed} entries, and {_QUEUE_DEPTH}={given} is set",
            hint=f"unset {_QUEUE_DEPTH}, or set it to {needed} or more",
        )


def _give_back(shared: Shared) -> None:
    shared.users -= 1
    if shared.users == 0:
        _OPEN.remove(shared)
        shared.buffer.destroy()


def deep_ep() -> ModuleType:
    """The installed DeepEP. Raises BindError where it does not load."""
    try:
        import deep_ep as module
    except (ImportError, OSError, AssertionError, TypeError) as error:
        # V2 asserts that it finds CUDA's compiler and the NCCL that it was linked to.
        raise BindError(
            f"deep_ep is installed but does not load: {error}",
            hint="build it against the torch and the NCCL that are installed here; V2 wants CUDA_HOME too",
        ) from error
    return module  # type: ignore[no-any-return]


def wire_dtype() -> torch.dtype:
    """Of ids, as the installed DeepEP was built: int64 unless it was told otherwise."""
    found: torch.dtype = getattr(deep_ep(), "topk_idx_t", torch.int64)
    return found


def chosen_sms(binding: Binding) -> int | None:
    """The option `num_sms`; None: DeepEP chooses. Raises BindError."""
    sms = binding.options.get("num_sms")
    if sms is None:
        return None
    if not (isinstance(sms, int) and sms > 0 and sms % 2 == 0):
        raise BindError(f"the option num_sms is an even number of SMs, got {sms!r}")
    if binding.device.type == "cuda":
        there = torch.cuda.get_device_properties(binding.device).multi_processor_count
        if sms > there:  # its blocks wait for each other, so all of them must run at a time
            raise BindError(f"the option num_sms is {sms}, and the device has {there} SMs")
    return sms


def ranks_of(binding: Binding) -> Any:
    """The process group whose rank r owns the experts of EP rank r, as DeepEP has it. Raises BindError."""
    groups = make_groups(binding)
    if groups.members != tuple(range(binding.parallel.ep_size)):
        raise BindError(
            f"DeepEP numbers experts by the rank within the process group, but EP ranks 0, 1, ... are its ranks "
            f"{list(groups.members)}",
            hint="make the group with its ranks in the order of ep_rank",
        )
    return groups.ep
