"""Layers over the strict double of AITER, compared with the reference runner."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from moe_core_aiter.testing import AiterDouble, OnCpu

import moe_core
from moe_core import Activation, DroppedSlot, MoeConfig
from moe_core.moe_plan import MoePlan
from moe_core.registry import Registry
from moe_core.testing import Layer, make_layer
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.testing.tolerances import assert_close

OAI = Activation.swiglu_oai()
#: Layers that name every quant type: none, per token and per tensor (by static scales), 128 x 128, 1 x 32, int4.
SCHEMES: dict[str, dict[str, Any]] = {
    "bf16": {},
    "fp8_tensor": {},
    "fp8_channel": {},
    "fp8_block128": {},
    "int8_channel": {},
    "int4_w4a16": {"group_size": 32},
    "mxfp4": {"hidden_size": 320, "intermediate_size": 192},
    "mxfp8": {"hidden_size": 320, "intermediate_size": 192},
    "mxfp4_w4a16": {"hidden_size": 320, "intermediate_size": 192, "activation": OAI, "bias": True},
}


@dataclass
class Bench:
    """One double, installed. arch: its architecture."""

    double: AiterDouble
    arch: str

    def config(self, scheme: str = "bf16", **changes: Any) -> MoeConfig:
        """A small layer."""
        sizes = {"num_experts": 8, "top_k": 3, "hidden_size": 256, "intermediate_size": 256}
        return MoeConfig(**(sizes | {"scheme": scheme} | SCHEMES.get(scheme, {}) | changes))

    def plan(
        self, config: MoeConfig, weights: Any, *, plugins: tuple[Any, ...] = (OnCpu(),), **request: Any
    ) -> MoePlan:
        """Bound to the runner `aiter`, unless another is named."""
        registry = Registry(plugins=[*plugins, testing_plugin], autoload=False)
        return moe_core.plan(config, weights, registry=registry, **{"runner": "aiter", **request})

    def expected(self, config: MoeConfig, layer: Layer, hidden: torch.Tensor | None = None) -> torch.Tensor:
        """By the reference runner."""
        plan = moe_core.plan(config, layer.weights, registry=Registry(autoload=False), runner="reference")
        return plan(layer.hidden if hidden is None else hidden, layer.topk)

    def close(self, actual: torch.Tensor, expected: torch.Tensor, config: MoeConfig) -> None:
        """By the one table of tolerances, for the architecture that the double plays."""
        assert_close(actual, expected, config.dtype, config.scheme, arch=self.arch)

    def check(
        self, config: MoeConfig, seed: int = 3, *, tokens: int = 20, pattern: str = "uniform", **request: Any
    ) -> MoePlan:
        """One call against the reference."""
        layer = make_layer(config, seed, tokens=tokens, pattern=pattern)
        plan = self.plan(config, layer.weights, **request)
        self.close(plan(layer.hidden, layer.topk), self.expected(config, layer), config)
        return plan


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Layers are small: threads would only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def bench() -> Iterator[Callable[..., Bench]]:
    """bench(arch, version, ...) installs a double until the test ends."""
    undo: list[Any] = []

    def make(arch: str = "gfx950", version: str | None = None, **more: Any) -> Bench:
        double = AiterDouble(arch, version, **more)
        undo.append(double.install())
        return Bench(double, arch)

    yield make
    for before in reversed(undo):
        AiterDouble.restore(before)


@pytest.fixture
def never() -> dict[str, Any]:
    """A request whose caller drops no slot."""
    return {"incoming": DroppedSlot.NEVER}
