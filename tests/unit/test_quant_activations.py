"""Activation payloads: the formulas of weights, static scales, values that are not finite, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from moe_core.errors import ConfigError
from moe_core.quant import (
    ACTIVATION_PAYLOADS,
    TwoLevelScale,
    dequantize,
    dequantize_activation,
    quantize,
    quantize_activation,
    roundtrip_activation,
)

by_payload = pytest.mark.parametrize("payload", ACTIVATION_PAYLOADS)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def as_weight_scheme(payload: str) -> str:
    return {"fp8_token": "fp8_channel", "int8_token": "int8_channel"}.get(payload, payload)


@by_payload
@pytest.mark.parametrize("rows", [0, 1, 5])
def test_activation_shapes(payload: str, rows: int) -> None:
    described = ACTIVATION_PAYLOADS[payload]
    x = random(rows, 256).to(torch.bfloat16)
    data, scale = quantize_activation(x, payload)
    assert data.shape == (rows, 256 // described.values_per_item)
    assert str(data.dtype) == f"torch.{described.storage_dtype}"
    assert isinstance(scale, TwoLevelScale) is described.global_scale
    block = scale.block if isinstance(scale, TwoLevelScale) else scale
    assert tuple(block.shape) == described.scale.shape(rows, 256)
    assert str(block.dtype) == f"torch.{described.scale.storage_dtype}"
    back = dequantize_activation(data, scale, payload)
    assert (back.shape, back.dtype) == ((rows, 256), torch.float32)
    assert torch.equal(roundtrip_activation(x, payload), back)
    assert dequantize_activation(data, scale, payload, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("payload", [p for p in ACTIVATION_PAYLOADS if p != "fp8_group128"])
def test_activations_use_the_formula_of_weights(payload: str) -> None:
    x = random(7, 256) * torch.logspace(-2, 2, 7).view(7, 1)
    scheme = as_weight_scheme(payload)
    q = quantize(x, scheme)
    assert torch.equal(raw(quantize_activation(x, payload)[0]), raw(q.data))
    assert torch.equal(roundtrip_activation(x, payload), dequantize(q, scheme))


@pytest.mark.parametrize("k", [64, 128, 200, 384])
def test_fp8_group128_by_loop(k: int) -> None:
    x = random(3, k) * 5
    data, scale = quantize_activation(x, "fp8_group128")
    assert isinstance(scale, torch.Tensor)
    for start in range(0, k, 128):
        part = x[:, start : start + 128]
        expected = part.abs().amax(1) / torch.full((3,), 448.0)
        assert torch.equal(scale[:, start // 128], expected)
        codes = (part / expected[:, None]).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert torch.equal(raw(data[:, start : start + 128]), raw(codes))


@by_payload
def test_activation_rows_of_zeros(payload: str) -> None:
    x = random(4, 256)
    x[1:3] = 0
    assert torch.equal(roundtrip_activation(x, payload)[1:3], torch.zeros(2, 256))
    assert torch.equal(roundtrip_activation(x * 0, payload), torch.zeros(4, 256))


@pytest.mark.parametrize("payload", ["fp8_token", "fp8_group128", "int8_token", "mxfp4", "mxfp8"])
def test_rows_do_not_affect_each_other(payload: str) -> None:
    x = random(4, 256)
    clean = roundtrip_activation(x, payload)
    for bad in (math.nan, math.inf):
        dirty = x.clone()
        dirty[2, 5] = bad
        back = roundtrip_activation(dirty, payload)
        assert torch.equal(back[[0, 1, 3]], clean[[0, 1, 3]])
        assert bool(torch.isnan(back[2, 5]))


@pytest.mark.parametrize("payload", ["fp8_tensor", "nvfp4"])
def test_whole_tensor_payloads_show_values_that_are_not_finite(payload: str) -> None:
    for bad in (math.nan, math.inf):
        x = random(2, 32)
        x[0, 3] = bad
        assert bool(torch.isnan(roundtrip_activation(x, payload)[0, 3]))


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_static_scales(shape: tuple[int, ...]) -> None:
    x = torch.tensor([[0.5, -1.0, 448.0, 1000.0]])
    data, scale = quantize_activation(x, "fp8_tensor", scale=torch.full(shape, 0.5))
    assert isinstance(scale, torch.Tensor)
    assert scale.tolist() == [0.5]
    assert data.float().tolist() == [[1.0, -2.0, 448.0, 448.0]]
    assert roundtrip_activation(x, "fp8_tensor", torch.full(shape, 0.5)).tolist() == [[0.5, -1.0, 224.0, 224.0]]


def test_static_global_scale_of_nvfp4() -> None:
    x = random(3, 64)
    _, dynamic = quantize_activation(x, "nvfp4")
    assert isinstance(dynamic, TwoLevelScale)
    same = roundtrip_activation(x, "nvfp4", dynamic.global_scale)
    assert torch.equal(same, roundtrip_activation(x, "nvfp4"))
    # Calibrated too low: the block scale and then the elements saturate, at 6 * 448 * global.
    assert (
        roundtrip_activation(torch.full((1, 16), 1e6), "nvfp4", torch.tensor(1.0)).flatten().tolist() == [2688.0] * 16
    )


@by_payload
def test_activation_refusals(payload: str) -> None:
    described = ACTIVATION_PAYLOADS[payload]
    with pytest.raises(ConfigError, match=r"must be \[rows, K\]"):
        quantize_activation(random(256), payload)
    with pytest.raises(ConfigError, match="floating"):
        quantize_activation(random(2, 256).int(), payload)
    if described.scale.granularity == "group":
        with pytest.raises(ConfigError, match="K = 40 is not a multiple of"):
            quantize_activation(random(2, 40), payload)
    if described.static_scale:
        for bad in (0.0, -1.0, math.nan, math.inf):
            with pytest.raises(ConfigError, match="must be positive"):
                quantize_activation(random(2, 256), payload, scale=torch.tensor(bad))
        with pytest.raises(ConfigError, match="must be one float32"):
            quantize_activation(random(2, 256), payload, scale=torch.ones(2))
    else:
        with pytest.raises(ConfigError, match="takes no static scale"):
            quantize_activation(random(2, 256), payload, scale=torch.ones(1))
    data, scale = quantize_activation(random(2, 256), payload)
    wrong = torch.ones(1) if described.global_scale else TwoLevelScale(torch.ones(1), torch.ones(1))
    with pytest.raises(ConfigError, match=f"scale of payload '{payload}' must be"):
        dequantize_activation(data, wrong, payload)
    with pytest.raises(ConfigError, match=f"data of payload '{payload}' must be"):
        dequantize_activation(data.float(), scale, payload)
    block = scale.block if isinstance(scale, TwoLevelScale) else scale
    longer = torch.cat([block, block])
    with pytest.raises(ConfigError, match=f"scale of payload '{payload}' must be"):
        dequantize_activation(data, TwoLevelScale(longer, torch.ones(1)) if described.global_scale else longer, payload)
    if isinstance(scale, TwoLevelScale):
        with pytest.raises(ConfigError, match="global scale"):
            dequantize_activation(data, scale._replace(global_scale=torch.ones(2)), payload)


def test_unknown_payload() -> None:
    with pytest.raises(ConfigError, match="did you mean 'fp8_token'"):
        roundtrip_activation(random(1, 32), "fp8_tokens")
