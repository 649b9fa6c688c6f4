"""The order of columns that the specialised kernels for packed weights read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from moe_core_triton import hopper
from moe_core_triton.kernels.hopper_unpack import wide_order

#: Places of sixteen columns in `wide_order`.
WIDE = (0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)


@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (5, 96), (3, 2 * 1024 + 48)])
@pytest.mark.parametrize("more", [0, 8])
def test_wide_order(lab: Any, tokens: int, width: int, more: int) -> None:
    """Of rows side by side, and of rows with something between them."""
    x = torch.randn(tokens, width + more).half().to(lab.device)[:, :width]
    found = wide_order(x)
    assert found.is_contiguous()
    assert torch.equal(found, x.unflatten(1, (-1, 16))[:, :, WIDE].flatten(1))
    assert torch.equal(hopper.natural(found), x)
    rows = hopper.wide(x)
    assert (rows.kind, rows.scale, rows.divisor) == ("wide", None, 0)
    assert torch.equal(rows.data, found)
