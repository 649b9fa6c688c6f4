"""The order of w13's rows. Canonical is [gate; up]; every kernel of this plugin reads [up; gate]."""

from __future__ import annotations

import torch
from torch import Tensor


def up_first(tensor: Tensor, gated: bool) -> Tensor:
    """[E, 2R, ...] with its halves of dimension 1 swapped, contiguous; as it is for a layer without a gate."""
    if not gated:
        return tensor
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor  # float8 has no cat on every device
    gate, up = raw.chunk(2, dim=1)
    return torch.cat([up, gate], dim=1).view(tensor.dtype)
