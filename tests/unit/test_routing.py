"""The routing functions against the routers of transformers, and what they refuse."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeTopkRouter
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssTopKRouter
from transformers.models.llama4.modeling_llama4 import Llama4Router
from transformers.models.minimax_m2.modeling_minimax_m2 import MiniMaxM2TopKRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.olmoe.modeling_olmoe import OlmoeTopKRouter
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from moe_core.config import RoutingConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.hf import read_config
from moe_core.routing import route

HIDDEN, EXPERTS, TOKENS = 32, 16, 65
GROUPS = RoutingConfig(
    method="sigmoid",
    renormalize=True,
    correction_bias=True,
    num_groups=4,
    topk_groups=2,
    group_score="top2_sum",
)


def filled(module: torch.nn.Module) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return module.eval()


def hidden_states() -> torch.Tensor:
    return torch.randn(TOKENS, HIDDEN, generator=torch.Generator().manual_seed(1))


def by_expert(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weights as float32 [T, E], 0 where an expert was not chosen: what both sides must agree on."""
    dense = torch.zeros(ids.shape[0], EXPERTS)
    return dense.scatter(1, ids.long(), weights.float())


def assert_same(got: Any, ids: torch.Tensor, weights: torch.Tensor) -> None:
    assert got.topk_ids.dtype == torch.int32
    assert got.topk_weights.dtype == torch.float32
    assert got.topk_ids.shape == got.topk_weights.shape == ids.shape
    assert torch.equal(got.topk_ids.long().sort(dim=-1).values, ids.long().sort(dim=-1).values)
    torch.testing.assert_close(by_expert(got.topk_ids, got.topk_weights), by_expert(ids, weights), rtol=1e-6, atol=1e-7)


def dense_sizes(**changes: Any) -> dict[str, Any]:
    return {"hidden_size": HIDDEN, "intermediate_size": 48, "num_experts_per_tok": 3, **changes}


def sizes(**changes: Any) -> dict[str, Any]:
    return dense_sizes(moe_intermediate_size=24, **changes)


ROUTERS = {
    "mixtral": (MixtralTopKRouter, transformers.MixtralConfig, dense_sizes(num_local_experts=EXPERTS)),
    "qwen2": (Qwen2MoeTopKRouter, transformers.Qwen2MoeConfig, sizes(num_experts=EXPERTS)),
    "qwen3": (Qwen3MoeTopKRouter, transformers.Qwen3MoeConfig, sizes(num_experts=EXPERTS)),
    "qwen3-normalized": (
        Qwen3MoeTopKRouter,
        transformers.Qwen3MoeConfig,
        sizes(num_experts=EXPERTS, norm_topk_prob=True),
    ),
    "olmoe": (OlmoeTopKRouter, transformers.OlmoeConfig, dense_sizes(num_experts=EXPERTS)),
    "gpt-oss": (GptOssTopKRouter, transformers.GptOssConfig, dense_sizes(num_local_experts=EXPERTS)),
    "deepseek-v2": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config,
        sizes(n_routed_experts=EXPERTS, routed_scaling_factor=1.5),
    ),
    "deepseek-v2-groups": (
        DeepseekV2TopkRouter,
        transformers.DeepseekV2Config,
        sizes(
            n_routed_experts=EXPERTS,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=16.0,
        ),
    ),
    "deepseek-v3": (
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config,
        sizes(n_routed_experts=EXPERTS, n_group=4, topk_group=2),
    ),
    "deepseek-v3-raw": (
        DeepseekV3TopkRouter,
        transformers.DeepseekV3Config,
        sizes(n_routed_experts=EXPERTS, n_group=1, topk_group=1, norm_topk_prob=False),
    ),
    "glm4": (
        Glm4MoeTopkRouter,
        transformers.Glm4MoeConfig,
        sizes(n_routed_experts=EXPERTS, routed_scaling_factor=2.5),
    ),
}


@pytest.mark.parametrize("name", ROUTERS)
def test_like_transformers(name: str) -> None:
    router_class, config_class, values = ROUTERS[name]
    hf_config = config_class(**values)
    router = filled(router_class(hf_config))
    config = read_config(hf_config)
    with torch.no_grad():
        logits, weights, ids = router(hidden_states())
    got = route(
        logits,
        config.top_k,
        config.routing,
        getattr(router, "e_score_correction_bias", None),
        config.routed_scaling_factor,
    )
    assert_same(got, ids, weights)


