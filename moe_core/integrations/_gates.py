"""Recognize a model's gate by what it computes, not by its name.

transformers lets an experts class override `_apply_gate` with any function. Instead of a list of model names, the
gate is evaluated on fixed test values and compared with every function that moe_core can express, using the constants
that the module and its configuration carry.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from moe_core.config import Activation
from moe_core.errors import ConfigError
from moe_core.runners.activation import FUNCTIONS, apply_activation

_ROWS, _WIDTH = 16, 64
_NEAR, _REACH = 8.0, 1e4
_LIMIT_NAMES = ("limit", "swiglu_limit", "gate_limit", "activation_limit")
_ALPHA_NAMES = ("alpha", "swiglu_alpha")


def read_gate(module: nn.Module) -> Activation:
    """The Activation that `module` computes between its GEMMs. Raises ConfigError where there is none."""
    gated = bool(getattr(module, "has_gate", True))
    limits = [v for v in _constants(module, _LIMIT_NAMES) if v > 0]
    probe = _probe_values(_WIDTH * (2 if gated else 1), reach=max([_REACH, *(2.0 * v for v in limits)]))
    with torch.no_grad():
        try:
            function, values = (module._apply_gate, _as_stored(probe, module)) if gated else (module.act_fn, probe)
            expected: Tensor = function(values)  # type: ignore[operator]
        except Exception as error:  # the model's own code: anything may be wrong with 64 columns on the CPU
            raise ConfigError(
                f"the gate of {type(module).__name__} could not be evaluated: {type(error).__name__}: {error}",
                hint="use another experts_implementation for this model",
            ) from error
    # The second part is for gates that compute in float32, where 1 + erf(x) and 1 + tanh(x) cancel.
    size = (probe[:, :_WIDTH] * probe[:, _WIDTH:]).abs() if gated else probe.abs()
    allowed = 1e-4 * expected.abs() + 1e-6 * size if expected.shape == size.shape else size
    for candidate in _candidates(gated, limits, _constants(module, _ALPHA_NAMES)):
        found = apply_activation(probe, candidate)
        if found.shape == expected.shape and bool(((found - expected).abs() <= allowed).all()):
            return candidate
    raise ConfigError(
        f"the gate of {type(module).__name__} computes something that moe_core's activations cannot express "
        f"(tried {', '.join(sorted(FUNCTIONS))} and swiglu_oai, with the limits and constants of the module)",
        hint="use another experts_implementation for this model",
    )


def _probe_values(width: int, reach: float) -> Tensor:
    """[rows, width] of fixed values: half of them dense around zero, half up to `reach`, to meet any clamp."""
    half = _ROWS * width // 2
    near = torch.linspace(-_NEAR, _NEAR, half, dtype=torch.float64)
    far = torch.logspace(math.log10(_NEAR), math.log10(reach), half, dtype=torch.float64)
    far[::2] *= -1
    values = torch.cat([near, far])
    # A fixed shuffle, so that gate and up are unrelated.
    order = torch.randperm(values.numel(), generator=torch.Generator().manual_seed(0))
    return values[order].reshape(_ROWS, width)


def _as_stored(canonical: Tensor, module: nn.Module) -> Tensor:
    """[gate; up] columns in the order in which the module's own GEMM1 would give them."""
    if getattr(module, "is_concatenated", True):
        return canonical.clone()
    gate, up = canonical.chunk(2, dim=-1)
    return torch.stack([gate, up], dim=-1).flatten(-2)


def _constants(module: nn.Module, names: tuple[str, ...]) -> list[float]:
    found: list[float] = []
    for holder in (module, getattr(module, "config", None)):
        for name in names:
            value = getattr(holder, name, None)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and float(value) not in found:
                found.append(float(value))
    return found


def _candidates(gated: bool, limits: list[float], alphas: list[float]) -> Iterator[Activation]:
    for name in FUNCTIONS:
        for limit in (None, *limits):
            yield Activation(name=name, gated=gated, limit=limit)
    if not gated:
        return
    for alpha in (*alphas, 1.702, 1.0):
        for beta in (1.0, 0.0):
            for limit in (None, *limits):
                yield Activation(name="swiglu_oai", alpha=alpha, beta=beta, limit=limit)
