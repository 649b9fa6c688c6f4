"""A model's gate is recognized by what it computes; what moe_core cannot express is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, NemotronHConfig
from transformers.activations import ACT2FN
from transformers.integrations.finegrained_fp8 import FP8Experts
from transformers.integrations.moe import use_experts_implementation
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

import moe_core.integrations.transformers as bridge
from moe_core.config import Activation
from moe_core.errors import ConfigError
from moe_core.integrations._gates import read_gate

Make = Callable[..., Any]
QUICK_GELU = Activation(name="swiglu_oai", alpha=1.702, beta=0.0)


def agrees(module: nn.Module, expected: Activation, call: Make, run_as: Make) -> None:
    """The gate is read as `expected`, and the layer computes the same as eager, far outside of every clamp too."""
    assert read_gate(module) == expected
    x, ids, weights = call(9)
    x = x * 20
    found, eager = (run_as(module, name, x, ids, weights) for name in (bridge.NAME, "eager"))
    torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5 * float(eager.abs().max()))


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("silu", Activation()),
        ("swish", Activation()),
        ("gelu", Activation(name="gelu")),
        ("gelu_python", Activation(name="gelu")),
        ("gelu_pytorch_tanh", Activation(name="gelu_tanh")),
        ("gelu_new", Activation(name="gelu_tanh")),
        ("gelu_fast", Activation(name="gelu_tanh")),
        ("quick_gelu", QUICK_GELU),
        ("relu", Activation(name="relu")),
        ("relu2", Activation(name="relu2")),
        ("linear", Activation(name="identity")),
    ],
)
def test_gated(function: str, expected: Activation, experts: Make, call: Make, run_as: Make) -> None:
    agrees(experts(hidden_act=function), expected, call, run_as)


@pytest.mark.parametrize("function", ["relu2", "silu", "gelu", "relu"])
def test_without_gate(function: str, experts: Make, call: Make, run_as: Make) -> None:
    module = experts(
        NemotronHExperts,
        config_class=NemotronHConfig,
        moe_intermediate_size=48,
        n_routed_experts=6,
        mlp_hidden_act=function,
        moe_latent_size=None,
    )
    agrees(module, Activation(name=function, gated=False), call, run_as)


def test_gpt_oss(experts: Make, call: Make, run_as: Make) -> None:
    module = experts(GptOssExperts, config_class=GptOssConfig)
    agrees(module, Activation.swiglu_oai(), call, run_as)
    module.limit, module.alpha = 2.5, 1.25
    bridge.release(module)
    agrees(module, Activation.swiglu_oai(alpha=1.25, limit=2.5), call, run_as)


class Clamped(MixtralExperts):
    """DeepSeek-V4's: gate and up are clamped before the activation."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.limit = config.swiglu_limit

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate.clamp(max=self.limit)) * up.clamp(min=-self.limit, max=self.limit)

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        if self.config._experts_implementation != "eager":
            return super().forward(x, ids, weights)
        slots = x[:, None].expand(-1, ids.shape[1], -1)
        hidden = self._apply_gate(torch.einsum("tkh,tkih->tki", slots, self.gate_up_proj[ids]))
        return (torch.einsum("tki,tkhi->tkh", hidden, self.down_proj[ids]) * weights[..., None]).sum(1)


@pytest.mark.parametrize("function", ["silu", "gelu"])
@pytest.mark.parametrize("limit", [0.5, 7.0, 100.0])
def test_clamped(function: str, limit: float, experts: Make, call: Make, run_as: Make) -> None:
    module = experts(Clamped, hidden_act=function, swiglu_limit=limit)
    agrees(module, Activation(name=function, limit=limit), call, run_as)


def test_a_limit_that_is_carried_but_not_used(experts: Make, call: Make, run_as: Make) -> None:
    """It is what the function does that counts."""
    agrees(experts(swiglu_limit=0.5), Activation(), call, run_as)


class Rounds(MixtralExperts):
    """Computes its gate in float32, as Beam's does."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return (self.act_fn(gate.float()) * up.float()).to(gate.dtype)


@pytest.mark.parametrize("function", ["silu", "gelu", "gelu_new"])
def test_gate_that_computes_in_float32(function: str, experts: Make) -> None:
    assert read_gate(experts(Rounds, hidden_act=function)) == read_gate(experts(hidden_act=function))


@pytest.mark.parametrize(
    ("alpha", "limit", "expected"),
    [
        (None, None, Activation()),
        (None, 2.0, Activation(limit=2.0)),
        (1.5, 3.0, Activation.swiglu_oai(alpha=1.5, limit=3.0)),
    ],
)
def test_fp8_experts(alpha: float | None, limit: float | None, expected: Activation, experts: Make) -> None:
    made = experts(Clamped, swiglu_limit=limit or 1.0).config
    made.swiglu_alpha, made.swiglu_limit = alpha, limit
    assert read_gate(FP8Experts(made, block_size=(128, 128))) == expected


def _tanh(gate: Tensor, up: Tensor) -> Tensor:
    return torch.tanh(gate) * up


def _clamped_after(gate: Tensor, up: Tensor) -> Tensor:
    """Step-3.7's."""
    return nn.functional.silu(gate).clamp(max=7.0) * up.clamp(-7.0, 7.0)


def _clamped_far_away(gate: Tensor, up: Tensor) -> Tensor:
    """By a number that the module does not carry under a known name."""
    return nn.functional.silu(gate.clamp(max=500.0)) * up


def _swapped(gate: Tensor, up: Tensor) -> Tensor:
    return gate * nn.functional.silu(up)


def _nearly(gate: Tensor, up: Tensor) -> Tensor:
    return nn.functional.silu(1.002 * gate) * up


def _whole(gate: Tensor, up: Tensor) -> Tensor:
    return torch.cat([gate, up], dim=-1)


def _nan(gate: Tensor, up: Tensor) -> Tensor:
    return gate * float("nan")


@pytest.mark.parametrize("gate", [_tanh, _clamped_after, _clamped_far_away, _swapped, _nearly, _whole, _nan])
def test_what_cannot_be_expressed_is_refused(gate: Any, experts: Make, call: Make, run_as: Make) -> None:
    @use_experts_implementation
    class Odd(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            return gate(*gate_up.chunk(2, dim=-1))

    module = experts(Odd)
    with pytest.raises(ConfigError) as caught:
        run_as(module, bridge.NAME, *call())
    assert "the gate of Odd computes something that moe_core's activations cannot express" in str(caught.value)
    assert "use another experts_implementation for this model" in str(caught.value)
    assert bridge.plans(module) == {}


@pytest.mark.parametrize("name", sorted({"sigmoid", "mish", "tanh", "leaky_relu", "sqrtsoftplus"} & set(ACT2FN)))
def test_activations_that_cannot_be_expressed(name: str, experts: Make) -> None:
    with pytest.raises(ConfigError, match="cannot express"):
        read_gate(experts(hidden_act=name))


def test_a_gate_that_cannot_be_evaluated(experts: Make) -> None:
    class Broken(MixtralExperts):
        def _apply_gate(self, gate_up: Tensor) -> Tensor:
            raise RuntimeError("a width of 96 is wanted")

    with pytest.raises(ConfigError, match=r"gate of Broken could not be evaluated: RuntimeError: a width of 96"):
        read_gate(experts(Broken))