def test_minimax_like_transformers() -> None:
    hf_config = transformers.MiniMaxM2Config(**dense_sizes(num_local_experts=EXPERTS))
    router, config = filled(MiniMaxM2TopKRouter(hf_config)), read_config(hf_config)
    bias = torch.randn(EXPERTS, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        logits, weights, ids = router(hidden_states(), bias)
    assert_same(route(logits, config.top_k, config.routing, bias), ids, weights)


@pytest.mark.parametrize("top_k", [1, 3])
def test_llama4_like_transformers(top_k: int) -> None:
    hf_config = transformers.Llama4TextConfig(**dense_sizes(num_local_experts=EXPERTS, num_experts_per_tok=top_k))
    router, config = filled(Llama4Router(hf_config)), read_config(hf_config)
    with torch.no_grad():
        dense, logits = router(hidden_states())
    got = route(logits, config.top_k, config.routing)
    assert torch.equal((dense > 0).sum(dim=-1), torch.full((TOKENS,), top_k))
    torch.testing.assert_close(by_expert(got.topk_ids, got.topk_weights), dense, rtol=1e-6, atol=1e-7)


def test_the_bias_changes_the_choice_and_not_the_weight() -> None:
    routing = RoutingConfig(method="sigmoid", correction_bias=True)
    got = route(torch.tensor([[2.0, 1.0, 0.0]]), 1, routing, torch.tensor([0.0, 0.0, 9.0]))
    assert got.topk_ids.tolist() == [[2]]
    assert got.topk_weights.tolist() == [[0.5]]


def test_only_the_best_groups_are_eligible() -> None:
    # Group 0 holds the single best expert, group 1 the best pair.
    logits = torch.tensor([[9.0, -9.0, 3.0, 3.5]])
    pair = RoutingConfig(method="sigmoid", num_groups=2, group_score="top2_sum")
    best = RoutingConfig(method="sigmoid", num_groups=2, group_score="max")
    assert route(logits, 2, pair).topk_ids.tolist() == [[3, 2]]
    assert route(logits, 2, best).topk_ids.tolist() == [[0, 1]]


def test_computes_in_float32_from_any_dtype() -> None:
    logits = torch.randn(TOKENS, EXPERTS).to(torch.bfloat16)
    routing = RoutingConfig(method="topk_softmax")
    got, expected = route(logits, 4, routing), route(logits.float(), 4, routing)
    assert torch.equal(got.topk_ids, expected.topk_ids)
    assert torch.equal(got.topk_weights, expected.topk_weights)


def test_renormalizing_vanishing_scores_gives_no_nan() -> None:
    got = route(torch.full((2, 4), -200.0), 2, RoutingConfig(method="sigmoid", renormalize=True))
    assert torch.equal(got.topk_weights, torch.zeros(2, 2))


ALL_METHODS = [
    RoutingConfig(method="softmax", renormalize=True),
    RoutingConfig(method="topk_softmax"),
    RoutingConfig(method="topk_sigmoid"),
    RoutingConfig(method="softmax", num_groups=4, topk_groups=2),
    GROUPS,
]


@pytest.mark.parametrize("routing", ALL_METHODS, ids=lambda r: f"{r.method}-{r.num_groups}")
def test_no_tokens(routing: RoutingConfig) -> None:
    bias = torch.zeros(EXPERTS) if routing.correction_bias else None
    got = route(torch.empty(0, EXPERTS), 4, routing, bias)
    assert got.topk_ids.shape == got.topk_weights.shape == (0, 4)
    assert got.topk_ids.dtype == torch.int32


@pytest.mark.parametrize("routing", ALL_METHODS, ids=lambda r: f"{r.method}-{r.num_groups}")
def test_compiles_as_one_graph(routing: RoutingConfig) -> None:
    torch._dynamo.reset()
    bias = torch.randn(EXPERTS) if routing.correction_bias else None

    def routed(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        got = route(logits, 4, routing, bias, 2.5)
        return got.topk_ids, got.topk_weights

    def whole(logits: torch.Tensor) -> Any:
        return route(logits, 4, routing, bias, 2.5)

    compiled = torch.compile(routed, backend="aot_eager", fullgraph=True, dynamic=True)
    object_compiled = torch.compile(whole, backend="eager", fullgraph=True)
    for tokens in (5, 9):
        logits = torch.randn(tokens, EXPERTS)
        ids, weights = compiled(logits)
        assert_same(object_compiled(logits), ids, weights)
        assert_same(route(logits, 4, routing, bias, 2.5), ids, weights)


SOFTMAX, BIASED = RoutingConfig(), RoutingConfig(method="sigmoid", correction_bias=True)
L = torch.zeros(3, EXPERTS)


@pytest.mark.parametrize(
    ("error", "args", "message"),
    [
        (ContractViolation, (L[0], 2, SOFTMAX), "must be floating point [T, E], got torch.float32 [16]"),
        (ContractViolation, (L.int(), 2, SOFTMAX), "got torch.int32 [3, 16]"),
        (ConfigError, (L, 17, SOFTMAX), "between 1 and the 16 experts of router_logits, got 17"),
        (ConfigError, (L, 0, SOFTMAX), "got 0"),
        (ContractViolation, (L, 2, BIASED), "has a correction bias, but none was given"),
        (ConfigError, (L, 2, SOFTMAX, L[0]), "a correction bias was given, but the routing has none"),
        (
            ContractViolation,
            (L, 2, BIASED, L[0, :8]),
            "must be [16] on cpu, like router_logits, got [8] on cpu",
        ),
        (ContractViolation, (L, 2, BIASED, L[0].to("meta")), "got [16] on meta"),
        (
            ConfigError,
            (L, 2, RoutingConfig(num_groups=3)),
            "16 experts cannot be divided into 3 routing groups",
        ),
        (
            ConfigError,
            (L, 1, RoutingConfig(num_groups=16, group_score="top2_sum")),
            "needs two experts a group, but 16 groups have 1",
        ),
        (
            ConfigError,
            (L, 9, GROUPS, L[0]),
            "top_k is 9, but the 2 chosen groups of 4 have 8 experts",
        ),
    ],
)
def test_refusals(error: type[Exception], args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(error, match=re.escape(message)):
        route(*args)
