"""`mori`: the first interface within a node and across nodes, each call whole on the current stream."""

from __future__ import annotations

from torch import Tensor

from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core_mori import calls
from moe_core_mori.dispatcher import MoriDispatcher
from moe_core_mori.launch import choose


class NormalDispatcher(MoriDispatcher):
    """See the module."""

    def __init__(self, binding: Binding) -> None:
        calls.check(calls.V1)
        super().__init__(binding, choose(binding.request, binding.options))

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The rows that need an expert of this rank: [rows, H], as many as may come; `num_valid` says how many did."""
        out = self._outgoing(hidden_states, topk_output, state)
        given = calls.dispatch_v1(out.slot.op, out.rows, out.weights, out.scales, out.handle.ids, self.launch)
        return self._output(given, out.handle)

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks: [T, H]."""
        slot, handle, rows = self._returning(combine_input)
        result = self._result(calls.combine_v1(slot.op, rows, handle.ids, self.launch), handle)
        slot.holder = None
        return result
