"""The layer as a formula in float64, written apart from every runner: what results are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from moe_core.config import Activation, MoeConfig
from moe_core.errors import ConfigError
from moe_core.protocols import HookRows, RunnerHooks
from moe_core.quant import QuantizedTensor, QuantScheme, builtin_scheme, dequantize, roundtrip_activation
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights

_F: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": lambda x: x / (1 + torch.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / 2**0.5)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))),
    "relu": lambda x: x.clamp(min=0),
    "relu2": lambda x: x.clamp(min=0) ** 2,
    "identity": lambda x: x,
}
#: Activations that the formula knows. A plugin's own can only be compared with the plugin itself.
ACTIVATIONS: Final = frozenset({*_F, "swiglu_oai"})


def activate(x: Tensor, activation: Activation) -> Tensor:
    """[rows, 2I] gate, up (or [rows, I]) -> [rows, I], see `moe_core.config.Activation`."""
    if activation.name not in ACTIVATIONS:
        raise ConfigError(f"the formula does not know the activation {activation.name!r}")
    limit = activation.limit
    if not activation.gated:
        return _F[activation.name](x if limit is None else x.clamp(max=limit))
    half = x.shape[-1] // 2
    gate, up = x[..., :half], x[..., half:]
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    if activation.name == "swiglu_oai":
        return gate / (1 + torch.exp(-activation.alpha * gate)) * (up + activation.beta)
    return _F[activation.name](gate) * up


def dense(
    config: MoeConfig,
    weights: CanonicalWeights,
    hidden: Tensor,
    topk: TopKOutput,
    *,
    scheme: QuantScheme | None = None,
    hooks: RunnerHooks | None = None,
) -> Tensor:
    """What the whole layer must give, float64: [T, H], or [T, K, H] with no_combine.

    weights: all experts, not sharded. Ids outside [0, E) are dropped slots, whatever their weight. Activations are
    quantized as the scheme says, the live rows of a GEMM all together.
    """
    described = scheme or builtin_scheme(config.scheme)
    x, ids = hidden.double(), topk.topk_ids.long()
    live = (ids >= 0) & (ids < config.num_experts)
    scales = topk.topk_weights.double().where(live, 0.0)
    out = x.new_zeros(*ids.shape, config.hidden_size)
    on_input = config.router_weight_on_input
    token, slot = live.nonzero(as_tuple=True)
    expert = ids[token, slot]
    info = HookRows(hidden, token, slot, expert)
    called = hooks if hooks is not None and token.numel() else RunnerHooks()
    rows = x[token] * scales[token, slot, None] if on_input else x[token]
    inner = _linear(rows, "w13", expert, weights, config, described)
    if called.after_gate_up is not None:
        called.after_gate_up(inner, info)
    result = _linear(activate(inner, config.activation), "w2", expert, weights, config, described)
    if called.after_down is not None:
        called.after_down(result, info)
    out[token, slot] = result
    if not on_input:
        out = out * scales[..., None]
    out = out * config.routed_scaling_factor
    return out if config.no_combine else out.sum(dim=1)


def _linear(
    x: Tensor, name: str, experts: Tensor, weights: CanonicalWeights, config: MoeConfig, scheme: QuantScheme
) -> Tensor:
    """x [S, K] -> [S, N], each row by its expert's matrix. All rows are quantized together, as one tensor."""
    static: Tensor | None = getattr(weights, f"{name}_input_scale")
    if scheme.activation is not None and static is None:
        x = roundtrip_activation(x.float(), scheme.activation).double()
    result = x.new_empty(x.shape[0], getattr(weights, name).shape[1])
    for expert in torch.unique(experts).tolist():
        mine = experts == expert

        def part(suffix: str, expert: int = expert) -> Tensor | None:
            tensor: Tensor | None = getattr(weights, f"{name}{suffix}")
            return None if tensor is None else tensor[expert]

        rows, matrix = x[mine], getattr(weights, name)[expert]
        if scheme.scale is not None:
            stored = QuantizedTensor(matrix, part("_scale"), part("_zero"), part("_global_scale"))
            matrix = dequantize(stored, scheme, group_size=config.group_size)
        if scheme.activation is not None and static is not None:
            rows = roundtrip_activation(rows.float(), scheme.activation, scale=static[expert]).double()
        result[mine] = rows @ matrix.double().t()
        bias = part("_bias")
        if bias is not None:
            result[mine] += bias.double()
    return result
