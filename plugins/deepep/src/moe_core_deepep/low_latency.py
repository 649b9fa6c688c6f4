"""`deepep_ll`: DeepEP's low-latency kernels, for decode.

Rows arrive sorted by local expert, at most M a rank and expert, quantized on the way where the payload is fp8;
`combine` applies the router weights. Nothing waits for the device, so a call can be captured in a graph. The kernels
have two halves of a buffer: a third dispatch before the first result is combined would overwrite it, so it is refused.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_core.dispatchers.steps import taken_on
from moe_core.errors import BindError, ContractViolation
from moe_core.formats import BatchedCombineInput, BatchedDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Step
from moe_core_deepep.buffers import Lease, Need, Receive, deep_ep, ranks_of, wire_dtype
from moe_core_deepep.wire import Wire, given

#: Results of dispatch that may wait for their combine at a time, of all layers that share a buffer.
MOST_FLYING = 2
_NOTHING: Mapping[str, Any] = {}
#: Arguments of low_latency_combine that are the dispatcher's to give.
_OURS = frozenset(
    {"self", "x", "topk_idx", "topk_weights", "handle", "zero_copy", "async_finish", "return_recv_hook", "out"}
)


@dataclass(slots=True, eq=False, weakref_slot=True)
class Handle:
    """What travels to `combine`. ids int64 and weights float32 [T, K] are this rank's own."""

    route: tuple[Any, ...]
    ids: Tensor
    weights: Tensor
    output: Tensor | None


@dataclass(slots=True)
class Flying:
    """A call whose sends are under way: `receive` launches the rest, without it all is done."""

    result: Any
    receive: Receive | None
    output: Tensor | None = None


def most_tokens(binding: Binding) -> int:
    """M: the most tokens a rank, rounded up so that ep_size * M is a multiple of 4, as the fp8 scales want."""
    wanted, ranks = binding.options.get("decode_max_tokens", binding.max_tokens), binding.parallel.ep_size
    if wanted is None:
        raise BindError("without max_tokens nobody knows how large the low-latency buffer must be")
    while wanted * ranks % 4:
        wanted += 1
    return int(wanted)


def need(binding: Binding) -> Need:
    """The buffer of the low-latency kernels."""
    shape = most_tokens(binding), binding.config.hidden_size, binding.config.num_experts
    tokens, hidden, experts = shape
    heap = deep_ep().Buffer.get_low_latency_rdma_size_hint(tokens, hidden, binding.parallel.ep_size, experts)
    return Need(rdma_bytes=heap, low_latency=shape, queue_pairs=binding.num_local_experts)


