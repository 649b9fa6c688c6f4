"""What holds for every scheme: shapes, bytes, error bounds, idempotence, zeros, extremes."""

from __future__ import annotations

import math

import pytest
import torch

from moe_core.errors import WeightError
from moe_core.quant import (
    BUILTIN_SCHEMES,
    QuantizedTensor,
    QuantScheme,
    dequantize,
    quantize,
)
from moe_core.quant.packing import (
    decode_e8m0,
)
from moe_core.quant.scaling import SMALLEST_SCALE

QUANTIZED = [scheme for scheme in BUILTIN_SCHEMES if scheme.scale is not None]
by_id = pytest.mark.parametrize("scheme", BUILTIN_SCHEMES, ids=lambda s: s.id)
by_quantized_id = pytest.mark.parametrize("scheme", QUANTIZED, ids=lambda s: s.id)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


@by_id
@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_shapes_dtypes_and_bytes(scheme: QuantScheme, batch: tuple[int, ...]) -> None:
    w = random(*batch, 6, 256).to(torch.bfloat16)
    q = quantize(w, scheme)
    assert tuple(q.data.shape) == (*batch, *scheme.storage_shape(6, 256))
    assert str(q.data.dtype) == f"torch.{scheme.storage_dtype}"
    stored = [q.data]
    if scheme.scale is None:
        assert q.scale is None
    else:
        assert q.scale is not None
        assert tuple(q.scale.shape) == (*batch, *(scheme.scale_shape(6, 256) or ()))
        assert str(q.scale.dtype) == f"torch.{scheme.scale.storage_dtype}"
        stored.append(q.scale)
    assert (q.global_scale is not None) is scheme.global_scale
    if q.global_scale is not None:
        assert q.global_scale.shape == (*batch, 1)
        stored.append(q.global_scale)
    size = sum(t.numel() * t.element_size() for t in stored)
    assert size == scheme.weight_bytes(6, 256) * math.prod(batch)
    back = dequantize(q, scheme)
    assert (back.shape, back.dtype) == (w.shape, torch.float32)
    assert all(t.is_contiguous() for t in stored)


@by_id
def test_experts_are_independent(scheme: QuantScheme) -> None:
    w = random(3, 6, 256) * torch.tensor([1.0, 100.0, 1e-3]).view(3, 1, 1)
    if scheme.id == "bf16":
        w = w.to(torch.bfloat16)
    q = quantize(w, scheme)
    for e in range(3):
        alone = quantize(w[e], scheme)
        assert torch.equal(raw(q.data[e]), raw(alone.data))
        assert torch.equal(dequantize(q, scheme)[e], dequantize(alone, scheme))


def spread_like(scheme: QuantScheme, per_region: torch.Tensor, n: int, k: int) -> torch.Tensor:
    assert scheme.scale is not None
    if scheme.scale.granularity == "tensor":
        return per_region.view(1, 1).expand(n, k)
    rows, columns = scheme.scale.rows or n, scheme.scale.columns or k
    return per_region.repeat_interleave(rows, 0)[:n].repeat_interleave(columns, 1)[:, :k]


@by_quantized_id
def test_error_bound(scheme: QuantScheme) -> None:
    n, k = 48, 512
    w = random(n, k) * torch.logspace(-2, 2, k)
    q = quantize(w, scheme)
    assert q.scale is not None
    error = (dequantize(q, scheme) - w).abs()
    scale = decode_e8m0(q.scale) if scheme.scale.dtype == "float8_e8m0" else q.scale.float()  # type: ignore[union-attr]
    step = spread_like(scheme, scale, n, k)
    if q.global_scale is not None:
        step = step * q.global_scale
    slack = 1 + 1e-5
    if scheme.weight_format in ("int8", "int4"):
        bound = step / 2
    elif scheme.weight_format == "e4m3":
        # Half of the spacing: 2^-4 relative when normal, 2^-10 steps when subnormal; MX may clip 512 to 448.
        bound = torch.maximum(w.abs() * 2.0**-4, step * 2.0**-10)
        if scheme.id == "mxfp8":
            bound = torch.maximum(bound, (w.abs() - 448 * step).clamp(min=0))
    else:
        # Spacings 0.5, 1, 2; MX may clip 8 to 6; an e4m3 block scale is up to 1/16 below the exact one.
        half = torch.where(w.abs() / step < 2, 0.25, torch.where(w.abs() / step < 4, 0.5, 1.0))
        bound = torch.maximum(half * step, (w.abs() - 6 * step).clamp(min=0))
        clipped = (w.abs() / step).max()
        assert clipped < (8 if scheme.scale.dtype == "float8_e8m0" else 6 * 17 / 16 * slack)  # type: ignore[union-attr]
    assert bool((error <= bound * slack).all())


