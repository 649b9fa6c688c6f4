"""What the runner does not do is refused when a plan is made, with a stable code; it is chosen where it should be."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from moe_core_triton.configs.candidates import specialized
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.planning import Planner

import moe_core
from moe_core import Activation, MoeConfig
from moe_core.errors import ContractViolation, UnsupportedOverride, WeightError
from moe_core.hardware import profile
from moe_core.settings import Settings
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Phase


def _codes(lab: Any, config: MoeConfig, hardware: Any, runner: str = "triton", **request: Any) -> set[str]:
    """Codes of all reasons against a runner; empty where it can serve."""
    found = moe_core.resolve(config, None, hardware, registry=lab.registry, settings=Settings(), **request)
    verdict = next(v for v in found.verdicts if v.spec.subject == f"runner:{runner}")
    return {reason.code for reason in verdict.reasons}


def _config(**changes: Any) -> MoeConfig:
    values: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 256}
    return MoeConfig(**(values | changes))


@pytest.mark.parametrize(
    ("code", "changes"),
    [
        ("quant.scheme", {"scheme": "nvfp4"}),
        ("quant.scheme", {"scheme": "mxfp8"}),
        ("quant.scheme", {"scheme": "mxfp4"}),
        ("dtype", {"dtype": "float64"}),
        ("activation", {"activation": Activation(name="no_such_function")}),
    ],
)
def test_what_is_not_declared(lab: Any, code: str, changes: dict[str, Any]) -> None:
    assert code in _codes(lab, _config(**changes), "h200")


def test_a_feature_that_nobody_has(lab: Any) -> None:
    assert "feature" in _codes(lab, _config(), "h200", features={"no_such_feature"})


@pytest.mark.parametrize("arch", ["sm_70", "sm_75"])
def test_older_architectures(lab: Any, arch: str) -> None:
    assert "device.arch" in _codes(lab, _config(), dataclasses.replace(profile("a100"), arch=arch))


def test_fp8_needs_hardware_that_has_it(lab: Any) -> None:
    for scheme in ("fp8_tensor", "fp8_channel", "fp8_block128"):
        assert _codes(lab, _config(scheme=scheme), "a100")
        assert not _codes(lab, _config(scheme=scheme), "h100") - {"dep.missing"}
    assert not _codes(lab, _config(), "a100") - {"dep.missing"}


@pytest.mark.parametrize("hardware", ["a100", "h100", "h200", "b200", "mi300x", "mi355x"])
def test_it_is_chosen_over_the_reference(lab: Any, hardware: str) -> None:
    pytest.importorskip("triton")
    found = moe_core.resolve(_config(), None, hardware, registry=lab.registry, settings=Settings())
    assert found.chosen is not None
    assert found.chosen.runner == "triton"


def test_the_gpu_runner_refuses_a_cpu(lab: Any) -> None:
    assert "device.type" in _codes(lab, _config(), "cpu")


def test_the_interpreter_serves_only_where_it_is_asked_for(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(dtype="float32", scheme="int8_channel")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not _codes(lab, config, "cpu", "triton_interpreter")
    # Where a runner is not a last resort, the interpreter does not win, whatever the environment says.
    plain = moe_core.resolve(_config(dtype="float32"), None, "cpu", registry=lab.registry, settings=Settings())
    assert plain.chosen is not None
    assert plain.chosen.runner == "cpu"
    monkeypatch.delenv("TRITON_INTERPRET")
    assert _codes(lab, config, "cpu", "triton_interpreter")
    found = moe_core.resolve(config, None, "cpu", registry=lab.registry, settings=Settings())
    assert found.chosen is not None
    assert found.chosen.runner == "reference"


def test_the_interpreter_has_no_bfloat16(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "dtype" in _codes(lab, _config(), "cpu", "triton_interpreter")


def test_both_runners_declare_the_same_otherwise(lab: Any) -> None:
    """The suites run one on a CPU and the other on a GPU: they must be the same kernels with the same claims."""
    one, other = (lab.registry.runner(name) for name in ("triton", "triton_interpreter"))
    assert (one.factory, one.prepare, one.update) == (other.factory, other.prepare, other.update)
    for name in ("schemes", "activations", "gated", "hooks", "group_sizes", "activation_limit"):
        assert getattr(one.support, name) == getattr(other.support, name), name
    assert other.last_resort


def test_a_forced_runner_says_why_it_cannot(lab: Any) -> None:
    config = _config(scheme="mxfp8", dtype=lab.dtype)
    weights = lab.layer(config).weights
    with pytest.raises(UnsupportedOverride) as caught:
        moe_core.plan(config, weights, registry=lab.registry, settings=Settings(runner=lab.runner))
    if lab.runner != "reference":
        assert "quant.scheme" in {reason.code for reason in caught.value.reasons}


def test_bad_input_is_refused_before_any_kernel(lab: Any) -> None:
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights)
    ids, weights = layer.topk.topk_ids, layer.topk.topk_weights
    for hidden, topk in (
        (layer.hidden[:, :-1], layer.topk),
        (layer.hidden.to(torch.float64), layer.topk),
        (layer.hidden, TopKOutput(ids[:, :1], weights)),
        (layer.hidden, TopKOutput(ids.short(), weights)),
        (layer.hidden[:3], layer.topk),
    ):
        with pytest.raises(ContractViolation):
            plan(hidden, topk)
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)


def test_more_tokens_than_planned_for(lab: Any) -> None:
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, max_tokens=4)
    with pytest.raises(ContractViolation, match="max_tokens=4"):
        plan(layer.hidden, layer.topk)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "int4_w4a16"])
def test_weights_that_do_not_fit(lab: Any, scheme: str) -> None:
    """At bind and at update; the plan goes on with its old weights."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights)
    wrong = dataclasses.replace(layer.weights, w2=layer.weights.w2[:, 1:].contiguous())
    with pytest.raises(WeightError, match="w2 has shape"):
        lab.plan(config, wrong)
    with pytest.raises(WeightError, match="w2 has shape"):
        plan.update_weights(wrong)
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)


