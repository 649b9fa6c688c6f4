"""What the doubles are for: every mistake in preparation or packing that is made here on purpose shows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import trtllm_double_formats
from moe_core_flashinfer_trtllm import (
    cutlass_weights,
    layer,
    routing,
    trtllm,
    trtllm_layouts,
    trtllm_tokens,
    trtllm_weights,
)
from trtllm_double import config, layer_of, verify

from moe_core import Activation, TopKOutput
from moe_core.errors import MoeCoreError

CUTLASS, TRTLLM = "flashinfer_cutlass", "flashinfer_trtllm"
pytestmark = pytest.mark.usefixtures("double")


def same(tensor: Any, *_: Any, **__: Any) -> Any:
    """A step that was forgotten."""
    return tensor


def plain_order(rows: int, gated: bool) -> torch.Tensor:
    return torch.arange(rows)


def gate_first(rows: int, gated: bool) -> torch.Tensor:
    """Shuffled, of [gate; up]."""
    return trtllm_double_formats.shuffled_rows(rows, gated=gated)


def unpaired(rows: int, gated: bool) -> torch.Tensor:
    """Shuffled without pairing gate and up."""
    order = torch.arange(rows).view(2, -1).flip(0).flatten() if gated else torch.arange(rows)
    return order[trtllm_double_formats.shuffled_rows(rows, gated=False)]


def sign_extended(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (ids << 16) | weights.to(torch.bfloat16).view(torch.int16).to(torch.int32)


def dropped_to_zero(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return PACK(ids.masked_fill(ids < 0, 0), weights.nan_to_num())


def halves_swapped(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    word = PACK(ids, weights)
    return ((word & 0xFFFF) << 16) | ((word >> 16) & 0xFFFF)


def weights_twice(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return PACK(ids, weights * weights)


def unmerged(ids: torch.Tensor, weights: torch.Tensor, later: torch.Tensor) -> Any:
    return ids, weights


PACK = routing.pack_topk
ORDERS: tuple[Callable[..., Any], ...] = (plain_order, gate_first, unpaired)
SHUFFLED = ("bf16", "fp8_tensor", "mxfp8", "nvfp4", "mxfp4_w4a16", "int4_w4a16")
MUTATIONS: list[tuple[str, str, Any, str, Callable[..., Any]]] = [
    *((CUTLASS, scheme, cutlass_weights, "up_first", same) for scheme in cutlass_weights.LAYOUTS),
    (TRTLLM, "fp8_block128", trtllm_weights, "up_first", same),
    *((TRTLLM, scheme, trtllm_layouts, "row_order", order) for scheme in SHUFFLED for order in ORDERS),
    *((TRTLLM, scheme, trtllm_weights, "swizzled", same) for scheme in ("mxfp8", "nvfp4", "mxfp4_w4a16", "int4_w4a16")),
    *((TRTLLM, scheme, trtllm_weights, "blocked", same) for scheme in ("bf16", "int4_w4a16")),
    *((TRTLLM, "bf16", trtllm, "pack_topk", wrong) for wrong in (dropped_to_zero, halves_swapped, weights_twice)),
    *((runner, "bf16", routing, "merge_duplicates", unmerged) for runner in (CUTLASS, TRTLLM)),
    (TRTLLM, "fp8_block128", trtllm_tokens, "group_quantize", lambda x: (x.to(torch.float8_e4m3fn), torch.ones(1))),
]


def name_of(case: tuple[Any, ...]) -> str:
    return "-".join([case[0], case[1], case[3], case[4].__name__.strip("<>")])


def judge(runner: str, scheme: str) -> None:
    """Layers with everything that a mistake could touch: dropped and double slots, a bias where there can be one."""
    sizes = {"group_size": 32, "intermediate_size": 256} if scheme == "int4_w4a16" else {}
    bias = scheme == "mxfp4_w4a16"
    one = config(scheme, **({"num_experts": 8, "bias": bias} | sizes))
    for pattern in ("dropped", "duplicate"):
        verify(runner, one, layer_of(one, 4, tokens=17, pattern=pattern))


@pytest.mark.parametrize("case", MUTATIONS, ids=name_of)
def test_a_mistake_shows(case: tuple[str, str, Any, str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    runner, scheme, place, name, wrong = case
    judge(runner, scheme)
    monkeypatch.setattr(place, name, wrong)
    with pytest.raises((AssertionError, MoeCoreError, TypeError)):
        judge(runner, scheme)


def test_a_sign_that_runs_into_the_id_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Routers rarely give negative weights; packing must not depend on that."""
    one = config(num_experts=8)
    layer_ = layer_of(one, 4, tokens=9)
    negative = layer_._replace(topk=TopKOutput(layer_.topk.topk_ids, -layer_.topk.topk_weights))
    verify(TRTLLM, one, negative)
    monkeypatch.setattr(trtllm, "pack_topk", sign_extended)
    with pytest.raises(AssertionError):
        verify(TRTLLM, one, negative)


@pytest.mark.parametrize("scheme", ["mxfp4_w4a16", "bf16"])
def test_a_forgotten_step_of_hopper_shows(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import trtllm_double_cutlass

    name = "interleave_moe_weights_for_sm90_mixed_gemm"
    real = cutlass_weights.bind_call

    def forgets(wanted: str, *more: Any) -> Any:
        return (lambda weight: weight.clone()) if wanted == name else real(wanted, *more)

    monkeypatch.setattr(cutlass_weights, "bind_call", forgets)
    if scheme == "bf16":
        judge(CUTLASS, scheme)  # it has no such step
    else:
        with pytest.raises(AssertionError):
            judge(CUTLASS, scheme)
    assert trtllm_double_cutlass.CALLS


def test_an_activation_without_its_limit_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    clamped = config(activation=Activation(limit=0.2))
    verify(CUTLASS, clamped)
    from moe_core_flashinfer_trtllm import cutlass

    monkeypatch.setattr(cutlass, "activation_tensors", lambda binding: {})
    with pytest.raises(AssertionError):
        verify(CUTLASS, clamped)


def test_an_offset_of_another_rank_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    from trtllm_double import expected, plan

    from moe_core import ParallelConfig
    from moe_core.testing import assert_close

    one, parallel = config(num_experts=8), ParallelConfig(ep_size=2, ep_rank=1, reduce="caller")
    whole = layer_of(one, 3)
    mine = whole._replace(weights=whole.weights.shard(one, parallel))
    for wrong in (False, True):
        if wrong:
            monkeypatch.setattr(trtllm, "experts_of", lambda binding: layer.Experts(8, 0, 4))
        result = plan(TRTLLM, one, mine.weights, parallel)(mine.hidden, mine.topk)
        want = expected(one, mine, parallel)
        if not wrong:
            assert_close(result, want, "bfloat16")
        else:
            with pytest.raises(AssertionError):
                assert_close(result, want, "bfloat16")
