"""The kit's checks of both runners, on the doubles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from doubling import OnCpu

from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing import layers, parametrize_with_checks
from moe_core.testing.dispatchers import plugin as testing_plugin

REGISTRY = Registry(plugins=[OnCpu(), testing_plugin], autoload=False, settings=Settings())
_ROUNDED = (
    "never: GEMM1 gives bfloat16, which is quantized then: single values fall to the next e2m1 one, and the largest "
    "error is beyond what the kit allows"
)
EXPECTED = {
    "plugin:cutedsl/hygiene.light_import": "never: the doubles import torch; tests/packaging checks the plugin itself",
    "runner:cutedsl/numerics.dtype[bfloat16]": _ROUNDED,
    "runner:cutedsl/numerics.routing[dropped]": _ROUNDED,
}


@pytest.fixture
def calibrated(patch: pytest.MonkeyPatch) -> None:
    """The fused MoE needs calibrated NVFP4 weights: the kit's layers get scales that their values fit."""
    quantize = layers._quantize

    def with_scales(*arguments: Any) -> Any:
        weights = quantize(*arguments)
        if weights.w13_global_scale is None:
            return weights
        scale = weights.w13_global_scale.new_ones(weights.w13.shape[0])
        return replace(weights, w13_input_scale=scale * 4.5 / 2688, w2_input_scale=scale * 3.0 / 2688)

    patch.setattr(layers, "_quantize", with_scales)


@pytest.mark.usefixtures("calibrated")
@parametrize_with_checks("cutedsl", registry=REGISTRY, expected_failures=EXPECTED)
def test_conformance(check: Any) -> None:
    check()
