"""Tiny random models of each family: through moe_core they are what they are through transformers' eager experts."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import moe_core.integrations.transformers as bridge

MLA = {
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
SHARED = {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 24}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "intermediate_size": 24},
    "qwen2_moe": {"num_experts": 8, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {"num_experts": 8, "moe_intermediate_size": 24, "head_dim": 8, "norm_topk_prob": True},
    "olmoe": {"num_experts": 8, "intermediate_size": 24},
    "deepseek_v2": {**SHARED, **MLA, "topk_method": "group_limited_greedy"},
    "deepseek_v3": {**SHARED, **MLA},
    "glm4_moe": {**SHARED, "head_dim": 8},
    "gpt_oss": {"num_local_experts": 4, "intermediate_size": 24, "head_dim": 8},
    "minimax_m2": {"num_local_experts": 8, "intermediate_size": 24, "head_dim": 8},
}
FIRST_DENSE = {"deepseek_v2", "deepseek_v3", "glm4_moe"}
PROMPT = torch.randint(3, 64, (2, 48), generator=torch.Generator().manual_seed(1))
TOLERANCE = 1e-5  # of logits that are O(1), in float32


def build(family: str, implementation: str = bridge.NAME) -> PreTrainedModel:
    """Two layers, hidden 32, logits O(1)."""
    config = AutoConfig.for_model(
        family,
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": None,
            "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        }
        | FAMILIES[family],
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation=implementation).eval()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                # The usual initialization gives logits near zero, where any error would hide.
                scale = 2.0 if ".experts." in name else 1.0
                parameter.copy_(torch.randn(parameter.shape, generator=random) * scale * parameter.shape[-1] ** -0.5)
            elif name.endswith("_bias"):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=random))
    return model


def logits(model: PreTrainedModel, implementation: str | None = None) -> Tensor:
    if implementation is not None:
        model.set_experts_implementation(implementation)
    with torch.inference_mode():
        return model(PROMPT).logits.float()


def generate(model: PreTrainedModel) -> list[list[int]]:
    with torch.inference_mode():
        mask = torch.ones_like(PROMPT)
        return model.generate(PROMPT, attention_mask=mask, max_new_tokens=6, do_sample=False).tolist()


@pytest.fixture(autouse=True)
def _registered(register: Callable[..., str]) -> None:
    register()
    register("moe_core_reference", runner="reference")


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_greedy_tokens_equal_eager(family: str) -> None:
    model = build(family)
    ours, our_tokens = logits(model), generate(model)
    layers = bridge.plans(model)
    first = 1 if family in FIRST_DENSE else 0
    assert list(layers) == [f"model.layers.{i}.mlp.experts" for i in range(first, 2)]
    assert {plan.resolution.require().runner for plan in layers.values()} == {"cpu"}
    expected = logits(model, "eager")
    assert 0.5 < expected.abs().max() < 20
    torch.testing.assert_close(ours, expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert our_tokens == generate(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_expert_matters(family: str) -> None:
    """Else the test above could pass with experts that are never read."""
    model = build(family)
    before, experts = logits(model), model.model.layers[1].mlp.experts
    down = experts.down_proj
    for expert in range(down.shape[0]):
        saved = down[expert].clone()
        with torch.no_grad():
            down[expert] = 0
        assert (logits(model) - before).abs().max() > 1e-2, expert
        with torch.no_grad():
            down[expert] = saved
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_exact_as_transformers_itself(family: str) -> None:
    model = build(family).to(torch.bfloat16)
    exact = logits(copy.deepcopy(model).float(), "eager")

    def error(implementation: str) -> float:
        # Of the median token: in bfloat16 a router's near tie may turn for a token, and then its logits are others.
        return float((logits(model, implementation) - exact).abs().amax(dim=-1).median())

    theirs = error("grouped_mm")
    assert 1e-3 < theirs < 0.2
    assert error(bridge.NAME) <= 2 * theirs
    assert error("moe_core_reference") <= 2 * theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_reference_runner_and_switching(family: str) -> None:
    model = build(family, "eager")
    expected = logits(model)
    assert bridge.plans(model) == {}
    for name, runner in ((bridge.NAME, "cpu"), ("moe_core_reference", "reference"), (bridge.NAME, "cpu")):
        torch.testing.assert_close(logits(model, name), expected, rtol=TOLERANCE, atol=TOLERANCE)
        assert {plan.resolution.require().runner for plan in bridge.plans(model).values()} == {runner}
        torch.testing.assert_close(logits(model, "eager"), expected, rtol=0, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(family: str, tmp_path: Path) -> None:
    model = build(family)
    expected = logits(model)  # the model that is saved has plans
    model.save_pretrained(tmp_path)
    assert "moe_core" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == family
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, experts_implementation=bridge.NAME)
    torch.testing.assert_close(logits(loaded), expected, rtol=TOLERANCE, atol=TOLERANCE)
    assert bridge.plans(loaded).keys() == bridge.plans(model).keys()
    elsewhere = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert elsewhere.get_experts_implementation() == {"": "grouped_mm"}
    torch.testing.assert_close(logits(elsewhere), expected, rtol=TOLERANCE, atol=TOLERANCE)
