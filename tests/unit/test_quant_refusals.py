"""What the weight codecs refuse, with which words, and codecs of third parties."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moe_core.errors import ConfigError, DependencyError, WeightError
from moe_core.quant import (
    QuantizedTensor,
    builtin_scheme,
    dequantize,
    quantize,
)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def test_quantize_refusals() -> None:
    w = random(4, 64)
    with pytest.raises(ConfigError, match="did you mean 'nvfp4'"):
        quantize(w, "nvpf4")
    with pytest.raises(ConfigError, match="'mxfp4' has no zero points"):
        quantize(w, "mxfp4", zero_points=True)
    with pytest.raises(ConfigError, match="'mxfp4' has no per-tensor scale to split"):
        quantize(w, "mxfp4", parts=2)
    with pytest.raises(ConfigError, match="does not allow group size 16"):
        quantize(w, "int4_w4a16", group_size=16)
    with pytest.raises(WeightError, match="N = 4 does not divide into 3 parts"):
        quantize(w, "fp8_tensor", parts=3)
    with pytest.raises(WeightError, match=r"'int4_w4a16' cannot hold a \[4, 64\] matrix: K = 64 is not a multiple"):
        quantize(w, "int4_w4a16")
    with pytest.raises(WeightError, match=r"got float32 \[64\]"):
        quantize(w[0], "mxfp8")
    with pytest.raises(WeightError, match=r"got int32 \[4, 64\]"):
        quantize(w.int(), "mxfp8")
    with pytest.raises(WeightError, match="N = 0 is not positive"):
        quantize(w[:0], "fp8_block128")


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e300])
def test_weights_must_be_finite(bad: float) -> None:
    w = random(4, 64).double()
    w[1, 2] = bad
    with pytest.raises(WeightError, match="must be finite"):
        quantize(w, "fp8_channel")


def test_dequantize_refusals() -> None:
    q = quantize(random(4, 64), "fp8_channel")
    assert q.scale is not None
    with pytest.raises(WeightError, match=r"'fp8_channel' scale is missing"):
        dequantize(QuantizedTensor(q.data), "fp8_channel")
    with pytest.raises(
        WeightError, match=r"must be float32 \[4, 1\] for data with N = 4 and K = 64, got float32 \[4\]"
    ):
        dequantize(QuantizedTensor(q.data, q.scale[:, 0]), "fp8_channel")
    with pytest.raises(WeightError, match="got float16"):
        dequantize(QuantizedTensor(q.data, q.scale.half()), "fp8_channel")
    with pytest.raises(WeightError, match="data must be float8_e4m3fn, got uint8"):
        dequantize(QuantizedTensor(raw(q.data), q.scale), "fp8_channel")
    with pytest.raises(WeightError, match="has no zero points"):
        dequantize(QuantizedTensor(q.data, q.scale, zero=raw(q.data)), "fp8_channel")
    with pytest.raises(WeightError, match="global_scale must be None"):
        dequantize(QuantizedTensor(q.data, q.scale, global_scale=q.scale), "fp8_channel")
    with pytest.raises(WeightError, match="'bf16' scale must be None"):
        dequantize(QuantizedTensor(random(4, 4), q.scale), "bf16")
    with pytest.raises(WeightError, match=r"must be \[\.\.\., N, K\]"):
        dequantize(QuantizedTensor(random(4)), "bf16")
    nv = quantize(random(4, 64), "nvfp4")
    with pytest.raises(WeightError, match="global_scale is missing"):
        dequantize(QuantizedTensor(nv.data, nv.scale), "nvfp4")
    int4 = quantize(random(4, 64), "int4_w4a16", group_size=64)
    with pytest.raises(WeightError, match="zero points must be uint8"):
        dequantize(QuantizedTensor(int4.data, int4.scale, zero=int4.scale), "int4_w4a16")
    with pytest.raises(WeightError, match=r"scale must be float32 \[1\]"):
        # Three scales do not divide four rows.
        dequantize(QuantizedTensor(q.data, torch.ones(3)), "fp8_tensor")


def test_a_third_party_scheme_brings_its_own_codec() -> None:
    mine = replace(builtin_scheme("mxfp8"), id="acme_mx8")
    w = random(4, 64)
    assert torch.equal(dequantize(quantize(w, mine), mine), dequantize(quantize(w, "mxfp8"), "mxfp8"))
    for target in ("no_such_package_of_acme:CODEC", "moe_core.quant.fp8:NOTHING", ":CODEC"):
        with pytest.raises(DependencyError, match="cannot load the codec"):
            quantize(w, replace(mine, codec=target))
