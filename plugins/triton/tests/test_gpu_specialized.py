"""The warp-specialised kernels, which plans on sm_90 get unasked: the same bits every time, and the right ones."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_core_triton import hopper
from moe_core_triton.configs.candidates import specialized
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.configs.specialized import HEIGHTS
from moe_core_triton.planning import Planner
from moe_core_triton.sequence import LayerSequence

from moe_core import Activation

#: What GPT-OSS has besides its sizes.
OAI: dict[str, Any] = {"bias": True, "activation": Activation.swiglu_oai()}
SHAPES = {"olmoe": (64, 8, 2048, 1024), "qwen3": (128, 8, 2048, 768), "gpt_oss": (32, 4, 2880, 2880)}


#: Sizes that no tile divides, as odd as each scheme allows. Of the last tile of 304, the right half is empty.
ODD = {"bf16": ((2056, 328), (2056, 304)), "fp8_block128": ((384, 256),), "mxfp4_w4a16": ((416, 288),)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts (2: GEMM1, 1: GEMM2) that specialised kernels are launched for. Tensors hold NaN until they write."""
    parts: list[int] = []
    launch, rows, output = hopper.launch, LayerSequence._rows, LayerSequence.output

    def poisoned(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(torch.uint8).fill_(255)  # NaN in every floating-point format
        return tensor

    def watched(*given: Any) -> None:
        parts.append(given[1].parts)
        assert given[3].view(torch.uint8).min() == 255, "its output was written before"
        launch(*given)

    monkeypatch.setattr(hopper, "launch", watched)
    monkeypatch.setattr(LayerSequence, "_rows", lambda self, *given: poisoned(rows(self, *given)))
    monkeypatch.setattr(LayerSequence, "output", lambda self, *given: poisoned(output(self, *given)))
    return parts


@pytest.fixture(autouse=True)
def _on_hopper(lab: Any) -> None:
    if not hopper.available(torch.device(lab.device)):
        pytest.skip("the specialised kernels are for sm_90")


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
def test_specialized(lab: Any, scheme: str, shape: str, more: dict[str, Any], tokens: int, launched: list[int]) -> None:
    """As the ordinary kernels give them, within the scheme's tolerance, and the same bits every time."""
    experts, top_k, hidden, inner = SHAPES[shape]
    sizes = {"num_experts": experts, "top_k": top_k, "hidden_size": hidden, "intermediate_size": inner}
    config = lab.config(scheme=scheme, **sizes, **more)
    weights = lab.layer(config, 4, tokens=1).weights
    plan = lab.plan(config, weights, "fused")
    ordinary = lab.plan(config, weights, "fused", options={"triton": {"specialized": False}})
    call = lab.tokens(config, tokens, seed=tokens)
    expected = ordinary(*call)
    assert not launched
    first = plan(*call).clone()
    assert launched or tokens < 1024
    lab.close(first, expected, config, f"{shape} with {tokens} tokens")
    for _ in range(20 if launched else 0):
        assert torch.equal(plan(*call), first)


TILES = [
    *(
        (scheme, height, "bfloat16", sizes)
        for scheme, heights in HEIGHTS.items()
        for height in heights
        for sizes in ODD[scheme]
    ),
    *(("bf16", height, "float16", ODD["bf16"][0]) for height in HEIGHTS["bf16"]),
]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "dropped", "nobody"])
@pytest.mark.parametrize("dispatcher", ["standard", "testing_batched", "testing_grouped"])
@pytest.mark.parametrize(("scheme", "block_m", "dtype", "sizes"), TILES)
def test_every_tile(
    lab: Any,
    scheme: str,
    block_m: int,
    dtype: str,
    sizes: tuple[int, int],
    dispatcher: str,
    pattern: str,
    launched: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Gathered and contiguous rows, also with their own stride; experts without rows, ragged tiles, none at all."""
    hidden, inner = sizes
    config = lab.config(scheme=scheme, dtype=dtype, hidden_size=hidden, intermediate_size=inner)
    layer = lab.layer(config, tokens=700, pattern="uniform" if pattern == "nobody" else pattern)
    if pattern == "nobody":
        layer.topk.topk_ids.fill_(-1)
    one = specialized(Problem(6, 2, hidden, inner, dtype=dtype, scheme=scheme, specialized=True), block_m)
    fixed = LayerConfig("tiles", block_m, one, one)
    monkeypatch.setattr(Planner, "__call__", lambda self, tokens: fixed)
    plan = lab.plan(config, layer.weights, "fused" if dispatcher == "standard" else None, dispatcher=dispatcher)
    strided = torch.zeros(700, hidden + 8, dtype=layer.hidden.dtype, device=layer.hidden.device)[:, :hidden]
    strided.copy_(layer.hidden)
    result = plan(strided, layer.topk)
    assert launched == [2, 1]
    lab.close(result, lab.expected(config, *layer), config, f"{fixed.text}, {pattern}, {dispatcher}")
    if pattern == "nobody":
        assert not result.any()
