"""The double of MoRI's first interface: `mori.ops` and `mori.shmem`.

T = tokens of this rank, K = top-k, M = max_num_inp_token_per_rank, R = ranks * M. What MoRI leaves undefined is poison:
rows past the number received, rows past T that combine gives, results of a send before its receive, and all that a
dispatch gave once it is combined.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core_mori.testing.errors import DoubleError
from moe_core_mori.testing.world import (
    BF16,
    F32,
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

MORI_SHMEM_INIT_WITH_UNIQUEID = 2
_WAVE, _NODE, _FEWEST_TOKENS = 64, 8, 256


class EpDispatchCombineKernelType(Enum):
    """By name; the numbers have moved before."""

    IntraNode = 0
    InterNode = 1
    InterNodeV1 = 2
    InterNodeV1LL = 3
    AsyncLL = 4
    IntraNodeLL = 5


@dataclass
class EpDispatchCombineConfig:
    """Fields, order and defaults of the real one, which checks nothing; what goes wrong later is said here."""

    data_type: torch.dtype
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    max_total_recv_tokens: int = 0
    use_external_inp_buf: bool = True
    kernel_type: EpDispatchCombineKernelType = EpDispatchCombineKernelType.IntraNode
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1
    quant_type: str = "none"


@dataclass
class _Held:
    """A dispatch that was not combined yet. filled: its rows are there; back: its sums, and where they will be."""

    ids: Tensor
    routed: Routed
    parts: list[tuple[Tensor, Tensor]]
    filled: bool = False
    back: tuple[Tensor, Tensor] | None = None


class EpDispatchCombineOp:
    """One dispatch at a time: rows are counted from combine to combine, and its buffers are written over."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        here = device()
        need(here.ranks is not None, "shmem is not initialized")
        self._here = here
        self._ranks: Ranks = here.ranks  # type: ignore[assignment]
        need(isinstance(config, EpDispatchCombineConfig), "not a config of this interface")
        self.config = config
        _check_config(config, self._ranks, here.compute_units)
        dist.barrier()  # the real one meets on the default group, twice
        rows, tokens, row = config.world_size * config.max_num_inp_token_per_rank, config.max_num_inp_token_per_rank, 0
        row = config.hidden_dim * config.max_token_type_size
        self._size = here.allocate((2 * rows + tokens) * row + rows * (8 * config.num_experts_per_token + 4))
        self._out = torch.empty(rows * row, dtype=U8)
        self._summed = torch.empty(tokens * row, dtype=U8)
        self._weights = torch.empty(rows, config.num_experts_per_token)
        self._ids = torch.empty(rows, config.num_experts_per_token, dtype=I32)
        self._scales = torch.empty(rows, config.scale_dim * config.scale_type_size, dtype=U8)
        self._total = torch.zeros(1, dtype=I32)
        self._held: _Held | None = None
        self._calls = 0
        here.open_operators += 1
        self._ranks.agree("EpDispatchCombineOp", {**vars(config), "rank": None, "kernel_type": config.kernel_type.name})
        dist.barrier()

    def __del__(self) -> None:
        if hasattr(self, "_size"):
            self._here.used -= self._size
            self._here.open_operators -= 1

    def dispatch(
        self, input: Tensor, weights: Tensor, scales: Tensor | None, indices: Tensor, block_num: int = -1,
        rdma_block_num: int = -1, warp_per_block: int = -1, call_local_expert_count: bool = False, *,
        routing: Any = None, return_routing: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        """Rows [R, hidden], weights float32 [R, K], scales [R, scale_dim] or None, ids int32 [R, K], rows int32 [1].

        Of the asynchronous kernels this is the send alone.
        """
        need(routing is None and not return_routing, "not implemented: routing handles")
        need(not call_local_expert_count, "not implemented: local expert counts")
        config, here = self.config, device()
        need(self._held is None, "a dispatch before the last one was combined: counts add up, rows are overwritten")
        need_tensor("input", input, here.row_dtypes(), (None, None))
        (tokens, hidden), size = input.shape, input.element_size()
        need(tokens <= config.max_num_inp_token_per_rank, f"{tokens} tokens, past max_num_inp_token_per_rank")
        need(0 < hidden <= config.hidden_dim, f"rows of {hidden} values, the config has {config.hidden_dim}")
        need(size <= config.max_token_type_size, f"elements of {size} bytes, past max_token_type_size")
        slots = (tokens, config.num_experts_per_token)
        need_tensor("weights", weights, (F32,), slots)
        need_tensor("indices", indices, (I32,), slots)
        experts = config.world_size * config.num_experts_per_rank
        inside = (indices >= 0) & (indices < experts)
        need(bool(inside.all()), f"an id is outside [0, {experts}); some kernels send it to rank 0")
        if config.scale_dim:
            need(isinstance(scales, Tensor) and scales.element_size() == config.scale_type_size, "scales do not fit")
            need_tensor("scales", scales, (scales.dtype,), (tokens, config.scale_dim))  # type: ignore[union-attr]
        else:
            need(scales is None or scales.numel() == 0, "scales without scale_dim would stay behind")
        self._check_launch(block_num, rdma_block_num, warp_per_block)
        self._ranks.agree("dispatch", hidden, str(input.dtype), block_num, rdma_block_num, warp_per_block)
        self._calls += 1
        routed = route(self._ranks, indices, config.num_experts_per_rank, self._calls)
        rows = self._ids.shape[0]
        out = self._out[: rows * hidden * size].view(input.dtype).view(rows, hidden)
        given = None
        parts = [(input, out), (weights, self._weights), (indices, self._ids)]
        if config.scale_dim and scales is not None:
            given = self._scales.view(scales.dtype)
            parts.append((scales, given))
        self._held = _Held(indices.clone(), routed, [(part.clone(), into) for part, into in parts])
        for _, into in parts:
            poison(into)
        poison(self._total)
        if config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            self._arrive()
        return out, self._weights, given, self._ids, self._total

    def _arrive(self) -> None:
        held = self._held
        need(held is not None and not held.filled, "a receive without a send")
        if held is not None:
            for part, into in held.parts:
                held.routed.spread(self._ranks, part, into)
            self._total.fill_(held.routed.total)
            held.filled, held.parts = True, [(into, into) for _, into in held.parts]

    def dispatch_send(
        self, input: Tensor, weights: Tensor, scales: Tensor | None, indices: Tensor, block_num: int = -1,
        warp_per_block: int = -1, call_local_expert_count: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
        """As dispatch; what it gives is undefined before `dispatch_recv`."""
        return self.dispatch(input, weights, scales, indices, block_num=block_num, warp_per_block=warp_per_block)

    def dispatch_recv(
        self, block_num: int = -1, warp_per_block: int = -1, call_local_expert_count: bool = False
    ) -> None:
        """Asynchronous kernels only."""
        self._need_async("dispatch_recv")
        self._ranks.agree("dispatch_recv")
        self._arrive()

    def combine(
        self, input: Tensor, weights: Tensor | None, indices: Tensor, block_num: int = -1, rdma_block_num: int = -1,
        warp_per_block: int = -1, use_external_inp_buf: int = -1, call_reset: bool = False, *, routing: Any = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Sums over ranks [M, hidden], of which T rows count, and of the weights (as received) where they are given."""
        config, held = self.config, self._held
        need(routing is None, "not implemented: routing handles")
        need(use_external_inp_buf in (-1, 1) and not call_reset, "not implemented: zero copy, and call_reset")
        if held is None or not held.filled or held.back is not None:
            raise DoubleError("combine without a dispatch that was received")
        total = held.routed.total
        need_tensor("input", input, (BF16, F32), (None, config.hidden_dim))
        need(input.element_size() <= config.max_token_type_size, "elements past max_token_type_size")
        need(len(input) >= total, f"{len(input)} rows, and {total} were received: the rest is read out of bounds")
        need_tensor("indices", indices, (I32,), (None, config.num_experts_per_token))
        same = indices.shape == held.ids.shape and bool((indices == held.ids).all())
        need(same, "indices are not those that this rank dispatched: the sums would take others' rows")
        if weights is not None:
            need_tensor("weights", weights, (F32,), (None, config.num_experts_per_token))
            need(len(weights) >= total, f"weights of {len(weights)} rows, and {total} were received")
        self._check_launch(block_num, rdma_block_num, warp_per_block)
        self._ranks.agree("combine", str(input.dtype), weights is None, block_num, rdma_block_num, warp_per_block)
        tokens = len(held.ids)
        sums = held.routed.collect(self._ranks, input, tokens).to(input.dtype)
        summed = None if weights is None else held.routed.collect(self._ranks, weights, tokens)
        out = self._summed[: config.max_num_inp_token_per_rank * config.hidden_dim * input.element_size()]
        out = out.view(input.dtype).view(config.max_num_inp_token_per_rank, config.hidden_dim)
        poison(out)
        held.back = (sums, out)
        if config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            self._return()
        return out, summed

    def _return(self) -> None:
        held = self._held
        if held is None or held.back is None:
            raise DoubleError("a receive without a send")
        sums, out = held.back
        out[: len(sums)] = sums
        for _, into in held.parts:  # peers may write there from now on
            poison(into)
        self._total.zero_()
        self._held = None

    def combine_send(
        self, input: Tensor, weights: Tensor | None, indices: Tensor, block_num: int = -1, warp_per_block: int = -1
    ) -> tuple[Tensor, Tensor | None]:
        """As combine; what it gives is undefined before `combine_recv`."""
        return self.combine(input, weights, indices, block_num=block_num, warp_per_block=warp_per_block)

    def combine_recv(self, block_num: int = -1, warp_per_block: int = -1) -> None:
        """Asynchronous kernels only."""
        self._need_async("combine_recv")
        self._ranks.agree("combine_recv")
        self._return()

    def reset(self) -> None:
        """Nothing: the published versions launch no kernel here."""

    def _need_async(self, call: str) -> None:
        if self.config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            raise ValueError(f"{call} only supports AsyncLL")

    def _check_launch(self, blocks: int, rdma: int, warps: int) -> None:
        config = self.config
        blocks = config.block_num if blocks <= 0 else blocks
        rdma = config.rdma_block_num if rdma <= 0 else rdma
        warps = config.warp_num_per_block if warps <= 0 else warps
        need(blocks <= device().compute_units, f"{blocks} blocks wait for each other on {device().compute_units} units")
        need(1 <= warps <= 16, f"{warps} warps of a block")
        crosses = config.kernel_type.name.startswith(("Inter", "Async"))
        need(not crosses or 0 < rdma < blocks, f"{rdma} of {blocks} blocks for RDMA")


def _check_config(config: EpDispatchCombineConfig, ranks: Ranks, units: int) -> None:
    need((config.rank, config.world_size) == (ranks.rank, ranks.size), "rank and world_size are not those of shmem")
    need(config.gpu_per_node in (1, 2, 4, 8), f"gpu_per_node is {config.gpu_per_node}, not a power of two up to 8")
    need(config.world_size % config.gpu_per_node == 0, "world_size is not a multiple of gpu_per_node")
    within = config.kernel_type.name.startswith("Intra")
    need(not within or config.world_size == config.gpu_per_node <= _NODE, "IntraNode kernels run within a node")
    across = config.kernel_type.name.startswith("Inter")
    need(not across or config.world_size > config.gpu_per_node, "InterNode kernels run across nodes")
    need(config.max_num_inp_token_per_rank >= _FEWEST_TOKENS, "fewer than 256 tokens a rank were seen to corrupt rows")
    need(0 < config.num_experts_per_token < _WAVE, f"a wave holds {_WAVE - 1} experts of a token")
    need(config.num_experts_per_rank > 0 and config.hidden_dim > 0, "no experts, or no values")
    need(config.max_token_type_size in (1, 2, 4), "elements of 1, 2 or 4 bytes")
    need(config.scale_dim == 0 or config.scale_type_size > 0, "scales without a size")
    need(config.num_qp_per_pe >= 1, "no queue pair")
    need(config.block_num <= units, f"{config.block_num} blocks wait for each other on {units} units")
    need(config.max_total_recv_tokens == 0 and config.use_external_inp_buf, "not implemented: caps, zero copy")
    need(config.quant_type == "none", "not implemented: combine in fewer bits")


def shmem_get_unique_id() -> bytes:
    """On rank 0, for all."""
    return new_unique_id()


def shmem_init_attr(flags: int, rank: int, nranks: int, unique_id: bytes) -> int:
    """Once a process; a further call changes nothing."""
    need(flags == MORI_SHMEM_INIT_WITH_UNIQUEID, f"flags are {flags}")
    here = device()
    if here.ranks is None:
        here.ranks = Ranks(unique_id, rank, nranks)
    return 0


def shmem_mype() -> int:
    """Aborts the process, really, where shmem is not initialized."""
    return _joined().rank


def shmem_npes() -> int:
    """Likewise."""
    return _joined().size


def _joined() -> Ranks:
    ranks = device().ranks
    if ranks is None:
        raise DoubleError("shmem is not initialized")
    return ranks
