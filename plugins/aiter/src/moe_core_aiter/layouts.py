"""Weights and scales in the order in which AITER's kernels read them. The orders are facts of those.

A tile of 16 rows and 32 elements (64 bytes a row in the interleaved form) lies in one piece, and in it the lanes of a
wave find their 16 bytes side by side: lane by lane along the rows first, then along K.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LANES = 16
_BYTES = 16
_E8M0_ONE = 127


def shuffled(matrix: Tensor) -> Tensor:
    """[E, N, K] of items of 1 or 2 bytes, N a multiple of 16 and K of 32: tiles of 16 x 32 items, 16 bytes a lane."""
    experts, n, k = matrix.shape
    pack = _BYTES // matrix.element_size()
    tiles = raw(matrix).view(experts, n // _LANES, _LANES, k // 32, 32 // pack, -1)
    return tiles.permute(0, 1, 3, 4, 2, 5).contiguous().view(experts, n, -1).view(matrix.dtype)


def interleaved(data: Tensor, *, parts: int) -> Tensor:
    """uint8 [E, N, bytes], N a multiple of 16 * parts and the bytes of a row of 64: tiles of 16 rows x 64 bytes.

    parts: 2 puts a tile of rows of the second half (up) behind each one of the first (gate).
    """
    experts, n, k = data.shape
    tiles = data.view(experts, parts, n // parts // _LANES, _LANES, k // 64, 4, _BYTES)
    return tiles.permute(0, 2, 1, 4, 5, 3, 6).contiguous().view(experts, n, k)


def shuffled_scales(scale: Tensor) -> Tensor:
    """uint8 e8m0 [rows, K / 32] -> [rows', K' / 32], padded to 256 rows and 8 columns with the scale 1."""
    rows, columns = scale.shape
    more = (0, -columns % 8, 0, -rows % 256)
    scale = torch.nn.functional.pad(scale, more, value=_E8M0_ONE) if any(more) else scale
    rows, columns = scale.shape
    tiles = scale.view(rows // 32, 2, _LANES, columns // 8, 2, 4)
    return tiles.permute(0, 3, 5, 2, 4, 1).contiguous().view(rows, columns)


def interleaved_scales(scale: Tensor, *, parts: int) -> Tensor:
    """uint8 e8m0 [E, N, K / 32], N a multiple of 32 and K of 256 -> [E * N, K / 32] for `interleaved` weights.

    parts: 2 pairs a row of the first half (gate) with its own of the second (up), 1 pairs rows 16 apart.
    """
    experts, n, columns = scale.shape
    if parts == 2:
        tiles = scale.view(experts, 2, n // 32, _LANES, columns // 8, 2, 4).permute(0, 2, 4, 6, 3, 5, 1)
    else:
        tiles = scale.view(experts, n // 32, 2, _LANES, columns // 8, 2, 4).permute(0, 1, 4, 6, 3, 5, 2)
    return tiles.contiguous().view(experts * n, columns)


def packed_int4(values: Tensor) -> Tensor:
    """int8 [E, N, K] of -8 to 7, shuffled -> int8 [E, N, K / 2]: value i and i + 4 of every 8 share a byte."""
    experts, n, k = values.shape
    codes = (values.view(torch.uint8) & 0xF).view(experts, n, k // 8, 2, 4)
    return (codes[..., 0, :] | codes[..., 1, :] << 4).reshape(experts, n, k // 2).view(torch.int8)


def int4_scales(scale: Tensor) -> Tensor:
    """float [E, N, K / 32] -> bfloat16 [E, K / 64, N, 2]: two groups of a row side by side."""
    experts, n, groups = scale.shape
    return scale.to(torch.bfloat16).view(experts, n, groups // 2, 2).transpose(1, 2).contiguous()


def to_fnuz(data: Tensor) -> Tensor:
    """float8_e4m3fn -> the float8_e4m3fnuz of half its value, exactly: the same bits, but for a minus zero.

    The exponent bias of fnuz is 8 instead of 7, and its NaN has the bits of minus zero; NaN becomes NaN.
    """
    bits = data.view(torch.uint8)
    nan = (bits & 0x7F) == 0x7F
    bits = torch.where(bits == 0x80, 0, bits).masked_fill(nan, 0x80)
    return bits.to(torch.uint8).view(torch.float8_e4m3fnuz)


def raw(tensor: Tensor) -> Tensor:
    """The bytes (or the tensor itself, where torch can copy it): not every dtype has every operation."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
