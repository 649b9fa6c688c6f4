"""How prepared weights lie in memory, undone: written apart from the plugin, and from FlashInfer's own functions.

E experts, M rows, K columns. A wrong shuffle, interleave or swizzle gives other values here, and so another result.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


class DoubleError(AssertionError):
    """FlashInfer would not survive this call, or would compute something else."""


def need(holds: bool, message: str) -> None:
    if not holds:
        raise DoubleError(message)


def tensor(name: str, value: Any, dtype: torch.dtype | tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """An argument's dtype, shape (None: any) and contiguity."""
    need(isinstance(value, Tensor), f"{name} is {type(value).__name__}, not a tensor")
    dtypes = dtype if isinstance(dtype, tuple) else (dtype,)
    need(value.dtype in dtypes, f"{name} is {value.dtype}, not {' or '.join(map(str, dtypes))}")
    fits = value.dim() == len(shape) and all(b in (None, a) for a, b in zip(value.shape, shape, strict=True))
    need(fits, f"{name} is {list(value.shape)}, not {list(shape)}")
    need(value.is_contiguous(), f"{name} is not contiguous")


def e2m1(codes: Tensor) -> Tensor:
    """uint8 [..., K / 2], the even element in the low bits -> float32 [..., K]."""
    table = torch.tensor([*_E2M1, *(-v for v in _E2M1)])
    return table[torch.stack([codes & 15, codes >> 4], dim=-1).long()].flatten(-2)


def e8m0(scale: Tensor) -> Tensor:
    """uint8 bytes -> float32 powers of two."""
    return torch.exp2(scale.double() - 127).float()


def spread(scale: Tensor, columns: int) -> Tensor:
    """[..., K / columns] -> [..., K]."""
    return scale.repeat_interleave(columns, dim=-1)


@lru_cache(maxsize=64)
def swizzled_places(rows: int, columns: int) -> Tensor:
    """int64 [rows, columns]: where the 128 x 4 tiles keep an element; tiles are padded to full size."""
    m, k = torch.arange(rows).unsqueeze(1), torch.arange(columns).unsqueeze(0)
    tile = (m // 128) * (-(-columns // 4)) + k // 4
    return tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4


def swizzle(scale: Tensor) -> Tensor:
    """[E, M, K] -> flat, E * padded M * padded K."""
    experts, rows, columns = scale.shape
    size = -(-rows // 128) * 128 * (-(-columns // 4)) * 4
    out = scale.new_zeros(experts, size)
    out[:, swizzled_places(rows, columns).flatten()] = scale.flatten(1)
    return out.flatten()


def unswizzle(flat: Tensor, experts: int, rows: int, columns: int) -> Tensor:
    """The inverse of `swizzle`: [E, M, K]."""
    return flat.reshape(experts, -1)[:, swizzled_places(rows, columns).flatten()].view(experts, rows, columns)


@lru_cache(maxsize=64)
def shuffled_rows(rows: int, *, gated: bool) -> Tensor:
    """int64 [rows]: which row of [up; gate] (or of a plain matrix) lies at each place after reordering and shuffling.

    Gate rows stand between the up rows (0, I, 1, I + 1, ...). In blocks of 32, row r goes to place r % 4 * 8 + r // 4.
    """
    paired = torch.arange(rows).view(2, -1).t().flatten() if gated else torch.arange(rows)
    place = torch.arange(rows)
    inside = place % 32
    # Place p of a block holds row 4 * (p % 8) + p // 8: the inverse of what is said above.
    return paired[place - inside + inside % 8 * 4 + inside // 8]


def unshuffle(matrix: Tensor, *, gated: bool) -> Tensor:
    """[E, M, ...] as the kernels read it -> rows [up; gate]."""
    order = shuffled_rows(matrix.shape[1], gated=gated)
    raw = matrix.view(torch.uint8) if matrix.element_size() == 1 else matrix
    plain = torch.empty_like(raw)
    plain[:, order] = raw
    return plain.view(matrix.dtype)


def unblock(matrix: Tensor) -> Tensor:
    """[E, K / b, M, b] -> [E, M, K]."""
    return matrix.transpose(1, 2).flatten(2)


#: (first bit, bits, to bit) of a word of eight e2m1 codes, as the mixed-input GEMM of Hopper wants them.
_MOVES = (
    (7, 1, 31), (4, 3, 22), (3, 1, 15), (0, 3, 6), (15, 1, 28), (12, 3, 19), (11, 1, 12), (8, 3, 3),
    (23, 1, 25), (20, 3, 16), (19, 1, 9), (16, 3, 0), (31, 1, 30), (28, 1, 29), (29, 2, 26), (27, 1, 14),
    (24, 1, 13), (25, 2, 10),
)  # fmt: skip


def _bits(word: Tensor, *, back: bool) -> Tensor:
    out = torch.zeros_like(word)
    for source, count, target in _MOVES:
        start, end = (target, source) if back else (source, target)
        out |= ((word >> start) & ((1 << count) - 1)) << end
    return out


@lru_cache(maxsize=64)
def _interleaved_places(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Byte positions in [rows, K / 2]: of the four bytes of each word before, and after. int64 [words, 4] each."""
    block, part, lane = torch.meshgrid(
        torch.arange(rows // 2), torch.arange(columns // 64), torch.arange(16), indexing="ij"
    )
    row, mma = block // 8 * 16 + block % 8, lane // 4
    first = row * (columns // 2) + part * 32 + mma * 8 + lane % 4
    second = first + 8 * (columns // 2)
    before = torch.stack([first, second, first + 4, second + 4], dim=-1).view(-1, 4)
    to = (row + mma % 2 * 8) * (columns // 2) + part * 32 + lane // 8 * 16 + lane % 4 * 4
    return before, (to.unsqueeze(-1) + torch.arange(4)).view(-1, 4)


def interleave_e2m1(weight: Tensor, *, back: bool = False) -> Tensor:
    """uint8 [E, M, K / 2] as `interleave_moe_weights_for_sm90_mixed_gemm(.., "fp4")` arranges it; `back` undoes it."""
    experts, rows, half = weight.shape
    before, after = _interleaved_places(rows, half * 2)
    source, target = (after, before) if back else (before, after)
    shift = torch.arange(4) * 8
    words = (weight.flatten(1)[:, source].long() << shift).sum(dim=-1)
    moved = _bits(words, back=back)
    out = torch.empty_like(weight).view(experts, -1)
    out[:, target] = ((moved.unsqueeze(-1) >> shift) & 255).to(torch.uint8)
    return out.view_as(weight)


def fold_scales(scale: Tensor, *, back: tuple[int, int] | None = None) -> Tensor:
    """uint8 [E, M, K / 32] -> [E, M / 64, K / 128, 16, 16]; back: the (M, K / 32) to come back to."""
    if back is not None:
        blocks = scale.view(scale.shape[0], back[0] // 64, back[1] // 4, 16, 4, 4)
        return blocks.permute(0, 1, 4, 3, 2, 5).reshape(scale.shape[0], *back)
    experts, rows, columns = scale.shape
    blocks = scale.view(experts, rows // 64, 4, 16, columns // 4, 4)
    return blocks.permute(0, 1, 4, 3, 2, 5).reshape(experts, rows // 64, columns // 4, 16, 16).contiguous()
