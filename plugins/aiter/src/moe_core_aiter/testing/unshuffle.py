"""What AITER's kernels find at which place, as addresses: written apart from the plugin's own shuffles.

Each function gives a tensor back in its logical order by computing where each of its items lies.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _grid(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    return torch.arange(rows)[:, None], torch.arange(columns)[None, :]


def weights(data: Tensor) -> Tensor:
    """[E, N, K] items of 1 or 2 bytes, in tiles of 16 rows by 32 items."""
    experts, rows, columns = data.shape
    pack = 16 // data.element_size()
    n, k = _grid(rows, columns)
    tile = n // 16 * (columns // 32) + k // 32
    lane = k % 32 // pack * 16 + n % 16
    return data.reshape(experts, -1)[:, (tile * (32 // pack) * 16 + lane) * pack + k % pack]


def guinterleaved(data: Tensor, parts: int) -> Tensor:
    """uint8 [E, N, bytes], in tiles of 16 rows by 64 bytes; parts: 2 where those of gate and up take turns."""
    experts, rows, columns = data.shape
    n, k = _grid(rows, columns)
    half, n = n // (rows // parts), n % (rows // parts)
    tile = (n // 16 * parts + half) * (columns // 64) + k // 64
    return data.reshape(experts, -1)[:, ((tile * 4 + k % 64 // 16) * 16 + n % 16) * 16 + k % 16]


def scales(data: Tensor, rows: int, columns: int) -> Tensor:
    """uint8 [rows', columns'], padded to 256 and 8, in tiles of 32 rows by 8 columns -> [rows, columns]."""
    width = data.shape[1]
    r, c = _grid(rows, columns)
    tile = r // 32 * (width // 8) + c // 8
    inside = ((c % 4 * 16 + r % 16) * 2 + c % 8 // 4) * 2 + r % 32 // 16
    return data.reshape(-1)[tile * 256 + inside]


def guinterleaved_scales(data: Tensor, experts: int, parts: int) -> Tensor:
    """uint8 [E * N, columns] -> [E, N, columns]; parts: 2 where a row of gate lies beside its row of up."""
    rows, columns = data.shape[0] // experts, data.shape[1]
    r, c = _grid(rows, columns)
    if parts == 2:
        pair, r = r // (rows // 2), r % (rows // 2)
        block, lane = r // 16, r % 16
    else:
        block, pair, lane = r // 32, r % 32 // 16, r % 16
    tile = block * (columns // 8) + c // 8
    inside = ((c % 4 * 16 + lane) * 2 + c % 8 // 4) * 2 + pair
    return data.reshape(experts, -1)[:, tile * 256 + inside]


def int4(data: Tensor) -> Tensor:
    """Packed bytes [E, N, K / 2] -> int8 [E, N, K] of -8 to 7."""
    experts, rows, half = data.shape
    codes = data.view(torch.uint8).reshape(experts, -1, 4)
    flat = torch.cat([codes & 0xF, codes >> 4], dim=-1).to(torch.int8)
    signed = torch.where(flat > 7, flat - 16, flat).reshape(experts, rows, half * 2)
    return weights(signed)


def int4_scales(data: Tensor, experts: int, rows: int, groups: int) -> Tensor:
    """bfloat16 items, pairs of groups beside each other -> float32 [E, N, groups]."""
    n, g = _grid(rows, groups)
    return data.reshape(experts, -1)[:, (g // 2 * rows + n) * 2 + g % 2].float()
