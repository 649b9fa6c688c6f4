"""`deepep_v2` and `deepep_v2_grouped`: DeepEP V2's `ElasticBuffer`, one API for prefill and decode.

A row travels once to each rank that has an expert for it. `deepep_v2` hands it over with its local ids and weights, and
the experts' sum of the row travels back. `deepep_v2_grouped` has DeepEP write it once for each of its local experts,
sorted by them, and DeepEP adds those copies up again. In prefill the host waits for how many rows came; in decode
there is room for the most that may come, nothing waits, and a call can be captured in a graph.

DeepEP compiles a kernel for every shape of call, so the first layer of a shape does one of each phase when it is bound.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_mask
from moe_core.dispatchers.steps import taken_on
from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.errors import BindError, ContractViolation
from moe_core.formats import (
    GroupedCombineInput,
    GroupedDispatchOutput,
    StandardCombineInput,
    StandardDispatchOutput,
)
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, Phase, Step
from moe_core_deepep.buffers import Lease, chosen_sms, ranks_of, wire_dtype
from moe_core_deepep.elastic_buffers import most_tokens, need
from moe_core_deepep.wire import Distinct, Wire, given

logger = logging.getLogger("moe_core.deepep")
#: DeepEP's own choice of SMs where it could not find out how fast NVLink is.
_BLIND_SMS = 4


@dataclass(slots=True)
class Handle:
    """What travels to `combine`. route: DeepEP's. counted: the host knows how many rows came. tokens: the caller's."""

    route: Any
    counted: bool
    tokens: int
    output: Tensor | None


@dataclass(slots=True)
class Flying:
    """A call that was started: its result once `event` (None: at once) has passed."""

    result: Any
    event: Any
    handle: Handle


class _Elastic(ABC):
    """What both have in common."""

    _expand = False
    _alignment = 1

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("DeepEP's elastic dispatcher was bound without terms")
        fills: bool = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
        if torch.are_deterministic_algorithms_enabled() and fills:
            raise BindError(
                "torch's deterministic algorithms fill new memory, which DeepEP's ElasticBuffer refuses",
                hint="set torch.utils.deterministic.fill_uninitialized_memory = False",
            )
        self._config, self._local = binding.config, binding.num_local_experts
        self._travelling, self._wire = Travelling(binding), Wire(binding, wire_dtype())
        twice = binding.config.top_k > 1 and not binding.options.get("distinct_experts", False)
        self._distinct = Distinct(binding) if twice else None
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in taken_on(binding) else 1.0
        self._most, sms = most_tokens(binding), chosen_sms(binding)
        self._lease = Lease(ranks_of(binding), need(binding, self._most, terms.payload))
        try:
            self._sms = self._deep_eps_sms() if sms is None else sms
            for phase in binding.request.phases:
                self._compile(phase, binding, terms.payload)
        except (RuntimeError, AssertionError) as error:
            raise BindError(
                f"DeepEP's ElasticBuffer was made, and its first call failed: {error}",
                hint="it compiles kernels when they are first called: nvcc must be found (CUDA_HOME), and ~/.deep_ep, "
                "or EP_JIT_CACHE_DIR, be writable",
            ) from error

    def _deep_eps_sms(self) -> int:
        try:
            sms = self._lease.shared.buffer.get_theoretical_num_sms(self._config.num_experts, self._config.top_k)
        except ZeroDivisionError as error:
            raise BindError(
                "DeepEP could not find out how fast the links are, so it cannot choose a number of SMs",
                hint="set the option num_sms: options={'deepep_v2': {'num_sms': 24}}",
            ) from error
        if sms <= _BLIND_SMS:
            logger.warning(
                "DeepEP chose %d SMs, as it does where `nvidia-smi nvlink -s` tells it no speed: set the option "
                "num_sms, to 24 for example",
                sms,
            )
        return int(sms)

    def _compile(self, phase: Phase, binding: Binding, payload: str) -> None:
        """One call of nobody's tokens: kernels are compiled now, neither in a forward nor while a graph is captured."""
        warm, shape = self._lease.shared.warm, (self._most[phase], self._config.num_experts, self._sms, payload)
        key = (type(self), phase, self._alignment, *shape)
        if key in warm:
            return
        state, config, device = RunningState(phase), self._config, binding.device
        hidden = torch.empty(0, config.hidden_size, dtype=binding.dtype, device=device)
        ids = torch.empty(0, config.top_k, dtype=torch.int32, device=device)
        nobody = TopKOutput(ids, torch.empty(0, config.top_k, device=device))
        flying = self._start(hidden, nobody, state, wait=True)
        rows = flying.result[0]
        back = torch.zeros_like(rows[0] if isinstance(rows, tuple) else rows, dtype=torch.bfloat16)
        self.combine(StandardCombineInput(back, flying.handle), state)
        warm.add(key)

    def close(self) -> None:
        """Give the buffer back, on all ranks together."""
        self._lease.close()

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Any:
        """The rows that need an expert of this rank."""
        return self.dispatch_finish(self._start(hidden_states, topk_output, state, wait=True), state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """Start it on DeepEP's own stream. The host waits here for the row counts, in prefill."""
        return self._start(hidden_states, topk_output, state, wait=False)

    def _start(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState, *, wait: bool) -> Flying:
        buffer, phase, tokens = self._lease.shared.buffer, state.phase or Phase.PREFILL, hidden_states.shape[0]
        if tokens > self._most[phase]:
            raise ContractViolation(
                f"{tokens} tokens in a call that was made for at most {self._most[phase]}",
                hint="raise max_tokens, or in decode the option decode_max_tokens",
            )
        ids, weights = self._wire(topk_output)
        if self._distinct is not None:
            ids, weights = self._distinct(ids, weights)
        if not tokens:
            # DeepEP has never been tried with none, and servers saw it wait for ever: one row that goes nowhere.
            hidden_states = hidden_states.new_zeros(1, hidden_states.shape[1])
            ids, weights = ids.new_full((1, ids.shape[1]), -1), weights.new_zeros(1, weights.shape[1])
        sent, counted = self._travelling(hidden_states), phase is Phase.PREFILL
        rows, local, received, route, event = buffer.dispatch(
            sent[0] if len(sent) == 1 else tuple(sent),
            topk_idx=ids,
            topk_weights=weights,
            num_experts=self._config.num_experts,
            num_max_tokens_per_rank=self._most[phase],
            expert_alignment=self._alignment,
            num_sms=self._sms,
            async_with_compute_stream=not wait,
            do_cpu_sync=counted,
            do_expand=self._expand,
        )
        output, state.output = state.output, None
        return Flying((rows, local, received), None if wait else event, Handle(route, counted, tokens, output))

    def dispatch_finish(self, handle: Flying, state: RunningState) -> Any:
        """Let the current stream wait for it."""
        if handle.event is not None:
            handle.event.current_stream_wait()
        rows, local, weights = handle.result
        data, scale = rows if isinstance(rows, tuple) else (rows, None)
        return self._given(data, scale, local, weights, handle.handle)

    @abstractmethod
    def _given(self, data: Tensor, scale: Tensor | None, local: Tensor | None, weights: Tensor, own: Handle) -> Any:
        """What DeepEP received, in the format."""

    def combine(self, combine_input: StandardCombineInput | GroupedCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks: [T, H]."""
        return self.combine_finish(self._send_back(combine_input, wait=True), state)

    def combine_begin(self, combine_input: StandardCombineInput | GroupedCombineInput, state: RunningState) -> Flying:
        """Start it on DeepEP's own stream."""
        return self._send_back(combine_input, wait=False)

    def _send_back(self, combine_input: StandardCombineInput | GroupedCombineInput, *, wait: bool) -> Flying:
        own: Handle = combine_input.handle
        result, _, event = self._lease.shared.buffer.combine(
            combine_input.hidden_states.contiguous(),
            own.route,
            num_sms=self._sms,
            async_with_compute_stream=not wait,
        )
        return Flying(result, None if wait else event, own)

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Let the current stream wait for it."""
        if handle.event is not None:
            handle.event.current_stream_wait()
        own: Handle = handle.handle
        result = handle.result if own.tokens else handle.result[:0]
        return given(result, self._scale, own.output)


class ElasticDispatcher(_Elastic):
    """`deepep_v2`: rows in the order in which they came, with local ids."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is not None:
            self._ids_dtype = getattr(torch, terms.ids_dtype)
            self._sink, self._says_valid = terms.dropped is DroppedSlot.SINK, "num_valid" in terms.extras
            masked = "expert_mask" in terms.extras
            self.expert_mask = expert_mask(binding, sink=self._sink) if masked else None
        super().__init__(binding)

    def _given(
        self, data: Tensor, scale: Tensor | None, local: Tensor | None, weights: Tensor, own: Handle
    ) -> StandardDispatchOutput:
        if local is None:
            raise ContractViolation("DeepEP gave no ids: the installed version differs from the one that this was for")
        total = own.route.psum_num_recv_tokens_per_scaleup_rank[-1]
        dropped = self._local if self._sink else -1
        if not own.counted and not self._says_valid:  # the tail is whatever the memory held
            came = torch.arange(local.shape[0], dtype=torch.int32, device=local.device) < total
            local = torch.where(came[:, None] & (local >= 0), local, dropped)
        elif self._sink:
            local = torch.where(local >= 0, local, dropped)
        return StandardDispatchOutput(
            data,
            local.to(self._ids_dtype),
            weights,
            hidden_scale=scale,
            num_valid=total if self._says_valid else None,
            expert_mask=self.expert_mask,
            handle=own,
        )


class ExpandedDispatcher(_Elastic):
    """`deepep_v2_grouped`: a row for each token and local expert, sorted by expert."""

    _expand = True

    def __init__(self, binding: Binding) -> None:
        alignment = binding.options.get("alignment", 1)
        if not (isinstance(alignment, int) and alignment > 0):
            raise BindError(f"the option alignment is a positive number of rows, got {alignment!r}")
        self._alignment = alignment
        self._gives_weights = binding.terms is not None and binding.terms.runner_does(Step.ROUTER_WEIGHT)
        super().__init__(binding)

    def _given(
        self, data: Tensor, scale: Tensor | None, local: Tensor | None, weights: Tensor, own: Handle
    ) -> GroupedDispatchOutput:
        ends: Tensor = own.route.psum_num_recv_tokens_per_expert  # where each expert's own rows end, before padding
        up = self._alignment
        offsets = torch.nn.functional.pad((ends + (up - 1)) // up * up if up > 1 else ends, (1, 0))
        row_ids = None
        if up > 1 or not own.counted:
            row = torch.arange(data.shape[0], dtype=torch.int32, device=data.device)
            expert = torch.searchsorted(offsets[1:], row, right=True).clamp_(max=self._local - 1)
            row_ids = torch.where(row < ends[expert], row, -1)
        return GroupedDispatchOutput(
            data,
            offsets,
            alignment=up,
            row_ids=row_ids,
            row_weights=weights if self._gives_weights else None,
            hidden_scale=scale,
            handle=own,
        )