def test_int4_zero_point_error_bound() -> None:
    w = random(32, 256) + 0.7
    q = quantize(w, "int4_w4a16", group_size=64, zero_points=True)
    assert q.scale is not None
    error = (dequantize(q, "int4_w4a16", group_size=64) - w).abs()
    step = q.scale.repeat_interleave(64, 1)
    assert bool((error <= step * (0.5 + 1e-5)).all())


@by_id
@pytest.mark.parametrize("seed", range(5))
def test_requantizing_changes_nothing(scheme: QuantScheme, seed: int) -> None:
    w = random(2, 16, 512, seed=seed).to(torch.bfloat16 if scheme.id == "bf16" else torch.float32)
    q = quantize(w, scheme)
    again = quantize(dequantize(q, scheme, dtype=w.dtype), scheme)
    assert torch.equal(raw(q.data), raw(again.data))
    for name in ("scale", "global_scale"):
        first, second = getattr(q, name), getattr(again, name)
        if first is None:
            assert second is None
        elif first.dtype == torch.float32:
            # amax is recovered as largest * scale, whose rounding can move the scale by one unit.
            torch.testing.assert_close(first, second, rtol=2.0**-23, atol=0)
        else:
            assert torch.equal(raw(first), raw(second))


def test_requantizing_int4_with_zero_points() -> None:
    q = quantize(random(8, 512), "int4_w4a16", zero_points=True)
    again = quantize(dequantize(q, "int4_w4a16"), "int4_w4a16", zero_points=True)
    assert torch.equal(q.data, again.data)
    assert q.zero is not None
    assert again.zero is not None
    assert torch.equal(q.zero, again.zero)


@by_id
def test_zeros_stay_zero(scheme: QuantScheme) -> None:
    w = torch.zeros(2, 4, 256)
    w[1, 2:] = random(2, 256)
    for matrix in (w, w[:1]):
        for zero_points in {False, scheme.zero_points}:
            if scheme.id == "bf16":
                matrix = matrix.to(torch.bfloat16)
            q = quantize(matrix, scheme, zero_points=zero_points)
            back = dequantize(q, scheme)
            assert torch.equal(back[0], torch.zeros(4, 256))
            assert torch.equal(back[:, :2], torch.zeros(len(back), 2, 256))
            for scale in (q.scale, q.global_scale):
                if scale is not None and scale.dtype != torch.uint8:
                    assert bool((scale.float() > 0).all())


@by_quantized_id
def test_zero_blocks_without_subnormals(scheme: QuantScheme) -> None:
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        back = dequantize(quantize(torch.zeros(4, 256), scheme), scheme)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(back, torch.zeros(4, 256))


@by_quantized_id
@pytest.mark.parametrize("magnitude", [1e-44, 1e-38, 1e-30, 1e30, 1e37])
def test_extreme_magnitudes_stay_finite(scheme: QuantScheme, magnitude: float) -> None:
    w = random(4, 256).clamp(-3, 3) * magnitude
    q = quantize(w, scheme)
    back = dequantize(q, scheme)
    assert bool(torch.isfinite(back).all())
    # Rounding goes up by a fifth at most (e2m1, 5 to 6), or by half of the smallest scale.
    assert back.abs().max() <= w.abs().max() * 1.2 + SMALLEST_SCALE / 2
    if scheme.scale is not None and scheme.scale.dtype == "float32":
        assert q.scale is not None
        assert q.scale.min() >= SMALLEST_SCALE


