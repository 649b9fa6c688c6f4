"""Orders of rows and of block scales that FlashInfer's kernels read."""

from __future__ import annotations

from torch import Tensor

#: Rows and columns of a swizzled tile of block scales, which the tensor cores read at once.
SCALE_ROWS, SCALE_COLUMNS = 128, 4


def alternate(w13: Tensor, out: Tensor, rows: int) -> Tensor:
    """w13 [E, 2I, ...], gate then up -> out, alternately `rows` rows of up and of gate. I is a multiple of `rows`."""
    groups = out.unflatten(1, (-1, 2, rows))
    gate, up = w13.unflatten(1, (2, -1, rows)).unbind(1)
    groups[:, :, 0].copy_(up)
    groups[:, :, 1].copy_(gate)
    return out


def swizzled(scales: Tensor) -> Tensor:
    """Block scales [E, R, C] -> the tiles that the tensor cores read, as a view [32, 4, R / 128, 4, C / 4, E].

    Rounded up to whole tiles, with zeros. In memory it is [E, R / 128, C / 4, 32, 4, 4]: row r is at (r % 32,
    r % 128 // 32, r // 128), column c at (c % 4, c // 4). The dtype is kept (any of one byte).
    """
    experts, rows, columns = scales.shape
    row_tiles, column_tiles = -(-rows // SCALE_ROWS), -(-columns // SCALE_COLUMNS)
    padded = scales.new_zeros(experts, row_tiles * SCALE_ROWS, column_tiles * SCALE_COLUMNS)
    padded[:, :rows, :columns].copy_(scales)
    tiles = padded.view(experts, row_tiles, 4, 32, column_tiles, 4).permute(0, 1, 4, 3, 2, 5).contiguous()
    return tiles.permute(3, 4, 1, 5, 2, 0)