class LowLatencyDispatcher:
    """See the module. lease: a buffer that another dispatcher of the plan shares with it."""

    def __init__(self, binding: Binding, lease: Lease | None = None) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("DeepEP's low-latency dispatcher was bound without terms")
        self._binding, self._most = binding, most_tokens(binding)
        self._lease = Lease(ranks_of(binding), need(binding)) if lease is None else lease
        self._experts, self._ranks = binding.config.num_experts, binding.parallel.ep_size
        self._fp8 = terms.payload == "fp8_group128"
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in taken_on(binding) else 1.0
        self._wire = Wire(binding, wire_dtype())
        self._takes = inspect.signature(deep_ep().Buffer.low_latency_combine).parameters

    def close(self) -> None:
        """Give the buffer back, on all ranks together."""
        self._lease.close()

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> BatchedDispatchOutput:
        """The rows of this rank's experts: [E_local, ep_size * M, H]."""
        return self._given(*self._start(hidden_states, topk_output, state, wait=True)[0])

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """Send; until `dispatch_finish`, or the next call that shares the buffer, no SM is busy with it."""
        return Flying(*self._start(hidden_states, topk_output, state, wait=False))

    def _start(
        self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState, *, wait: bool
    ) -> tuple[tuple[Any, ...], Receive | None]:
        shared, tokens = self._lease.shared, hidden_states.shape[0]
        if tokens > self._most:
            raise ContractViolation(
                f"{tokens} tokens in a low-latency call that was made for at most {self._most}",
                hint="call the plan with phase='prefill', or raise max_tokens (decode_max_tokens of 'deepep')",
            )
        if len(shared.flying) >= MOST_FLYING:
            raise ContractViolation(
                f"{len(shared.flying)} results of low-latency dispatches wait for their combine; another dispatch "
                "would overwrite the first",
                hint="combine one before; at most two micro-batches can be in flight, over all layers",
            )
        ids, weights = self._wire(topk_output)
        shared.settle()
        rows, counts, route, _, hook = shared.buffer.low_latency_dispatch(
            hidden_states.contiguous(), ids, self._most, self._experts, use_fp8=self._fp8, return_recv_hook=not wait
        )
        shared.receive = None if wait else Receive(hook)
        output, state.output = state.output, None
        own = Handle(route, ids, weights, output)
        shared.flying.add(own)
        told = state.tokens_per_rank
        return (rows, counts, own, tokens * self._ranks if told is None else sum(told)), shared.receive

    def dispatch_finish(self, handle: Flying, state: RunningState) -> BatchedDispatchOutput:
        """Receive."""
        self._lease.shared  # noqa: B018, raises once the plan is closed: the receive would read freed memory
        if handle.receive is not None:
            handle.receive()
        return self._given(*handle.result)

    def _given(self, rows: Any, counts: Tensor, own: Handle, everybodys: int) -> BatchedDispatchOutput:
        data, scale = rows if self._fp8 else (rows, None)
        slots = everybodys * self._binding.config.top_k  # as far as this rank knows
        return BatchedDispatchOutput(
            data,
            counts,
            expected_m=-(-slots // self._experts),
            hidden_scale=scale,
            topk_ids=own.ids,
            topk_weights=own.weights,
            handle=own,
        )

    def combine(self, combine_input: BatchedCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens: weighted and summed over their experts, [T, H]."""
        result, _, output = self._send_back(combine_input, state, wait=True)
        return given(result, self._scale, output)

    def combine_begin(self, combine_input: BatchedCombineInput, state: RunningState) -> Flying:
        """Send; until `combine_finish`, or the next call that shares the buffer, no SM is busy with it."""
        return Flying(*self._send_back(combine_input, state, wait=False))

    def _send_back(
        self, combine_input: BatchedCombineInput, state: RunningState, *, wait: bool
    ) -> tuple[Tensor, Receive | None, Tensor | None]:
        shared, own = self._lease.shared, combine_input.handle
        shared.settle()
        result, _, hook = shared.buffer.low_latency_combine(
            combine_input.hidden_states.contiguous(),
            own.ids,
            own.weights,
            own.route,
            return_recv_hook=not wait,
            **(_NOTHING if state.overlap is None else self._overlapping(state)),
        )
        shared.receive = None if wait else Receive(hook)
        shared.flying.discard(own)
        return result, shared.receive, own.output

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Receive, and sum."""
        self._lease.shared  # noqa: B018, as above
        if handle.receive is not None:
            handle.receive()
        return given(handle.result, self._scale, handle.output)

    def _overlapping(self, state: RunningState) -> Mapping[str, Any]:
        """`state.overlap`: further arguments for the installed low_latency_combine (forks wait for GEMM2's tiles)."""
        more: Any = state.overlap
        takes = set(self._takes) - _OURS
        unknown = sorted(set(more) - takes) if isinstance(more, Mapping) else [type(more).__name__]
        if unknown:
            raise ContractViolation(
                f"state.overlap asks for {', '.join(unknown)}, which the installed DeepEP's low_latency_combine lacks",
                hint=f"it takes {', '.join(sorted(takes))}, beside those that the dispatcher gives",
            )
        return dict(more)
