"""The double of FlashInfer as modules, and this plugin with its runners on the CPU, where the double runs."""

from __future__ import annotations

import sys
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
import trtllm_double_autotuner
import trtllm_double_cutlass
import trtllm_double_enums
import trtllm_double_kernels
from moe_core_flashinfer_trtllm import trtllm_layouts
from moe_core_flashinfer_trtllm.plugin import CUTLASS, TRTLLM, FlashInferTrtllmPlugin
from torch import Tensor

import moe_core
from moe_core import CanonicalWeights, MoeConfig, ParallelConfig, hookimpl
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.specs import RunnerSpec
from moe_core.testing import assert_close, make_layer
from moe_core.testing.layers import Layer

VERSION = "0.7.2.double"
#: Where the double keeps each function.
PLACES: dict[str, dict[str, Any]] = {
    "flashinfer": {"block_scale_interleave": trtllm_double_cutlass.block_scale_interleave, **trtllm_double_kernels.TOP},
    "flashinfer.fused_moe": {
        name: getattr(trtllm_double_cutlass, name)
        for name in (
            "cutlass_fused_moe",
            "cutlass_fused_moe_workspace_size",
            "interleave_moe_weights_for_sm90_mixed_gemm",
            "interleave_moe_scales_for_sm90_mixed_gemm",
        )
    }
    | trtllm_double_kernels.FUSED_MOE,
    "flashinfer.autotuner": {"autotune": trtllm_double_autotuner.autotune},
    "flashinfer.tllm_enums": {
        name: value
        for name, value in vars(trtllm_double_enums).items()
        if isinstance(value, type) and name[0].isupper()
    },
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put the double where `import flashinfer` finds it."""
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    for name, functions in PLACES.items():
        module = ModuleType(name)
        vars(module).update(functions)
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["flashinfer"].__version__ = VERSION  # type: ignore[attr-defined]
    sys.modules["flashinfer.autotuner"].AutoTuner = trtllm_double_autotuner.AutoTuner  # type: ignore[attr-defined]
    for calls in (trtllm_double_cutlass.CALLS, trtllm_double_kernels.CALLS, trtllm_double_autotuner.LOADED):
        calls.clear()
    trtllm_double_cutlass.ABSENT.clear()
    trtllm_layouts.row_order.cache_clear()


class OnCpu(FlashInferTrtllmPlugin):
    """This plugin, with runners that say they run on CPUs."""

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """On any device, without FlashInfer being installed."""
        anywhere = {"devices": {"cpu": ("*",)}, "scheme_archs": {}, "requires": ()}
        # What is claimed for GPUs is the real plugin's, and judged there.
        return tuple(replace(s, support=replace(s.support, **anywhere), maturity={}) for s in (TRTLLM, CUTLASS))


def registry(*more: Any) -> Registry:
    """The core, this plugin, and `more`."""
    return Registry(plugins=[OnCpu(), *more], autoload=False, settings=Settings())


def config(scheme: str = "bf16", **changes: Any) -> MoeConfig:
    """Sizes that are unequal, with several scales along each."""
    sizes = {"hidden_size": 256, "intermediate_size": 128}
    return MoeConfig(**({"num_experts": 6, "top_k": 2, "scheme": scheme, **sizes} | changes))


def _parted(layer: Layer, config: MoeConfig, parts: int) -> Layer:
    """The layer with `parts` different scales of each w13."""
    tensors, experts = layer.weights.tensors(), layer.weights.w13.shape[0]
    if parts == 2:
        name = "w13_scale" if config.scheme == "fp8_tensor" else "w13_global_scale"
        scale = tensors[name].reshape(experts, 1)
        tensors[name] = torch.cat([scale, scale * torch.linspace(0.5, 1.5, experts)[:, None]], dim=1)
    return Layer(CanonicalWeights(**tensors), layer.hidden, layer.topk)


def layer_of(config: MoeConfig, seed: int = 0, *, parts: int = 1, **more: Any) -> Layer:
    """A random layer that the kernels can take."""
    return _parted(make_layer(config, seed, input_scales=True, **more), config, parts)


def plan(
    runner: str,
    config: MoeConfig,
    weights: CanonicalWeights,
    parallel: ParallelConfig | None = None,
    *,
    options: dict[str, Any] | None = None,
    plugins: tuple[Any, ...] = (),
    dispatcher: str = "standard",
    max_tokens: int = 300,
    **request: Any,
) -> moe_core.MoePlan:
    """A plan of a runner over the double; weights: this rank's."""
    settings = Settings(runner=runner, dispatcher=dispatcher, options={runner: options} if options else {})
    return moe_core.plan(
        config, weights, parallel, registry=registry(*plugins), settings=settings, max_tokens=max_tokens, **request
    )


def expected(config: MoeConfig, layer: Layer, parallel: ParallelConfig | None = None) -> Tensor:
    """What the core's oracle gives."""
    oracle = moe_core.plan(config, layer.weights, parallel, runner="reference")
    result: Tensor = oracle(layer.hidden, layer.topk)
    return result


def verify(runner: str, config: MoeConfig, layer: Layer | None = None, **more: Any) -> Tensor:
    """One layer over the double against the oracle."""
    layer = layer or layer_of(config, pattern="dropped")
    result: Tensor = plan(runner, config, layer.weights, **more)(layer.hidden, layer.topk)
    assert_close(result, expected(config, layer), config.dtype, config.scheme, what=f"{runner}, {config.scheme}")
    return result
