"""Prepared weights: updated whole or not at all, held to their layout, and pickled with their plan."""

from __future__ import annotations

import pickle
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

import moe_core
from moe_core import BindError, CanonicalWeights, LayoutMismatch, MoeConfig, ParallelConfig, Registry, Settings
from moe_core._contract import copy_in_place
from moe_core.errors import WeightError
from moe_core.quant import BUILTIN_SCHEMES, builtin_scheme
from moe_core.testing.fakes import fake_plugin, runner_like

LAYER = MoeConfig(num_experts=2, top_k=2, hidden_size=128, intermediate_size=128, dtype="float32")


def weights(config: MoeConfig = LAYER) -> CanonicalWeights:
    generator = torch.Generator().manual_seed(0)
    w13, w2 = (torch.randn(2, n, 128, generator=generator) / 9 for n in (256, 128))
    return CanonicalWeights.quantize(w13, w2, config)


@dataclass
class Held:
    parts: Any
    blocks: int = 1
    names: dict[str, Any] = field(default_factory=dict)


def test_tensors_are_found_wherever_they_are() -> None:
    def held(value: float) -> Held:
        return Held([torch.full((2,), value), (torch.full((3,), value), 7)], names={"a": torch.full((1,), value)})

    old = held(0.0)
    addresses = [old.parts[0].data_ptr(), old.parts[1][0].data_ptr(), old.names["a"].data_ptr()]
    copy_in_place(old, held(5.0), "acme")
    found = [old.parts[0], old.parts[1][0], old.names["a"]]
    assert [t.data_ptr() for t in found] == addresses
    assert all(bool((t == 5).all()) for t in found)


@pytest.mark.parametrize(
    ("new", "message"),
    [
        (Held([torch.ones(2), torch.ones(4)]), r"\.parts\[1\]: \(3,\) torch.float32 and \(4,\)"),
        (Held([torch.ones(2), torch.ones(3)], blocks=2), r"\.blocks: 1 and 2"),
        (Held([torch.ones(2)]), r"\.parts\[1\]"),
        (Held([torch.ones(2), torch.ones(3).double()]), "torch.float64"),
        (Held([torch.ones(2), None]), "None"),
    ],
)
def test_an_update_that_changes_more_than_values_changes_nothing(new: Held, message: str) -> None:
    old = Held([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(BindError, match=f"(?s)cannot be updated in place.*{message}"):
        copy_in_place(old, new, "acme")
    assert not old.parts[0].any()


def test_nothing_to_update_is_an_error() -> None:
    with pytest.raises(BindError, match="they hold no tensor"):
        copy_in_place(Held([]), Held([]), "acme")


def acme(**changes: Any) -> Registry:
    parts = runner_like("reference", "acme", **changes)
    return Registry(plugins=[fake_plugin("acme", **parts)], autoload=False, settings=Settings())


def make(registry: Registry, runner: str = "acme") -> moe_core.MoePlan:
    return moe_core.plan(LAYER, weights(), registry=registry, settings=Settings(runner=runner))


def explode(*arguments: Any) -> Any:
    raise ZeroDivisionError("too small")


@pytest.mark.parametrize(
    "changes",
    [{"factory": explode}, {"prepare": explode}, {"adapter": {"pre": explode}}, {"adapter": {"post": explode}}],
    ids=["factory", "prepare", "pre", "post"],
)
def test_what_a_plugin_raises_when_it_is_bound_names_its_target(changes: dict[str, Any]) -> None:
    with pytest.raises(BindError, match=r"acme.*raised ZeroDivisionError: too small") as caught:
        make(acme(**changes))
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.parametrize("junk", [None, 3, {}, object()])
def test_prepared_weights_without_a_layout_are_refused(junk: Any) -> None:
    with pytest.raises(LayoutMismatch, match="its weights are scheme None in layout None"):
        make(acme(prepare=lambda weights, binding: junk))


@pytest.mark.parametrize("scheme", [s.id for s in BUILTIN_SCHEMES])
def test_a_plan_of_every_scheme_travels_between_processes(scheme: str) -> None:
    config = LAYER.replace(scheme=scheme, dtype="bfloat16")
    plan = moe_core.plan(config, weights(config), settings=Settings(runner="reference"))
    copy = pickle.loads(pickle.dumps(plan))
    hidden = torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    decision = moe_core.TopKOutput(torch.tensor([[0, 1]] * 3, dtype=torch.int32), torch.ones(3, 2))
    assert torch.equal(copy(hidden, decision), plan(hidden, decision))
    for name, tensor in weights(config).tensors().items():
        assert copy.quant_info.weights.tensors()[name].dtype == tensor.dtype


def problems(config: MoeConfig, given: CanonicalWeights, ranks: ParallelConfig | None = None) -> str:
    with pytest.raises(WeightError) as caught:
        given.validate(config, ranks or ParallelConfig(), builtin_scheme(config.scheme))
    return str(caught.value)


def test_what_validate_finds() -> None:
    biased, ranks = LAYER.replace(bias=True), ParallelConfig(tp_size=2, tp_rank=1)
    half = replace(weights().shard(LAYER, ranks), w13_bias=torch.zeros(2, 128), w2_bias=torch.zeros(2, 128))
    assert "w2_bias was given on a TP rank above 0" in problems(biased, half, ranks)
    replace(half, w2_bias=None).validate(biased, ranks, builtin_scheme("bf16"))
    assert "has no static activation scales" in problems(LAYER, replace(weights(), w13_input_scale=torch.ones(2)))
    fp8, nvfp4 = LAYER.replace(scheme="fp8_tensor"), LAYER.replace(scheme="nvfp4")
    assert "w2_input_scale has shape (3,), expected (2,)" in problems(
        fp8, replace(weights(fp8), w2_input_scale=torch.ones(3))
    )
    replace(weights(fp8), w2_input_scale=torch.ones(2)).validate(fp8, ParallelConfig(), builtin_scheme("fp8_tensor"))
    assert "w13_global_scale is missing" in problems(nvfp4, replace(weights(nvfp4), w13_global_scale=None))
    assert "w2_global_scale has shape (5,)" in problems(nvfp4, replace(weights(nvfp4), w2_global_scale=torch.ones(5)))
