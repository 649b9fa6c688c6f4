"""Narrow number formats, code by code, against exact arithmetic."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch

from moe_core.quant.packing import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    shared_exponent,
    unpack_nibbles,
)

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def raw(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def nearest(value: float, magnitudes: list[float]) -> int:
    """The code whose magnitude is nearest, ties to the even code, in exact arithmetic."""
    exact = abs(Fraction(value))
    return min(range(len(magnitudes)), key=lambda c: (abs(Fraction(magnitudes[c]) - exact), c % 2))


def test_nibble_order() -> None:
    assert pack_nibbles(torch.tensor([[1, 2, 15, 0]], dtype=torch.uint8)).tolist() == [[0x21, 0x0F]]
    codes = torch.arange(256, dtype=torch.uint8).view(4, 64) % 16
    assert torch.equal(unpack_nibbles(pack_nibbles(codes)), codes)
    every = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(pack_nibbles(unpack_nibbles(every)), every)


def test_e2m1_codes() -> None:
    values = decode_e2m1(torch.arange(16, dtype=torch.uint8))
    assert values.tolist() == E2M1 + [-v for v in E2M1]
    assert torch.signbit(values[8])
    assert encode_e2m1(values).tolist() == list(range(16))


@pytest.mark.parametrize(
    ("value", "code"),
    [(0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (6.5, 7), (1e30, 7)],
)
def test_e2m1_ties_and_saturation(value: float, code: int) -> None:
    both = torch.tensor([value, -value])
    assert encode_e2m1(both).tolist() == [code, code | 8]


def test_e2m1_rounds_like_exact_arithmetic() -> None:
    x = torch.cat([torch.linspace(0, 7, 1793), random(500).abs() * 3])
    x = torch.cat([x, torch.nextafter(x, torch.tensor(10.0)), torch.nextafter(x, torch.tensor(-10.0)).abs()])
    assert encode_e2m1(x).tolist() == [nearest(v, E2M1) for v in x.tolist()]


def test_e2m1_special_values() -> None:
    assert encode_e2m1(torch.tensor([math.inf, -math.inf, -0.0, -0.1])).tolist() == [7, 15, 8, 8]
    assert (encode_e2m1(torch.tensor([math.nan])) & 7).tolist() == [0]


def test_e4m3_rounds_like_exact_arithmetic_and_saturates() -> None:
    finite = [(c & 7) / 8 * 2.0**-6 if c < 8 else (1 + (c & 7) / 8) * 2.0 ** ((c >> 3) - 7) for c in range(127)]
    assert finite[-1] == 448
    middles = [(a + b) / 2 for a, b in itertools.pairwise(finite)]
    x = torch.tensor(finite + middles + (random(1000).abs() * 100).tolist() + [460.0, 464.0, 480.0, 1e9, math.inf])
    wanted = [nearest(min(v, 448.0), finite) for v in x.tolist()]
    assert raw(encode_e4m3(x)).tolist() == wanted
    assert raw(encode_e4m3(-x)).tolist() == [c | 0x80 for c in wanted]
    assert torch.isnan(encode_e4m3(torch.tensor([math.nan])).float()).all()


def test_e8m0_bytes() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    values = decode_e8m0(every)
    assert values[:255].tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert torch.isnan(values[255])
    if hasattr(torch, "float8_e8m0fnu"):
        assert torch.equal(decode_e8m0(every.view(torch.float8_e8m0fnu))[:255], values[:255])
        assert torch.equal(every.view(torch.float8_e8m0fnu)[:255].float(), values[:255])


@pytest.mark.parametrize("emax", [2, 8])
def test_shared_exponent_is_exact_beside_powers_of_two(emax: int) -> None:
    for power in range(-149, 128):
        exact = torch.tensor(2.0**power, dtype=torch.float64).to(torch.float32)
        below, above = (
            torch.nextafter(exact, torch.tensor(0.0)),
            torch.nextafter(exact, torch.tensor(math.inf)),
        )
        for amax in (below, exact, above):
            if amax == 0:
                continue
            floor_log2 = math.frexp(amax.item())[1] - 1
            assert shared_exponent(amax, emax).item() == max(floor_log2 - emax + 127, 0), amax
    assert shared_exponent(torch.tensor([0.0, math.inf, math.nan]), emax).tolist() == [0, 255, 255]
