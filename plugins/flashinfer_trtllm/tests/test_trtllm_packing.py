"""Ids and weights on their way into the kernels: packed bit by bit, dropped slots kept, duplicates merged."""

from __future__ import annotations

import pytest
import torch
import trtllm_double_kernels
from moe_core_flashinfer_trtllm.routing import merge_duplicates, pack_topk
from trtllm_double import config, layer_of, plan

from moe_core import TopKOutput
from moe_core.testing import assert_close


def by_hand(ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(id << 16) | bits of the bfloat16, in Python integers."""
    bits = weights.to(torch.bfloat16).view(torch.int16)
    words = [((int(i) & 0xFFFF) << 16) | (int(b) & 0xFFFF) for i, b in zip(ids.flatten(), bits.flatten(), strict=True)]
    return torch.tensor([w - (1 << 32) if w >> 31 else w for w in words], dtype=torch.int32).view(ids.shape)


def test_known_words() -> None:
    ids = torch.tensor([[0, 1, 511, -1, -1]], dtype=torch.int32)
    weights = torch.tensor([[1.0, -0.5, 0.0, 1.0, float("nan")]])
    packed = pack_topk(ids, weights)
    assert packed.dtype == torch.int32
    assert packed.is_contiguous()
    words = [int(w) & 0xFFFFFFFF for w in packed[0]]
    assert words[:4] == [0x00003F80, 0x0001BF00, 0x01FF0000, 0xFFFF3F80]
    assert words[4] >> 16 == 0xFFFF, "a dropped slot stays negative whatever its weight"
    assert int(packed[0, 3]) < 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_bit_exact_with_negative_weights_and_dropped_slots(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(-1, 512, (200, 7), generator=random).to(dtype)
    weights = torch.randn(200, 7, generator=random)
    assert torch.equal(pack_topk(ids, weights), by_hand(ids, weights))
    wide = torch.randn(200, 14, generator=random)[:, ::2]
    assert torch.equal(pack_topk(ids, wide), by_hand(ids, wide))


def test_empty() -> None:
    assert pack_topk(torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 4)).shape == (0, 4)


def test_the_first_of_equal_slots_takes_all_weights() -> None:
    ids = torch.tensor([[3, 5, 3, 3], [-1, 2, -1, 2], [1, 2, 3, 4]], dtype=torch.int32)
    nan = float("nan")
    weights = torch.tensor([[0.5, 0.25, 1.0, 2.0], [nan, 0.5, nan, 0.25], [1.0, 2.0, 3.0, 4.0]])
    later = torch.ones(4, 4, dtype=torch.bool).tril(-1)
    merged, total = merge_duplicates(ids, weights, later)
    assert merged.tolist() == [[3, 5, -1, -1], [-1, 2, -1, -1], [1, 2, 3, 4]]
    assert merged.dtype == torch.int32
    assert total[0, :2].tolist() == [3.5, 0.25]
    assert float(total[1, 1]) == 0.75, "the weight of a dropped slot reaches nobody"
    assert torch.equal(total[2], weights[2])


@pytest.mark.usefixtures("double")
def test_a_padded_batch_gives_what_the_unpadded_one_gives() -> None:
    """Padding rows are dropped slots: no expert runs for them (SGLang's change 23493)."""
    layer = config()
    one = layer_of(layer, tokens=12)
    bound = plan("flashinfer_trtllm", layer, one.weights)
    ids, weights = one.topk.topk_ids.clone(), one.topk.topk_weights.clone()
    ids[7:], weights[7:] = -1, 0.0
    hidden = one.hidden.clone()
    hidden[7:] = float("nan")
    padded = bound(hidden, TopKOutput(ids, weights))
    assert (trtllm_double_kernels.CALLS[-1]["topk_ids"][7:] < 0).all()
    assert torch.equal(padded[:7], bound(one.hidden[:7], TopKOutput(ids[:7], weights[:7])))
    assert not padded[7:].count_nonzero()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("runner", ["flashinfer_trtllm", "flashinfer_cutlass"])
def test_rows_behind_num_valid_are_dropped(runner: str) -> None:
    from moe_core.testing.dispatchers import plugin as testing

    layer = config()
    one = layer_of(layer, tokens=9, pattern="dropped")
    bound = plan(runner, layer, one.weights, dispatcher="testing_standard", plugins=(testing,))
    assert "num_valid" in bound.terms["standard"].extras
    assert_close(bound(one.hidden, one.topk), plan(runner, layer, one.weights)(one.hidden, one.topk), "bfloat16")
