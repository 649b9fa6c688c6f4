"""Which rows belong to which expert, and the tiles that cover them: what every grouped kernel here is driven by."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(slots=True)
class RowTable:
    """Rows of the intermediate results ("positions") by local expert, on the device; nothing here is read back.

    positions: how many there may be (a host bound). block_m: positions a tile. starts, ends: int32 [E_local]; expert e
    owns positions starts[e] to ends[e]. tile_expert, tile_start: int32 [tiles], ascending; the unused tail has expert
    -1. tiles is a host bound too. slots: int32 [positions], the slot t * K + k of a position, or None where positions
    are the rows of the input itself. local_ids: int32 [T * K], the local expert of a slot or -1 (None without slots).
    ticket: int32 [1], zero between kernels: who computes which tile is drawn there. usual: about how many tiles will be
    live, where that may be far fewer than the bound.
    """

    positions: int
    block_m: int
    starts: Tensor
    ends: Tensor
    tile_expert: Tensor
    tile_start: Tensor
    ticket: Tensor
    slots: Tensor | None = None
    local_ids: Tensor | None = None
    usual: int | None = None

    @property
    def sparse(self) -> bool:
        """Whether most programs of a grid of `tiles` would find nothing to do: each costs its start all the same.

        DeepSeek-V3, 8 tokens a rank in DeepEP's batches, EP2 on an H200: both products 810 us, and 506 without.
        """
        return self.usual is not None and self.tiles > 4 * self.usual

    @property
    def drawing(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """What a kernel needs that draws its tiles."""
        return self.tile_expert, self.tile_start, self.starts, self.ends, self.ticket

    @property
    def tiles(self) -> int:
        """The host's bound on the number of tiles, which is the grid of a kernel."""
        return self.tile_expert.shape[0]


def most_tiles(positions: int, experts: int, block_m: int) -> int:
    """The most tiles of `block_m` that `positions` rows in `experts` groups can need, whatever the routing."""
    if positions <= experts:
        return max(positions, 1)
    return experts + (positions - experts) // block_m
