"""`cutedsl`: FlashInfer's CuTe DSL NVFP4 experts for Blackwell, one kind of kernels for each format."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.formats import BatchedCombineInput, BatchedDispatchOutput, StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import BATCHED
from moe_core_cutedsl.nvfp4_masked import MaskedExperts
from moe_core_cutedsl.nvfp4_standard import WholeExperts
from moe_core_cutedsl.nvfp4_weights import NvFp4Weights


class NvFp4Runner:
    """A layer bound to the kernels of every format that the plan has."""

    def __init__(self, binding: Binding) -> None:
        self._experts: dict[str, Callable[..., Tensor]] = {
            name: (MaskedExperts if name == BATCHED else WholeExperts)(replace(binding, format=name, terms=terms))
            for name, terms in binding.all_terms.items()
        }

    def run(self, runner_input: Any, quant_info: NvFp4Weights, state: RunningState) -> Tensor:
        """A dispatch output -> the experts' rows in its layout."""
        return self._experts[runner_input.format](runner_input, quant_info, state)


def fused_batched(binding: Binding) -> Callable[..., BatchedCombineInput]:
    """The fused func of the format `batched`."""
    runner: NvFp4Runner = binding.runner

    def fused(d: BatchedDispatchOutput, q: NvFp4Weights, config: MoeConfig, state: RunningState) -> BatchedCombineInput:
        return BatchedCombineInput(runner.run(d, q, state), d.topk_ids, d.topk_weights, d.handle)

    return fused


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The fused func of the format `standard`."""
    runner: NvFp4Runner = binding.runner

    def fused(
        d: StandardDispatchOutput, q: NvFp4Weights, config: MoeConfig, state: RunningState
    ) -> StandardCombineInput:
        return StandardCombineInput(runner.run(d, q, state), d.handle)

    return fused
