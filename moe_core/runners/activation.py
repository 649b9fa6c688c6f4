"""The activation functions of `moe_core.config.Activation`, in plain torch: the definition that kernels are held to."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.config import ACTIVATIONS, Activation
from moe_core.errors import ConfigError, did_you_mean


def _relu2(x: Tensor) -> Tensor:
    return functional.relu(x).square()


def _gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _identity(x: Tensor) -> Tensor:
    return x


FUNCTIONS: Final[dict[str, Callable[[Tensor], Tensor]]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": functional.relu,
    "relu2": _relu2,
    "identity": _identity,
}


def apply_activation(gate_up: Tensor, activation: Activation) -> Tensor:
    """[..., 2I] with gate in the first half (or [..., I] if not gated) -> [..., I], in the dtype of the input."""
    if not activation.gated:
        x = gate_up if activation.limit is None else gate_up.clamp(max=activation.limit)
        return _function(activation.name)(x)
    gate, up = gate_up.chunk(2, dim=-1)
    if activation.limit is not None:
        gate = gate.clamp(max=activation.limit)
        up = up.clamp(min=-activation.limit, max=activation.limit)
    if activation.name == "swiglu_oai":
        return gate * torch.sigmoid(activation.alpha * gate) * (up + activation.beta)
    return _function(activation.name)(gate) * up


def _function(name: str) -> Callable[[Tensor], Tensor]:
    try:
        return FUNCTIONS[name]
    except KeyError:
        raise ConfigError(f"unknown activation {name!r}", hint=did_you_mean(name, ACTIVATIONS)) from None
