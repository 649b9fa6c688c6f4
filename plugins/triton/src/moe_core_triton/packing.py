"""Four-bit weights in the K order that the kernels read (see `kernels.unpack`): halves of a block, not neighbors."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_width(group: int, *, scale_in_loop: bool) -> int:
    """K elements of a block. A half never holds more than one scale where the scale multiplies the half's product."""
    return 2 * min(group, 64) if scale_in_loop else 128


def halves(data: Tensor, width: int, *, words: bool = False) -> Tensor:
    """uint8 [E, N, K / 2], neighbors in a byte -> uint8 [E, N, ceil(K / width) * width / 2], block halves in a byte.

    K is padded with code 0. words: the bits as `_words` lays them. One expert at a time: the unpacked codes take as
    much memory as one expert in int8.
    """
    experts, n, half = data.shape
    k = 2 * half
    blocks = -(-k // width)
    out = data.new_empty(experts, n, blocks * width // 2)
    for expert in range(experts):
        codes = data.new_zeros(n, blocks * width)
        codes[:, 0:k:2] = data[expert] & 15
        codes[:, 1:k:2] = data[expert] >> 4
        pairs = codes.view(n, blocks, 2, width // 2)
        low, high = pairs[:, :, 0], pairs[:, :, 1]
        out[expert] = (_words(low, high) if words else low | (high << 4)).view(n, -1)
    return out


def _words(low: Tensor, high: Tensor) -> Tensor:
    """e2m1 codes [..., H] of two halves -> uint8 [..., H]: four bytes are a word of eight codes.

    A 16-bit lane of a word has, from the top: the signs of its codes 0, 2, 3 and 1, then the magnitudes of 3, 0, 1 and
    2. Lane 0 has low 0 and 2 and high 0 and 2 as codes 0 to 3, lane 1 the odd ones.
    """
    lanes = []
    for odd in (0, 1):
        codes = [part.unflatten(-1, (-1, 4))[..., at].int() for part in (low, high) for at in (odd, odd + 2)]
        sign, size = [code >> 3 for code in codes], [code & 7 for code in codes]
        signs = (sign[0] << 15) | (sign[2] << 14) | (sign[3] << 13) | (sign[1] << 12)
        lanes.append(signs | (size[3] << 9) | (size[0] << 6) | (size[1] << 3) | size[2])
    parts = [lane >> shift & 255 for lane in lanes for shift in (0, 8)]
    return torch.stack(parts, dim=-1).to(torch.uint8).flatten(-2)


def pad_groups(scale: Tensor, k: int, width: int, group: int) -> Tensor:
    """Scales or zero points [E, N, K / group] -> [E, N, groups of the padded K], zero where there is no weight."""
    groups = -(-k // width) * width // group
    return torch.nn.functional.pad(scale, (0, groups - scale.shape[-1]))
