"""FP8Experts modules, whose weights carry scales: against dense experts of the same, dequantized weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation

import moe_core.integrations.transformers as bridge
from moe_core.errors import ConfigError
from moe_core.quant import dequantize, quantize

Make = Callable[..., Any]
E, H = 4, 256
EXACT = {"reference": {"emulate_activations": False}}


@use_experts_implementation(experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
class Experts(FP8Experts):
    """As transformers makes them when it replaces a model's experts."""


class Layer:
    """An FP8Experts module, and the same weights as float32."""

    def __init__(self, inner: int, scheme: str, activation_scheme: str = "dynamic", **arguments: Any) -> None:
        config = MixtralConfig(hidden_size=H, intermediate_size=inner, num_local_experts=E, num_experts_per_tok=2)
        config._experts_implementation = bridge.NAME
        self.module = Experts(config, activation_scheme=activation_scheme, **arguments)
        self.module.requires_grad_(False)
        random = torch.Generator().manual_seed(0)
        self.w13 = self._fill("gate_up_proj", (E, 2 * inner, H), scheme, 2 if scheme == "fp8_tensor" else 1, random)
        self.w2 = self._fill("down_proj", (E, H, inner), scheme, 1, random)

    def _fill(self, name: str, shape: tuple[int, ...], scheme: str, parts: int, random: torch.Generator) -> Tensor:
        # Experts and halves of different sizes, so that each needs its own scale.
        sizes = torch.linspace(0.5, 2.0, E)[:, None, None] * torch.linspace(0.5, 2.0, shape[1])[None, :, None]
        quantized = quantize(torch.randn(shape, generator=random) * sizes * shape[2] ** -0.5, scheme, parts=parts)
        weight, scale = getattr(self.module, name), getattr(self.module, f"{name}_scale_inv")
        weight.copy_(quantized.data)
        scale.copy_(quantized.scale.reshape(scale.shape))
        return dequantize(quantized, scheme)

    def dense(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        slots = torch.einsum("th,tkih->tki", x.float(), self.w13[ids])
        gate, up = slots.chunk(2, dim=-1)
        rows = torch.einsum("tki,tkhi->tkh", nn.functional.silu(gate) * up, self.w2[ids])
        return (rows * weights[..., None]).sum(1)


def check(layer: Layer, call: Make, tolerance: float, dtype: torch.dtype = torch.float32) -> None:
    x, ids, weights = call(11, num_experts=E, hidden=H, dtype=dtype)
    with torch.no_grad():
        found = layer.module(x, ids, weights)
    assert found.dtype == dtype
    expected = layer.dense(x, ids, weights)
    assert float((found - expected).norm() / expected.norm()) < tolerance


def test_a_name_of_plain_experts_only_fails_in_the_forward(register: Make, call: Make) -> None:
    """Why `register` fills both interfaces."""
    name = register()
    ExpertsInterface.register("plain_only", ExpertsInterface().get_interface(name, None))
    layer = Layer(128, "fp8_block128", block_size=(128, 128))
    layer.module.config._experts_implementation = "plain_only"
    with pytest.raises(KeyError, match="plain_only"):
        check(layer, call, 8e-2)
    layer.module.config._experts_implementation = name
    check(layer, call, 8e-2)


@pytest.mark.parametrize("inner", [128, 192, 256])
def test_blocks_of_128(register: Make, call: Make, inner: int) -> None:
    """192: one block of scales holds rows of gate and up."""
    register()
    layer = Layer(inner, "fp8_block128", block_size=(128, 128))
    check(layer, call, 8e-2)  # activations are rounded to e4m3
    check(layer, call, 8e-2, torch.bfloat16)
    register(options=EXACT)
    check(layer, call, 1e-5)
    check(layer, call, 1e-2, torch.bfloat16)
    assert bridge.plans(layer.module)[""].quant_info.scheme == "fp8_block128"


@pytest.mark.parametrize("activations", ["dynamic", "static"])
def test_one_scale_a_tensor(register: Make, call: Make, activations: str) -> None:
    register()
    layer = Layer(128, "fp8_tensor", activations, block_size=None)
    if activations == "static":
        layer.module.gate_up_proj_activation_scale.fill_(4.0 / 448)
        layer.module.down_proj_activation_scale.fill_(64.0 / 448)
    check(layer, call, 8e-2)
    if activations == "static":
        # A scale that cuts everything off at 1/10 shows that it is used.
        layer.module.gate_up_proj_activation_scale.fill_(0.1 / 448)
        with pytest.raises(AssertionError):
            check(layer, call, 0.5)
    register(options=EXACT)
    check(layer, call, 1e-5)
    assert bridge.plans(layer.module)[""].quant_info.scheme == "fp8_tensor"


def test_scales_of_powers_of_two(register: Make, call: Make) -> None:
    register(options=EXACT)
    layer = Layer(128, "fp8_block128", block_size=(128, 128), scale_fmt="ue8m0")
    for name in ("w13", "w2"):
        attribute = {"w13": "gate_up_proj", "w2": "down_proj"}[name]
        weight, scale = getattr(layer.module, attribute), getattr(layer.module, f"{attribute}_scale_inv")
        assert scale.dtype == torch.float8_e8m0fnu
        blocks = scale.float().repeat_interleave(128, 1).repeat_interleave(128, 2)
        setattr(layer, name, weight.float() * blocks)
    check(layer, call, 1e-5)


def test_weights_and_scales_that_change(register: Make, call: Make) -> None:
    register(options=EXACT)
    layer = Layer(128, "fp8_block128", block_size=(128, 128))
    check(layer, call, 1e-5)
    plan = bridge.plans(layer.module)[""]
    layer.module.down_proj_scale_inv.mul_(2)
    layer.w2 = layer.w2 * 2
    check(layer, call, 1e-5)
    assert bridge.plans(layer.module)[""] is plan


def test_dequantized_module(register: Make, call: Make) -> None:
    """transformers puts plain weights into FP8Experts where a device has no FP8; scales are left behind."""
    register()
    layer = Layer(128, "fp8_block128", block_size=(128, 128))
    layer.module.gate_up_proj = nn.Parameter(layer.w13, requires_grad=False)
    layer.module.down_proj = nn.Parameter(layer.w2, requires_grad=False)
    check(layer, call, 1e-5)
    assert bridge.plans(layer.module)[""].resolution.require().runner == "cpu"


def test_dropped_slots(register: Make, call: Make) -> None:
    register()
    layer = Layer(128, "fp8_block128", block_size=(128, 128))
    x, ids, weights = call(5, num_experts=E, hidden=H)
    with torch.no_grad():
        expected = layer.module(x, ids, weights)
        more = torch.cat([ids, torch.full_like(ids, E)], 1), torch.cat([weights, weights * float("nan")], 1)
        torch.testing.assert_close(layer.module(x, *more), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("arguments", [{"block_size": (64, 64)}, {"block_size": (128, 128), "expert_dtype": "fp4"}])
def test_what_no_scheme_describes(register: Make, call: Make, arguments: Any) -> None:
    register()
    config = MixtralConfig(hidden_size=H, intermediate_size=128, num_local_experts=E)
    config._experts_implementation = bridge.NAME
    module = Experts(config, **arguments).requires_grad_(False)
    with pytest.raises(ConfigError) as caught, torch.no_grad():
        module(*call(3, num_experts=E, hidden=H))
    stored = "torch.int8 with blocks (128, 128)" if "expert_dtype" in arguments else "e4m3fn with blocks (64, 64)"
    assert stored in str(caught.value)
    assert "which no quant scheme of moe_core describes" in str(caught.value)
    assert "FP8 experts with one scale a tensor or a 128x128 block" in str(caught.value)
