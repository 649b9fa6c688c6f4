"""A strict test double of DeepEP V2's `ElasticBuffer`: put this module into `sys.modules` as `deep_ep`.

CPU tensors move between the real processes of a gloo group. What DeepEP leaves undefined is NaN, and `WILD` or -1 in
integers: rows past those that came, padding between experts, tensors of the handle that this kind of call does not
write, and everything before its event is waited for. Rows of a rank arrive in any order, and so do those of an expert.
What DeepEP would trap on, hang on or read wrongly raises `DoubleError`. Memory is counted, not allocated. Checked
against DeepEP's commit dd758ca: elastic.py, buffer.hpp and the kernels' own assertions.

T = tokens of this rank, H = hidden size, K = top-k, E = experts, R = ranks, L = E / R, M = most tokens of a rank in a
call, N = received tokens, X = rows when each stands for one local expert (expanded).
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from double_basics import BF16, F32, FP8, I32, Collective, DoubleError, EventOverlap, is_tensor, need
from torch import Tensor

topk_idx_t = torch.int64
#: In memory that nobody has written; no id, row or count is this large.
WILD = 0x7F7F7F7F
_PAGE = 2 << 20
DEVICE_SMS = 132
_MOST_TOP_K, _MOST_RANKS, _MOST_EXPERTS, _MOST_LOCAL = 32, 1024, 2048, 256


def wild(*shape: int, dtype: torch.dtype) -> Tensor:
    """Memory that nobody has written."""
    return torch.full(shape, float("nan") if dtype.is_floating_point else WILD, dtype=dtype)


def up(number: int, to: int) -> int:
    """The next multiple."""
    return -(-number // to) * to


def _token_bytes(row_bytes: int, packs: int, top_k: int, *, sent: bool) -> int:
    """A row, its scales, and K ids and weights; on the way there also where it comes from and K links."""
    return up(row_bytes, 16) + up(packs * 4, 16) + up(top_k * 8 + ((1 + top_k) * 4 if sent else 0), 16)


def _dispatch_bytes(most: int, ranks: int, row_bytes: int, packs: int, top_k: int) -> int:
    return ranks * most * _token_bytes(row_bytes, packs, top_k, sent=True)


def _combine_bytes(most: int, ranks: int, hidden: int, top_k: int) -> int:
    return min(ranks, top_k) * most * _token_bytes(hidden * 2, 0, top_k, sent=False)


@dataclass(eq=False)
class EPHandle:
    """What `combine` needs. recv_src_metadata int32 [N, K + 2]: source rank * M + token, source rank * K + first slot
    that goes here, and (expanded) the row of each slot or -1."""

    do_expand: bool
    num_experts: int
    expert_alignment: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens: int = 0
    num_expanded_tokens: int = 0
    num_recv_tokens_per_expert_list: list[int] = field(default_factory=list)
    psum_num_recv_tokens_per_scaleup_rank: Tensor = field(init=False)
    psum_num_recv_tokens_per_expert: Tensor = field(init=False)
    num_unaligned_recv_tokens_per_expert: Tensor = field(init=False)
    recv_src_metadata: Tensor = field(init=False)
    dst_buffer_slot_idx: Tensor = field(init=False)
    token_metadata_at_forward: Tensor | None = None
    channel_linked_list: Tensor | None = None


@dataclass
class _Received:
    """One dispatch as this rank got it, N rows by source rank."""

    parts: list[Tensor]  # the rows, and their scales where there are some
    ids: Tensor  # int32 [N, K], global
    weights: Tensor
    source: Tensor  # int64 [N]: source rank * M + token
    per_rank: Tensor  # int64 [R]


class ElasticBuffer(Collective):
    """Within one node: all ranks see each other's memory."""

    def __init__(
        self, group: dist.ProcessGroup, num_bytes: int | None = None, num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0, hidden: int = 0, num_topk: int = 0, use_fp8_dispatch: bool = False,
        deterministic: bool = False, allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True, sl_idx: int = 3, num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300, num_gpu_timeout_secs: int = 100, explicitly_destroy: bool = False,
    ) -> None:  # fmt: skip
        need(num_cpu_bytes == 0, "not implemented: memory of the host")
        need(not deterministic and allow_multiple_reduction, "not implemented: sorted rows, and a single reduction")
        super().__init__(group, explicitly_destroy)
        if num_bytes is None:
            sizes = num_max_tokens_per_rank, hidden, num_topk, use_fp8_dispatch
            num_bytes = self.get_buffer_size_hint(group, *sizes)
        need(num_bytes > 0 and num_bytes % _PAGE == 0, f"a positive multiple of 2 MiB, not {num_bytes} bytes")
        self.num_bytes, self.num_max_tokens_per_rank = num_bytes, num_max_tokens_per_rank
        self.num_allocated_qps = num_allocated_qps or (129 if allow_hybrid_mode else 17)
        self._handles: weakref.WeakSet[EPHandle] = weakref.WeakSet()
        self._agree("ElasticBuffer", num_bytes)

    @staticmethod
    def get_buffer_size_hint(
        group: dist.ProcessGroup, num_max_tokens_per_rank: int, hidden: int, num_topk: int = 0,
        use_fp8_dispatch: bool = False, allow_hybrid_mode: bool = True, allow_multiple_reduction: bool = True,
    ) -> int:  # fmt: skip
        """Bytes, a multiple of 2 MiB: the larger of what dispatch and combine need, with scales per 32 values."""
        need(num_max_tokens_per_rank > 0 and hidden > 0, "the most tokens of a rank and the hidden size are positive")
        need(-(-hidden // 32) * 4 <= hidden, f"scales of rows of {hidden} values are larger than they")
        ranks, top_k = group.size(), num_topk or _MOST_TOP_K
        row, packs = (hidden, -(-hidden // 32)) if use_fp8_dispatch else (hidden * 2, 0)
        there = _dispatch_bytes(num_max_tokens_per_rank, ranks, row, packs, top_k)
        return up(max(there, _combine_bytes(num_max_tokens_per_rank, ranks, hidden, top_k)), _PAGE)

    def get_theoretical_num_sms(
        self, num_experts: int, num_topk: int, num_scaleout_topk: int = 0, rdma_gbs: float = 0,
        nvlink_gbs: float = 0, sm_read_gbs: float = 200, sm_write_gbs: float = 50,
    ) -> int:  # fmt: skip
        """Some even number."""
        need(num_experts % self.group_size == 0, f"{num_experts} experts: not a multiple of the ranks")
        return 12

    def get_theoretical_num_qps(self, num_sms: int) -> int:
        """As many as there are."""
        return min(num_sms * 16 + 1, self.num_allocated_qps)

    def dispatch(
        self, x: Tensor | tuple[Tensor, Tensor], topk_idx: Tensor | None = None, topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None, num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None, expert_alignment: int | None = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
        handle: EPHandle | None = None, do_handle_copy: bool = True, do_cpu_sync: bool | None = None,
        do_expand: bool = False, do_zero_padding: bool = False, use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, Tensor | None, Tensor, EPHandle, EventOverlap]:  # fmt: skip
        """x: bfloat16 [T, H], or float8 [T, H] with scales of 4 bytes [T, packs]; a row goes to a rank once.

        Rows, ids, weights, handle, event. Rows [N, H], or [M * R, H] without do_cpu_sync, with int64 ids in [0, L) or
        -1 and float32 weights [N, K]; expanded: [X, H] by local expert, no ids, float32 weights [X].
        """
        stats = cumulative_local_expert_recv_stats is not None
        need(not stats and handle is None, "not implemented: statistics, and replaying the layout of a handle")
        need(not (do_zero_padding or use_tma_aligned_col_major_sf), "not implemented: zeroed padding, column-major")
        if topk_idx is None or topk_weights is None or num_experts is None:
            raise DoubleError("topk_idx and num_experts are given (not implemented: without topk_weights)")
        self._streams(previous_event, allocate_on_comm_stream)
        most = self.num_max_tokens_per_rank if num_max_tokens_per_rank is None else num_max_tokens_per_rank
        alignment, counted = 1 if expert_alignment is None else expert_alignment, do_cpu_sync is not False
        parts = self._check_sent(x, topk_idx, topk_weights, num_experts, most)
        num_sms = self._check_sms(num_sms or self.get_theoretical_num_sms(num_experts, topk_idx.shape[1]), num_qps)
        need(alignment > 0, "expert_alignment is positive")
        row_bytes, packs = parts[0].shape[1] * parts[0].element_size(), parts[1].shape[1] if len(parts) > 1 else 0
        self._agree("dispatch", most, num_experts, topk_idx.shape[1], row_bytes, packs)
        kept = topk_idx.clone() if do_handle_copy else topk_idx
        made = EPHandle(do_expand, num_experts, alignment, most, num_sms, kept)
        came = self._move(parts, topk_idx, topk_weights, num_experts, most)
        return self._deliver(came, made, counted=counted, later=async_with_compute_stream)

    def combine(
        self, x: Tensor, handle: EPHandle, topk_weights: Tensor | None = None, bias: Any = None, num_sms: int = 0,
        num_qps: int = 0, previous_event: Any = None, previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False, allocate_on_comm_stream: bool = False,
    ) -> tuple[Tensor, None, EventOverlap]:  # fmt: skip
        """x: bfloat16 rows as dispatched -> bfloat16 [T, H], the unweighted sum of a token's rows, None, event."""
        need(isinstance(handle, EPHandle) and handle in self._handles, "not a handle of this buffer")
        need(topk_weights is None and bias is None, "not implemented: weights and a bias")
        self._streams(previous_event, allocate_on_comm_stream)
        self._check_sms(num_sms or handle.num_sms, num_qps)
        meta, most, (tokens, top_k) = handle.recv_src_metadata, handle.num_max_tokens_per_rank, handle.topk_idx.shape
        # Of expanded rows DeepEP checks no number, and reads past the end of too few.
        rows = handle.num_expanded_tokens if handle.do_expand else len(meta)
        is_tensor("x", x, BF16, (rows, None))
        hidden = x.shape[1]
        need(hidden % 256 == 0, f"rows of {hidden} values: not a multiple of 256")
        room = _combine_bytes(most, self.group_size, hidden, top_k)
        need(room <= self.num_bytes, f"{room} bytes for combine, and the buffer has {self.num_bytes}")
        self._agree("combine", most, handle.num_experts, top_k, hidden)

        came = int(handle.psum_num_recv_tokens_per_scaleup_rank[-1])
        need(0 <= came <= len(meta), "the handle is not filled yet: its event was not waited for")
        meta = meta[:came].long()
        source, token = meta[:, 1] // top_k, meta[:, 0] % most
        if handle.do_expand:  # a bfloat16 row for each token, of its copies' sum
            here = (meta[:, 2:] >= 0).unsqueeze(-1)
            back = torch.where(here, x[meta[:, 2:].clamp(min=0)].float(), 0.0).sum(1).to(BF16)
        else:
            back = x[:came]
        order, sent = source.argsort(stable=True), torch.bincount(source, minlength=self.group_size)
        received = self._exchange(sent.unsqueeze(1), [1] * self.group_size, [1] * self.group_size).flatten()
        splits = sent.tolist(), received.tolist()
        got, to = self._exchange(back, *splits, order), self._exchange(token.unsqueeze(1), *splits, order).flatten()
        origin = torch.arange(self.group_size).repeat_interleave(received)
        found = torch.zeros(tokens, self.group_size, dtype=torch.int64).index_put_((to, origin), torch.tensor(1), True)
        owner = handle.topk_idx.div(handle.num_experts // self.group_size, rounding_mode="floor")
        wanted = (owner.unsqueeze(-1) == torch.arange(self.group_size)).any(1)
        need(torch.equal(found, wanted.long()), "rows of other tokens or ranks than topk_idx of the handle says")
        total = torch.zeros(tokens, hidden).index_add_(0, to, got.float()).to(BF16)
        (out,), event, _ = self._later([total], async_with_compute_stream)
        return out, None, event

    def _streams(self, previous_event: Any, allocate_on_comm_stream: bool) -> None:
        need(not self._destroyed, "the buffer is destroyed")
        need(previous_event is None or allocate_on_comm_stream, "previous_event needs allocate_on_comm_stream")

    def _check_sms(self, num_sms: int, num_qps: int) -> int:
        need(0 < num_sms <= DEVICE_SMS, f"{num_sms} SMs of {DEVICE_SMS}")
        need(num_qps <= self.num_allocated_qps, f"{num_qps} queue pairs of {self.num_allocated_qps}")
        return num_sms

    def _check_sent(self, x: Any, ids: Tensor, weights: Tensor, experts: int, most: int) -> list[Tensor]:
        parts = list(x) if isinstance(x, tuple) else [x]
        is_tensor("x", parts[0], FP8 if len(parts) > 1 else BF16, (None, None))
        tokens, hidden = parts[0].shape
        row_bytes, packs, ranks = hidden * parts[0].element_size(), 0, self.group_size
        if len(parts) > 1:
            is_tensor("scales", parts[1], parts[1].dtype, (tokens, None), dense=False)
            need(parts[1].element_size() == 4, f"scales have 4 bytes, not {parts[1].dtype}")
            packs = parts[1].shape[1]
        need(row_bytes % 16 == 0, f"rows of {row_bytes} bytes: not a multiple of 16")
        is_tensor("topk_idx", ids, topk_idx_t, (tokens, None))
        top_k = ids.shape[1]
        need(0 < top_k <= _MOST_TOP_K, f"1 to {_MOST_TOP_K} experts a token, not {top_k}")
        is_tensor("topk_weights", weights, F32, (tokens, top_k))
        fits = experts % ranks == 0 and 0 < experts <= _MOST_EXPERTS and experts // ranks <= _MOST_LOCAL
        need(fits and ranks <= _MOST_RANKS, f"{experts} experts do not fit on {ranks} ranks")
        need(bool(((ids >= -1) & (ids < experts)).all()), f"an id is outside [-1, {experts})")
        ordered = ids.sort(dim=1).values
        twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
        need(not bool(twice.any()), "a token names an expert twice: the kernel traps")
        need(tokens <= most, f"{tokens} tokens, at most {most}")
        # Nothing in its source speaks against none, but its own test never sends fewer than one token, and servers
        # report that the host then waits until it times out.
        need(tokens > 0, "no tokens at all")
        room = _dispatch_bytes(most, ranks, row_bytes, packs, top_k)
        need(room <= self.num_bytes, f"{room} bytes for dispatch, and the buffer has {self.num_bytes}")
        return parts

    def _move(self, parts: list[Tensor], ids: Tensor, weights: Tensor, experts: int, most: int) -> _Received:
        ranks, local = self.group_size, experts // self.group_size
        goes = (ids.div(local, rounding_mode="floor").unsqueeze(-1) == torch.arange(ranks)).any(1)
        chosen = [goes[:, rank].nonzero().flatten() for rank in range(ranks)]
        order = torch.cat([tokens[torch.randperm(len(tokens))] for tokens in chosen])  # slots are given out at random
        sent = goes.sum(0)
        received = self._exchange(sent.unsqueeze(1), [1] * ranks, [1] * ranks).flatten()
        source = (self.rank * most + torch.arange(len(ids))).unsqueeze(1)
        wire = [*parts, ids.to(I32), weights, source]
        got = [self._exchange(part, sent.tolist(), received.tolist(), order) for part in wire]
        return _Received(got[:-3], got[-3], got[-2], got[-1].flatten(), received)

    def _deliver(
        self, came: _Received, handle: EPHandle, *, counted: bool, later: bool
    ) -> tuple[Any, Tensor | None, Tensor, EPHandle, EventOverlap]:
        ranks, most, alignment = self.group_size, handle.num_max_tokens_per_rank, handle.expert_alignment
        (n, top_k), count = came.ids.shape, handle.num_experts // ranks
        local = came.ids.long() - self.rank * count
        local = torch.where((local >= 0) & (local < count), local, -1)
        per_expert = torch.bincount(local[local >= 0], minlength=count)
        aligned = (per_expert + alignment - 1).div(alignment, rounding_mode="floor") * alignment
        starts = aligned.cumsum(0) - aligned
        handle.num_recv_tokens = n if counted else ranks * most
        worst = up(ranks * most * min(top_k, count) + (alignment - 1) * count, alignment)
        handle.num_expanded_tokens = int(aligned.sum()) if counted else worst
        handle.num_recv_tokens_per_expert_list = aligned.tolist() if counted else []

        meta = wild(handle.num_recv_tokens, top_k + 2, dtype=I32)
        first = (local >= 0).long().argmax(dim=1)
        meta[:n, 0] = came.source.to(I32)
        meta[:n, 1] = (torch.arange(ranks).repeat_interleave(came.per_rank) * top_k + first).to(I32)
        row, target = torch.arange(n), torch.arange(n)
        rows, weights, ids = handle.num_recv_tokens, came.weights, None
        if handle.do_expand:
            rows, meta[:n, 2:] = handle.num_expanded_tokens, -1
            pairs = torch.cat([(local == e).nonzero()[torch.randperm(int(per_expert[e]))] for e in range(count)])
            row = pairs[:, 0]
            spans = zip(starts.tolist(), (starts + per_expert).tolist(), strict=True)
            target = torch.cat([torch.arange(*span) for span in spans])
            meta[row, 2 + pairs[:, 1]] = target.to(I32)
            weights = weights[row, pairs[:, 1]]
        else:
            ids = wild(rows, top_k, dtype=topk_idx_t)
            ids[:n] = local
        values = []
        for part in (*came.parts, weights):
            full, raw = wild(rows, *part.shape[1:], dtype=part.dtype), torch.uint8 if part.dtype == FP8 else part.dtype
            # The weights of an unexpanded row come as they were sent, those of other ranks' experts too.
            full.view(raw)[target] = part.view(raw) if part is weights else part.view(raw)[row]
            values.append(full)
        ends = (starts + per_expert) if handle.do_expand else aligned.cumsum(0)
        unaligned = per_expert if handle.do_expand else wild(count, dtype=I32)
        values += [came.per_rank.cumsum(0).to(I32), ends.to(I32), unaligned.to(I32), meta]
        values += [wild(*handle.topk_idx.shape, dtype=I32)] + ([] if ids is None else [ids])
        out, event, _ = self._later(values, later)
        data = (out[0], out[1]) if len(came.parts) == 2 else out[0]
        out = out[len(came.parts) :]
        handle.psum_num_recv_tokens_per_scaleup_rank, handle.psum_num_recv_tokens_per_expert = out[1:3]
        handle.num_unaligned_recv_tokens_per_expert, handle.recv_src_metadata, handle.dst_buffer_slot_idx = out[3:6]
        self._handles.add(handle)
        return data, None if ids is None else out[6], out[0], handle, event
