"""The warp-specialised kernels, which plans on sm_90 get unasked: the same bits every time, and the right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_core_triton import hopper

from moe_core import Activation

#: What GPT-OSS has besides its sizes.
OAI: dict[str, Any] = {"bias": True, "activation": Activation.swiglu_oai()}
SHAPES = {"olmoe": (64, 8, 2048, 1024), "qwen3": (128, 8, 2048, 768), "gpt_oss": (32, 4, 2880, 2880)}


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [256, 1024, 4096, 16384])
@pytest.mark.parametrize(
    ("scheme", "shape", "more"),
    [
        ("bf16", "olmoe", {}),
        ("bf16", "qwen3", {}),
        ("bf16", "gpt_oss", {}),
        ("bf16", "gpt_oss", OAI),
        ("fp8_block128", "olmoe", {}),
        ("mxfp4_w4a16", "gpt_oss", OAI),
    ],
)
def test_specialized(
    lab: Any, scheme: str, shape: str, more: dict[str, Any], tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results in memory that held NaN before; as the ordinary kernels give them, within the scheme's tolerance."""
    experts, top_k, hidden, inner = SHAPES[shape]
    sizes = {"num_experts": experts, "top_k": top_k, "hidden_size": hidden, "intermediate_size": inner}
    config = lab.config(scheme=scheme, **sizes, **more)
    weights = lab.layer(config, 4, tokens=1).weights
    launched = []
    launch = hopper.launch
    monkeypatch.setattr(hopper, "launch", lambda *given: (launched.append(given[1].parts), launch(*given)))
    plan = lab.plan(config, weights, "fused")
    ordinary = lab.plan(config, weights, "fused", options={"triton": {"specialized": False}})
    call = lab.tokens(config, tokens, seed=tokens)
    if not hopper.available(call[0].device):
        pytest.skip("the specialised kernels are for sm_90")
    expected = ordinary(*call)
    assert not launched
    first = plan(*call)
    if not launched:
        pytest.skip("no configuration here names a specialised kernel")
    lab.close(first, expected, config, f"{shape} with {tokens} tokens")
    for _ in range(20):
        poison = torch.full((1 << 28,), float("nan"), dtype=torch.bfloat16, device=first.device)
        del poison  # the next buffers are made of this memory
        assert torch.equal(plan(*call), first)
