"""`moe_core::cpu_experts`: the kernel as one operator, so that torch.compile(fullgraph=True) traces a layer.

The operator gets the weights as an int handle into `weights.LIVE`: packed weights are opaque oneDNN
tensors, which neither fake tensors nor the compiler's caches can represent. `cpu_experts` goes through the
operator only while a compiler traces; otherwise it calls the kernel, since an operator implemented in
Python costs microseconds a call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.errors import BindError
from moe_core.runners.cpu.kernel import experts_forward
from moe_core.runners.cpu.weights import LIVE, CpuWeights

if TYPE_CHECKING:
    from moe_core.protocols import RunnerHooks

_SCHEMA = (
    "cpu_experts(Tensor hidden, Tensor ids, Tensor? weights, int handle, str activation, bool gated, "
    "float alpha, float beta, float? limit, bool router_weight_on_input, bool combine, "
    "float output_scale) -> Tensor"
)


def cpu_experts(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
    *,
    router_weight_on_input: bool = False,
    combine: bool = True,
    output_scale: float = 1.0,
    hooks: RunnerHooks | None = None,
) -> Tensor:
    """`kernel.experts_forward`, traceable. Hooks are Python callables, so a compiler breaks its graph at
    them."""
    if hooks is None and torch.compiler.is_compiling():
        result: Tensor = torch.ops.moe_core.cpu_experts.default(
            hidden,
            topk_ids,
            topk_weights,
            weights.handle,
            activation.name,
            activation.gated,
            activation.alpha,
            activation.beta,
            activation.limit,
            router_weight_on_input,
            combine,
            output_scale,
        )
        return result
    return experts_forward(
        hidden,
        topk_ids,
        topk_weights,
        weights,
        activation,
        router_weight_on_input=router_weight_on_input,
        combine=combine,
        output_scale=output_scale,
        hooks=hooks,
    )


def _run(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    handle: int,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    router_weight_on_input: bool,
    combine: bool,
    output_scale: float,
) -> Tensor:
    prepared = LIVE.get(handle)
    if prepared is None:
        raise BindError(
            f"moe_core::cpu_experts was called with handle {handle}, whose weights are gone",
            hint="keep the plan alive as long as the compiled function, in the same process",
        )
    return experts_forward(
        hidden,
        ids,
        weights,
        prepared,
        Activation(name=activation, gated=gated, alpha=alpha, beta=beta, limit=limit),
        router_weight_on_input=router_weight_on_input,
        combine=combine,
        output_scale=output_scale,
    )


def _fake(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    handle: int,
    activation: str,
    gated: bool,
    alpha: float,
    beta: float,
    limit: float | None,
    router_weight_on_input: bool,
    combine: bool,
    output_scale: float,
) -> Tensor:
    tokens, width = hidden.shape
    return hidden.new_empty((tokens, width) if combine else (tokens, ids.shape[1], width))


def _register() -> torch.library.Library:
    # Held by the module: an operator disappears with its Library. A fragment, since plugins may add to the
    # namespace.
    library = torch.library.Library("moe_core", "FRAGMENT")  # type: ignore[no-untyped-call]
    # Defined already after a reload, or by a second copy of the package in this process.
    if not hasattr(torch.ops.moe_core, "cpu_experts"):
        library.define(_SCHEMA)  # type: ignore[no-untyped-call]
        library.impl("cpu_experts", _run, "CPU")  # type: ignore[no-untyped-call]
        torch.library.register_fake("moe_core::cpu_experts", _fake, lib=library)
    return library


_LIBRARY = _register()
