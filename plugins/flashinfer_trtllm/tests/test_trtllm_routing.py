"""The router in the kernel: every routing method of the core that FlashInfer has, and those that it has not."""

from __future__ import annotations

import pytest
import torch
import trtllm_double_kernels
from moe_core_flashinfer_trtllm.rules import routing_method
from trtllm_double import config, layer_of, plan, registry
from trtllm_double_enums import RoutingMethodType

import moe_core
from moe_core import BypassedTopK, MoeConfig, ParallelConfig, RoutingConfig
from moe_core.errors import ContractViolation, UnsupportedOverride
from moe_core.routing import route
from moe_core.testing import assert_close
from moe_core.testing.layers import Layer
from moe_core.vocabulary import TOPK_BYPASSED

RUNNER = "flashinfer_trtllm"
GROUPED = {"num_groups": 4, "topk_groups": 2, "group_score": "top2_sum"}
DEEPSEEK = RoutingConfig(method="sigmoid", renormalize=True, correction_bias=True, **GROUPED)
#: FlashInfer's name -> the core's routing, and the experts of a token.
METHODS = {
    "Default": (RoutingConfig(), 3),
    "RenormalizeNaive": (RoutingConfig(renormalize=True), 3),
    "Renormalize": (RoutingConfig(method="topk_softmax"), 3),
    "DeepSeekV3": (DEEPSEEK, 3),
    "Llama4": (RoutingConfig(method="topk_sigmoid"), 1),
    "SigmoidRenorm": (RoutingConfig(method="sigmoid", renormalize=True), 3),
    "MiniMax2": (RoutingConfig(method="sigmoid", renormalize=True, correction_bias=True), 3),
    "Sigmoid": (RoutingConfig(method="sigmoid"), 3),
    "TopKSigmoid": (RoutingConfig(method="topk_sigmoid"), 3),
}
#: None of the core's routings: the logits themselves as weights, and nothing.
UNUSED = {"TopK", "Unspecified"}
NOT_THERE = {
    "softmax with a bias": RoutingConfig(correction_bias=True),
    "softmax in groups": RoutingConfig(num_groups=4, topk_groups=2),
    "sigmoid, bias, not renormalized": RoutingConfig(method="sigmoid", correction_bias=True),
    "sigmoid in groups without a bias": RoutingConfig(method="sigmoid", renormalize=True, **GROUPED),
    "groups by their best expert": RoutingConfig(
        method="sigmoid", renormalize=True, correction_bias=True, num_groups=4, topk_groups=2
    ),
    "top-k of logits with a bias": RoutingConfig(method="topk_softmax", correction_bias=True),
    "sigmoid of the chosen, renormalized": RoutingConfig(method="topk_sigmoid", renormalize=True),
}
pytestmark = pytest.mark.usefixtures("double")


def of(routing: RoutingConfig, top_k: int, scheme: str = "bf16", **changes: object) -> MoeConfig:
    return config(scheme, num_experts=16, top_k=top_k, routing=routing, **changes)


def decision(layer: MoeConfig, tokens: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> BypassedTopK:
    """Logits without ties, and a bias that changes the choice."""
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, layer.num_experts, generator=random).mul_(2).to(dtype)
    bias = torch.randn(layer.num_experts, generator=random) / 2 if layer.routing.correction_bias else None
    return BypassedTopK(logits, bias)


def check(layer: MoeConfig, dtype: torch.dtype = torch.float32, parallel: ParallelConfig | None = None) -> None:
    """A layer that routes itself against the same layer routed by the core."""
    one = layer_of(layer, 2, tokens=19)
    given = decision(layer, 19, dtype=dtype)
    topk = route(given.router_logits, layer.top_k, layer.routing, given.correction_bias)
    weights = one.weights if parallel is None else one.weights.shard(layer, parallel)
    oracle = moe_core.plan(layer, weights, parallel, runner="reference")
    bound = plan(RUNNER, layer, weights, parallel, topk_format=TOPK_BYPASSED)
    assert_close(bound(one.hidden, given), oracle(one.hidden, topk), layer.dtype, layer.scheme)


def test_every_method_of_flashinfer_is_accounted_for() -> None:
    assert {*METHODS, *UNUSED} >= {method.name for method in RoutingMethodType}
    for name, (routing, top_k) in METHODS.items():
        assert routing_method(of(routing, top_k)) == name


@pytest.mark.parametrize("name", sorted(METHODS))
def test_a_method(name: str) -> None:
    layer = of(*METHODS[name])
    check(layer)
    call = trtllm_double_kernels.CALLS[-1]
    assert call["routing_method_type"] == RoutingMethodType[name]
    assert "topk_ids" not in call
    assert (call["n_group"], call["topk_group"]) == ((4, 2) if name == "DeepSeekV3" else (0, 0))


@pytest.mark.parametrize("scheme", ["fp8_block128", "fp8_tensor", "mxfp8", "nvfp4", "mxfp4_w4a16", "int4_w4a16"])
@pytest.mark.parametrize("name", ["RenormalizeNaive", "DeepSeekV3"])
def test_every_scheme_routes(scheme: str, name: str) -> None:
    sizes = {"group_size": 32, "intermediate_size": 256} if scheme == "int4_w4a16" else {}
    check(of(*METHODS[name], scheme, **sizes))


