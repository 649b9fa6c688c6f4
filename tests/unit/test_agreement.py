"""Ranks that resolved differently find out before they communicate."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moe_core
from moe_core.agreement import compare, summary
from moe_core.errors import RankDisagreement

CONFIG = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, dtype="float32")


def resolution(ep_rank: int, **settings: str) -> moe_core.resolution.Resolution:
    parallel = moe_core.ParallelConfig(ep_size=4, ep_rank=ep_rank)
    return moe_core.resolve(CONFIG, parallel, "cpu", **settings)


def test_ranks_of_one_layer_have_one_fingerprint() -> None:
    compare([summary(resolution(rank)) for rank in range(4)])


def test_the_odd_rank_is_named_with_both_plans() -> None:
    summaries = [summary(resolution(rank)) for rank in range(4)]
    summaries[2] = summary(resolution(2, runner="reference"))
    with pytest.raises(RankDisagreement) as caught:
        compare(summaries)
    message = str(caught.value)
    assert message.startswith("rank 2 resolved to another plan")
    assert "the other ranks: standard+cpu/fused" in message
    assert "rank 2: standard+reference/split" in message


def _rank(rank: int, rendezvous: str, results: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    try:
        parallel = moe_core.ParallelConfig(ep_size=2, ep_rank=rank)
        weights = moe_core.CanonicalWeights(w13=torch.zeros(4, 32, 32), w2=torch.zeros(4, 32, 16))
        runner = {"runner": "reference"} if rank == 1 else {}
        try:
            moe_core.plan(CONFIG, weights, parallel, group=dist.group.WORLD, **runner)
        except RankDisagreement as error:
            Path(results, str(rank)).write_text(str(error))
    finally:
        dist.destroy_process_group()


def test_every_rank_raises_instead_of_hanging(tmp_path: Path) -> None:
    mp.spawn(_rank, args=(str(tmp_path / "rendezvous"), str(tmp_path)), nprocs=2)
    messages = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert messages[0] == messages[1]
    assert "resolved to another plan" in messages[0]
