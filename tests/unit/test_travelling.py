"""Tokens travel as the terms' payload says, quantized by the runner's kernels where it brings some."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import ContractViolation, MoeConfig, Registry, Settings
from moe_core.dispatchers.standard import StandardDispatcher
from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.quant import quantize_activation
from moe_core.testing import dispatcher_like, fake_plugin, make_layer, runner_like


def bound(payload: str, quantizer: Any = None) -> Any:
    return SimpleNamespace(terms=SimpleNamespace(payload=payload), quantizer=quantizer)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_rows_travel_with_their_scales(rows: int) -> None:
    tokens = torch.randn(rows, 256)
    (plain,) = Travelling(bound("bf16"))(tokens)
    assert torch.equal(plain, tokens)
    data, scale = Travelling(bound("fp8_group128"))(tokens)
    expected = quantize_activation(tokens, "fp8_group128")
    assert torch.equal(data.view(torch.uint8), expected[0].view(torch.uint8))
    assert isinstance(expected[1], Tensor)
    assert torch.equal(scale, expected[1])
    assert scale.shape == (rows, 2)


@pytest.mark.parametrize("payload", ["fp8_tensor", "nvfp4"])
def test_rows_that_share_a_scale_cannot_travel(payload: str) -> None:
    with pytest.raises(ContractViolation, match="no scale a row"):
        Travelling(bound(payload))(torch.randn(3, 256))


def test_the_runners_quantizer_is_the_dispatchers() -> None:
    seen: list[Any] = []

    class Sees(StandardDispatcher):
        def __init__(self, binding: Any) -> None:
            super().__init__(binding)
            seen.append(binding.quantizer)

    def quantizer(binding: Any) -> Any:
        assert binding.config.num_experts == 4
        return lambda rows, payload: (rows + 1, rows[:, :1])

    config = MoeConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=16, dtype="float32")
    for brings in ({"quantizer": quantizer}, {}):
        parts = {**runner_like("reference", "mine", **brings), **dispatcher_like("standard", "sees", factory=Sees)}
        registry = Registry(plugins=[fake_plugin("acme", **parts)], autoload=False)
        layer = make_layer(config, 1, tokens=2)
        settings = Settings(runner="mine", dispatcher="sees")
        plan = moe_core.plan(config, layer.weights, registry=registry, settings=settings)
        assert plan(layer.hidden, layer.topk).shape == (2, 16)
    made, none = seen
    assert none is None
    data, scale = Travelling(bound("fp8_group128", made))(torch.zeros(2, 16))
    assert torch.equal(data, torch.ones(2, 16))
    assert scale.shape == (2, 1)
