"""The doubles in FlashInfer's place, and this plugin where they run: on a CPU."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import double_nvfp4
import double_sm90
import portable
import pytest
from moe_core_cutedsl.plugin import CuteDslPlugin

import moe_core
from moe_core import MoeConfig, ParallelConfig, hookimpl
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.specs import RunnerSpec
from moe_core.testing.dispatchers import plugin as testing_plugin

# What a kernel does is not counted as the plugin's time, and the doubles stand for kernels.
for _double in (double_nvfp4, double_sm90, portable):
    _double.__name__ = f"{_double.__name__}.kernels"
_CUTE = "flashinfer.fused_moe.cute_dsl."
#: Module -> the attributes that the double has there.
PLACES: dict[str, dict[str, Any]] = {
    "flashinfer": {
        name: getattr(double_nvfp4, name)
        for name in ("fp4_quantize", "scaled_fp4_grouped_quantize", "silu_and_mul_scaled_nvfp4_experts_quantize")
    },
    "flashinfer.gemm": {"grouped_gemm_nt_masked": double_nvfp4.grouped_gemm_nt_masked},
    "flashinfer.fused_moe": {
        "ActivationType": double_sm90.ActivationType,
        "CuteDslMoEWrapper": double_nvfp4.CuteDslMoEWrapper,
        "cute_dsl_fused_moe_bf16": double_sm90.cute_dsl_fused_moe_bf16,
    },
    "flashinfer.fused_moe.cute_dsl": {},
    **{
        _CUTE + name: {name: getattr(double_sm90, name)}
        for name in (
            "sm90_contiguous_gather_grouped_gemm_act_fusion",
            "sm90_contiguous_grouped_gemm_finalize_fusion",
        )
    },
}


@contextmanager
def doubled() -> Iterator[pytest.MonkeyPatch]:
    """FlashInfer is the double, our kernels are plain torch."""
    sm90 = importlib.import_module("moe_core_cutedsl.sm90")
    with pytest.MonkeyPatch.context() as patch:
        for module in [m for m in sys.modules if m.partition(".")[0] == "flashinfer"]:
            patch.delitem(sys.modules, module)
        for place, attributes in PLACES.items():
            module = ModuleType(place)
            module.__dict__.update(attributes, __path__=[])
            patch.setitem(sys.modules, place, module)
        patch.setattr(sm90, "sort", portable.sort)
        patch.setattr(sm90, "combine", portable.combine)
        yield patch


class OnCpu(CuteDslPlugin):
    """The same runners, where the doubles run."""

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        here: dict[str, Any] = {"devices": {"cpu": ("*",)}, "requires": ()}
        moved = (replace(spec, support=replace(spec.support, **here)) for spec in super().moe_core_runners())
        return tuple(replace(spec, maturity={}) for spec in moved)


def registry(*more: Any) -> Registry:
    """The core, this plugin on CPUs, and the kit's dispatchers."""
    return Registry(plugins=[OnCpu(), testing_plugin, *more], autoload=False, settings=Settings())


def planned(
    runner: str,
    config: MoeConfig,
    weights: Any,
    parallel: ParallelConfig | None = None,
    *,
    dispatcher: str = "standard",
    options: dict[str, Any] | None = None,
    **request: Any,
) -> Any:
    """A plan of the runner on the doubles."""
    chosen = {runner: options} if options else {}
    settings = Settings(runner=runner, dispatcher=dispatcher, options=chosen)
    return moe_core.plan(config, weights, parallel, registry=registry(), settings=settings, **request)
