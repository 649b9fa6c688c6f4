"""The double of MoRI's second interface within a node: `mori.ops.dispatch_combine_v2` and `mori.cco`.

T = tokens of this rank, K = top-k, M = max_num_inp_token_per_rank, R = ranks * M. Poison as in the first interface's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core_mori.testing.errors import DoubleError
from moe_core_mori.testing.world import (
    BF16,
    F32,
    FN,
    FNUZ,
    FP4,
    I32,
    U8,
    Ranks,
    Routed,
    device,
    need,
    need_tensor,
    new_unique_id,
    poison,
    route,
)

_SIZES: dict[Any, int] = {BF16: 2, F32: 4, FNUZ: 1, FN: 1}


class Communicator:
    """`mori.cco.Communicator`. per_rank_vmm bounds what its operators may hold."""

    DEFAULT_PER_RANK_VMM: int = 4 << 30

    def __init__(self) -> None:
        self.ranks: Ranks | None = None
        self.left = 0

    @staticmethod
    def get_unique_id() -> bytes:
        """On rank 0, for all."""
        return new_unique_id()

    @classmethod
    def init(cls, nranks: int, rank: int, unique_id: bytes, per_rank_vmm: int = DEFAULT_PER_RANK_VMM) -> Communicator:
        """All ranks together."""
        made = cls()
        made.ranks, made.left = Ranks(unique_id, rank, nranks), per_rank_vmm
        made.ranks.agree("Communicator", nranks, per_rank_vmm)
        return made

    def destroy(self) -> None:
        """All ranks together; operators first."""
        self.ranks = None


@dataclass
class EpDispatchCombineConfig:
    """Fields, order and defaults of the real one, and its checks as far as they concern a single node."""

    rank: int
    world_size: int
    hidden_dim: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    data_type: torch.dtype = torch.bfloat16
    dispatch_data_type: torch.dtype | None = None
    combine_data_type: torch.dtype | None = None
    scale_dim: int = 0
    scale_type_size: int = 0
    combine_mode: str = "gather"
    quant_type: str = "none"
    dispatch_block_num: int | None = None
    combine_block_num: int | None = None
    warp_num_per_block: int | None = None
    combine_warp_num_per_block: int | None = None
    schedule: tuple[Any, ...] | None = None
    enable_std_moe: bool = False
    max_total_recv_tokens: int = 0
    gpu_per_node: int | None = None
    num_qp_per_pe: int = 2
    max_token_type_size: int | None = None
    dispatch_rdma_block_num: int | None = None
    combine_rdma_block_num: int | None = None
    internode_kernel: str = "auto"
    internode_auto_ll_max_tokens: int = 512
    kernel_backend: str | None = None

    def __post_init__(self) -> None:
        if (self.dispatch_data_type is None) != (self.combine_data_type is None):
            raise ValueError("dispatch_data_type and combine_data_type are given together")
        if self.dispatch_bytes % 16 or self.hidden_dim * _SIZES[self.combine_dtype] % 16:
            raise ValueError(f"rows are a multiple of 16 bytes: {self.dispatch_bytes}")
        if self.gpu_per_node not in (None, self.world_size):
            raise NotImplementedError("the double's second interface is one node")
        if self.kernel_backend not in (None, "flydsl", "hip"):
            raise ValueError(f"unknown kernel backend {self.kernel_backend!r}")
        if self.combine_mode != "gather" or self.quant_type != "none" or self.enable_std_moe:
            raise NotImplementedError("not in the double: scatter, quantized combine, standard MoE")
        if self.max_total_recv_tokens or self.schedule:
            raise NotImplementedError("not in the double: caps, schedules")

    @property
    def dispatch_dtype(self) -> Any:
        """Of rows that travel to the experts."""
        return self.data_type if self.dispatch_data_type is None else self.dispatch_data_type

    @property
    def combine_dtype(self) -> Any:
        """Of rows that travel back."""
        return self.data_type if self.combine_data_type is None else self.combine_data_type

    @property
    def columns(self) -> int:
        """Items of a row that travels to the experts."""
        return self.hidden_dim // 2 if self.dispatch_dtype is FP4 else self.hidden_dim

    @property
    def dispatch_bytes(self) -> int:
        """Of such a row."""
        return self.columns * (1 if self.dispatch_dtype is FP4 else _SIZES[self.dispatch_dtype])


@dataclass
class EpDispatchRoutingHandle:
    """What combine finds its rows by."""

    routed: Routed
    cur_rank_num_token: int


class EpDispatchCombineOp:
    """One dispatch at a time, as in the first interface."""

    def __init__(self, cfg: EpDispatchCombineConfig, comm: Communicator) -> None:
        need(isinstance(cfg, EpDispatchCombineConfig), "not a config of this interface")
        if comm.ranks is None:
            raise DoubleError("the communicator is destroyed")
        self._ranks, self.cfg = comm.ranks, cfg
        need((cfg.rank, cfg.world_size) == (comm.ranks.rank, comm.ranks.size), "not the ranks of the communicator")
        need(cfg.dispatch_dtype in device().row_dtypes(), f"no kernel for {cfg.dispatch_dtype} on {device().arch}")
        need(cfg.max_num_inp_token_per_rank >= 256, "fewer than 256 tokens a rank were seen to corrupt rows")
        rows, top_k = cfg.world_size * cfg.max_num_inp_token_per_rank, cfg.num_experts_per_token
        self._words = -(-cfg.scale_dim * cfg.scale_type_size // 4)
        padded = -(-self._words // 32) * 32  # a backend may pad rows of scales to 128 bytes
        row = cfg.dispatch_bytes + cfg.hidden_dim * _SIZES[cfg.combine_dtype] + top_k * 8 + 4 + padded * 4
        need(rows * row <= comm.left, f"an arena of {rows * row} bytes, and {comm.left} are left of per_rank_vmm")
        comm.left -= rows * row
        self._out = torch.empty(rows, cfg.dispatch_bytes, dtype=U8).view(cfg.dispatch_dtype)
        self._staged = torch.empty(rows, cfg.hidden_dim, dtype=cfg.combine_dtype)
        self._weights = torch.empty(rows, top_k)
        self._ids = torch.empty(rows, top_k, dtype=I32)
        self._scales = torch.empty(rows, padded, dtype=I32)
        self._summed = torch.empty(cfg.max_num_inp_token_per_rank, cfg.hidden_dim, dtype=cfg.combine_dtype)
        self._total = torch.zeros(1, dtype=I32)
        self._routing: EpDispatchRoutingHandle | None = None
        self._calls, self._closed = 0, False
        self._here = device()
        self._here.open_operators += 1
        self._ranks.agree("EpDispatchCombineOp", {**vars(cfg), "rank": None})

    def dispatch(
        self, input: Tensor, weights: Tensor, scales: Tensor | None, indices: Tensor, *, routing: Any = None,
        return_routing: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        """As in the first interface; scales are words [R, words] that may lie strided, and a routing comes last."""
        cfg = self.cfg
        self._need_open()
        need(routing is None and return_routing, "not implemented: replay, and dispatch without return_routing")
        need(self._routing is None, "a dispatch before the last one was combined: rows and routing are overwritten")
        need_tensor("input", input, (cfg.dispatch_dtype,), (None, cfg.columns))
        tokens = len(input)
        if tokens > cfg.max_num_inp_token_per_rank:
            raise ValueError(f"{tokens} tokens exceeds max_num_inp_token_per_rank={cfg.max_num_inp_token_per_rank}")
        need_tensor("weights", weights, (F32,), (tokens, cfg.num_experts_per_token))
        need_tensor("indices", indices, (I32,), (tokens, cfg.num_experts_per_token))
        experts = cfg.world_size * cfg.num_experts_per_rank
        need(bool(((indices >= 0) & (indices < experts)).all()), f"an id is outside [0, {experts}), and nothing guards")
        need((scales is not None) == bool(self._words), "scales, and the config says otherwise")
        self._ranks.agree("dispatch")
        self._calls += 1
        routed = route(self._ranks, indices, cfg.num_experts_per_rank, self._calls)
        parts = [(input, self._out), (weights, self._weights), (indices, self._ids)]
        if scales is not None:
            size = (tokens, cfg.scale_dim)
            need_tensor("scales", scales, (scales.dtype,), size)
            need(scales.element_size() == cfg.scale_type_size, "scales of another size than the config says")
            parts.append((scales.view(I32), self._scales[:, : self._words]))
        for part, into in parts:
            routed.spread(self._ranks, part, into)
        self._total.fill_(routed.total)
        self._routing = EpDispatchRoutingHandle(routed, tokens)
        words = self._scales[:, : self._words] if scales is not None else None
        return self._out, self._weights, words, self._ids, self._total, self._routing

    def combine_in_view(self) -> Tensor:
        """[R, hidden]: where combine's rows are staged, for runners that write there themselves."""
        self._need_open()
        return self._staged

    def combine(
        self, input: Tensor, weights: Tensor | None = None, indices: Tensor | None = None, *, routing: Any
    ) -> tuple[Tensor, None]:
        """input [R or fewer, hidden] -> the sums over ranks [T, hidden]. indices are not looked at."""
        self._need_open()
        need(weights is None, "not implemented: sums of weights")
        if not isinstance(routing, EpDispatchRoutingHandle) or routing is not self._routing:
            raise DoubleError("the routing is not that of the last dispatch, or was combined already")
        routed, tokens = routing.routed, routing.cur_rank_num_token
        need_tensor("input", input, (self.cfg.combine_dtype,), (None, self.cfg.hidden_dim))
        need(routed.total <= len(input) <= len(self._ids), f"{len(input)} rows, and {routed.total} were received")
        self._ranks.agree("combine")
        poison(self._summed)
        self._summed[:tokens] = routed.collect(self._ranks, input, tokens).to(self._summed.dtype)
        for tensor in (self._out, self._weights, self._ids, self._scales):
            poison(tensor)
        self._total.zero_()
        self._routing = None
        return self._summed[:tokens], None

    def reset(self) -> None:
        """All ranks together: a clean slate."""
        self._need_open()
        self._ranks.agree("reset")
        self._routing = None
        self._total.zero_()

    def close(self) -> None:
        """Give the arena back."""
        if not self._closed:
            self._closed = True
            self._here.open_operators -= 1

    def _need_open(self) -> None:
        need(not self._closed, "the operator is closed")
