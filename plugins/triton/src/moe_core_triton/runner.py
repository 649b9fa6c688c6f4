"""The runner core. It runs the one kernel sequence that the fused func runs too."""

from __future__ import annotations

from moe_core.protocols import Binding, RunningState
from moe_core_triton.calls import Call
from moe_core_triton.weights import TritonWeights


class TritonRunner:
    """GEMM1, activation and GEMM2 of a prepared call."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding

    def run(self, runner_input: Call, quant_info: TritonWeights, state: RunningState) -> Call:
        """The call with its result: rows by slot, or finished where the path sums too."""
        return runner_input.layer.compute(runner_input, quant_info, state)
