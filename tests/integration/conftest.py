"""What the tests of the transformers bridge share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MixtralConfig, PreTrainedConfig
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_core.integrations.transformers as bridge

E, H, I, K = 6, 64, 48, 2  # noqa: E741


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads only get into each other's way at these sizes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def register() -> Iterator[Callable[..., str]]:
    """register(name, **plan options) -> name; forgotten when the test ends."""
    interfaces = (ExpertsInterface, FP8ExpertsInterface)
    before = [dict(interface._global_mapping) for interface in interfaces]

    def add(name: str = bridge.NAME, **options: Any) -> str:
        bridge.register(name, **options)
        return name

    yield add
    for interface, mapping in zip(interfaces, before, strict=True):
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)


@pytest.fixture
def experts(register: Callable[..., str]) -> Callable[..., nn.Module]:
    """experts(class, dtype, config class, **config) -> a module with O(1) results, run through moe_core."""
    register()

    def make(
        cls: type[nn.Module] = MixtralExperts,
        dtype: torch.dtype = torch.float32,
        config_class: type[PreTrainedConfig] = MixtralConfig,
        **changes: Any,
    ) -> nn.Module:
        sizes = {"hidden_size": H, "intermediate_size": I, "num_local_experts": E, "num_experts_per_tok": K}
        config = config_class(**(sizes | changes))
        config._experts_implementation = bridge.NAME
        module = cls(config)
        random = torch.Generator().manual_seed(0)
        for parameter in module.parameters():
            values = torch.randn(parameter.shape, generator=random) * 1.5 * parameter.shape[-1] ** -0.5
            parameter.data = values.to(dtype)
            parameter.requires_grad_(False)
        return module.eval()

    return make


@pytest.fixture
def call() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """call(tokens, ...) -> hidden states, ids, weights."""

    def make(
        tokens: int = 7, top_k: int = K, num_experts: int = E, hidden: int = H, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, hidden, generator=random).to(dtype)
        ids = torch.stack([torch.randperm(num_experts, generator=random)[:top_k] for _ in range(tokens)])
        return x, ids, torch.rand(tokens, top_k, generator=random) + 0.1

    return make


@pytest.fixture
def run_as() -> Callable[..., Tensor]:
    """run_as(module, implementation, *inputs) -> the module's result under another implementation."""

    def run(module: nn.Module, implementation: str, *inputs: Tensor) -> Tensor:
        before = module.config._experts_implementation
        module.config._experts_implementation = implementation
        try:
            with torch.no_grad():
                return module(*inputs)
        finally:
            module.config._experts_implementation = before

    return run
