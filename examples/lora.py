"""LoRA on the experts, through the hooks that a runner declares.

python examples/lora.py
"""

from __future__ import annotations

import torch
from torch import Tensor

import moe_core

EXPERTS, HIDDEN, INNER, RANK = 8, 64, 32, 4


def main() -> None:
    config = moe_core.MoeConfig(
        num_experts=EXPERTS, top_k=2, hidden_size=HIDDEN, intermediate_size=INNER, dtype="float32"
    )
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) / shape[-1] ** 0.5

    w13, w2 = random(EXPERTS, 2 * INNER, HIDDEN), random(EXPERTS, HIDDEN, INNER)
    lora_a, lora_b = random(EXPERTS, RANK, HIDDEN), random(EXPERTS, 2 * INNER, RANK)

    def add_lora(gate_up: Tensor, rows: moe_core.HookRows) -> None:
        """gate_up [rows, 2I] += (x A^T) B^T with the adapter of each row's expert."""
        x = rows.hidden_states[rows.token_ids]
        low = torch.einsum("nh,nrh->nr", x, lora_a[rows.expert_ids])
        gate_up += torch.einsum("nr,nir->ni", low, lora_b[rows.expert_ids])

    # A plan says which hook points it must have, so a runner or fused func that would skip them is refused.
    plan = moe_core.plan(config, moe_core.CanonicalWeights(w13=w13, w2=w2), hooks={"after_gate_up"})
    hidden_states = random(6, HIDDEN)
    topk = moe_core.route(random(6, EXPERTS), config.top_k, config.routing)
    hooks = moe_core.RunnerHooks(after_gate_up=add_lora)
    y = plan(hidden_states, topk, state=moe_core.RunningState(hooks=hooks))

    # The same as merging the adapters into the weights.
    merged = moe_core.CanonicalWeights(w13=w13 + lora_b @ lora_a, w2=w2)
    expected = moe_core.plan(config, merged)(hidden_states, topk)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)
    print("LoRA through hooks equals merged weights:", float((y - expected).abs().max()))


if __name__ == "__main__":
    main()
