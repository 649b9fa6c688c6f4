"""The double bites: each of these mistakes, put into the plugin, fails a comparison or raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_core_aiter import layouts, weights
from moe_core_aiter.testing import DoubleError
from moe_core_aiter.tokens import TokenReader

import moe_core
from moe_core import ParallelConfig
from moe_core.testing import Layer, make_layer
from moe_core.testing.tolerances import relative_error
from moe_core.weights import CanonicalWeights


def rough(config: Any, seed: int = 3, tokens: int = 24, pattern: str = "dropped") -> Layer:
    """A layer whose scales differ strongly by row and by block: exchanged ones show."""
    layer = make_layer(config, seed, tokens=tokens, pattern=pattern)
    random = torch.Generator().manual_seed(seed)
    matrices = []
    for n, k in ((2 * config.intermediate_size, config.hidden_size), (config.hidden_size, config.intermediate_size)):
        matrix = torch.randn(config.num_experts, n, k, generator=random) / k**0.5
        rows = torch.randn(config.num_experts, n, 1, generator=random).exp2()
        blocks = torch.randn(config.num_experts, 1, k // 32, generator=random).exp2().repeat_interleave(32, 2)
        matrices.append(matrix * rows * blocks)
    biases = {name: getattr(layer.weights, name) for name in ("w13_bias", "w2_bias")}
    return layer._replace(weights=CanonicalWeights.quantize(*matrices, config, **biases))


def outcome(bench: Any, scheme: str, arch: str = "gfx950", mutate: Any = None, **more: Any) -> float:
    """The relative error of a layer, with a mistake at the border to AITER; raises what the double raises."""
    here = bench(arch)
    config = here.config(scheme, **more)
    layer = rough(config)
    plan = here.plan(config, layer.weights)
    if mutate is not None:
        true = plan.runner._fused_moe

        def wrong(hidden: Any, w1: Any, w2: Any, topk_weight: Any, topk_ids: Any, **given: Any) -> Any:
            given.update(hidden_states=hidden, w1=w1, w2=w2, topk_weight=topk_weight, topk_ids=topk_ids)
            return true(**mutate(given))

        plan.runner._fused_moe = wrong
    return relative_error(plan(layer.hidden, layer.topk), here.expected(config, layer))


def bites(measure: Callable[[], float], over: float = 0.2) -> None:
    """It raises the double's error, or gives numbers far from the tolerance."""
    try:
        error = measure()
    except DoubleError:
        return
    assert not error < over, f"the mistake went unseen: {error}"


def with_(name: str, change: Callable[[Any], Any]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda given: {**given, name: change(given[name])}


CALLS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "int64 ids": with_("topk_ids", lambda t: t.long()),
    "bool mask": with_("expert_mask", lambda t: t.bool()),
    "-1 kept": with_("topk_ids", lambda t: torch.where(t == 8, -1, t)),
    "a sink inside the experts": with_("topk_ids", lambda t: torch.where(t == 8, 7, t)),
    "a sink outside of the mask": with_("topk_ids", lambda t: torch.where(t == 8, 9, t)),
    "a mask off by one": with_("expert_mask", lambda t: t.roll(1)),
    "no mask": with_("expert_mask", lambda t: None),
    "an expert map for a mask": with_("expert_mask", lambda t: (t.cumsum(0) * t - 1).int()),
    "weights applied twice": with_("topk_weight", lambda t: (t * t).nan_to_num()),
    "weights applied before the activation": lambda given: {**given, "doweight_stage1": True},
    "gelu for silu": with_("activation", lambda a: type(a).Gelu),
    "another kind of quantization": with_("quant_type", lambda q: type(q).per_Tensor),
    "w1 and w2 exchanged": lambda given: {**given, "w1": given["w2"], "w2": given["w1"]},
}


@pytest.mark.parametrize("what", CALLS)
def test_mistakes_of_a_call(what: str, bench: Any) -> None:
    assert outcome(bench, "bf16") < 0.01
    scale = {"routed_scaling_factor": 0.3} if what.startswith("weights") else {}
    bites(lambda: outcome(bench, "bf16", mutate=CALLS[what], **scale), over=0.05)


