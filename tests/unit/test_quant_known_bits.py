"""Hand-computed bits of each scheme's formula."""

from __future__ import annotations

import pytest
import torch

from moe_core.quant import (
    QuantizedTensor,
    dequantize,
    quantize,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_mxfp4_known_block() -> None:
    row = torch.zeros(1, 64)
    row[0, :4] = torch.tensor([24.0, -2.0, 1.0, 7.0])  # amax 24: 2^(4 - 2), so divided by 4
    q = quantize(row, "mxfp4_w4a16")
    assert q.scale is not None
    assert q.scale.tolist() == [[127 + 2, 0]]
    assert q.data[0, :3].tolist() == [0x97, 0x40, 0x00]  # 6 and -0.5; 0.25 ties to 0, 1.75 ties to 2
    assert dequantize(q, "mxfp4_w4a16")[0, :5].tolist() == [24.0, -2.0, 0.0, 8.0, 0.0]


def test_mx_saturates_when_the_maximum_exceeds_the_grid() -> None:
    # The shared exponent comes from the power of two under amax, so 7.9 (e2m1) and 511 (e4m3) clip.
    row = torch.zeros(1, 32)
    row[0, 0] = 7.9
    assert dequantize(quantize(row, "mxfp4"), "mxfp4").max() == 6
    row[0, 0] = 511
    assert dequantize(quantize(row, "mxfp8"), "mxfp8").max() == 448


def test_nvfp4_known_block() -> None:
    row = torch.zeros(1, 32)
    row[0, 0], row[0, 1], row[0, 16], row[0, 17] = 2688.0, -448.0, 3.0, 0.25
    q = quantize(row, "nvfp4")
    assert q.scale is not None
    assert q.global_scale is not None
    assert q.global_scale.tolist() == [1.0]
    assert q.scale.float().tolist() == [[448.0, 0.5]]
    assert q.data[0, 0].item() == 0xA7  # 6 and -1
    assert q.data[0, 8].item() == 0x17  # 3 / 0.5 = 6 and 0.25 / 0.5 = 0.5
    assert torch.equal(dequantize(q, "nvfp4"), row)


def test_int4_known_group() -> None:
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([7.0, -7.0, 2.5, -3.5])
    q = quantize(row, "int4_w4a16", group_size=32)
    assert q.scale is not None
    assert q.scale.tolist() == [[1.0]]
    assert q.data[0, :3].tolist() == [0x1F, 0x4A, 0x88]
    assert dequantize(q, "int4_w4a16")[0, :5].tolist() == [7.0, -7.0, 2.0, -4.0, 0.0]
    lowest = QuantizedTensor(torch.zeros_like(q.data), q.scale)
    assert dequantize(lowest, "int4_w4a16").flatten().tolist() == [-8.0] * 32


def test_int4_zero_points_known_group() -> None:
    row = torch.zeros(1, 32)
    row[0, :3] = torch.tensor([-3.0, 12.0, 5.0])
    q = quantize(row, "int4_w4a16", group_size=32, zero_points=True)
    assert q.scale is not None
    assert q.zero is not None
    assert (q.scale.tolist(), q.zero.tolist(), q.zero.dtype) == ([[1.0]], [[3]], torch.uint8)
    assert q.data[0, :2].tolist() == [0xF0, 0x38]
    assert torch.equal(dequantize(q, "int4_w4a16"), row)


def test_int4_zero_points_of_one_signed_groups() -> None:
    # Zero is always inside the range, so that padding and pruned weights stay exact.
    row = torch.arange(1.0, 33.0).view(1, 32)
    high, low = (quantize(x, "int4_w4a16", group_size=32, zero_points=True) for x in (row, -row))
    assert high.zero is not None
    assert low.zero is not None
    assert (high.zero.item(), low.zero.item()) == (0, 15)


def test_int8_known_row() -> None:
    q = quantize(torch.tensor([[127.0, -127.0, 0.5, 1.5, -2.5]]), "int8_channel")
    assert q.data.tolist() == [[127, -127, 0, 2, -2]]
    assert q.scale is not None
    assert q.scale.tolist() == [[1.0]]


def test_fp8_block_scales_by_loop() -> None:
    w = random(3, 200, 300) * torch.logspace(-3, 3, 300)
    q = quantize(w, "fp8_block128")
    assert q.scale is not None
    assert q.scale.shape == (3, 2, 3)
    back = dequantize(q, "fp8_block128")
    for e in range(3):
        for i in range(2):
            for j in range(3):
                tile = (e, slice(i * 128, (i + 1) * 128), slice(j * 128, (j + 1) * 128))
                scale = w[tile].abs().max() / torch.tensor(448.0)
                assert q.scale[e, i, j] == scale
                expected = (w[tile] / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                assert torch.equal(raw(q.data[tile]), raw(expected))
                assert torch.equal(back[tile], expected.float() * scale)


@pytest.mark.parametrize("id", ["fp8_tensor", "nvfp4"])
def test_two_parts_are_two_matrices(id: str) -> None:
    w = torch.cat([random(2, 8, 32), random(2, 8, 32, seed=1) * 50], dim=-2)
    both = quantize(w, id, parts=2)
    halves = [quantize(half, id) for half in w.chunk(2, dim=-2)]
    name = "scale" if id == "fp8_tensor" else "global_scale"
    assert torch.equal(getattr(both, name), torch.cat([getattr(h, name) for h in halves], dim=-1))
    assert torch.equal(raw(both.data), raw(torch.cat([h.data for h in halves], dim=-2)))
    expected = torch.cat([dequantize(h, id) for h in halves], dim=-2)
    assert torch.equal(dequantize(both, id), expected)


def test_documented_scales_of_zeros() -> None:
    zeros = torch.zeros(2, 128)
    for id in ("fp8_block128", "fp8_tensor", "fp8_channel", "int8_channel", "int4_w4a16"):
        scale = quantize(zeros, id).scale
        assert scale is not None
        assert torch.equal(scale, torch.ones_like(scale))
    nvfp4 = quantize(zeros, "nvfp4")
    assert nvfp4.scale is not None
    assert nvfp4.global_scale is not None
    assert (raw(nvfp4.scale).flatten().tolist(), nvfp4.global_scale.tolist()) == ([1] * 16, [1.0])
    mxfp8 = quantize(zeros, "mxfp8")
    assert mxfp8.scale is not None
    assert mxfp8.scale.flatten().tolist() == [0] * 8