def test_the_checked_mode_names_bad_ids(lab: Any) -> None:
    """MOE_CORE_CHECK=1 finds an id that no expert has before a kernel reads past the weights."""
    config = lab.config()
    layer = lab.layer(config)
    settings = Settings(runner=lab.runner, dispatcher="standard", check=True)
    plan = moe_core.plan(config, layer.weights, registry=lab.registry, settings=settings)
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)
    layer.topk.topk_ids[1, 0] = 99
    with pytest.raises(ContractViolation, match="99"):
        plan(layer.hidden, layer.topk)


@pytest.mark.parametrize(
    ("code", "asked"),
    [("feature", {"graph_capture": {Phase.DECODE}}), ("feature.host_sync", {"no_host_sync": {Phase.DECODE}})],
)
def test_hooks_bring_a_count_to_the_host(lab: Any, code: str, asked: dict[str, Any]) -> None:
    """Explained for hardware that is not here; without hooks the same request is served."""
    here = profile("h200")
    assert code not in _codes(lab, _config(), here, **asked)
    assert code in _codes(lab, _config(), here, hooks={"after_down"}, **asked)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize(
    ("scheme", "block_m"), [("bf16", 128), ("bf16", 192), ("fp8_block128", 128), ("mxfp4_w4a16", 64)]
)
def test_what_no_specialized_kernel_computes_is_computed_all_the_same(
    lab: Any, scheme: str, block_m: int, bias: bool, on_input: bool
) -> None:
    """A tuned configuration names the specialised kernels; the layer has something that they have not."""
    config = lab.config(
        scheme=scheme, bias=bias, router_weight_on_input=on_input, hidden_size=256, intermediate_size=128
    )
    layer = lab.layer(config, tokens=40)
    plan = lab.plan(config, layer.weights, "fused")
    one = specialized(Problem(8, 2, 256, 128, scheme=scheme, specialized=True), block_m)
    fixed = LayerConfig("tiles", block_m, one, one)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Planner, "__call__", lambda self, tokens: fixed)
        patch.setattr(Planner, "tiles", lambda self, tokens: fixed)
        result = plan(layer.hidden, layer.topk)
    lab.close(result, lab.expected(config, *layer), config)
