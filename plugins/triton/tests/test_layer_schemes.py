"""Every quant scheme through `moe_core.plan`, against the reference runner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_core import Activation, CanonicalWeights, MoeConfig
from moe_core.quant import builtin_scheme, quantize

SCHEMES = (
    "bf16",
    "fp8_tensor",
    "fp8_channel",
    "fp8_block128",
    "int8_channel",
    "int8_w8a16",
    "int4_w4a16",
    "mxfp4_w4a16",
)
PATHS = ("fused", "split")
#: (experts, top_k, H, I) of real layers: a wide one, a narrow one, and one whose sizes no power of two divides.
SHAPES = {"olmoe": (64, 8, 2048, 1024), "qwen3": (128, 8, 2048, 768), "gpt_oss": (32, 4, 2880, 2880)}
TOKENS = (0, 1, 2, 7, 8, 33, 64, 257, 1024, 4096, 16384)


@pytest.mark.parametrize(("path", "gated"), [("fused", True), ("split", True), ("split", False)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_scheme(lab: Any, scheme: str, path: str, gated: bool) -> None:
    config = lab.config(scheme=scheme, activation=Activation(name="silu" if gated else "relu2", gated=gated))
    lab.verify(config, path=path)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_other_dtypes(lab: Any, scheme: str) -> None:
    for dtype in lab.dtypes[1:]:
        lab.verify(lab.config(scheme=scheme, dtype=dtype), path="fused")


def _tensor_scales(config: MoeConfig, weights: CanonicalWeights, shape: str) -> CanonicalWeights:
    """The same layer with its tensor scales written in another legal way."""
    if shape == "[E]":
        assert weights.w13_scale is not None
        assert weights.w2_scale is not None
        return replace(weights, w13_scale=weights.w13_scale.reshape(-1), w2_scale=weights.w2_scale.reshape(-1))
    # Gate and up far apart, so that one scale for both would be far off.
    scheme, random = builtin_scheme(config.scheme), torch.Generator().manual_seed(9)
    rows = (config.num_experts, 2 * config.intermediate_size, config.hidden_size)
    w13 = torch.randn(rows, generator=random) / config.hidden_size**0.5
    w13[:, config.intermediate_size :] *= 16
    made = quantize(w13, scheme, parts=2)
    assert made.scale is not None
    assert tuple(made.scale.shape) == (config.num_experts, 2)
    return replace(weights, w13=made.data.to(weights.device), w13_scale=made.scale.to(weights.device))


@pytest.mark.parametrize("shape", ["[E]", "[E, 2]"])
def test_tensor_scales_of_every_shape(lab: Any, shape: str) -> None:
    config = lab.config(scheme="fp8_tensor")
    layer = lab.layer(config)
    layer = layer._replace(weights=_tensor_scales(config, layer.weights, shape))
    for path in PATHS:
        lab.verify(config, layer, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scales", ["equal", "different"])
def test_static_activation_scales(lab: Any, scales: str, path: str) -> None:
    """Tokens of several experts must not share what was quantized with the scale of one of them."""
    config = lab.config(scheme="fp8_tensor")
    layer = lab.layer(config, tokens=6)
    spread = torch.ones(6) if scales == "equal" else torch.tensor([1.0, 0.5, 3.0, 1.5, 0.75, 2.0])
    static = {"w13_input_scale": 3.5 / 448 * spread, "w2_input_scale": 2.5 / 448 * spread.flip(0)}
    weights = replace(layer.weights, **{name: scale.to(lab.device) for name, scale in static.items()})
    static_result = lab.verify(config, layer._replace(weights=weights), path)
    # Were they ignored, the result would still be within the tolerance: it must be the static one, not the dynamic.
    wanted = lab.expected(config, weights, layer.hidden, layer.topk)
    lab.nearer(static_result, wanted, lab.expected(config, *layer))


@pytest.mark.parametrize("group_size", [32, 64, 128])
@pytest.mark.parametrize("zero_points", [False, True])
def test_int4_groups_and_zero_points(lab: Any, group_size: int, zero_points: bool) -> None:
    config = lab.config(scheme="int4_w4a16", group_size=group_size)
    layer = lab.layer(config)
    random = torch.Generator().manual_seed(3)
    # All weights positive: without its zero point every code means another number.
    w13 = torch.rand(6, 2 * config.intermediate_size, config.hidden_size, generator=random) / config.hidden_size
    w2 = torch.rand(6, config.hidden_size, config.intermediate_size, generator=random) / config.intermediate_size
    weights = CanonicalWeights.quantize(w13, w2, config, zero_points=zero_points).to(lab.device)
    assert (weights.w13_zero is not None) == zero_points
    for path in PATHS:
        lab.verify(config, layer._replace(weights=weights), path)


@pytest.mark.parametrize("scheme", ["fp8_tensor", "fp8_channel", "fp8_block128", "int8_channel"])
def test_rows_of_zeros_and_of_huge_values_quantize(lab: Any, scheme: str) -> None:
    """A row of zeros has the scale 0: dividing by it must not show. Nor may one row's values hurt another row."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config)
    layer.hidden[0] = 0
    if scheme != "fp8_tensor":  # there all rows share one scale by definition
        layer.hidden[1] *= 1000
    result = lab.plan(config, layer.weights, "fused")(layer.hidden, layer.topk)
    expected = lab.expected(config, *layer)
    assert not result[0].any()
    for row in range(1, 5):
        lab.close(result[row], expected[row], config, f"row {row}")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_update_weights_in_place(lab: Any, scheme: str) -> None:
    config = lab.config(scheme=scheme, bias=True)
    old, new = lab.layer(config, 1), lab.layer(config, 2)
    plan = lab.plan(config, old.weights, "fused")
    # Before the update: a runner may keep the caller's tensors and write into them.
    lab.close(plan(new.hidden, new.topk), lab.expected(config, old.weights, new.hidden, new.topk), config)
    before = _addresses(plan.quant_info)  # after a call, which may make tensor descriptors
    kept = {name: tensor.clone() for name, tensor in new.weights.tensors().items()}
    plan.update_weights(new.weights)
    lab.close(plan(new.hidden, new.topk), lab.expected(config, *new), config, "the result after the update")
    assert _addresses(plan.quant_info) == before
    for name, tensor in new.weights.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), kept[name].view(torch.uint8)), f"the update changed {name}"


