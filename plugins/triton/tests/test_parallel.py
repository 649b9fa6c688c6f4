"""Expert and tensor parallelism, all ranks in one process: each rank by itself, and their sum."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_core import Activation, ParallelConfig

#: Layouts of seven experts: divisible by nothing, so ranks differ in size; the last one leaves a rank without any.
LAYOUTS = {
    "linear-2": ParallelConfig(ep_size=2, reduce="caller"),
    "linear-3": ParallelConfig(ep_size=3, reduce="caller"),
    "round_robin-2": ParallelConfig(ep_size=2, placement="round_robin", reduce="caller"),
    "round_robin-4": ParallelConfig(ep_size=4, placement="round_robin", reduce="caller"),
    "map-2": ParallelConfig(ep_size=2, placement=(1, 0, 0, 1, 0, 1, 1), reduce="caller"),
    "map-3": ParallelConfig(ep_size=3, placement=(2, 0, 2, 0, 2, 0, 1), reduce="caller"),
}
DISPATCHERS = ("standard", "testing_global", "testing_batched", "testing_grouped")


def _check(lab: Any, config: Any, layout: ParallelConfig, pattern: str = "dropped", **more: Any) -> None:
    """Every rank equals the oracle's rank, and the sum equals the oracle's whole layer."""
    layer = lab.layer(config, 7, pattern=pattern)
    total = torch.zeros_like(layer.hidden, dtype=torch.float64)
    for ep_rank in range(layout.ep_size):
        for tp_rank in range(layout.tp_size):
            rank = replace(layout, ep_rank=ep_rank, tp_rank=tp_rank)
            weights = layer.weights.shard(config, rank)
            result = lab.plan(config, weights, parallel=rank, **more)(layer.hidden, layer.topk)
            expected = lab.expected(config, weights, layer.hidden, layer.topk, parallel=rank)
            lab.close(result, expected, config, f"rank ep {ep_rank} tp {tp_rank}")
            total += result.double()
    whole = lab.expected(config, *layer)
    lab.close(total.to(whole.dtype), whole, config, "the sum over ranks")


@pytest.mark.parametrize(
    ("layout", "dispatcher"),
    [(layout, name) for layout in LAYOUTS for name in (DISPATCHERS if layout == "map-3" else DISPATCHERS[:2])],
)
def test_expert_parallel(lab: Any, layout: str, dispatcher: str) -> None:
    """With `testing_global`, ids stay global: the runner skips those that the expert map sends elsewhere."""
    config = lab.config(num_experts=7)
    _check(lab, config, LAYOUTS[layout], dispatcher=dispatcher)


def test_the_global_dispatcher_sends_global_ids(lab: Any) -> None:
    """Otherwise the tests above would say nothing about expert maps."""
    if lab.runner == "reference":
        pytest.skip("takes local ids alone")
    config = lab.config(num_experts=7)
    rank = LAYOUTS["round_robin-2"]
    weights = lab.layer(config).weights.shard(config, rank)
    terms = lab.plan(config, weights, "fused", dispatcher="testing_global", parallel=rank).terms["standard"]
    assert terms.id_space == "global"
    assert "expert_map" in terms.extras


@pytest.mark.parametrize("scheme", ["fp8_block128", "int4_w4a16", "mxfp4_w4a16"])
def test_quantized_experts(lab: Any, scheme: str) -> None:
    config = lab.config(num_experts=7, scheme=scheme, bias=True)
    _check(lab, config, LAYOUTS["round_robin-2"], dispatcher="testing_global")


@pytest.mark.parametrize("path", ["fused", "split"])
def test_a_rank_whose_experts_nobody_chose(lab: Any, path: str) -> None:
    config = lab.config(num_experts=7, bias=True)
    layer = lab.layer(config)
    layer.topk.topk_ids.copy_(layer.topk.topk_ids % 3)
    rank = ParallelConfig(ep_size=2, ep_rank=1, reduce="caller")
    weights = layer.weights.shard(config, rank)
    for dispatcher in ("standard", "testing_global"):
        plan = lab.plan(config, weights, path, parallel=rank, dispatcher=dispatcher)
        assert not plan(layer.hidden, layer.topk).any()


def test_no_combine_on_a_rank(lab: Any) -> None:
    """Slots of other ranks are rows of zeros."""
    config = lab.config(num_experts=7, no_combine=True)
    layer = lab.layer(config)
    rank = ParallelConfig(ep_size=2, placement="round_robin", reduce="caller")
    weights = layer.weights.shard(config, rank)
    result = lab.plan(config, weights, "fused", parallel=rank)(layer.hidden, layer.topk)
    lab.close(result, lab.expected(config, weights, layer.hidden, layer.topk, parallel=rank), config)
    assert not result[layer.topk.topk_ids % 2 == 1].any()


@pytest.mark.parametrize("gated", [True, False])
def test_tensor_parallel(lab: Any, gated: bool) -> None:
    """Rank 0 alone has the second bias."""
    config = lab.config(bias=True, activation=Activation(gated=gated))
    _check(lab, config, ParallelConfig(tp_size=2, reduce="caller"))


@pytest.mark.parametrize(("scheme", "inner"), [("fp8_block128", 256), ("int8_channel", 80), ("mxfp4_w4a16", 128)])
def test_tensor_parallel_quantized(lab: Any, scheme: str, inner: int) -> None:
    """Schemes whose activations are quantized sum partial results of other roundings: only ranks are compared."""
    config = lab.config(scheme=scheme, intermediate_size=inner)
    _check(lab, config, ParallelConfig(tp_size=2, reduce="caller"), "uniform")


def test_both(lab: Any) -> None:
    config = lab.config(num_experts=7, bias=True)
    _check(lab, config, ParallelConfig(tp_size=2, ep_size=2, reduce="caller"), dispatcher="testing_global")


@pytest.mark.gpu
@pytest.mark.parametrize("dispatcher", ["standard", "testing_global"])
@pytest.mark.parametrize("tokens", [1, 64, 3000])
def test_expert_parallel_in_size(lab: Any, dispatcher: str, tokens: int) -> None:
    """A rank of eight: seven of eight slots belong to others."""
    config = lab.config(num_experts=130, top_k=8, hidden_size=2048, intermediate_size=768)
    layer = lab.layer(config, tokens=tokens)
    for ep_rank in (0, 3, 7):
        rank = ParallelConfig(ep_size=8, ep_rank=ep_rank, placement="round_robin", reduce="caller")
        weights = layer.weights.shard(config, rank)
        result = lab.plan(config, weights, "fused", parallel=rank, dispatcher=dispatcher)(layer.hidden, layer.topk)
        expected = lab.expected(config, weights, layer.hidden, layer.topk, parallel=rank)
        lab.close(result, expected, config, f"rank {ep_rank}")
