"""Ranks that resolved differently find out before they communicate."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

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


RANK = """
import os, sys, torch, moe_core
import torch.distributed as dist
from moe_core.errors import RankDisagreement

rank, rendezvous = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
config = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, dtype="float32")
parallel = moe_core.ParallelConfig(ep_size=2, ep_rank=rank)
weights = moe_core.CanonicalWeights(w13=torch.zeros(4, 32, 32), w2=torch.zeros(4, 32, 16))
runner = {"runner": "reference"} if rank == 1 else {}
try:
    moe_core.plan(config, weights, parallel, group=dist.group.WORLD, **runner)
except RankDisagreement as error:
    print(error, flush=True)
dist.barrier()
# gloo's threads now and then end a process in std::terminate while it is torn down; what was asked is answered by now.
os._exit(0)
"""


def test_every_rank_raises_instead_of_hanging(tmp_path: Path) -> None:
    command = [sys.executable, "-c", RANK]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "rendezvous")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for rank in range(2)
    ]
    outcomes = [process.communicate(timeout=120) for process in ranks]
    assert [process.returncode for process in ranks] == [0, 0], outcomes
    assert outcomes[0][0] == outcomes[1][0]
    assert "resolved to another plan" in outcomes[0][0]