@pytest.mark.parametrize("name", ["DeepSeekV3", "RenormalizeNaive", "MiniMax2"])
def test_the_scaling_factor_is_applied_once(name: str) -> None:
    """In the kernel where it does that, on the result otherwise."""
    check(of(*METHODS[name], routed_scaling_factor=2.5))
    assert trtllm_double_kernels.CALLS[-1]["routed_scaling_factor"] == (2.5 if name == "DeepSeekV3" else 1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["Default", "DeepSeekV3"])
def test_logits_of_other_dtypes(name: str, dtype: torch.dtype) -> None:
    """float16 would be read as bfloat16: it travels as float32."""
    check(of(*METHODS[name]), dtype)
    found = trtllm_double_kernels.CALLS[-1]["routing_logits"].dtype
    assert found == (torch.bfloat16 if dtype is torch.bfloat16 and name == "Default" else torch.float32)


def test_ranks_of_expert_parallelism() -> None:
    for rank in range(2):
        check(of(*METHODS["RenormalizeNaive"]), parallel=ParallelConfig(ep_size=2, ep_rank=rank, reduce="caller"))


def test_no_tokens() -> None:
    layer = of(*METHODS["Default"])
    bound = plan(RUNNER, layer, layer_of(layer).weights, topk_format=TOPK_BYPASSED)
    assert bound(torch.empty(0, 256, dtype=torch.bfloat16), decision(layer, 0)).shape == (0, 256)


def test_a_missing_bias_is_an_error_before_any_kernel() -> None:
    layer = of(DEEPSEEK, 3)
    one: Layer = layer_of(layer, tokens=4)
    bound = plan(RUNNER, layer, one.weights, topk_format=TOPK_BYPASSED)
    with pytest.raises(ContractViolation, match="correction bias"):
        bound(one.hidden, BypassedTopK(decision(layer, 4).router_logits))
    assert trtllm_double_kernels.CALLS == []


@pytest.mark.parametrize("name", sorted(NOT_THERE))
def test_what_the_kernels_do_not_route_by(name: str) -> None:
    layer = of(NOT_THERE[name], 3)
    assert routing_method(layer) is None
    with pytest.raises(UnsupportedOverride, match=r"topk\.format.*do not route by"):
        plan(RUNNER, layer, layer_of(layer).weights, topk_format=TOPK_BYPASSED)
    plan(RUNNER, layer, layer_of(layer).weights)  # the caller's choice may come from anywhere


@pytest.mark.parametrize(
    ("changes", "groups", "code"),
    [
        ({"top_k": 9, "num_experts": 64}, {}, "shape.top_k"),
        ({"top_k": 8, "num_experts": 16}, {}, "shape.top_k"),
        ({}, {"num_groups": 8, "topk_groups": 5}, "topk.format"),
        ({"num_experts": 48}, {"num_groups": 16}, "topk.format"),
        ({"num_experts": 160}, {}, "topk.format"),  # 40 experts a group
        ({"num_experts": 18}, {"num_groups": 2, "topk_groups": 1}, "shape.num_experts"),
    ],
)
def test_limits_of_routing_by_groups(changes: dict[str, int], groups: dict[str, int], code: str) -> None:
    routing = RoutingConfig(**{**vars_of(DEEPSEEK), **groups})
    assert codes(of(routing, 3).replace(**changes)) == {code}


def test_deepseek_v3_itself_routes() -> None:
    routing = RoutingConfig(**{**vars_of(DEEPSEEK), "num_groups": 8, "topk_groups": 4})
    assert codes(of(routing, 8).replace(num_experts=256)) == set()


@pytest.mark.parametrize(
    ("name", "experts", "top_k"),
    [
        *((name, 256, 8) for name in ("Default", "SigmoidRenorm", "Sigmoid", "TopKSigmoid")),
        ("Llama4", 128, 1),
        *((name, 512, 32) for name in ("Renormalize", "RenormalizeNaive", "MiniMax2")),
    ],
)
def test_sizes_that_a_method_is_compiled_for(name: str, experts: int, top_k: int) -> None:
    """FlashInfer has no kernel beyond these, and would say so in the first forward."""
    most = of(METHODS[name][0], METHODS[name][1]).replace(num_experts=experts, top_k=top_k)
    assert codes(most) == set()
    assert "shape.num_experts" in codes(most.replace(num_experts=experts + 4))
    if name != "Llama4":  # of several experts it is another method
        assert "shape.top_k" in codes(most.replace(top_k=top_k + 1))


def vars_of(routing: RoutingConfig) -> dict[str, object]:
    return {name: getattr(routing, name) for name in RoutingConfig.__dataclass_fields__}


def codes(layer: MoeConfig) -> set[str]:
    resolution = moe_core.resolve(layer, None, "cpu", registry=registry(), topk_format=TOPK_BYPASSED)
    (verdict,) = [v for v in resolution.verdicts if v.spec.name == RUNNER]
    return {reason.code for reason in verdict.reasons}
