"""Number formats narrower than torch's own arithmetic: nibbles, e2m1, e8m0 and saturating e4m3. Bit exact."""

from __future__ import annotations

import torch
from torch import Tensor

E4M3_MAX = 448.0
"""Largest finite e4m3 magnitude (OCP 8-bit Floating Point Specification v1.0)."""

E2M1_MAX = 6.0
"""Largest e2m1 magnitude (OCP Microscaling Formats v1.0)."""

E2M1_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes of the e2m1 codes 0..7; bit 3 is the sign, so code 8 is minus zero."""


def pack_nibbles(codes: Tensor) -> Tensor:
    """[..., K] uint8 codes 0..15, K even -> [..., K/2] uint8; element 2i is in the low nibble of byte i."""
    pairs = codes.reshape(*codes.shape[:-1], codes.shape[-1] // 2, 2)
    return pairs[..., 0] | (pairs[..., 1] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """[..., K/2] uint8 -> [..., K] uint8 codes 0..15, the low nibble first."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(-2)


def encode_e2m1(x: Tensor) -> Tensor:
    """float32 [...] -> uint8 e2m1 codes 0..15, rounded to nearest (ties to the even code), saturated at +-6.

    The sign of zero is kept. NaN, which the format cannot hold, gives a zero code.
    """
    magnitude = x.abs()
    code = torch.zeros_like(x, dtype=torch.uint8)
    for below in range(len(E2M1_VALUES) - 1):
        midpoint = (E2M1_VALUES[below] + E2M1_VALUES[below + 1]) / 2
        # A tie must land on the even code of the two, so it moves up only from an odd one.
        code += (magnitude >= midpoint) if below % 2 else (magnitude > midpoint)
    return code | (torch.signbit(x).to(torch.uint8) << 3)


def decode_e2m1(codes: Tensor) -> Tensor:
    """uint8 codes 0..15 [...] -> float32 values [...]."""
    table = torch.tensor([*E2M1_VALUES, *(-v for v in E2M1_VALUES)], dtype=torch.float32, device=codes.device)
    return table[codes.to(torch.int64)]


def shared_exponent(amax: Tensor, emax: int) -> Tensor:
    """e8m0 byte of 2^(floor(log2(amax)) - emax), exact: the block scale of OCP Microscaling Formats v1.0.

    amax  float32 [...], not negative
    emax  exponent of the element format's largest power of two: 2 for e2m1, 8 for e4m3

    The exponent clamps at -127, so a zero block (and any amax under 2^(emax - 126)) gets byte 0. An infinite
    or NaN amax gives byte 255, the format's NaN.
    """
    # The exponent field of float32 has the bias of e8m0, and reads 0 for subnormals, which clamp anyway: no
    # logarithm, hence no rounding near a power of two.
    field = (amax.view(torch.int32) >> 23) & 0xFF
    return torch.where(field == 255, field, (field - emax).clamp(min=0)).to(torch.uint8)


def decode_e8m0(scale: Tensor) -> Tensor:
    """e8m0 bytes (uint8, or torch.float8_e8m0fnu) [...] -> float32 2^(byte - 127) [...]; byte 255 is NaN."""
    byte = scale.view(torch.uint8).to(torch.int32)
    # 2^-127 is subnormal in float32: its bits are not the byte shifted into the exponent field.
    bits = torch.where(byte == 0, 0x0040_0000, byte << 23)
    return torch.where(byte == 255, 0x7FC0_0000, bits).to(torch.int32).view(torch.float32)


def divide_e8m0(x: Tensor, scale: Tensor) -> Tensor:
    """float32 `x` over the e8m0 bytes `scale` (broadcast), exactly, without a subnormal divisor."""
    # The reciprocal of 2^(b - 127) has byte 254 - b. A process that flushes subnormals would divide by zero
    # for b = 0; the reciprocal is normal for every b that shared_exponent can return.
    reciprocal = torch.where(scale == 255, scale, 254 - scale)
    return x * decode_e8m0(reciprocal)


def encode_e4m3(x: Tensor) -> Tensor:
    """float32 [...] -> torch.float8_e4m3fn, rounded to nearest even, saturated at +-448; NaN stays NaN."""
    # Whether torch's own cast saturates or gives NaN above 448 differs between its versions.
    return x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
