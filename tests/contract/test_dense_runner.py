"""A runner written from nothing, as small as one can be, passes the kit: every expert computes every token.

No step depends on the routing, so it can be captured in a device graph and traced by a compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from moe_core.capability import Support
from moe_core.formats import StandardCombineInput
from moe_core.registry import Registry
from moe_core.specs import AdapterSpec, RunnerSpec, Wants
from moe_core.testing import Check, as_target, fake_plugin, parametrize_with_checks
from moe_core.vocabulary import Phase, Step


@dataclass
class DenseWeights:
    w13: Tensor
    w2: Tensor
    scheme: str = "bf16"
    layout: str = "dense"


def prepare(weights: Any, binding: Any) -> DenseWeights:
    return DenseWeights(weights.w13.clone(), weights.w2.clone())


class DenseRunner:
    def __init__(self, binding: Any) -> None:
        self.experts = torch.arange(binding.num_local_experts, device=binding.device)

    def run(self, hidden: Tensor, weights: DenseWeights, state: Any) -> Tensor:
        """[T, H] -> [E, T, H]."""
        gate, up = (hidden @ weights.w13.transpose(1, 2)).chunk(2, dim=-1)
        result: Tensor = (functional.silu(gate) * up) @ weights.w2.transpose(1, 2)
        return result


def pre(binding: Any) -> Callable[..., Tensor]:
    def call(d: Any, weights: Any, config: Any, state: Any) -> Tensor:
        state.private["dense"] = d
        # A token that nobody computes may be NaN, and would spoil the sum with its weight of 0.
        hidden: Tensor = d.hidden_states.where((valid(d) >= 0).any(dim=1, keepdim=True), 0.0)
        return hidden

    return call


def valid(d: Any) -> Tensor:
    """The ids, -1 in padding rows."""
    ids: Tensor = d.topk_ids
    if d.num_valid is None:
        return ids
    rows = torch.arange(ids.shape[0], device=ids.device)[:, None]
    return ids.where(rows < d.num_valid, -1)


def post(binding: Any) -> Callable[..., StandardCombineInput]:
    weighs = binding.terms.runner_does(Step.ROUTER_WEIGHT)
    experts = binding.runner.experts

    def call(out: Tensor, weights: Any, config: Any, state: Any) -> StandardCombineInput:
        d = state.private["dense"]
        ids = valid(d)
        scale = d.topk_weights if weighs else torch.ones_like(d.topk_weights)
        hits = torch.where(ids[..., None] == experts, scale[..., None], 0.0).sum(dim=1)
        result = torch.einsum("te,eth->th", hits, out.float()).to(out.dtype)
        return StandardCombineInput(result if state.output is None else state.output.copy_(result), d.handle)

    return call


RUNNER = RunnerSpec(
    name="dense",
    summary="every expert computes every token",
    factory=as_target(DenseRunner),
    prepare=as_target(prepare),
    layouts=frozenset({"dense"}),
    support=Support(
        devices={"*": ("*",)},
        schemes=frozenset({"bf16"}),
        dtypes=frozenset({"float32", "bfloat16"}),
        activations=frozenset({"silu"}),
        gated=frozenset({True}),
        features=frozenset({"compile", "deterministic"}),
        graph_capture=frozenset(Phase),
    ),
)
ADAPTER = AdapterSpec(
    runner="dense",
    format="standard",
    pre=as_target(pre),
    post=as_target(post),
    wants=Wants(can=frozenset({Step.ROUTER_WEIGHT}), always=frozenset({Step.TOPK_SUM})),
)


@parametrize_with_checks(
    "dense", registry=Registry(plugins=[fake_plugin("dense", runners=(RUNNER,), adapters=(ADAPTER,))], autoload=False)
)
def test_dense(check: Check) -> None:
    check()
