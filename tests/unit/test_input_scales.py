"""Runners that need static input scales: refused by the selection where the weights have none, and found where not."""

from __future__ import annotations

import pytest

import moe_core
from moe_core import MoeConfig, Registry, Settings, UnsupportedOverride
from moe_core.cli._timing import random_weights
from moe_core.config import ParallelConfig
from moe_core.testing import assert_close, fake_plugin, make_layer
from moe_core.testing.fakes import runner_like
from moe_core.testing.oracle import dense

FP8 = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32", scheme="fp8_tensor")


@pytest.fixture(scope="module")
def registry() -> Registry:
    """The core, and its reference runner a second time, asking for scales with fp8_tensor."""
    plain = Registry(autoload=False, settings=Settings())
    support = {"needs_input_scales": frozenset({"fp8_tensor"})}
    copy = runner_like("reference", "calibrated", registry=plain, support=support)
    return Registry(plugins=[fake_plugin("calibrated", **copy)], autoload=False, settings=Settings())


def test_weights_without_them_are_refused_with_a_reason(registry: Registry) -> None:
    layer = make_layer(FP8)
    with pytest.raises(UnsupportedOverride, match=r"quant.input_scales.*static input scales only") as error:
        moe_core.plan(FP8, layer.weights, registry=registry, runner="calibrated")
    reason = next(r for r in error.value.reasons if r.code == "quant.input_scales")
    assert "w13_input_scale" in str(reason.needed)
    assert moe_core.plan(FP8, layer.weights, registry=registry).runner is not None  # others can


def test_one_of_the_two_is_not_enough(registry: Registry) -> None:
    layer = make_layer(FP8, input_scales=True)
    layer.weights.w2_input_scale = None
    with pytest.raises(UnsupportedOverride, match=r"quant.input_scales"):
        moe_core.plan(FP8, layer.weights, registry=registry, runner="calibrated")


def test_weights_with_them_run_and_other_schemes_need_none(registry: Registry) -> None:
    layer = make_layer(FP8, input_scales=True)
    plan = moe_core.plan(FP8, layer.weights, registry=registry, runner="calibrated")
    assert_close(plan(layer.hidden, layer.topk), dense(FP8, *layer), "float32", "fp8_tensor")
    bf16 = FP8.replace(scheme="bf16")
    assert make_layer(bf16, input_scales=True).weights.w2_input_scale is None
    moe_core.plan(bf16, make_layer(bf16).weights, registry=registry, runner="calibrated")


def test_without_weights_they_are_taken_as_given(registry: Registry) -> None:
    for given, code in ((None, False), (True, False), (False, True)):
        resolution = moe_core.resolve(FP8, registry=registry, runner="calibrated", input_scales=given)
        assert ("quant.input_scales" in {r.code for r in resolution.reasons}) is code
    bf16 = FP8.replace(scheme="bf16")
    asked = [moe_core.resolve(bf16, registry=registry, input_scales=given) for given in (None, False)]
    assert asked[0].fingerprint == asked[1].fingerprint


def test_measured_layers_have_them() -> None:
    import torch

    weights = random_weights(FP8, ParallelConfig(), torch.device("cpu"))
    assert weights.w13_input_scale is not None
    assert weights.w13_input_scale.shape == (4,)
