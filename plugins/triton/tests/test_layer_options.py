"""Every option of a layer through `moe_core.plan`, one by one and in the combinations that models have."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_core import Activation, CanonicalWeights, MoeConfig
from moe_core.protocols import RunningState
from moe_core.testing.layers import Layer
from moe_core.topk import TopKOutput
from moe_core.weights import canonical_gate_up

PATHS = ("fused", "split")
NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")
ACTIVATIONS = {
    **{f"{name}-gated": Activation(name=name) for name in NAMES},
    **{f"{name}-plain": Activation(name=name, gated=False) for name in NAMES},
    # Limits so low that most values are clamped, gate from above only and up from both sides.
    "silu-gated-limit": Activation(limit=0.3),
    "silu-plain-limit": Activation(gated=False, limit=0.3),
    "gelu-gated-limit": Activation(name="gelu", limit=0.3),
    "oai": Activation.swiglu_oai(),
    "oai-limit": Activation.swiglu_oai(alpha=1.3, beta=0.5, limit=0.4),
    "oai-no-limit": Activation.swiglu_oai(limit=None),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activation(lab: Any, name: str) -> None:
    lab.verify(lab.config(activation=ACTIVATIONS[name]), path="fused")


@pytest.mark.parametrize("name", ["silu-gated-limit", "relu2-plain", "oai-limit"])
def test_activation_on_the_split_path(lab: Any, name: str) -> None:
    lab.verify(lab.config(activation=ACTIVATIONS[name]), path="split")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "mxfp4_w4a16"])
def test_bias(lab: Any, scheme: str, gated: bool, path: str) -> None:
    config = lab.config(scheme=scheme, bias=True, activation=Activation(gated=gated))
    lab.verify(config, lab.layer(config, pattern="dropped"), path)


def test_float32_bias_of_a_layer_in_another_dtype(lab: Any) -> None:
    config = lab.config(bias=True, dtype=lab.dtypes[1])
    layer = lab.layer(config)
    wide = {n: t.float() if n.endswith("bias") else t for n, t in layer.weights.tensors().items()}
    lab.verify(config, layer._replace(weights=CanonicalWeights(**wide)), "fused")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_channel"])
def test_router_weight_on_input(lab: Any, scheme: str, top_k: int, path: str) -> None:
    config = lab.config(scheme=scheme, top_k=top_k, router_weight_on_input=True, activation=Activation(name="gelu"))
    layer = lab.layer(config)
    layer = layer._replace(topk=TopKOutput(layer.topk.topk_ids, layer.topk.topk_weights * 0.7))
    lab.verify(config, layer, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("on_input", [False, True])
def test_routed_scaling_factor(lab: Any, on_input: bool, path: str) -> None:
    config = lab.config(routed_scaling_factor=2.5, router_weight_on_input=on_input)
    lab.verify(config, path=path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("changes", [{}, {"router_weight_on_input": True}, {"routed_scaling_factor": 2.5}])
def test_no_combine(lab: Any, changes: dict[str, Any], path: str) -> None:
    """[T, K, H]: a row a slot, and exactly zero in dropped ones."""
    config = lab.config(no_combine=True, **changes)
    layer = lab.layer(config, tokens=6, pattern="dropped")
    result = lab.verify(config, layer, path)
    assert result.shape == (6, 2, config.hidden_size)
    assert not result[layer.topk.topk_ids < 0].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("no_combine", [False, True])
def test_given_output(lab: Any, no_combine: bool, path: str) -> None:
    """The result is in the caller's tensor, every element of it, whatever was there."""
    config = lab.config(no_combine=no_combine, bias=True)
    layer = lab.layer(config, tokens=6, pattern="dropped")
    expected = lab.expected(config, *layer)
    output = torch.full_like(expected, float("nan"))
    result = lab.plan(config, layer.weights, path)(layer.hidden, layer.topk, state=RunningState(output=output))
    assert result.data_ptr() == output.data_ptr()
    lab.close(output, expected, config)


@pytest.mark.parametrize("path", PATHS)
def test_in_place(lab: Any, path: str) -> None:
    config = lab.config()
    layer = lab.layer(config, tokens=6)
    expected, hidden = lab.expected(config, *layer), layer.hidden.clone()
    plan = lab.plan(config, layer.weights, path, features={"inplace"})
    result = plan(hidden, layer.topk, state=RunningState(output=hidden))
    assert result.data_ptr() == hidden.data_ptr()
    lab.close(hidden, expected, config)