@pytest.mark.parametrize("wrong", ["map", "off by one", "local ids"])
def test_mistakes_of_a_rank(wrong: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four of eight experts here; a map of them must not pass for a mask, even where its values are 0 and 1."""
    here = bench()
    config = here.config(num_experts=4, top_k=2)
    layer = rough(config)
    parallel = ParallelConfig(ep_size=2, ep_rank=0, reduce="caller")

    def error(mutate: Any) -> float:
        def read(reader: TokenReader, given: Any, prepared: Any) -> Any:
            call = true(reader, given, prepared)
            if mutate == "map":
                call.mask = torch.tensor([0, 1, -1, -1, 0], dtype=torch.int32)
            elif mutate == "off by one":
                call.mask = call.mask.roll(1)
            elif mutate == "local ids":
                call.ids = torch.where(call.ids < 4, call.ids % 2, call.ids)
            return call

        true = original
        monkeypatch.setattr(TokenReader, "__call__", read)
        plan = here.plan(config, layer.weights.shard(config, parallel), parallel=parallel)
        whole = moe_core.plan(config, layer.weights.shard(config, parallel), parallel, runner="reference")
        return relative_error(plan(layer.hidden, layer.topk), whole(layer.hidden, layer.topk))

    original = TokenReader.__call__
    assert error(None) < 0.01
    bites(lambda: error(wrong))


SCHEMES = (
    *("bf16", "fp8_tensor", "fp8_channel", "fp8_block128", "int8_channel"),
    *("int4_w4a16", "mxfp4", "mxfp8", "mxfp4_w4a16"),
)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_right_layers_of_rough_weights_pass(scheme: str, bench: Any) -> None:
    assert outcome(bench, scheme) < 0.1


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unshuffled_weights(scheme: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("shuffled", "interleaved"):
        monkeypatch.setattr(layouts, name, lambda data, parts=1: data.clone())
    bites(lambda: outcome(bench, scheme))


@pytest.mark.parametrize("matrix", ["w1", "w2"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "mxfp4"])
def test_one_unshuffled_matrix(scheme: str, matrix: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, true = [], layouts.shuffled

    def once(data: Any) -> Any:
        seen.append(data)
        return data.clone() if len(seen) == int(matrix[1]) else true(data)

    monkeypatch.setattr(layouts, "shuffled", once)
    bites(lambda: outcome(bench, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gate_and_up_swapped(scheme: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = weights.prepare

    def swapped(given: CanonicalWeights, binding: Any) -> Any:
        half = given.w13.shape[1] // 2
        raw = given.w13.view(torch.uint8) if given.w13.element_size() == 1 else given.w13
        changed = {"w13": torch.cat([raw[:, half:], raw[:, :half]], 1).view(given.w13.dtype)}
        if given.w13_scale is not None and given.w13_scale.dim() == 3:
            middle = given.w13_scale.shape[1] // 2
            changed["w13_scale"] = given.w13_scale.roll(middle, 1)
        return true(CanonicalWeights(**{**given.tensors(), **changed}), binding)

    monkeypatch.setattr(weights, "prepare", swapped)
    bites(lambda: outcome(bench, scheme))


@pytest.mark.parametrize("scheme", ["mxfp8", "mxfp4_w4a16"])
def test_gate_and_up_not_interleaved(scheme: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    true = layouts.interleaved
    monkeypatch.setattr(layouts, "interleaved", lambda data, parts: true(data, parts=1))
    bites(lambda: outcome(bench, scheme))


@pytest.mark.parametrize(
    ("scheme", "name"),
    [
        ("mxfp4", "shuffled_scales"),
        ("mxfp8", "shuffled_scales"),
        ("mxfp8", "interleaved_scales"),
        ("mxfp4_w4a16", "interleaved_scales"),
        ("int4_w4a16", "int4_scales"),
    ],
)
def test_scales_in_their_logical_order(scheme: str, name: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(scale: Any, parts: int = 1) -> Any:
        return scale.bfloat16() if name == "int4_scales" else scale.reshape(-1, scale.shape[-1])

    monkeypatch.setattr(layouts, name, plain)
    bites(lambda: outcome(bench, scheme))


def test_int4_packed_in_pairs_of_neighbors(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def neighbors(values: Any) -> Any:
        codes = values.view(torch.uint8) & 0xF
        return (codes[..., ::2] | codes[..., 1::2] << 4).view(torch.int8)

    monkeypatch.setattr(layouts, "packed_int4", neighbors)
    bites(lambda: outcome(bench, "int4_w4a16"))


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel", "fp8_block128"])
def test_bits_of_fn_taken_for_fnuz(scheme: str, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of each value: the scales are not doubled, or doubled for values that were not halved."""

    def unhalved(data: Any) -> Any:
        return (data.float() * 0.999).to(torch.float8_e4m3fnuz)

    assert outcome(bench, scheme, "gfx942") < 0.08
    monkeypatch.setattr(layouts, "to_fnuz", unhalved)
    bites(lambda: outcome(bench, scheme, "gfx942"))


def test_padding_that_the_kernels_are_told_of(bench: Any) -> None:
    """Columns that they skip are undefined; without a word of it they are zeros."""
    pads = {"hidden_pad": 192, "intermediate_pad": 64}
    assert outcome(bench, "mxfp4_w4a16", mutate=lambda given: given) < 0.01
    assert outcome(bench, "mxfp4_w4a16", mutate=lambda given: {**given, **pads}) < 0.01  # they are cut
    bites(lambda: outcome(bench, "mxfp4_w4a16", mutate=lambda given: {**given, "hidden_pad": 320}))
