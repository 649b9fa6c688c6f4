"""What this library adds to DeepEP's own low-latency calls: host microseconds of a dispatch and a combine.

    PYTHONPATH=.:plugins/deepep/src torchrun --nproc-per-node 2 benchmarks/deepep_overhead.py

Both ways use the same buffer, tokens and routing, in turns; a few tokens, so that the host is what takes the time.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from moe_core_deepep.plugin import plugin

import moe_core
from moe_core import MoeConfig, ParallelConfig, RunningState, Settings, TopKOutput
from moe_core.registry import Registry
from moe_core.testing import make_layer
from moe_core.vocabulary import Phase

TOKENS, CALLS, ROUNDS = 4, 100, 15
CONFIG: Final = MoeConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=128)


def timed(work: Callable[[], Any]) -> float:
    """Microseconds of a call, in a row of them."""
    dist.barrier()
    torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(CALLS):
        work()
    torch.cuda.synchronize()
    return 1e6 * (time.perf_counter() - began) / CALLS


def main() -> None:
    """Prints a line of JSON on rank 0."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(CONFIG, rank, tokens=TOKENS, device="cuda")
    topk = TopKOutput(layer.topk.topk_ids.long(), layer.topk.topk_weights)  # as DeepEP wants them
    settings = Settings(runner="reference", dispatcher="deepep_ll")
    more: dict[str, Any] = {"phases": (Phase.DECODE,), "max_tokens": 128, "registry": Registry([plugin])}
    weights = layer.weights.shard(CONFIG, parallel)
    plan = moe_core.plan(CONFIG, weights, parallel, group=dist.group.WORLD, settings=settings, **more)
    state = RunningState(Phase.DECODE)
    done = plan.run(first := plan.dispatch(layer.hidden, topk, state), state)
    plan.combine(done, state)
    ids, topk_weights = first.handle.ids, first.handle.weights
    buffer = plan.dispatcher._lease.shared.buffer

    def ours() -> None:
        done.handle = plan.dispatch(layer.hidden, topk, RunningState(Phase.DECODE)).handle
        plan.combine(done, RunningState(Phase.DECODE))

    def theirs() -> None:
        _, _, handle, _, _ = buffer.low_latency_dispatch(layer.hidden, ids, 128, CONFIG.num_experts, use_fp8=False)
        buffer.low_latency_combine(done.hidden_states, ids, topk_weights, handle)

    found: dict[str, list[float]] = {"moe_core": [], "deep_ep": []}
    for number in range(ROUNDS + 2):
        for name, work in (("moe_core", ours), ("deep_ep", theirs)):
            microseconds = timed(work)
            if number >= 2:
                found[name].append(microseconds)
    medians = {name: round(statistics.median(values), 1) for name, values in found.items()}
    if rank == 0:
        print(json.dumps(medians | {"added_us": round(medians["moe_core"] - medians["deep_ep"], 1)}))
    plan.close()
    dist.destroy_process_group()
    sys.stdout.flush()


if __name__ == "__main__":
    main()
