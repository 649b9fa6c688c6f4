"""`mori_ll`: the first interface's asynchronous kernels, whose sends and receives are apart.

Between the two halves the current stream is free for other work; a copy engine moves the rows within a node where
MORI_ENABLE_SDMA=1 was set before the process started.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core_mori import calls
from moe_core_mori.buffers import Slot
from moe_core_mori.dispatcher import Handle, MoriDispatcher, Outgoing
from moe_core_mori.launch import choose_asynchronous


@dataclass(slots=True)
class Sent:
    """A half of a call whose other half is to come. kept: tensors that the sends may still read."""

    given: Any
    handle: Handle
    slot: Slot
    kept: Outgoing | Tensor


class LowLatencyDispatcher(MoriDispatcher):
    """See the module."""

    def __init__(self, binding: Binding) -> None:
        calls.check(calls.V1, calls.ASYNCHRONOUS)
        super().__init__(binding, choose_asynchronous(binding.request, binding.options))

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The rows that need an expert of this rank: [rows, H], as many as may come; `num_valid` says how many did."""
        return self.dispatch_finish(self.dispatch_begin(hidden_states, topk_output, state), state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Sent:
        """Send."""
        out = self._outgoing(hidden_states, topk_output, state)
        given = calls.dispatch_send(out.slot.op, out.rows, out.weights, out.scales, out.handle.ids, self.launch)
        return Sent(given, out.handle, out.slot, out)

    def dispatch_finish(self, handle: Sent, state: RunningState) -> StandardDispatchOutput:
        """Receive."""
        self._lease.shared.holds(handle.slot, handle.handle)
        given, handle.given = handle.given, None
        if given is None:
            raise ContractViolation("this dispatch was finished already", hint="finish it once")
        calls.dispatch_receive(handle.slot.op, self.launch)
        return self._output(given, handle.handle)

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks: [T, H]."""
        return self.combine_finish(self.combine_begin(combine_input, state), state)

    def combine_begin(self, combine_input: StandardCombineInput, state: RunningState) -> Sent:
        """Send."""
        slot, handle, rows = self._returning(combine_input)
        return Sent(calls.combine_send(slot.op, rows, handle.ids, self.launch), handle, slot, rows)

    def combine_finish(self, handle: Sent, state: RunningState) -> Tensor:
        """Receive, and sum."""
        self._lease.shared.holds(handle.slot, handle.handle)
        calls.combine_receive(handle.slot.op, self.launch)
        result = self._result(handle.given, handle.handle)
        handle.slot.holder = None
        return result
