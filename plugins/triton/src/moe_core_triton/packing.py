"""Four-bit weights in the K order that the kernels read (see `kernels.unpack`): halves of a block, not neighbors."""

from __future__ import annotations

import torch
from torch import Tensor


def pack_width(group: int, *, scale_in_loop: bool) -> int:
    """K elements of a block. A half never holds more than one scale where the scale multiplies the half's product."""
    return 2 * min(group, 64) if scale_in_loop else 128


def repack(data: Tensor, width: int, out: Tensor | None = None) -> Tensor:
    """uint8 [E, N, K / 2], neighbors in a byte -> uint8 [E, N, ceil(K / width) * width / 2], halves of a block in a byte.

    K is padded with code 0. One expert at a time: the unpacked codes take as much memory as one expert in int8.
    """
    experts, n, half = data.shape
    k = 2 * half
    blocks = -(-k // width)
    if out is None:
        out = data.new_empty(experts, n, blocks * width // 2)
    for expert in range(experts):
        codes = data.new_zeros(n, blocks * width)
        codes[:, 0:k:2] = data[expert] & 15
        codes[:, 1:k:2] = data[expert] >> 4
        pairs = codes.view(n, blocks, 2, width // 2)
        out[expert] = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).view(n, -1)
    return out
