"""Fake plugins, hardware, layers and routings; what importing the kit costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_core.config import Activation, MoeConfig, ParallelConfig
from moe_core.errors import ConfigError
from moe_core.registry import Registry
from moe_core.testing import (
    as_target,
    dispatcher_like,
    fake_hardware,
    fake_plugin,
    make_layer,
    make_routing,
    runner_like,
)
from moe_core.testing.layers import PATTERNS
from moe_core.testing.oracle import activate
from moe_core.testing.profile import ConformanceProfile

CONFIG = MoeConfig(num_experts=6, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")


@pytest.mark.parametrize("module", ["moe_core.testing", "moe_core.testing.pytest_plugin", "moe_core.testing.fakes"])
def test_importing_the_kit_is_light(module: str) -> None:
    heavy = "{'torch', 'transformers', 'moe_core.testing.checks'}"
    code = f"import sys, {module}; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_fake_plugin_registers_under_its_name() -> None:
    parts = runner_like(
        "reference", "acme", formats=("standard",), priority=7, support={"dtypes": frozenset({"float32"})}
    )
    registry = Registry(plugins=[fake_plugin("acme_plugin", **parts)], autoload=False)
    spec = registry.runner("acme")
    assert registry.owner("runner", "acme") == "acme_plugin"
    assert (spec.priority, spec.support.dtypes) == (7, {"float32"})
    assert ("standard", "acme") in registry.adapters
    assert ("batched", "acme") not in registry.adapters


def test_fake_plugin_takes_any_hook_and_no_other() -> None:
    calls = []
    plugin = fake_plugin("acme", hooks={"moe_core_plan_bound": lambda resolution, plan: calls.append(plan)})
    Registry(plugins=[plugin], autoload=False).call("moe_core_plan_bound", resolution=None, plan="it")
    assert calls == ["it"]
    with pytest.raises(ConfigError, match="did you mean 'moe_core_runners'"):
        fake_plugin("acme", hooks={"moe_core_runner": tuple})


def test_dispatcher_like() -> None:
    parts = dispatcher_like("standard", "acme", priority=3)
    assert Registry(plugins=[fake_plugin("p", **parts)], autoload=False).dispatcher("acme").priority == 3


def test_targets_of_local_objects_can_be_loaded() -> None:
    from moe_core._lazy import load, module_exists

    def factory() -> str:
        return "made"

    target = as_target(factory)
    assert module_exists(target)
    assert load(target, wanted_by="a test")() == "made"
    assert as_target("a.b:c") == "a.b:c"
    assert as_target(factory) != target


def test_fake_hardware_is_a_profile_with_changes() -> None:
    hardware = fake_hardware("h200", present=True, device_count=1)
    assert (hardware.arch, hardware.present, hardware.device_count) == ("sm_90", True, 1)
    assert fake_hardware().device_type == "cpu"


@pytest.mark.parametrize("reason", ["because", "notyet:", "never: "])
def test_profile_refuses_reasons_that_say_nothing(reason: str) -> None:
    with pytest.raises(ConfigError, match="notimpl:, notyet:, never:"):
        ConformanceProfile(expected_failures={"numerics.bias": reason})


def test_profile_is_frozen_and_hashable() -> None:
    profile = ConformanceProfile(expected_failures={"numerics.bias": "never: no"})
    assert hash(profile) == hash(ConformanceProfile(expected_failures={"numerics.bias": "never: no"}))


def test_layers_come_from_their_seed() -> None:
    first, again, other = make_layer(CONFIG, 1), make_layer(CONFIG, 1), make_layer(CONFIG, 2)
    assert torch.equal(first.weights.w13, again.weights.w13)
    assert torch.equal(first.hidden, again.hidden)
    assert not torch.equal(first.weights.w13, other.weights.w13)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel", "int4_w4a16", "nvfp4", "mxfp8"])
def test_layers_are_valid_in_every_kind_of_scheme(scheme: str) -> None:
    config = CONFIG.replace(scheme=scheme, hidden_size=256, intermediate_size=128, bias=True)
    registry = Registry(autoload=False)
    layer = make_layer(config)
    layer.weights.validate(config, ParallelConfig(), registry.schemes[scheme])


def test_ranks_share_one_layer() -> None:
    whole = make_layer(CONFIG).weights
    parallel = ParallelConfig(ep_size=2, ep_rank=1, tp_size=2, tp_rank=1)
    part = make_layer(CONFIG, parallel=parallel)
    assert torch.equal(part.weights.w2, whole.w2[3:, :, 16:])
    assert torch.equal(part.hidden, make_layer(CONFIG).hidden)


def test_routing_patterns() -> None:
    made = {pattern: make_routing(pattern, 60, 6, 2, 3) for pattern in PATTERNS}
    for pattern, topk in made.items():
        assert topk.topk_ids.dtype is torch.int32, pattern
        assert topk.topk_ids.max() < 6, pattern
    assert (made["uniform"].topk_ids[:, 0] != made["uniform"].topk_ids[:, 1]).all()
    assert made["one_hot"].topk_ids.unique().numel() == 1
    counts = torch.bincount(made["skewed"].topk_ids.flatten().long(), minlength=6)
    assert counts[0] > 3 * counts[5]
    dropped = made["dropped"]
    assert (dropped.topk_ids[:15] == -1).all()
    assert (dropped.topk_ids[15:] >= 0).any()
    assert torch.equal(dropped.topk_ids < 0, dropped.topk_weights.isnan())
    assert (made["duplicate"].topk_ids[:30, 0] == made["duplicate"].topk_ids[:30, 1]).all()
    with pytest.raises(ConfigError, match="did you mean 'skewed'"):
        make_routing("skewd", 1, 2, 1)


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_oai"])
@pytest.mark.parametrize("limit", [None, 0.5])
def test_formula_of_activations_agrees_with_the_definition(name: str, limit: float | None) -> None:
    from moe_core.runners.activation import apply_activation

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for gated in (True, False) if name != "swiglu_oai" else (True,):
        activation = Activation(name=name, gated=gated, alpha=1.7, beta=1.0, limit=limit)
        torch.testing.assert_close(activate(x, activation), apply_activation(x, activation))
