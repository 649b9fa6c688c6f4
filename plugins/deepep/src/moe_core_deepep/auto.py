"""`deepep`: the normal kernels in prefill, the low-latency kernels in decode."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import BATCHED, STANDARD, FormatId, Phase
from moe_core_deepep import low_latency, normal
from moe_core_deepep.buffers import NODE, Lease, ranks_of
from moe_core_deepep.low_latency import LowLatencyDispatcher
from moe_core_deepep.normal import NormalDispatcher

_FORMAT_OF = {Phase.PREFILL: STANDARD, Phase.DECODE: BATCHED}


@dataclass(slots=True)
class Flying:
    """A call that `by` has started."""

    by: NormalDispatcher | LowLatencyDispatcher
    call: Any


class AutoDispatcher:
    """See the module. Holds the dispatchers of the plan's phases."""

    def __init__(self, binding: Binding) -> None:
        lease = None
        if binding.parallel.ep_size > NODE and len(binding.all_terms) > 1:
            # Across nodes both need NVSHMEM, of which a process has one.
            of_normal, of_ll = normal.configs(binding).need, low_latency.need(binding)
            both = replace(
                of_ll,
                nvl_bytes=of_normal.nvl_bytes,
                rdma_bytes=max(of_normal.rdma_bytes, of_ll.rdma_bytes),
                queue_pairs=max(of_normal.queue_pairs, of_ll.queue_pairs),
            )
            lease = Lease(ranks_of(binding), both)
        self._by_format: dict[FormatId, NormalDispatcher | LowLatencyDispatcher] = {}
        for format, terms in binding.all_terms.items():
            make = NormalDispatcher if format == STANDARD else LowLatencyDispatcher
            self._by_format[format] = make(replace(binding, format=format, terms=terms), lease)

    def close(self) -> None:
        """Give the buffers back, on all ranks together."""
        for dispatcher in self._by_format.values():
            dispatcher.close()

    def _of(self, state: RunningState) -> NormalDispatcher | LowLatencyDispatcher:
        return self._by_format[_FORMAT_OF[state.phase or Phase.PREFILL]]

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Any:
        """By the phase of the call."""
        return self._of(state).dispatch(hidden_states, topk_output, state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """By the phase of the call."""
        by = self._of(state)
        return Flying(by, by.dispatch_begin(hidden_states, topk_output, state))

    def dispatch_finish(self, handle: Flying, state: RunningState) -> Any:
        """Of the one that began it."""
        return handle.by.dispatch_finish(handle.call, state)

    def combine(self, combine_input: Any, state: RunningState) -> Tensor:
        """Of the one that gave the format."""
        return self._by_format[combine_input.format].combine(combine_input, state)

    def combine_begin(self, combine_input: Any, state: RunningState) -> Flying:
        """Of the one that gave the format."""
        by = self._by_format[combine_input.format]
        return Flying(by, by.combine_begin(combine_input, state))

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Of the one that began it."""
        return handle.by.combine_finish(handle.call, state)
