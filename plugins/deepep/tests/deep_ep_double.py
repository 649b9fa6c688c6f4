"""A strict test double of DeepEP V1: put this module into `sys.modules` as `deep_ep` and no GPU is needed.

CPU tensors move between the real processes of a gloo group. What DeepEP leaves undefined is NaN (-1 in integers): rows
past a count, the tail of a worst case, results before their event is waited for or their hook called. What it would
trap on, hang on or read wrongly raises `DoubleError`. Memory is counted, not allocated; handles are mere shapes.

T = tokens of this rank, H = hidden size, K = top-k, E = experts, R = ranks, L = E / R, N = received rows, M = most
tokens of a rank in a low-latency call, C = num_sms / 2 channels.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from double_basics import BF16, F32, FP8, I32, I64, Collective, DoubleError, EventOverlap, garbage, is_tensor, need
from torch import Tensor

topk_idx_t = torch.int64
_LL_HIDDEN = (2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192)
_INT_MAX = 2**31 - 1
#: Ranks -> (send, receive) rows of a chunk.
_DISPATCH = {2: (24, 256), 4: (6, 256), 8: (6, 256)}
_COMBINE = {2: (10, 256), 4: (9, 256), 8: (4, 256)}


def _to_fp8(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: [T, H] -> float8 [T, H] and float32 scales [T, H / 128], which multiply."""
    groups = x.float().view(x.shape[0], x.shape[1] // 128, 128)
    scales = groups.abs().amax(-1).clamp(min=1e-4) / 448
    return (groups / scales.unsqueeze(-1)).clamp(-448, 448).flatten(1).to(FP8), scales


class Config:
    """SMs and chunk sizes (rows) of a normal call."""

    def __init__(self, num_sms: int, nvl_send: int, nvl_recv: int, rdma_send: int = 6, rdma_recv: int = 128) -> None:
        need(num_sms >= 0 and 0 < nvl_send < nvl_recv, "0 < rows sent < rows received")
        self.num_sms, self.nvl_recv = num_sms, nvl_recv

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes: a queue per channel and rank, of rows with 128 ids, weights and scales and 8 bytes more."""
        need(num_ranks <= 8, "the double is one node of at most 8 ranks")
        row = hidden_bytes + 8 + 128 * (8 + 4 + 4)
        return -(-(self.num_sms // 2 * num_ranks) * (20 + self.nvl_recv * row) // 128) * 128

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes: none within a node."""
        return 0


@dataclass
class _Ticket:
    """What a handle stands for."""

    sent: list[int]  # rows to each rank, and from each
    received: list[int]
    tokens: Tensor  # int64: the token of each row sent
    x_shape: tuple[int, ...]  # of the rows that combine takes
    sizes: tuple[int, ...]  # normal: T, C; low latency: M, H, E
    topk_idx: Tensor
    pairs: Tensor  # int64: t * K + k of each row sent (low latency)
    slots: Tensor  # int64: the flat row in [L * R * M] of each row received (low latency)


class Buffer(Collective):
    """V1 `deep_ep.Buffer` within one node. All ranks make the same calls in the same order, which is checked too."""

    num_sms: ClassVar[int] = 20

    def __init__(
        self, group: dist.ProcessGroup | None, num_nvl_bytes: int = 0, num_rdma_bytes: int = 0,
        low_latency_mode: bool = False, num_qps_per_rank: int = 24, allow_nvlink_for_low_latency_mode: bool = True,
        allow_mnnvl: bool = False, use_fabric: bool = False, explicitly_destroy: bool = False,
        enable_shrink: bool = False, comm: Any = None,
    ) -> None:  # fmt: skip
        need(comm is None and not enable_shrink, "not implemented: an mpi4py group, and shrinking")
        assert group is not None
        super().__init__(group, explicitly_destroy)
        self.num_nvl_bytes, self.num_rdma_bytes = num_nvl_bytes, num_rdma_bytes
        self.low_latency_mode = low_latency_mode
        need(self.group_size <= 8, "the double is one node of at most 8 ranks")
        for size in (num_nvl_bytes, num_rdma_bytes):
            need(size % 128 == 0 and size // 16 < _INT_MAX, f"a multiple of 128 bytes below 32 GiB, not {size}")
        need(num_rdma_bytes == 0 or low_latency_mode, "num_rdma_bytes without low_latency_mode within a node")
        need(num_rdma_bytes == 0 or num_nvl_bytes <= _INT_MAX, "num_nvl_bytes is below 2 GiB next to RDMA bytes")
        need(num_qps_per_rank > 0 or not low_latency_mode, "num_qps_per_rank is positive")
        self._qps, self._queue_depth = num_qps_per_rank, int(os.environ.setdefault("NVSHMEM_QP_DEPTH", "1024"))
        self._tickets: dict[int, _Ticket] = {}
        self._staged = (-1, 0, torch.empty(0))  # low-latency calls before, id of the handle's first tensor, rows
        self._dirty = False
        self._calls = 0  # of low latency
        self._agree("Buffer", num_nvl_bytes, num_rdma_bytes, low_latency_mode)

    @staticmethod
    def set_num_sms(new_num_sms: int) -> None:
        """For all buffers: the SMs of the default configs."""
        need(new_num_sms % 2 == 0, f"the number of SMs is even, not {new_num_sms}")
        Buffer.num_sms = new_num_sms

    @staticmethod
    def get_dispatch_config(num_ranks: int) -> Config:
        """The default of `dispatch`."""
        need(num_ranks in _DISPATCH, f"no config for {num_ranks} ranks")
        return Config(Buffer.num_sms, *_DISPATCH[num_ranks])

    @staticmethod
    def get_combine_config(num_ranks: int) -> Config:
        """The default of `combine`."""
        need(num_ranks in _COMBINE, f"no config for {num_ranks} ranks")
        return Config(Buffer.num_sms, *_COMBINE[num_ranks])

    @staticmethod
    def get_low_latency_rdma_size_hint(
        num_max_dispatch_tokens_per_rank: int, hidden: int, num_ranks: int, num_experts: int
    ) -> int:
        """Bytes: twice M * E rows to send and to receive, each with 4 bytes for 128 values, and the flags."""
        rows = num_experts * num_max_dispatch_tokens_per_rank * (hidden * 2 + max(16, hidden // 128 * 4))
        return ((4 * rows + 2 * -(-num_experts * 4 // 128) * 128) // 128 + 1) * 128

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, Tensor, Tensor, EventOverlap]:  # fmt: skip
        """int32 [R] tokens for each rank, None, int32 [E] for each expert, bool [T, R], event. It sends nothing."""
        self._begin(previous_event, async_finish, allocate_on_comm_stream)
        self._check_ids(topk_idx, None, num_experts, 32)
        owner = topk_idx.div(num_experts // self.group_size, rounding_mode="floor")
        goes = (owner.unsqueeze(-1) == torch.arange(self.group_size)).any(1)  # once to a rank, for all its experts
        per_expert = torch.bincount(topk_idx[topk_idx >= 0], minlength=num_experts)
        return goes.sum(0).to(I32), None, per_expert.to(I32), goes, self._later([], async_finish)[1]

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], handle: tuple[Any, ...] | None = None,
        num_tokens_per_rank: Tensor | None = None, num_tokens_per_rdma_rank: Tensor | None = None,
        is_token_in_rank: Tensor | None = None, num_tokens_per_expert: Tensor | None = None,
        topk_idx: Tensor | None = None, topk_weights: Tensor | None = None, expert_alignment: int = 1,
        num_worst_tokens: int = 0, config: Config | None = None, previous_event: EventOverlap | None = None,
        async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, Tensor, Tensor, list[int], tuple[Any, ...], EventOverlap]:  # fmt: skip
        """x: bfloat16 [T, H], or float8 [T, H] with float32 scales [T, H / 128]; a row goes to a rank once.

        Rows [N, H] by source rank, int64 [N, K] ids in [0, L) or -1, float32 [N, K] weights (0 where -1), counts of L
        local experts, handle, event. With num_worst_tokens: that many rows, and no counts.
        """
        need(handle is None, "not implemented: replaying the layout of a handle")
        self._begin(previous_event, async_finish, allocate_on_comm_stream)
        ranks, config = self.group_size, config or Buffer.get_dispatch_config(self.group_size)
        rows, scales = x if isinstance(x, tuple) else (x, None)
        is_tensor("x", rows, BF16 if scales is None else FP8, (None, None))
        (tokens, hidden), row_bytes = rows.shape, rows.shape[1] * rows.element_size()
        if scales is not None:
            need(hidden % 128 == 0, f"fp8 rows of {hidden} values: not a multiple of 128")
            is_tensor("scales", scales, F32, (tokens, hidden // 128), dense=False)
        # The kernel moves a row in two halves of 16-byte words, each through 8 KiB together with an 8-byte flag.
        need(row_bytes % 32 == 0 and row_bytes <= 16368, f"a row is a multiple of 32 up to 16368 bytes: {row_bytes}")
        self._normal_room(config, row_bytes)
        if topk_idx is None or topk_weights is None or num_tokens_per_expert is None:
            raise DoubleError("dispatch needs topk_idx and topk_weights (not implemented: without) and their layout")
        experts, local = len(num_tokens_per_expert), len(num_tokens_per_expert) // ranks
        is_tensor("topk_weights", topk_weights, F32, tuple(topk_idx.shape))
        # An assertion of its kernel, seen on an H200. (Python's data_ptr() is 0 for every empty tensor.)
        if len({part.untyped_storage().data_ptr() == 0 for part in (topk_idx, topk_weights)}) > 1:
            raise DoubleError("topk_idx and topk_weights have an address both, or neither: empty tensors may differ")
        told = num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank
        per_rank, _, per_expert, in_rank, _ = made = self.get_dispatch_layout(topk_idx, experts, async_finish=True)
        for given, true in zip(told, made[:4], strict=True):
            if true is not None:
                is_tensor("the layout", given, true.dtype, tuple(true.shape))
            same = given is true or (given is not None and true is not None and torch.equal(given, true))
            need(same and len(in_rank) == tokens, "the layout is not that of topk_idx and x")
        need(expert_alignment > 0 and num_worst_tokens >= 0, "expert_alignment is positive")
        wire = [rows, topk_idx, topk_weights] if scales is None else [rows, scales, topk_idx, topk_weights]
        self._agree("dispatch", experts, config.num_sms, expert_alignment, *(part.shape[1] for part in wire), row_bytes)

        counts = torch.cat([per_expert.view(ranks, local), per_rank.view(ranks, 1)], 1)
        counts = self._exchange(counts, [1] * ranks, [1] * ranks)
        sent, received, order = per_rank.tolist(), counts[:, -1].tolist(), in_rank.T.nonzero()[:, 1]
        total = sum(received)
        need(num_worst_tokens == 0 or total <= num_worst_tokens, f"{total} rows came, past {num_worst_tokens}")
        room, got = num_worst_tokens or total, []
        for part in wire:
            got.append(garbage(room, part.shape[1], dtype=part.dtype))
            got[-1][:total] = self._exchange(part, sent, received, order)
        ids = got[-2] - self.rank * local
        got[-2] = torch.where((ids >= 0) & (ids < local), ids, -1)
        got[-1][:total][got[-2][:total] < 0] = 0  # the tail of the ids is -1, that of the weights is undefined
        channels, none = config.num_sms // 2, torch.empty(0)
        shapes = ((ranks, ranks), (ranks, channels), (ranks, channels), (room,), (tokens, ranks))
        opaque = [garbage(*shape, dtype=I32) for shape in shapes]
        ticket = _Ticket(sent, received, order, (room, hidden), (tokens, channels), topk_idx, none, none)
        self._dirty = True
        self._keep(opaque[0], ticket)
        listed = [] if num_worst_tokens else counts[:, :-1].sum(0).tolist()
        listed = [-(-count // expert_alignment) * expert_alignment for count in listed]
        out, event, _ = self._later(got, async_finish)
        received_x = out[0] if scales is None else (out[0], out[1])
        return received_x, out[-2], out[-1], listed, (*opaque[:4], in_rank, opaque[4]), event

    def combine(
        self, x: Tensor, handle: tuple[Any, ...], topk_weights: Tensor | None = None,
        bias: Tensor | tuple[Tensor, Tensor] | None = None, config: Config | None = None,
        previous_event: EventOverlap | None = None, async_finish: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, Tensor | None, EventOverlap]:  # fmt: skip
        """x: bfloat16 [N, H] as dispatched -> the sum over ranks [T, H], float32 [T, K] sums of topk_weights, event."""
        ticket = self._take(handle, 6)
        self._begin(previous_event, async_finish, allocate_on_comm_stream)
        config = config or Buffer.get_combine_config(self.group_size)
        (rows, hidden), (tokens, channels) = ticket.x_shape, ticket.sizes
        is_tensor("x", x, BF16, (rows, hidden))
        need(config.num_sms // 2 == channels, "the number of SMs changed between dispatch and combine")
        self._normal_room(config, hidden * 2)
        if topk_weights is not None:
            is_tensor("topk_weights", topk_weights, F32, (rows, None))
        need(bias is None, "not implemented: a bias")
        self._agree("combine", hidden, topk_weights is not None, config.num_sms)
        self._tickets.pop(id(handle[0]))
        self._dirty, sums = True, []
        for part in (x,) if topk_weights is None else (x, topk_weights):
            back = self._exchange(part[: sum(ticket.received)], ticket.received, ticket.sent)
            sums.append(torch.zeros(tokens, part.shape[1]).index_add_(0, ticket.tokens, back.float()))
        sums[0] = sums[0].to(BF16)
        out, event, _ = self._later(sums, async_finish)
        return out[0], None if topk_weights is None else out[1], event

    def clean_low_latency_buffer(self, num_max_dispatch_tokens_per_rank: int, hidden: int, num_experts: int) -> None:
        """After normal calls, before low-latency ones."""
        self._low_latency_room(num_max_dispatch_tokens_per_rank, hidden, num_experts, both=False, clean=False)
        self._agree("clean", num_max_dispatch_tokens_per_rank, hidden, num_experts)
        self._dirty = False

    def low_latency_dispatch(
        self, x: Tensor, topk_idx: Tensor, num_max_dispatch_tokens_per_rank: int, num_experts: int,
        cumulative_local_expert_recv_stats: Tensor | None = None, dispatch_wait_recv_cost_stats: Tensor | None = None,
        use_fp8: bool = True, round_scale: bool = False, use_ue8m0: bool = False, async_finish: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, tuple[Any, ...], EventOverlap, Callable[[], None] | None]:  # fmt: skip
        """x: bfloat16 [T, H] -> rows [L, R * M, H], int32 [L] counts, handle, event, hook.

        Rows are bfloat16, or float8 with float32 scales [L, R * M, H / 128], column-major; the last rank's come first.
        """
        most, experts, ranks = num_max_dispatch_tokens_per_rank, num_experts, self.group_size
        stats = cumulative_local_expert_recv_stats is not None or dispatch_wait_recv_cost_stats is not None
        need(not (use_ue8m0 or round_scale or stats), "not implemented: rounded or packed scales, and statistics")
        is_tensor("x", x, BF16, (None, None))
        tokens, hidden = x.shape
        self._low_latency_room(most, hidden, experts, both=async_finish and return_recv_hook)
        need(tokens <= most, f"{tokens} tokens, at most {most}")
        self._check_ids(topk_idx, tokens, experts, 11)
        local, room = experts // ranks, ranks * most
        need(self._qps >= local, f"num_qps_per_rank is {self._qps}, for {local} local experts")
        held = sum(len(ticket.sizes) == 3 for ticket in self._tickets.values())
        need(held < 2, "two results are held already: combine one first")
        flat = topk_idx.flatten()
        pairs = flat.argsort(stable=True)[int((flat < 0).sum()) :]  # by expert, then by token
        per_expert = torch.bincount(flat[pairs], minlength=experts).view(ranks, local)
        need(int(per_expert.max()) <= most, "tokens choose an expert twice, and overflow its slots")
        self._agree("low_latency_dispatch", most, hidden, experts, use_fp8)

        counts = self._exchange(per_expert, [1] * ranks, [1] * ranks)  # [source, L]
        sent, received, order = per_expert.sum(1).tolist(), counts.sum(1).tolist(), pairs // topk_idx.shape[1]
        starts = counts.flip(0).cumsum(0).flip(0) - counts + torch.arange(local) * room
        blocks = zip(starts.flatten().tolist(), counts.flatten().tolist(), strict=True)
        slots = torch.cat([torch.arange(start, start + count) for start, count in blocks])
        got = [garbage(local, room, hidden, dtype=FP8 if use_fp8 else BF16)]
        if use_fp8:
            got.append(garbage(local, hidden // 128, room, dtype=F32).transpose(1, 2))
        for target, part in zip(got, _to_fp8(x) if use_fp8 else (x,), strict=True):
            raw = torch.uint8 if part.dtype == FP8 else part.dtype  # not all indexing knows float8
            target.view(raw)[slots // room, slots % room] = self._exchange(part, sent, received, order).view(raw)
        got.append(counts.sum(0).to(I32))
        src_info, sizes, shape = garbage(local, room, dtype=I32), (most, hidden, experts), (local, room, hidden)
        self._keep(src_info, _Ticket(sent, received, order, shape, sizes, topk_idx.clone(), pairs, slots))
        self._calls += 1
        out, event, hook = self._later(got, async_finish, return_recv_hook)
        handle = (src_info, garbage(local, ranks, dtype=I64), *sizes)
        return (out[0], out[1]) if use_fp8 else out[0], out[-1], handle, event, hook

    def low_latency_combine(
        self, x: Tensor, topk_idx: Tensor, topk_weights: Tensor, handle: tuple[Any, ...], use_logfmt: bool = False,
        zero_copy: bool = False, async_finish: bool = False, return_recv_hook: bool = False, out: Tensor | None = None,
        combine_wait_recv_cost_stats: Tensor | None = None,
    ) -> tuple[Tensor, EventOverlap, Callable[[], None] | None]:  # fmt: skip
        """x: bfloat16 [L, R * M, H] -> bfloat16 [T, H], weighted and summed in float32 without the ids -1, event, hook.

        zero_copy takes the rows from `get_next_low_latency_combine_buffer`, and only the shape from x.
        """
        ticket = self._take(handle, 5)
        need(not (use_logfmt or combine_wait_recv_cost_stats is not None), "not implemented: logfmt, and statistics")
        self._low_latency_room(*ticket.sizes, both=async_finish and return_recv_hook)
        need(handle[2:] == ticket.sizes, f"the handle says {handle[2:]}, the dispatch was {ticket.sizes}")
        is_tensor("x", x, BF16, ticket.x_shape)
        is_tensor("topk_idx", topk_idx, topk_idx_t, tuple(ticket.topk_idx.shape))
        same = (topk_idx == ticket.topk_idx) | (topk_idx == -1)
        need(bool(same.all()), "topk_idx names experts that the dispatch did not send to")
        is_tensor("topk_weights", topk_weights, F32, tuple(topk_idx.shape))
        shape, source = (len(topk_idx), x.shape[2]), self._staged[2] if zero_copy else x
        if out is not None:
            is_tensor("out", out, BF16, shape)
        staged = self._staged[:2] == (self._calls, id(handle[0]))
        need(staged or not zero_copy, "zero_copy without get_next_low_latency_combine_buffer(handle) right before")
        self._agree("low_latency_combine", *ticket.sizes)
        self._tickets.pop(id(handle[0]))
        self._calls += 1
        rows = self._exchange(source.flatten(0, 1)[ticket.slots], ticket.received, ticket.sent).float()
        kept = topk_idx.flatten()[ticket.pairs] >= 0
        rows = rows[kept] * topk_weights.flatten()[ticket.pairs][kept].unsqueeze(1)
        total = torch.zeros(shape).index_add_(0, ticket.tokens[kept], rows).to(BF16)
        done, event, hook = self._later([total], async_finish, return_recv_hook, out)
        return done[0], event, hook

    def get_next_low_latency_combine_buffer(self, handle: tuple[Any, ...]) -> Tensor:
        """bfloat16 [L, R * M, H] for zero_copy by the next call; not contiguous: a row has room for its scales."""
        local, room, hidden = self._take(handle, 5).x_shape
        view = garbage(local, room, hidden + hidden // 64, dtype=BF16)[..., :hidden]
        self._staged = (self._calls, id(handle[0]), view)
        return view

    def _begin(self, previous: EventOverlap | None, async_finish: bool, allocate_on_comm_stream: bool) -> None:
        need(not self._destroyed, "the buffer is destroyed")
        event = None if previous is None else previous.event
        allowed = event is not None and async_finish
        need(allowed or not allocate_on_comm_stream, "allocate_on_comm_stream needs previous_event and async_finish")
        if event is not None:
            event()

    def _keep(self, key: Tensor, ticket: _Ticket) -> None:
        """Until it is combined, or nobody has the handle any more."""
        self._tickets[id(key)] = ticket
        weakref.finalize(key, self._tickets.pop, id(key), None)

    def _take(self, handle: tuple[Any, ...], length: int) -> _Ticket:
        ticket = self._tickets.get(id(handle[0])) if isinstance(handle, tuple) and len(handle) == length else None
        if ticket is None or len(ticket.x_shape) != (2 if length == 6 else 3):
            raise DoubleError("not a handle of this buffer and of this kind of call, or combined already")
        return ticket

    def _check_ids(self, topk_idx: Any, tokens: int | None, experts: int, most: int) -> None:
        need(experts > 0 and experts % self.group_size == 0, f"{experts} experts: not a multiple of the ranks")
        is_tensor("topk_idx", topk_idx, topk_idx_t, (tokens, None))
        need(0 < topk_idx.shape[1] <= most, f"1 to {most} experts a token, not {topk_idx.shape[1]}")
        need(bool(((topk_idx >= -1) & (topk_idx < experts)).all()), f"an id is outside [-1, {experts})")

    def _normal_room(self, config: Config, row_bytes: int) -> None:
        need(self.group_size in _DISPATCH, f"normal kernels run on 2, 4 or 8 ranks, not {self.group_size}")
        need(config.num_sms > 0 and config.num_sms % 2 == 0, "the number of SMs is even")
        hint = config.get_nvl_buffer_size_hint(row_bytes, self.group_size)
        need(self.num_nvl_bytes >= hint, f"num_nvl_bytes is {self.num_nvl_bytes}, below the hint {hint}")

    def _low_latency_room(self, most: int, hidden: int, experts: int, *, both: bool, clean: bool = True) -> None:
        need(self.low_latency_mode, "the buffer is not in low_latency_mode")
        need(hidden in _LL_HIDDEN, f"no low-latency kernel for rows of {hidden} values")
        need(0 < most <= 1024, f"1 to 1024 tokens of a rank, not {most}")
        need(self._queue_depth >= 2 * (most + 1), f"NVSHMEM_QP_DEPTH is {self._queue_depth}, below 2 * ({most} + 1)")
        need(self.group_size * most % 4 == 0, f"{self.group_size} * {most} slots: not a multiple of 4")
        hint = Buffer.get_low_latency_rdma_size_hint(most, hidden, self.group_size, experts)
        need(self.num_rdma_bytes >= hint, f"num_rdma_bytes is {self.num_rdma_bytes}, below the hint {hint}")
        need(not both, "async_finish excludes return_recv_hook")
        need(not (clean and self._dirty), "clean_low_latency_buffer was not called after a normal call")
        # Each call clears the flags of the one before, whose receive would then wait for ever.
        need(self._hooked is None, "a low-latency call before the hook of the last one")
