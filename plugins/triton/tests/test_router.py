"""route against moe_core.routing.route. Without a GPU the kernel runs in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moe_core_triton.kernels.router import route

from moe_core.config import RoutingConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.routing import route as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with numpy, which warns where a kernel means to overflow to infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def distinct(tokens: int, experts: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows without ties, even as scores: distinct multiples of 1/64 in some order (exact in every dtype)."""
    values = (
        torch.stack([torch.randperm(experts) for _ in range(tokens)]) - experts // 2
        if tokens
        else torch.empty(0, experts)
    )
    return (values / 64).to(device=DEVICE, dtype=dtype)


def check(
    logits: torch.Tensor, top_k: int, routing: RoutingConfig, bias: torch.Tensor | None = None, scale: float = 1.0
) -> None:
    got, want = route(logits, top_k, routing, bias, scale), reference(logits, top_k, routing, bias, scale)
    assert got.topk_ids.dtype == torch.int32
    assert got.topk_weights.dtype == torch.float32
    assert torch.equal(got.topk_ids, want.topk_ids)
    torch.testing.assert_close(got.topk_weights, want.topk_weights, rtol=2e-6, atol=1e-9)


@pytest.mark.parametrize("method", ["softmax", "topk_softmax", "sigmoid", "topk_sigmoid"])
@pytest.mark.parametrize("renormalize", [False, True])
@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 128, 8), (5, 60, 4), (3, 1, 1), (2, 9, 9)])
def test_methods(method: str, renormalize: bool, tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    check(distinct(tokens, experts), top_k, RoutingConfig(method=method, renormalize=renormalize), scale=2.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    check(distinct(3, 64, dtype), 6, RoutingConfig(method="softmax", renormalize=True))


@pytest.mark.parametrize("method", ["softmax", "sigmoid"])
@pytest.mark.parametrize("score", ["max", "top2_sum"])
@pytest.mark.parametrize(
    ("experts", "top_k", "groups", "chosen"),
    [(256, 8, 8, 4), (160, 6, 8, 3), (60, 4, 5, 2), (24, 3, 12, 12), (16, 2, 4, 1)],
)
def test_groups(method: str, score: str, experts: int, top_k: int, groups: int, chosen: int) -> None:
    torch.manual_seed(2)
    config = {"method": method, "num_groups": groups, "topk_groups": chosen, "group_score": score}
    check(torch.randn(4, experts, device=DEVICE), top_k, RoutingConfig(**config))
    bias = torch.randn(experts, device=DEVICE)
    routing = RoutingConfig(**config, correction_bias=True, renormalize=True)
    check(torch.randn(4, experts, device=DEVICE), top_k, routing, bias, 2.5)


def test_bias_is_for_the_choice_only() -> None:
    torch.manual_seed(3)
    logits, bias = torch.randn(6, 40, device=DEVICE), torch.randn(40, device=DEVICE)
    for method in ("softmax", "sigmoid", "topk_softmax", "topk_sigmoid"):
        check(logits, 5, RoutingConfig(method=method, correction_bias=True), bias)
        check(logits.bfloat16(), 5, RoutingConfig(method=method, correction_bias=True), bias.double())


def test_large_top_k_and_many_experts() -> None:
    torch.manual_seed(4)
    check(distinct(2, 1024), 32, RoutingConfig(method="topk_softmax"))


def test_ties_go_to_the_lowest_id() -> None:
    logits = torch.zeros(2, 20, device=DEVICE)
    logits[1, [7, 11, 13]] = 1.0
    logits[0, ::2] = -0.0
    assert route(logits, 4, RoutingConfig()).topk_ids.tolist() == [[0, 1, 2, 3], [7, 11, 13, 0]]
    routing = RoutingConfig(num_groups=4, topk_groups=2)
    assert route(logits, 6, routing).topk_ids.tolist() == [[0, 1, 2, 3, 4, 5], [7, 11, 13, 5, 6, 8]]


def test_values_that_are_not_finite_still_give_distinct_ids() -> None:
    logits = torch.randn(4, 20, device=DEVICE)
    logits[0] = float("nan")
    logits[1, 3:] = float("-inf")
    logits[2, 5] = float("nan")
    logits[3] = float("-inf")
    for routing in (
        RoutingConfig(),
        RoutingConfig(method="sigmoid", num_groups=5, topk_groups=2, group_score="top2_sum"),
        RoutingConfig(method="topk_sigmoid"),
    ):
        for row in route(logits, 6, routing).topk_ids.tolist():
            assert len(set(row)) == 6
            assert all(0 <= e < 20 for e in row)
    assert route(logits, 3, RoutingConfig(method="topk_softmax")).topk_ids[1].sort().values.tolist() == [0, 1, 2]


def test_extreme_logits() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0, 90.0, -90.0, 3e38, -3e38, 1.0]], device=DEVICE)
    for method in ("topk_softmax", "topk_sigmoid"):
        check(logits, 4, RoutingConfig(method=method))


def test_strides_and_empty() -> None:
    torch.manual_seed(6)
    wide = distinct(4, 96)
    check(wide[:, 8:40], 4, RoutingConfig())
    check(wide.t()[:30].t(), 4, RoutingConfig())
    empty = route(wide[:0], 4, RoutingConfig())
    assert empty.topk_ids.shape == empty.topk_weights.shape == (0, 4)


def test_refusals_are_the_cores() -> None:
    logits, bias = torch.randn(2, 12, device=DEVICE), torch.randn(12, device=DEVICE)
    cases = [
        (logits.long(), 2, RoutingConfig(), None),
        (logits[0], 2, RoutingConfig(), None),
        (logits, 13, RoutingConfig(), None),
        (logits, 2, RoutingConfig(correction_bias=True), None),
        (logits, 2, RoutingConfig(), bias),
        (logits, 2, RoutingConfig(correction_bias=True), bias[:5]),
        (logits, 2, RoutingConfig(num_groups=5, topk_groups=2), None),
        (logits, 9, RoutingConfig(num_groups=3, topk_groups=2), None),
    ]
    for case in cases:
        with pytest.raises((ConfigError, ContractViolation)) as want:
            reference(*case)
        with pytest.raises(want.type):
            route(*case)
    with pytest.raises(ConfigError, match="32"):
        route(torch.randn(1, 64, device=DEVICE), 33, RoutingConfig())
