"""The layer's routing function by our kernel; by the core's torch code where the layer is beyond the kernel."""

from __future__ import annotations

from torch import Tensor

from moe_core.binding import core_router
from moe_core.protocols import Binding, BoundRouter
from moe_core.topk import TopKOutput
from moe_core_triton.kernels.router import fits, route


def router(binding: Binding) -> BoundRouter:
    """The routing function of this layer."""
    config = binding.config
    if not fits(config.num_experts, config.top_k, config.routing):
        return core_router(binding)

    def bound(router_logits: Tensor, correction_bias: Tensor | None = None, scaling_factor: float = 1.0) -> TopKOutput:
        return route(router_logits, config.top_k, config.routing, correction_bias, scaling_factor)

    return bound
