"""`deepep_normal` and `deepep_normal_static`: DeepEP's normal kernels, for throughput.

A row travels once to each rank that has an expert for it, with its local ids and weights; the experts' sum of the row
travels back in bfloat16 and is added up there. `deepep_normal` waits on the host for the number of received rows, the
static one computes on the most that may come, its tail without experts, and can be captured in a graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_mask
from moe_core.dispatchers.steps import taken_on
from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.errors import BindError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, Step
from moe_core_deepep.buffers import NODE, Lease, Need, chosen_sms, deep_ep, ranks_of, wire_dtype
from moe_core_deepep.wire import Wire, given


@dataclass(slots=True)
class Handle:
    """What travels to `combine`: DeepEP's own handle and the caller's output tensor."""

    route: tuple[Any, ...]
    output: Tensor | None


@dataclass(slots=True)
class Flying:
    """A call that was started: its result once `event` has passed."""

    result: Any
    event: Any
    output: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Configs:
    """DeepEP's tuned chunk sizes for a number of ranks, and the buffer that they need."""

    dispatch: Any
    combine: Any
    need: Need


def configs(binding: Binding) -> Configs:
    """With the option `num_sms`, else DeepEP's own choice."""
    buffer, ranks = deep_ep().Buffer, binding.parallel.ep_size
    sms, before = chosen_sms(binding), buffer.num_sms
    try:
        buffer.set_num_sms(before if sms is None else sms)
        dispatch, combine = buffer.get_dispatch_config(ranks), buffer.get_combine_config(ranks)
    finally:
        buffer.set_num_sms(before)
    row = binding.config.hidden_size * 2  # combine's rows are bfloat16
    both = dispatch, combine
    rdma = max(config.get_rdma_buffer_size_hint(row, ranks) for config in both) if ranks > NODE else 0
    pairs = (before if sms is None else sms) if ranks > NODE else 1
    nvl = max(config.get_nvl_buffer_size_hint(row, ranks) for config in both)
    return Configs(dispatch, combine, Need(nvl_bytes=nvl, rdma_bytes=rdma, queue_pairs=pairs))


class NormalDispatcher:
    """See the module. lease: a buffer that another dispatcher of the plan shares with it."""

    def __init__(self, binding: Binding, lease: Lease | None = None) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("DeepEP's normal dispatcher was bound without terms")
        self._binding, self._configs, self._travelling = binding, configs(binding), Travelling(binding)
        self._lease = Lease(ranks_of(binding), self._configs.need) if lease is None else lease
        self._experts, self._local = binding.config.num_experts, binding.num_local_experts
        self._ids_dtype = getattr(torch, terms.ids_dtype)
        self._wire = Wire(binding, wire_dtype())
        self._sink = terms.dropped is DroppedSlot.SINK
        self._counts = "host_counts" in terms.extras
        self.expert_mask = expert_mask(binding, sink=self._sink) if "expert_mask" in terms.extras else None
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in taken_on(binding) else 1.0
        self._most = 0  # rows that are received whatever was sent; 0: as many as were

    def close(self) -> None:
        """Give the buffer back, on all ranks together."""
        self._lease.close()

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The rows that need an expert of this rank: [received, H]."""
        return self.dispatch_finish(self._start(hidden_states, topk_output, state, wait=True), state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """Start it on DeepEP's own stream. The host waits here for the row counts, where it does."""
        return self._start(hidden_states, topk_output, state, wait=False)

    def _start(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState, *, wait: bool) -> Flying:
        buffer = self._lease.shared.buffer
        ids, weights = self._wire(topk_output)
        sent = self._travelling(hidden_states)
        to_rank, to_node, to_expert, goes, _ = buffer.get_dispatch_layout(ids, self._experts)
        rows, local, received, counts, route, event = buffer.dispatch(
            sent[0] if len(sent) == 1 else tuple(sent),
            num_tokens_per_rank=to_rank,
            num_tokens_per_rdma_rank=to_node,
            is_token_in_rank=goes,
            num_tokens_per_expert=to_expert,
            topk_idx=ids,
            topk_weights=weights,
            num_worst_tokens=self._most,
            config=self._configs.dispatch,
            async_finish=not wait,
        )
        output, state.output = state.output, None
        return Flying((rows, local, received, counts, Handle(route, output)), None if wait else event)

    def dispatch_finish(self, handle: Flying, state: RunningState) -> StandardDispatchOutput:
        """Let the current stream wait for it."""
        if handle.event is not None:
            handle.event.current_stream_wait()
        rows, local, weights, counts, own = handle.result
        data, scale = rows if isinstance(rows, tuple) else (rows, None)
        if self._sink:
            local = torch.where(local < 0, self._local, local)
        return StandardDispatchOutput(
            data,
            local.to(self._ids_dtype),
            weights,
            hidden_scale=scale,
            host_counts=counts if self._counts else None,
            expert_mask=self.expert_mask,
            handle=own,
        )

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks: [T, H]."""
        return self.combine_finish(self._send_back(combine_input, wait=True), state)

    def combine_begin(self, combine_input: StandardCombineInput, state: RunningState) -> Flying:
        """Start it on DeepEP's own stream."""
        return self._send_back(combine_input, wait=False)

    def _send_back(self, combine_input: StandardCombineInput, *, wait: bool) -> Flying:
        shared, own = self._lease.shared, combine_input.handle
        result, _, event = shared.buffer.combine(
            combine_input.hidden_states.contiguous(), own.route, config=self._configs.combine, async_finish=not wait
        )
        return Flying(result, None if wait else event, own.output)

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Let the current stream wait for it."""
        shared = self._lease.shared
        if handle.event is not None:
            handle.event.current_stream_wait()
        if shared.need.low_latency is not None:
            # Across nodes both kinds of kernels use NVSHMEM's heap, and the low-latency ones want it clean.
            shared.buffer.clean_low_latency_buffer(*shared.need.low_latency)
        return given(handle.result, self._scale, handle.output)


class StaticDispatcher(NormalDispatcher):
    """`deepep_normal_static`: room for every token of every rank, and nothing waits."""

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        if binding.max_tokens is None:
            raise BindError("without max_tokens nobody knows the most rows that may be received")
        self._most = binding.max_tokens * binding.parallel.ep_size
