"""`mori_v2`: the second interface, within a node. It sizes its launches itself, from tables of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.errors import BindError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core_mori import calls
from moe_core_mori.dispatcher import MoriDispatcher


class V2Dispatcher(MoriDispatcher):
    """See the module."""

    def __init__(self, binding: Binding) -> None:
        calls.check(calls.V2)
        if "backend" in binding.options:
            calls.check(calls.PROBED)
        terms = binding.terms
        if terms is not None and terms.payload == "mxfp4":
            lacking = "gfx942" if binding.hardware.arch == "gfx942" else f"torch {torch.__version__} without float4"
            if lacking == "gfx942" or not hasattr(torch, "float4_e2m1fn_x2"):
                raise BindError(
                    f"MoRI's second interface moves mxfp4 rows as float4 on gfx950, and this is {lacking}",
                    hint="use the dispatcher mori, which copies their bytes anywhere",
                )
        super().__init__(binding, None)

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The rows that need an expert of this rank: [rows, H], as many as may come; `num_valid` says how many did."""
        out = self._outgoing(hidden_states, topk_output, state)
        given = calls.dispatch_v2(out.slot.op, out.rows, out.weights, out.scales, out.handle.ids)
        out.handle.routing = given[5]
        return self._output(given[:5], out.handle)

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks: [T, H]."""
        slot, handle, rows = self._returning(combine_input)
        result = self._result(calls.combine_v2(slot.op, rows, handle.routing), handle)
        slot.holder = None
        return result
