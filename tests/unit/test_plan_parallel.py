"""Ranks: the parts of a layer, each with its shard of the weights, sum to the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import CanonicalWeights, MoeConfig, ParallelConfig, Registry, Settings, TopKOutput, WeightError
from moe_core.config import Activation
from moe_core.testing.oracle import dense

LAYER = MoeConfig(num_experts=7, top_k=3, hidden_size=32, intermediate_size=48, dtype="float32")
CORE = Registry(autoload=False, settings=Settings())
RUNNERS = pytest.mark.parametrize("runner", ["cpu", "reference"])
PLACEMENTS = ["linear", "round_robin", (2, 0, 0, 1, 2, 2, 0)]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(config: MoeConfig = LAYER, zero_points: bool = False) -> CanonicalWeights:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(config.num_experts, *shape, generator=generator) / 5

    rows, inner, hidden = config.gate_up_factor * config.intermediate_size, config.intermediate_size, config.hidden_size
    biases = {"w13_bias": random(rows), "w2_bias": random(hidden)} if config.bias else {}
    w13, w2 = random(rows, hidden), random(hidden, inner)
    return CanonicalWeights.quantize(w13, w2, config, zero_points=zero_points, **biases)


def call(config: MoeConfig = LAYER, count: int = 9) -> tuple[Tensor, TopKOutput]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(count, config.hidden_size, generator=generator)
    ids = torch.rand(count, config.num_experts, generator=generator).topk(config.top_k).indices.to(torch.int32)
    ids[0, 0] = -1
    return hidden, TopKOutput(ids, torch.rand(ids.shape, generator=generator))


def run(
    config: MoeConfig, runner: str, ranks: ParallelConfig | None = None, given: Any = None, **options: Any
) -> Tensor:
    ranks = replace(ranks or ParallelConfig(), reduce="caller")
    whole = given or weights(config)
    settings = Settings(runner=runner, options=options)
    plan = moe_core.plan(config, whole.shard(config, ranks), ranks, registry=CORE, settings=settings)
    return plan(*call(config))


def total(config: MoeConfig, runner: str, ranks: list[ParallelConfig], **more: Any) -> Tensor:
    return torch.stack([run(config, runner, rank, **more) for rank in ranks]).sum(dim=0)


def ep(size: int, **changes: Any) -> list[ParallelConfig]:
    return [ParallelConfig(ep_size=size, ep_rank=rank, **changes) for rank in range(size)]


def tp(size: int) -> list[ParallelConfig]:
    return [ParallelConfig(tp_size=size, tp_rank=rank) for rank in range(size)]


@RUNNERS
@pytest.mark.parametrize("placement", PLACEMENTS, ids=["linear", "round_robin", "map"])
@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"no_combine": True}, {"routed_scaling_factor": 3.0}], ids=str)
def test_expert_parallel_parts_sum_to_the_layer(runner: str, placement: Any, changes: dict[str, Any]) -> None:
    config = replace(LAYER, **changes)
    found = total(config, runner, ep(3, placement=placement))
    torch.testing.assert_close(found, run(config, runner), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.double(), dense(config, weights(config), *call(config)), rtol=1e-4, atol=1e-5)


@RUNNERS
def test_a_rank_adds_nothing_for_experts_of_others(runner: str) -> None:
    """Every weight outside the rank is poisoned: none of it may show."""
    ranks = ParallelConfig(ep_size=3, ep_rank=1, placement="round_robin", reduce="caller")
    plan = moe_core.plan(LAYER, weights().shard(LAYER, ranks), ranks, registry=CORE, settings=Settings(runner=runner))
    hidden, decision = call()
    mine = torch.isin(decision.topk_ids, torch.tensor([1, 4], dtype=torch.int32))
    expected = dense(LAYER, weights(), hidden, TopKOutput(decision.topk_ids.where(mine, -1), decision.topk_weights))
    poisoned = TopKOutput(decision.topk_ids, decision.topk_weights.where(mine, float("nan")))
    torch.testing.assert_close(plan(hidden, poisoned).double(), expected, rtol=1e-4, atol=1e-5)


@RUNNERS
def test_a_rank_without_experts_gives_zeros(runner: str) -> None:
    ranks = ParallelConfig(ep_size=2, ep_rank=1, placement=(0,) * 7)
    assert torch.equal(run(LAYER, runner, ranks), torch.zeros(9, 32))


@RUNNERS
@pytest.mark.parametrize("gated", [True, False])
def test_tensor_parallel_parts_sum_to_the_layer_with_each_bias_once(runner: str, gated: bool) -> None:
    config = replace(LAYER, bias=True, activation=Activation(gated=gated))
    found = total(config, runner, tp(3))
    torch.testing.assert_close(found, run(config, runner), rtol=1e-4, atol=1e-5)


def test_only_the_first_rank_carries_the_second_bias() -> None:
    config = replace(LAYER, bias=True)
    parts = [weights(config).shard(config, rank) for rank in tp(3)]
    assert [part.w2_bias is not None for part in parts] == [True, False, False]
    assert all(part.w13_bias is not None and part.w13_bias.shape == (7, 32) for part in parts)


@RUNNERS
def test_both_kinds_of_ranks_together_sum_to_the_layer(runner: str) -> None:
    config = replace(LAYER, bias=True, routed_scaling_factor=0.5)
    ranks = [replace(t, ep_size=2, ep_rank=e) for t in tp(2) for e in range(2)]
    torch.testing.assert_close(total(config, runner, ranks), run(config, runner), rtol=1e-4, atol=1e-5)


def test_a_shard_is_the_gate_and_the_up_rows_of_its_rank() -> None:
    config = MoeConfig(num_experts=2, top_k=1, hidden_size=1, intermediate_size=4, dtype="float32")
    w13 = torch.arange(16.0).reshape(2, 8, 1)
    whole = CanonicalWeights(w13=w13, w2=torch.arange(8.0).reshape(2, 1, 4))
    part = whole.shard(config, ParallelConfig(tp_size=2, tp_rank=1, ep_size=2, ep_rank=1))
    assert part.w13.flatten().tolist() == [10.0, 11.0, 14.0, 15.0]
    assert part.w2.flatten().tolist() == [6.0, 7.0]
    assert all(tensor.is_contiguous() for tensor in part.tensors().values())


QUANTIZED = {
    "fp8_block128": {"hidden_size": 128, "intermediate_size": 256},
    "fp8_channel": {},
    "fp8_tensor": {},
    "int8_w8a16": {},
    "int4_w4a16": {"hidden_size": 64, "intermediate_size": 128, "group_size": 32},
    "mxfp4_w4a16": {"intermediate_size": 128},
    "nvfp4": {"intermediate_size": 64},
}


@pytest.mark.parametrize("scheme", QUANTIZED)
@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_parts_of_quantized_weights_sum_to_the_layer(scheme: str, kind: str) -> None:
    config = replace(LAYER, scheme=scheme, **QUANTIZED[scheme])
    given = weights(config, zero_points=scheme == "int4_w4a16")
    # Activations stay as they are: a rank that sees a part of a row would round it otherwise.
    exact = {"given": given, "reference": {"emulate_activations": False}}
    found = total(config, "reference", tp(2) if kind == "tp" else ep(2), **exact)
    torch.testing.assert_close(found, run(config, "reference", **exact), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("scheme", "sizes", "size"),
    [
        ("fp8_block128", {"hidden_size": 128, "intermediate_size": 256}, 4),
        ("fp8_block128", {"hidden_size": 128, "intermediate_size": 128}, 2),
        ("fp8_block128", {"hidden_size": 128, "intermediate_size": 460}, 2),
        ("int4_w4a16", {"hidden_size": 128, "intermediate_size": 128}, 2),
        ("mxfp4_w4a16", {"intermediate_size": 64}, 4),
        ("nvfp4", {"intermediate_size": 48}, 2),
    ],
)
def test_a_shard_that_would_cut_through_a_scale_is_refused(scheme: str, sizes: dict[str, int], size: int) -> None:
    config = replace(LAYER, scheme=scheme, **sizes)
    with pytest.raises(WeightError, match=r"(?s)tp_size \d would cut through a scale or a packed item.*use a tp_size"):
        weights(config).shard(config, ParallelConfig(tp_size=size))


def test_a_tp_size_that_does_not_divide_the_layer_is_refused() -> None:
    with pytest.raises(WeightError, match="intermediate size 48 cannot be divided by tp_size 5"):
        weights().shard(LAYER, ParallelConfig(tp_size=5))
