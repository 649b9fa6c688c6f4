"""A rank that is dead or late: the others get an error that says so, within the group's timeout, and do not hang."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

#: Rank 1 makes the plan, runs it once, and then dies or comes too late. What rank 0 saw, and after how many seconds.
SOURCE = """
from moe_core import CommunicationError, MoeConfig, ParallelConfig
from moe_core.testing import make_layer

config = MoeConfig(num_experts=8, top_k=2, hidden_size=32, intermediate_size=16, dtype="float32")
parallel = ParallelConfig(ep_size=2, ep_rank=rank, tokens="sharded")
layer = make_layer(config, 1, tokens=6)
settings = moe_core.Settings(runner="reference", dispatcher=NAME)
plan = moe_core.plan(config, layer.weights.shard(config, parallel), parallel, group=group, max_tokens=6,
                     settings=settings)
plan(layer.hidden, layer.topk)
began = time.monotonic()
if rank == 1:
    if DEAD:
        print(json.dumps(said), flush=True)
        os._exit(0)
    time.sleep(9)
else:
    try:
        plan(layer.hidden, layer.topk)
        said["error"] = "none"
    except CommunicationError as error:
        said["error"] = str(error)
    said["seconds"] = time.monotonic() - began
print(json.dumps(said), flush=True)
os._exit(0)
"""
PATIENCE = 4.0


@pytest.mark.parametrize("dead", [True, False], ids=["dead", "late"])
@pytest.mark.parametrize("name", ["allgather", "alltoall"])
def test_an_error_in_time(name: str, dead: bool, ranks: Callable[..., list[dict[str, Any]]]) -> None:
    said = ranks(2, f"NAME, DEAD = {name!r}, {dead}\n{SOURCE}", PATIENCE)[0]
    assert "failed on rank 0 of 2; another rank is dead, late, or not in this call" in said["error"]
    assert "timeout" in said["error"]
    assert said["seconds"] < PATIENCE + 3
