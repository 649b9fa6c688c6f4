"""The runner's router: the kernel within its limits, the core's torch code beyond them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_core_triton import routing
from moe_core_triton.plugin import RUNNER

from moe_core import MoeConfig
from moe_core.config import RoutingConfig
from moe_core.routing import route as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GROUPED = {"num_groups": 64, "renormalize": True}


def router(experts: int, top_k: int, **changes: Any) -> tuple[Any, RoutingConfig]:
    config = RoutingConfig(**changes)
    layer = MoeConfig(num_experts=experts, top_k=top_k, hidden_size=8, intermediate_size=8, routing=config)
    return routing.router(SimpleNamespace(config=layer)), config  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("experts", "top_k", "changes", "ours"),
    [
        (40, 4, {}, True),
        (1024, 32, {"method": "sigmoid", "correction_bias": True}, True),
        (64, 4, GROUPED | {"topk_groups": 64}, True),  # all groups: no restriction
        (64, 4, {"num_groups": 32, "topk_groups": 3}, True),
        (1025, 4, {"correction_bias": True}, False),
        (64, 33, {}, False),
        (64, 4, GROUPED | {"topk_groups": 8}, False),
    ],
)
def test_who_routes(monkeypatch: Any, experts: int, top_k: int, changes: dict[str, Any], ours: bool) -> None:
    kernel, calls = routing.route, list[int]()

    def counted(*given: Any) -> Any:
        calls.append(1)
        return kernel(*given)

    monkeypatch.setattr(routing, "route", counted)
    bound, config = router(experts, top_k, **changes)
    assert calls == []  # a choice of the plan, not of every call
    logits = torch.stack([torch.randperm(experts) for _ in range(3)]).to(DEVICE) / 64
    bias = torch.randn(experts, device=DEVICE) if config.correction_bias else None
    found, wanted = bound(logits, bias, 2.5), reference(logits, top_k, config, bias, 2.5)
    assert bool(calls) is ours
    assert torch.equal(found.topk_ids, wanted.topk_ids)
    torch.testing.assert_close(found.topk_weights, wanted.topk_weights, rtol=2e-6, atol=1e-9)
    plain = bound(logits, bias)
    torch.testing.assert_close(plain.topk_weights * 2.5, found.topk_weights)


def test_the_spec_names_it() -> None:
    assert RUNNER.router == "moe_core_triton.routing:router"
    assert RUNNER.router in RUNNER.targets