@pytest.mark.parametrize("id", ["fp8_block128", "fp8_channel", "fp8_tensor", "int8_channel"])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (127, 129), (130, 5), (128, 128)])
def test_any_size(id: str, n: int, k: int) -> None:
    w = random(2, n, k)
    back = dequantize(quantize(w, id), id)
    assert back.shape == w.shape
    assert (back - w).abs().max() <= w.abs().max() / 14


@by_id
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_input_and_output_dtypes(scheme: QuantScheme, dtype: torch.dtype) -> None:
    w = random(4, 256).to(torch.bfloat16).to(dtype)
    if scheme.id == "bf16" and dtype == torch.float64:
        with pytest.raises(WeightError, match="float64"):
            quantize(w, scheme)
        return
    q = quantize(w, scheme)
    if scheme.id != "bf16":
        assert torch.equal(raw(q.data), raw(quantize(w.to(torch.float32), scheme).data))
    exact = dequantize(q, scheme)
    assert torch.equal(dequantize(q, scheme, dtype=dtype), exact.to(dtype))


def test_bf16_keeps_the_weights() -> None:
    w = random(2, 4, 8).to(torch.float16)
    q = quantize(w, "bf16")
    assert q.data.data_ptr() == w.data_ptr()
    assert torch.equal(dequantize(q, "bf16", dtype=torch.float16), w)


def test_gradients_do_not_follow() -> None:
    w = torch.nn.Parameter(random(4, 32))
    assert not dequantize(quantize(w, "mxfp8"), "mxfp8").requires_grad
    assert w.requires_grad


def test_strided_weights() -> None:
    w = random(256, 12).t()
    for scheme in QUANTIZED:
        assert torch.equal(raw(quantize(w, scheme).data), raw(quantize(w.contiguous(), scheme).data))


def test_k_cuts_padded_columns() -> None:
    q = quantize(random(4, 64), "mxfp4")
    assert torch.equal(dequantize(q, "mxfp4", k=50), dequantize(q, "mxfp4")[:, :50])
    for k in (0, 65):
        with pytest.raises(WeightError, match=r"outside 1\.\.64"):
            dequantize(q, "mxfp4", k=k)


def test_shorthand_scales() -> None:
    w = random(3, 4, 32)
    q = quantize(w, "fp8_tensor")
    assert q.scale is not None
    assert torch.equal(dequantize(QuantizedTensor(q.data, q.scale[:, 0]), "fp8_tensor"), dequantize(q, "fp8_tensor"))
    q = quantize(w, "nvfp4")
    assert q.global_scale is not None
    short = QuantizedTensor(q.data, q.scale, global_scale=q.global_scale[:, 0])
    assert torch.equal(dequantize(short, "nvfp4"), dequantize(q, "nvfp4"))


@pytest.mark.skipif(not hasattr(torch, "float8_e8m0fnu"), reason="this torch has no e8m0 dtype")
def test_e8m0_scales_may_come_as_torchs_own_dtype() -> None:
    q = quantize(random(4, 64), "mxfp8")
    assert q.scale is not None
    typed = QuantizedTensor(q.data, q.scale.view(torch.float8_e8m0fnu))
    assert torch.equal(dequantize(typed, "mxfp8"), dequantize(q, "mxfp8"))


def test_group_size_is_read_off_the_scales() -> None:
    w = random(4, 256)
    for size in (32, 64, 128):
        q = quantize(w, "int4_w4a16", group_size=size)
        assert torch.equal(dequantize(q, "int4_w4a16"), dequantize(q, "int4_w4a16", group_size=size))
    with pytest.raises(WeightError, match=r"scale must be float32 \[4, 8\]"):
        dequantize(q, "int4_w4a16", group_size=32)
