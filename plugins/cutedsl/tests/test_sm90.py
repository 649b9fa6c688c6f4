"""`cutedsl_sm90` on strict doubles of FlashInfer: whole layers, refusals, and mistakes that must show."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
import torch
from double_sm90 import DoubleError
from doubling import planned
from moe_core_cutedsl import layouts, sm90, sm90_weights

import moe_core
from moe_core import Activation, MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, DependencyError, UnsupportedOverride
from moe_core.protocols import RunningState
from moe_core.testing import assert_close, make_layer
from moe_core.testing.oracle import dense
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot

pytestmark = pytest.mark.usefixtures("patch")
SIZES: dict[str, Any] = {"num_experts": 6, "top_k": 2, "hidden_size": 40, "intermediate_size": 64}
ACTIVATIONS = {
    "silu": Activation(),
    "clamped": Activation(limit=0.7),
    "oai": Activation.swiglu_oai(limit=1.5),
    "gelu": Activation(name="gelu_tanh"),
    "relu2": Activation(name="relu2", gated=False),
}
OPTIONS = [{}, {"fused_finalize": True}, {"sort": "flashinfer"}, {"sort": "flashinfer", "fused_finalize": True}]
options_of = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")


def layer_of(seed: int = 0, tokens: int = 5, pattern: str = "uniform", **changes: Any) -> tuple[MoeConfig, Any]:
    config = MoeConfig(**(SIZES | changes))
    return config, make_layer(config, seed, tokens=tokens, pattern=pattern)


def close(actual: torch.Tensor, config: MoeConfig, layer: Any, weights: Any = None) -> None:
    wanted = dense(config, weights or layer.weights, layer.hidden, layer.topk)
    assert_close(actual, wanted.to(actual.dtype), config.dtype)


@options_of
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, options: dict[str, Any]) -> None:
    config, layer = layer_of(activation=ACTIVATIONS[activation], tokens=9)
    plan = planned("cutedsl_sm90", config, layer.weights, options=options)
    close(plan(layer.hidden, layer.topk), config, layer)


@options_of
@pytest.mark.parametrize("tokens", [0, 1, 3, 17, 300])
@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "skewed", "dropped", "duplicate"])
def test_routings(pattern: str, tokens: int, options: dict[str, Any]) -> None:
    config, layer = layer_of(tokens=tokens, pattern=pattern, routed_scaling_factor=2.5, dtype="float16")
    plan = planned("cutedsl_sm90", config, layer.weights, options=options)
    result = plan(layer.hidden, layer.topk)
    close(result, config, layer)
    nobody = TopKOutput(torch.full_like(layer.topk.topk_ids, -1), torch.full_like(layer.topk.topk_weights, torch.nan))
    assert not plan(layer.hidden, nobody).any()


@options_of
@pytest.mark.parametrize("dispatcher", ["standard", "testing_standard"])
@pytest.mark.parametrize("placement", ["linear", "round_robin", (0, 1, 1, 2, 2, 2)])
def test_expert_parallel(placement: Any, dispatcher: str, options: dict[str, Any]) -> None:
    """Every rank's share adds up to the whole; the dispatcher's padding rows hold NaN."""
    config, layer = layer_of(tokens=21, pattern="dropped")
    total = torch.zeros(layer.hidden.shape, dtype=torch.float64)
    for rank in range(3):
        parallel = ParallelConfig(ep_size=3, ep_rank=rank, reduce="caller", placement=placement)
        shard = layer.weights.shard(config, parallel)
        arguments = dict(dispatcher=dispatcher, options=options)
        if options.get("sort") == "flashinfer" and placement != "linear":
            with pytest.raises(UnsupportedOverride, match="from an offset on"):
                planned("cutedsl_sm90", config, shard, parallel, **arguments)
            return
        total += planned("cutedsl_sm90", config, shard, parallel, **arguments)(layer.hidden, layer.topk).double()
    assert_close(total, dense(config, layer.weights, layer.hidden, layer.topk), config.dtype)


@options_of
def test_other_ways_to_write_a_routing(options: dict[str, Any]) -> None:
    config, layer = layer_of(tokens=7, pattern="dropped")
    ids = torch.where(layer.topk.topk_ids < 0, config.num_experts, layer.topk.topk_ids).long()
    plan = planned("cutedsl_sm90", config, layer.weights, incoming=DroppedSlot.SINK, options=options)
    close(plan(layer.hidden, TopKOutput(ids, layer.topk.topk_weights)), config, layer)


@options_of
def test_the_callers_output(options: dict[str, Any]) -> None:
    config, layer = layer_of()
    plan = planned("cutedsl_sm90", config, layer.weights, options=options)
    for output in (torch.full_like(layer.hidden, torch.nan), torch.full((5, 80), torch.nan).bfloat16()[:, ::2]):
        assert plan(layer.hidden, layer.topk, state=RunningState(output=output)) is output
        close(output, config, layer)


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_weights_are_updated_in_place(activation: str) -> None:
    config, layer = layer_of(activation=ACTIVATIONS[activation])
    other = layer_of(1, activation=ACTIVATIONS[activation])[1].weights
    plan = planned("cutedsl_sm90", config, layer.weights)
    addresses = plan.quant_info.w1.data_ptr(), plan.quant_info.w2.data_ptr()
    plan.update_weights(other)
    assert addresses == (plan.quant_info.w1.data_ptr(), plan.quant_info.w2.data_ptr())
    close(plan(layer.hidden, layer.topk), config, layer, other)


@pytest.mark.parametrize("sort", ["own", "flashinfer"])
@pytest.mark.parametrize("tactic", [[64, 192, 1, 128], (128, 64, 8, 256)])
def test_a_tactic_of_the_callers(tactic: Any, sort: str) -> None:
    config, layer = layer_of(tokens=150)
    plan = planned("cutedsl_sm90", config, layer.weights, options={"tactic": tactic, "sort": sort})
    assert {plan.runner._tactics(tokens).vendor()[0] for tokens in (1, 150, 9999)} == {tactic[0]}
    close(plan(layer.hidden, layer.topk), config, layer)


def test_prepared_rows() -> None:
    """Row 64 * j + r is row 32 * j + r of up, then of gate; and back."""
    w13 = torch.arange(2 * 192 * 3).view(2, 192, 3).float()
    made = layouts.alternate(w13, torch.empty_like(w13), 32)
    gate, up = w13[:, :96], w13[:, 96:]
    for j in range(3):
        assert torch.equal(made[:, 64 * j : 64 * j + 32], up[:, 32 * j : 32 * j + 32])
        assert torch.equal(made[:, 64 * j + 32 : 64 * j + 64], gate[:, 32 * j : 32 * j + 32])
    back = made.view(2, 3, 2, 32, 3)
    assert torch.equal(torch.cat([back[:, :, 1].flatten(1, 2), back[:, :, 0].flatten(1, 2)], 1), w13)


@pytest.mark.parametrize("mistake", ["gate first", "chunks of 64", "not at all", "weights twice", "tile limits"])
def test_a_mistake_shows(mistake: str, patch: pytest.MonkeyPatch) -> None:
    config, layer = layer_of(tokens=33)

    def swapped(w13: Any, out: Any, rows: int) -> Any:
        gate, up = w13.chunk(2, 1)
        return whole(torch.cat([up, gate], 1), out, rows)

    whole, sort = sm90_weights.alternate, sm90.sort
    wrong = {
        "gate first": swapped,
        "chunks of 64": lambda w13, out, rows: whole(w13, out, 2 * rows),
        "not at all": lambda w13, out, rows: out.copy_(w13),
    }
    if mistake in wrong:
        patch.setattr(sm90_weights, "alternate", wrong[mistake])
    elif mistake == "weights twice":
        patch.setattr(sm90, "sort", lambda *a, **k: vars_of(sort(*a, **k), weights=lambda t: t.weights**2))
    else:
        patch.setattr(sm90, "sort", lambda *a, **k: vars_of(sort(*a, **k), tile_limit=lambda t: t.tile_limit + 1))
    with pytest.raises(AssertionError):
        close(planned("cutedsl_sm90", config, layer.weights)(layer.hidden, layer.topk), config, layer)


def vars_of(tiles: Any, **changes: Any) -> Any:
    for name, change in changes.items():
        setattr(tiles, name, change(tiles))
    return tiles


@pytest.mark.parametrize(
    ("changes", "request_changes", "message"),
    [
        ({"intermediate_size": 72}, {}, "alternate by 32"),
        ({"hidden_size": 44}, {}, "multiple of 8"),
        ({"activation": Activation(name="relu2")}, {}, "no gated relu2"),
        ({"activation": Activation(name="gelu_tanh", limit=2.0)}, {}, "cannot clamp gelu_tanh"),
        ({"bias": True}, {}, "'bias'"),
        ({"no_combine": True}, {}, "'no_combine'"),
        ({"scheme": "fp8_channel"}, {}, "does not run fp8_channel"),
        ({}, {"options": {"fused_finalize": True}, "features": {"deterministic"}}, "atomics"),
    ],
)
def test_refusals(changes: dict[str, Any], request_changes: dict[str, Any], message: str) -> None:
    config, layer = layer_of(**changes)
    with pytest.raises(UnsupportedOverride, match=message):
        planned("cutedsl_sm90", config, layer.weights, **request_changes)


@pytest.mark.parametrize("wrong", [{"fused_finalize": "yes"}, {"sort": "quick"}, {"tactic": [64, 64, 1, 256]}])
def test_wrong_options(wrong: dict[str, Any]) -> None:
    config, layer = layer_of()
    with pytest.raises(ConfigError, match=f"(?s){next(iter(wrong))}.*it takes"):
        planned("cutedsl_sm90", config, layer.weights, options=wrong)


def test_another_flashinfer(patch: pytest.MonkeyPatch) -> None:
    """A renamed, a removed and a new parameter are named when the plan is bound; so is a missing function."""
    config, layer = layer_of()
    place = sys.modules[sm90.GEMM1.module]

    def other(x: Any, w1: Any, tiles: Any, *, topk: int) -> None: ...

    patch.setattr(place, sm90.GEMM1.name, other)
    with pytest.raises(DependencyError, match=r"takes no .*w1_weight; it needs tiles, w1"):
        planned("cutedsl_sm90", config, layer.weights)
    patch.delattr(place, sm90.GEMM1.name)
    with pytest.raises(DependencyError, match="has no flashinfer"):
        planned("cutedsl_sm90", config, layer.weights)
    patch.setitem(sys.modules, sm90.GEMM1.module, None)
    with pytest.raises(DependencyError, match="cannot be imported"):
        planned("cutedsl_sm90", config, layer.weights)


def test_the_double_is_strict() -> None:
    config, layer = layer_of()
    plan = planned("cutedsl_sm90", config, layer.weights)
    plan.quant_info.w1 = plan.quant_info.w1.float()
    with pytest.raises(DoubleError, match=r"w1_weight is torch.float32"):
        plan(layer.hidden, layer.topk)


def test_against_the_reference_runner() -> None:
    """The two runners on one layer of more tokens than a tile has rows."""
    config, layer = layer_of(tokens=200, num_experts=3, top_k=3)
    wanted = moe_core.plan(config, layer.weights, runner="reference")(layer.hidden, layer.topk)
    result = planned("cutedsl_sm90", config, layer.weights)(layer.hidden, layer.topk)
    assert_close(result, wanted, config.dtype)


@pytest.mark.parametrize(("distribution", "old"), [("nvidia-cutlass-dsl", "4.6.2"), ("triton", "3.3.1")])
def test_older_packages_are_refused_with_their_version(
    distribution: str, old: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the README asks for is asked of the machine, before anything is imported."""
    from moe_core_cutedsl.plugin import NVFP4, SM90

    from moe_core import _metadata

    for spec in (NVFP4, SM90):
        (wanted,) = [r for r in spec.support.requires if r.distribution == distribution]
        here = replace(wanted, module="moe_core", submodule=None)  # a module that is there, whatever else is
        monkeypatch.setattr(_metadata, "version", lambda name: old if name == distribution else None)
        assert [reason.code for reason in here.why_not("it")] == ["dep.version"]
        monkeypatch.setattr(_metadata, "version", lambda name, wanted=wanted: wanted.min_version)
        assert here.why_not("it") == []