def _addresses(info: Any) -> dict[str, int]:
    from moe_core._contract import leaves

    return {name: leaf.data_ptr() for name, leaf in leaves(info) if isinstance(leaf, torch.Tensor)}


def test_update_refreshes_static_scales(lab: Any) -> None:
    config = lab.config(scheme="fp8_tensor")
    layer = lab.layer(config)
    static = {f"{n}_input_scale": torch.full((6,), 0.01, device=lab.device) for n in ("w13", "w2")}
    weights = replace(layer.weights, **static)
    old = lab.expected(config, weights, layer.hidden, layer.topk)
    plan = lab.plan(config, weights, "fused")
    # So small that values saturate: by a power of two alone nothing would change.
    other = replace(weights, **{name: scale / 16 for name, scale in static.items()})
    plan.update_weights(other)
    result, wanted = plan(layer.hidden, layer.topk), lab.expected(config, other, layer.hidden, layer.topk)
    lab.close(result, wanted, config)
    lab.nearer(result, wanted, old)


def _sweep() -> list[Any]:
    """All token counts for bf16 on every shape, fewer for the other schemes."""
    rows = [("bf16", shape, TOKENS) for shape in SHAPES]
    rows += [(scheme, "olmoe", (1, 8, 64, 257, 4096)) for scheme in SCHEMES[1:]]
    rows += [("fp8_block128", "qwen3", (1, 33, 1024)), ("mxfp4_w4a16", "gpt_oss", (1, 33, 1024, 4096))]
    rows += [("fp8_channel", "gpt_oss", (7, 1024)), ("int8_channel", "gpt_oss", (7, 1024))]
    return [pytest.param(s, n, t, id=f"{s}-{n}") for s, n, t in rows]


@pytest.mark.gpu
@pytest.mark.parametrize(("scheme", "shape", "tokens"), _sweep())
def test_real_shapes(lab: Any, scheme: str, shape: str, tokens: tuple[int, ...]) -> None:
    """One plan for all token counts, as a server has it; skewed routing on every second of them."""
    experts, top_k, hidden, inner = SHAPES[shape]
    sizes = {"num_experts": experts, "top_k": top_k, "hidden_size": hidden, "intermediate_size": inner}
    config = lab.config(scheme=scheme, **sizes)
    weights = lab.layer(config, 4, tokens=1).weights
    plan = lab.plan(config, weights, "fused")
    oracle = lab.plan(config, weights, "split", runner="reference")
    for number, count in enumerate(tokens):
        call = lab.tokens(config, count, seed=count, pattern="skewed" if number % 2 else "uniform")
        lab.close(plan(*call), oracle(*call), config, f"{shape} with {count} tokens")
