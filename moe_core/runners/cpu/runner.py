"""The `cpu` runner: bfloat16, float32 and float16 layers on a CPU, through oneDNN's prepacked products.

The split path and the fused func call the same kernel; the split path exists so that others can put their own
adapters beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.errors import ConfigError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.runners.cpu import weights as cpu_weights
from moe_core.runners.cpu.op import cpu_experts
from moe_core.runners.cpu.weights import CpuWeights
from moe_core.vocabulary import Step
from moe_core.weights import CanonicalWeights


@dataclass(slots=True)
class CpuInput:
    """hidden: [T, H]. ids: [T, K] local, -1 for dropped. weights: float32 [T, K] or None for 1."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor | None


def prepare(weights: CanonicalWeights, binding: Binding) -> CpuWeights:
    """Pack the weights or keep views of them, as option `pack_weights` says."""
    pack = binding.options.get("pack_weights", "auto")
    if not isinstance(pack, bool) and pack != "auto":
        raise ConfigError(
            f"option pack_weights of runner 'cpu' must be 'auto', True or False, got {pack!r}",
            hint="'auto', the default, takes what is measured to be faster on this machine",
        )
    return cpu_weights.prepare(
        weights.w13,
        weights.w2,
        weights.w13_bias,
        weights.w2_bias,
        gated=binding.config.activation.gated,
        pack=pack,
    )


def update(quant_info: CpuWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """New values for the same packed buffers."""
    cpu_weights.update_in_place(quant_info, weights.w13, weights.w2, weights.w13_bias, weights.w2_bias)


class CpuRunner:
    """All arguments of the kernel that a plan fixes."""

    def __init__(self, binding: Binding) -> None:
        config, terms = binding.config, binding.terms
        self._activation = config.activation
        self._on_input = config.router_weight_on_input
        self._weighs = terms is None or terms.runner_does(Step.ROUTER_WEIGHT)
        self._combine = terms is None or terms.runner_does(Step.TOPK_SUM)
        scales = terms is not None and terms.runner_does(Step.ROUTED_SCALING)
        self._scale = config.routed_scaling_factor if scales else 1.0

    def run(self, runner_input: CpuInput, quant_info: CpuWeights, state: RunningState) -> Tensor:
        """-> [T, H], or [T, K, H] where the runner does not sum."""
        return cpu_experts(
            runner_input.hidden,
            runner_input.ids,
            runner_input.weights if self._weighs else None,
            quant_info,
            self._activation,
            router_weight_on_input=self._on_input,
            combine=self._combine,
            output_scale=self._scale,
            hooks=state.hooks,
        )


def pre_standard(binding: Binding) -> Callable[..., CpuInput]:
    """Pre-permute of the format `standard`: nothing moves."""
    return _to_input


def post_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """Post-permute of the format `standard`."""
    return _to_combine


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The same three steps as one call."""
    run = binding.runner.run

    def fused(
        dispatched: StandardDispatchOutput, quant_info: CpuWeights, config: MoeConfig, state: RunningState
    ) -> StandardCombineInput:
        out = run(_to_input(dispatched, quant_info, config, state), quant_info, state)
        return StandardCombineInput(out if state.output is None else state.output.copy_(out), dispatched.handle)

    return fused


def _to_input(dispatched: StandardDispatchOutput, quant_info: Any, config: Any, state: RunningState) -> CpuInput:
    ids, weights = dispatched.topk_ids, dispatched.topk_weights
    if ids is None or weights is None:
        raise TypeError("the cpu runner needs top-k ids and weights")
    if dispatched.num_valid is not None:
        padding = torch.arange(ids.shape[0]) >= dispatched.num_valid
        ids = ids.masked_fill(padding[:, None], -1)
    state.private["cpu.handle"] = dispatched.handle
    return CpuInput(dispatched.hidden_states, ids, weights)


def _to_combine(out: Tensor, quant_info: Any, config: Any, state: RunningState) -> StandardCombineInput:
    # Written out here and in the fused func: a shared function would be one Python frame more in every forward.
    return StandardCombineInput(out if state.output is None else state.output.copy_(out), state.private["cpu.handle"])
