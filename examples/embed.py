"""Embed the core in an engine: configuration and weights in, one callable out.

python examples/embed.py
"""

from __future__ import annotations

import torch

import moe_core


def main() -> None:
    # A checkpoint's config.json, a preset, or the sizes themselves.
    config = moe_core.MoeConfig(num_experts=16, top_k=4, hidden_size=256, intermediate_size=128, dtype="float32")

    # Canonical weights: w13 is [experts, gate rows then up rows, hidden], w2 is [experts, hidden, intermediate].
    generator = torch.Generator().manual_seed(0)
    w13 = torch.randn(16, 2 * 128, 256, generator=generator) / 16
    w2 = torch.randn(16, 256, 128, generator=generator) / 11
    weights = moe_core.CanonicalWeights(w13=w13, w2=w2)

    # Once a layer: choose, prepare the weights, bind. `explain` tells what was chosen, what was refused, and why.
    plan = moe_core.plan(config, weights)
    print(plan.explain())

    # Every forward: the router's decision and the tokens.
    hidden_states = torch.randn(5, 256, generator=generator)
    router_logits = torch.randn(5, 16, generator=generator)
    topk = moe_core.route(router_logits, config.top_k, config.routing)
    y = plan(hidden_states, topk, phase=moe_core.Phase.DECODE)

    # The oracle is a runner like any other.
    oracle = moe_core.plan(config, weights, runner="reference")
    print("largest difference from the oracle:", float((y - oracle(hidden_states, topk)).abs().max()))

    # New weights (RL, expert rebalancing) go into the same buffers: captured graphs see them.
    plan.update_weights(moe_core.CanonicalWeights(w13=w13 * 0.5, w2=w2))


if __name__ == "__main__":
    main()
