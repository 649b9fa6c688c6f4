"""A runner that asks for larger sizes gets weights whose added part contributes exactly zero."""

from __future__ import annotations

import pytest
import torch

import moe_core
from moe_core.errors import WeightError
from moe_core.hookspecs import hookimpl
from moe_core.quant import BUILTIN_SCHEMES, QuantizedTensor, builtin_scheme, dequantize
from moe_core.weights import CanonicalWeights, WeightRequirements

HIDDEN, INNER, EXPERTS = 256, 128, 4
PADDED = WeightRequirements(hidden_size=512, intermediate_size=256)


def layer(scheme: str, **changes: object) -> moe_core.MoeConfig:
    return moe_core.MoeConfig(
        num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER, dtype="float32", scheme=scheme
    ).replace(**changes)


def float_weights() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, generator=generator) / 16
    return w13, torch.randn(EXPERTS, HIDDEN, INNER, generator=generator) / 11


@pytest.mark.parametrize("scheme", [s.id for s in BUILTIN_SCHEMES])
@pytest.mark.parametrize("zero_points", [False, True])
def test_padding_keeps_the_old_values_and_adds_zeros(scheme: str, zero_points: bool) -> None:
    from moe_core._pad import pad

    described = builtin_scheme(scheme)
    if zero_points and not described.zero_points:
        zero_points = False
    config = layer(scheme)
    weights = CanonicalWeights.quantize(*float_weights(), config, zero_points=zero_points)
    padded = pad(weights, config, INNER, described, PADDED)
    padded.validate(config, moe_core.ParallelConfig(), described, PADDED)

    def dense(w: CanonicalWeights, name: str) -> torch.Tensor:
        quantized = QuantizedTensor(
            getattr(w, name),
            *(getattr(w, f"{name}_{part}") for part in ("scale", "zero", "global_scale")),
        )
        return dequantize(quantized, described)

    old, new = dense(weights, "w13"), dense(padded, "w13").view(EXPERTS, 2, PADDED.intermediate_size, -1)
    assert torch.equal(new[:, :, :INNER, :HIDDEN].reshape(old.shape), old)
    assert new[:, :, INNER:].abs().sum() == 0
    assert new[..., HIDDEN:].abs().sum() == 0
    old, new = dense(weights, "w2"), dense(padded, "w2")
    assert torch.equal(new[:, :HIDDEN, :INNER], old)
    assert new[:, HIDDEN:].abs().sum() == 0
    assert new[:, :, INNER:].abs().sum() == 0


def test_padding_that_cuts_a_scale_block_is_refused() -> None:
    from moe_core._pad import pad

    config = layer("fp8_block128", intermediate_size=192)
    generator = torch.Generator().manual_seed(0)
    weights = CanonicalWeights.quantize(
        torch.randn(EXPERTS, 384, HIDDEN, generator=generator), torch.randn(EXPERTS, HIDDEN, 192), config
    )
    with pytest.raises(WeightError, match=r"padding to 256 would cut through"):
        pad(
            weights,
            config,
            192,
            builtin_scheme("fp8_block128"),
            WeightRequirements(hidden_size=256, intermediate_size=256),
        )


class PaddingPlugin:
    """The reference runner, behind a spec that asks for a larger intermediate size."""

    @hookimpl
    def moe_core_plugin_info(self):
        return moe_core.plugins.PluginInfo(name="padding", summary="test")

    @hookimpl
    def moe_core_runners(self):
        import dataclasses

        from moe_core._builtin import REFERENCE_RUNNER

        target = "tests_padding_rules:requirements"
        return [
            dataclasses.replace(REFERENCE_RUNNER, name="padding", requirements=target, priority=500, last_resort=False)
        ]

    @hookimpl
    def moe_core_adapters(self):
        import dataclasses

        from moe_core._builtin import _SUMS, _reference_adapter

        return [dataclasses.replace(_reference_adapter("standard", _SUMS), runner="padding")]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch, tmp_path) -> moe_core.Registry:
    (tmp_path / "tests_padding_rules.py").write_text(
        "from moe_core.weights import WeightRequirements\n"
        "def requirements(request):\n"
        "    inner = -(-request.local_intermediate_size // 192) * 192\n"
        "    return WeightRequirements(hidden_size=request.config.hidden_size, intermediate_size=inner)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    return moe_core.Registry(plugins=[PaddingPlugin()], autoload=False)


def test_a_plan_pads_and_computes_the_same(registry: moe_core.Registry) -> None:
    config = layer("bf16", bias=True)
    w13, w2 = float_weights()
    weights = CanonicalWeights(
        w13=w13, w2=w2, w13_bias=torch.randn(EXPERTS, 2 * INNER), w2_bias=torch.randn(EXPERTS, HIDDEN)
    )
    assert moe_core.weight_requirements(config, hardware="cpu", registry=registry) == WeightRequirements(
        hidden_size=HIDDEN, intermediate_size=192
    )
    plan = moe_core.plan(config, weights, registry=registry)
    assert plan.quant_info.weights.w13.shape == (EXPERTS, 2 * 192, HIDDEN)
    hidden = torch.randn(5, HIDDEN)
    topk = moe_core.route(torch.randn(5, EXPERTS), 2, config.routing)
    expected = moe_core.plan(config, weights, registry=registry, runner="reference")(hidden, topk)
    torch.testing.assert_close(plan(hidden, topk), expected)


def test_weights_that_are_allocated_padded_are_taken_as_they_are(registry: moe_core.Registry) -> None:
    config = layer("bf16")
    w13 = torch.zeros(EXPERTS, 2 * 192, HIDDEN)
    plan = moe_core.plan(config, CanonicalWeights(w13=w13, w2=torch.zeros(EXPERTS, HIDDEN, 192)), registry=registry)
    assert plan.quant_info.weights.w13.data_ptr() == w13.data_ptr()
