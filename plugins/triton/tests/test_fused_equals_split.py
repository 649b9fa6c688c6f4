"""The fused func and the runner core use one kernel sequence: bit-identical, whatever the layer."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from moe_core import Activation

SCHEMES = (
    "bf16",
    "fp8_tensor",
    "fp8_channel",
    "fp8_block128",
    "int8_channel",
    "int8_w8a16",
    "int4_w4a16",
    "mxfp4_w4a16",
)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"activation": Activation(name="relu2", gated=False)},
    "oai": {"activation": Activation.swiglu_oai(), "bias": True},
    "on_input": {"router_weight_on_input": True},
    "no_combine": {"no_combine": True},
    "scaled": {"routed_scaling_factor": 2.5},
    "top_1": {"top_k": 1},
    "top_3": {"top_k": 3, "bias": True},
}


def _same(lab: Any, config: Any, tokens: int, pattern: str, **more: Any) -> None:
    layer = lab.layer(config, tokens=tokens, pattern=pattern)
    fused, split = (lab.plan(config, layer.weights, path, **more) for path in ("fused", "split"))
    one, other = fused(layer.hidden, layer.topk), split(layer.hidden, layer.topk)
    assert torch.equal(one, other), f"{config.scheme}: {int((one != other).sum())} of {one.numel()} values differ"
    if lab.on_gpu:
        assert torch.equal(fused(layer.hidden, layer.topk), one), "the second call gave other bits"


@pytest.mark.parametrize("pattern", ["uniform", "dropped"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes(lab: Any, scheme: str, pattern: str) -> None:
    _same(lab, lab.config(scheme=scheme), 3, pattern)


@pytest.mark.parametrize("option", OPTIONS)
def test_options(lab: Any, option: str) -> None:
    _same(lab, lab.config(**OPTIONS[option]), 4, "dropped")


@pytest.mark.parametrize("dispatcher", ["testing_standard", "testing_global"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_other_dispatchers(lab: Any, scheme: str, dispatcher: str) -> None:
    _same(lab, lab.config(scheme=scheme), 4, "dropped", dispatcher=dispatcher)


@pytest.mark.parametrize("tokens", [0, 1, 2])
def test_few_tokens(lab: Any, tokens: int) -> None:
    _same(lab, lab.config(), tokens, "uniform")


_GRID = list(itertools.product(SCHEMES, (0, 1, 2, 16, 33, 64, 257, 1024, 4096)))


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "tokens"), _GRID)
def test_sizes(lab: Any, scheme: str, tokens: int) -> None:
    """Through every regime: few tokens, split reductions, tiles of any height, the persistent kernels."""
    config = lab.config(scheme=scheme, num_experts=32, top_k=4, hidden_size=2048, intermediate_size=1024, bias=True)
    _same(lab, config, tokens, "skewed")


@pytest.mark.gpu
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("tokens", [3, 150, 2000])
def test_options_in_size(lab: Any, option: str, tokens: int) -> None:
    config = lab.config(num_experts=60, hidden_size=1024, intermediate_size=704, **OPTIONS[option])
    _same(lab, config, tokens, "dropped")
