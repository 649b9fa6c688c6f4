"""A whole MoE layer as a torch module: router, routing function, plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_core.api import plan as make_plan
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.moe_plan import MoePlan
from moe_core.protocols import RunningState
from moe_core.topk import AnyTopK, BypassedTopK
from moe_core.vocabulary import TOPK_BYPASSED, TOPK_STANDARD, Owner, Phase, Step
from moe_core.weights import CanonicalWeights


class MoeLayer(nn.Module):
    """`y = layer(hidden_states)` for hidden states [..., H]: routes, runs the experts, adds shared experts.

    router_weight: [E, H], any float dtype; logits are computed in its dtype, scores in float32. correction_bias:
    float32 [E] where the routing has one. shared_experts: a module [T, H] -> [T, H] whose result is added. The
    experts' weights belong to `plan`, in the layout of the runner that was chosen; change them with `update_weights`.
    A state_dict holds the router alone: save the experts where they come from.
    Keywords of `moe_core.plan` (hardware, settings, group, max_tokens, ...) are passed on.
    """

    def __init__(
        self,
        config: MoeConfig,
        router_weight: Tensor,
        weights: CanonicalWeights,
        *,
        correction_bias: Tensor | None = None,
        shared_experts: Callable[[Tensor], Tensor] | None = None,
        parallel: ParallelConfig | None = None,
        **plan_options: Any,
    ) -> None:
        super().__init__()
        expected = (config.num_experts, config.hidden_size)
        if tuple(router_weight.shape) != expected:
            raise ConfigError(f"router_weight has shape {tuple(router_weight.shape)}, expected {expected}")
        if config.routing.correction_bias != (correction_bias is not None):
            raise ConfigError(
                f"the routing has correction_bias={config.routing.correction_bias}, "
                f"but the layer was given {'none' if correction_bias is None else 'one'}"
            )
        self.config = config
        self.router_weight = nn.Parameter(router_weight, requires_grad=False)
        self.correction_bias: Tensor | None
        self.register_buffer("correction_bias", correction_bias)
        self.shared_experts = shared_experts
        if config.no_combine and shared_experts is not None:
            raise ConfigError("no_combine returns a row for each slot: there is no sum to add shared_experts to")
        # This layer routes, so it can scale the router's weights where no kernel does; but not those that a kernel
        # computes itself, nor those that multiply the input of a function that is not linear.
        if plan_options.get("topk_format", TOPK_STANDARD) == TOPK_STANDARD and not config.router_weight_on_input:
            plan_options.setdefault("caller_can", {Step.ROUTED_SCALING})
        self.plan: MoePlan = make_plan(config, weights, parallel, **plan_options)
        scales = self.plan.step_owner(Step.ROUTED_SCALING) is Owner.CALLER
        self._scaling = config.routed_scaling_factor if scales else 1.0
        self._bypass = self.plan.resolution.request.topk_format == TOPK_BYPASSED

    def route(self, hidden_states: Tensor) -> AnyTopK:
        """The router's decision for hidden states [T, H]."""
        logits = nn.functional.linear(hidden_states.to(self.router_weight.dtype), self.router_weight)
        if self._bypass:
            return BypassedTopK(logits, self.correction_bias)
        return self.plan.route(logits, self.correction_bias, scaling_factor=self._scaling)

    def forward(
        self, hidden_states: Tensor, *, phase: Phase | None = None, state: RunningState | None = None
    ) -> Tensor:
        """[..., H] -> [..., H] ([..., K, H] with no_combine)."""
        if hidden_states.shape[-1] != self.config.hidden_size:
            raise ContractViolation(
                f"hidden_states has shape {tuple(hidden_states.shape)}, expected [..., {self.config.hidden_size}]"
            )
        rows = hidden_states.reshape(-1, self.config.hidden_size)
        # Before the plan: it may write its result over the rows.
        shared = self.shared_experts(rows) if self.shared_experts is not None else None
        given = state is not None and state.output is not None
        result = self.plan(rows, self.route(rows), phase=phase, state=state)
        if shared is not None:
            result = result.add_(shared) if given else result + shared
        return result.reshape(*hidden_states.shape[:-1], *result.shape[1:])

    @torch.no_grad()
    def update_weights(self, weights: CanonicalWeights) -> None:
        """New expert weights, in place."""
        self.plan.update_weights(weights)

    def extra_repr(self) -> str:
        """For print(layer)."""
        return repr(self.plan)