@pytest.mark.parametrize("path", PATHS)
def test_inputs_stay_as_they_are(lab: Any, path: str) -> None:
    config = lab.config(router_weight_on_input=True)
    layer = lab.layer(config, pattern="dropped")
    given = (layer.hidden, layer.topk.topk_ids, layer.topk.topk_weights)
    before = [tensor.clone().view(torch.uint8) for tensor in given]
    lab.plan(config, layer.weights, path)(layer.hidden, layer.topk)
    assert all(torch.equal(a.view(torch.uint8), b) for a, b in zip(given, before, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_strided_tokens_ids_and_weights(lab: Any, path: str) -> None:
    """Rows cut out of wider ones, and columns of wider choices: what a server's buffers look like."""
    config = lab.config()
    layer = lab.layer(config, tokens=6)
    expected = lab.expected(config, *layer)
    wide = torch.full((6, config.hidden_size + 24), float("nan"), dtype=layer.hidden.dtype, device=lab.device)
    wide[:, 8:-16] = layer.hidden
    ids = torch.full((6, 4), -1, dtype=torch.int32, device=lab.device)
    weights = torch.full((6, 4), float("nan"), device=lab.device)
    ids[:, 1:3], weights[:, 1:3] = layer.topk.topk_ids, layer.topk.topk_weights
    plan = lab.plan(config, layer.weights, path)
    lab.close(plan(wide[:, 8:-16], TopKOutput(ids[:, 1:3], weights[:, 1:3])), expected, config, "from wider rows")
    turned = layer.hidden.t().contiguous().t()
    lab.close(plan(turned, layer.topk), expected, config, "from column-major tokens")


SIZES = [(96, 80), (64, 48), (128, 16), (16, 128), (40, 72), (33, 17)]


@pytest.mark.parametrize(("hidden", "inner"), SIZES)
def test_sizes_that_no_tile_divides(lab: Any, hidden: int, inner: int) -> None:
    config = lab.config(hidden_size=hidden, intermediate_size=inner, bias=True)
    lab.verify(config, path="fused")


@pytest.mark.parametrize("scheme", ["fp8_block128", "fp8_channel", "int8_channel", "int8_w8a16"])
def test_quantized_sizes_that_no_tile_divides(lab: Any, scheme: str) -> None:
    lab.verify(lab.config(scheme=scheme, hidden_size=136, intermediate_size=72), path="fused")


@pytest.mark.parametrize(("experts", "top_k"), [(1, 1), (2, 2), (7, 1), (7, 3), (5, 5), (8, 1)])
def test_numbers_of_experts(lab: Any, experts: int, top_k: int) -> None:
    lab.verify(lab.config(num_experts=experts, top_k=top_k), path="fused")


#: Layers as models have them, with everything at once.
MODELS: dict[str, dict[str, Any]] = {
    "gpt_oss": {"scheme": "mxfp4_w4a16", "bias": True, "activation": Activation.swiglu_oai()},
    "llama4": {"scheme": "fp8_channel", "top_k": 1, "router_weight_on_input": True},
    "deepseek": {"scheme": "fp8_block128", "routed_scaling_factor": 2.5, "activation": Activation(limit=1.0)},
    "nemotron": {"activation": Activation(name="relu2", gated=False), "top_k": 3, "routed_scaling_factor": 2.5},
    "kimi_int4": {"scheme": "int4_w4a16", "group_size": 32, "routed_scaling_factor": 2.827},
    "mixtral_int8": {"scheme": "int8_w8a16", "dtype": "float16"},
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_models(lab: Any, model: str, path: str) -> None:
    config = lab.config(**MODELS[model])
    layer = lab.layer(config, tokens=6, pattern="dropped")
    expected = lab.expected(config, *layer)
    output = torch.full_like(expected, float("nan"))
    lab.plan(config, layer.weights, path)(layer.hidden, layer.topk, state=RunningState(output=output))
    lab.close(output, expected, config, model)


def test_interleaved_checkpoint(lab: Any) -> None:
    """GPT-OSS writes gate0, up0, gate1, ...; the core sorts the rows, and nothing downstream knows."""
    config = lab.config(bias=True, activation=Activation.swiglu_oai())
    layer = lab.layer(config)
    pairs = {n: t for n, t in layer.weights.tensors().items() if n in ("w13", "w13_bias")}
    mixed = {n: torch.stack(t.chunk(2, dim=1), dim=2).flatten(1, 2) for n, t in pairs.items()}
    sorted_again = {n: canonical_gate_up(t, interleaved=True) for n, t in mixed.items()}
    weights = CanonicalWeights(**(layer.weights.tensors() | sorted_again))
    assert torch.equal(weights.w13, layer.weights.w13)
    lab.verify(config, layer._replace(weights=weights), "fused")


def _with_shared(lab: Any, config: MoeConfig, layer: Layer) -> tuple[MoeConfig, Layer]:
    """The last expert becomes a shared one: every token takes it, with weight 1, as one more slot."""
    ids, weights = layer.topk.topk_ids, layer.topk.topk_weights
    last = torch.full_like(ids[:, :1], config.num_experts)
    topk = TopKOutput(torch.cat([ids, last], 1), torch.cat([weights, torch.ones_like(weights[:, :1])], 1))
    fused = config.replace(num_experts=config.num_experts + 1, top_k=config.top_k + 1)
    return fused, Layer(lab.layer(fused, 8).weights, layer.hidden, topk)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_shared_expert_as_one_more_expert(lab: Any, scheme: str, path: str) -> None:
    """It equals the routed experts plus the shared one by itself, and dropped tokens still take it."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config, pattern="dropped")
    fused, both = _with_shared(lab, config, layer)
    result = lab.verify(fused, both, path)
    parts = both.weights.tensors()
    routed = CanonicalWeights(**{n: t[:-1].contiguous() for n, t in parts.items()})
    shared = CanonicalWeights(**{n: t[-1:].contiguous() for n, t in parts.items()})
    ones = TopKOutput(torch.zeros_like(both.topk.topk_ids[:, -1:]), torch.ones_like(both.topk.topk_weights[:, -1:]))
    alone = lab.expected(config.replace(num_experts=1, top_k=1), shared, layer.hidden, ones)
    wide = lab.expected(config, routed, layer.hidden, layer.topk).float() + alone.float()
    lab.close(result, wide.to(result.dtype), fused, "routed plus shared")


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 64, 300, 2048])
@pytest.mark.parametrize("model", MODELS)
def test_layers_of_models_in_their_size(lab: Any, model: str, tokens: int) -> None:
    sizes = {"num_experts": 32, "top_k": 4, "hidden_size": 2880, "intermediate_size": 2880}
    if MODELS[model].get("scheme") in ("fp8_block128", "int4_w4a16"):
        sizes |= {"hidden_size": 2048, "intermediate_size": 1408}
    config = lab.config(**(sizes | MODELS[model]))
    lab.verify(config, lab.layer(config, tokens=tokens, pattern="dropped"), "fused")


@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("tokens", [3, 40])
@pytest.mark.parametrize("path", ["fused", "split"])
def test_outputs_of_any_strides(lab: Any, path: str, tokens: int, top_k: int) -> None:
    """Padded rows, columns that are not side by side, slots of a wider tensor: nothing beside the output is written."""
    for no_combine in (False, True):
        config = lab.config(no_combine=no_combine, top_k=top_k, bias=True)
        layer = lab.layer(config, tokens=tokens, pattern="dropped")
        plan = lab.plan(config, layer.weights, path)
        expected = lab.expected(config, *layer)
        wide = [*expected.shape[:-1], expected.shape[-1] + 8]
        frames = [torch.full(wide, 7.0, dtype=expected.dtype, device=expected.device)]
        views = [frames[0][..., : expected.shape[-1]]]
        frames.append(torch.full(expected.shape[::-1], 7.0, dtype=expected.dtype, device=expected.device))
        views.append(frames[1].permute(*range(expected.dim() - 1, -1, -1)))
        for view in views:
            result = plan(layer.hidden, layer.topk, state=RunningState(output=view))
            assert result.data_ptr() == view.data_ptr()
            lab.close(view, expected, config, f"strides {view.stride()}")
        assert bool((frames[0][..., expected.shape[-1] :] == 7.0).all())
