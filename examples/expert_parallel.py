"""Expert parallelism with torch.distributed (gloo) on this machine.

    python examples/expert_parallel.py

Each rank holds half of the experts. First all ranks bring the same tokens, and the dispatcher `standard` sums what they
give; then each brings its own, and `allgather` takes them to the experts and back. Before the first collective the
ranks compare what they resolved to.
"""

from __future__ import annotations

import tempfile

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import moe_core

RANKS = 2
CONFIG = moe_core.MoeConfig(num_experts=10, top_k=3, hidden_size=64, intermediate_size=32, dtype="float32")


def rank_main(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=RANKS)
    try:
        # The same seed on every rank: the same whole model, the same tokens.
        generator = torch.Generator().manual_seed(0)
        whole = moe_core.CanonicalWeights(
            w13=torch.randn(10, 64, 64, generator=generator) / 8, w2=torch.randn(10, 64, 32, generator=generator) / 6
        )
        hidden_states = torch.randn(7, 64, generator=generator)
        topk = moe_core.route(torch.randn(7, 10, generator=generator), CONFIG.top_k, CONFIG.routing)
        expected = moe_core.plan(CONFIG, whole)(hidden_states, topk)

        for placement in ("linear", "round_robin"):
            parallel = moe_core.ParallelConfig(ep_size=RANKS, ep_rank=rank, placement=placement)
            plan = moe_core.plan(CONFIG, whole.shard(CONFIG, parallel), parallel, group=dist.group.WORLD)
            y = plan(hidden_states, topk)
            torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
            if rank == 0:
                print(f"{placement}: {RANKS} ranks agree with one, plan {plan.fingerprint}")

        # As with DP attention: rank 0 has five of the tokens, rank 1 the other two. Where the server knows how many
        # tokens each rank brings, it says so, and nothing is padded to max_tokens.
        counts = [5, 2]
        mine = slice(0, 5) if rank == 0 else slice(5, 7)
        parallel = moe_core.ParallelConfig(ep_size=RANKS, ep_rank=rank, tokens="sharded")
        plan = moe_core.plan(CONFIG, whole.shard(CONFIG, parallel), parallel, group=dist.group.WORLD, max_tokens=16)
        own = moe_core.TopKOutput(topk.topk_ids[mine], topk.topk_weights[mine])
        y = plan(hidden_states[mine], own, state=moe_core.RunningState(tokens_per_rank=counts))
        torch.testing.assert_close(y, expected[mine], rtol=1e-5, atol=1e-5)
        if rank == 0:
            print(f"own tokens, {counts} of them: {plan.resolution.require().id}")
    finally:
        dist.destroy_process_group()


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(rank_main, args=(f"{folder}/rendezvous",), nprocs=RANKS)


if __name__ == "__main__":
    main()
