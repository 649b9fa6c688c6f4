"""Which of FlashInfer's tile shapes run a call of the Hopper kernels: a model of the device, no measurement.

The kernels are persistent: each SM takes one tile after the other, so a GEMM ends when the SM with the most tiles does.
A tile's cost is taken as its width plus a constant for what does not depend on it (filling the pipeline, storing). Few
rows an expert leave the tensor cores idle whatever the tile, so 64 rows serve there, and waste less.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from moe_core.errors import ConfigError

#: Rows of a tile, and of padding an expert.
TILE_ROWS = (64, 128)
#: Columns of a tile, by its rows, as the kernels allow: GEMM2 has one consumer warpgroup for 64 rows.
GEMM1_COLUMNS = {64: (256, 192, 128, 64), 128: (256, 192, 128, 64)}
GEMM2_COLUMNS = {64: (128, 64), 128: (256, 128, 64)}
#: Columns' worth of time that a tile costs beyond its own.
_TILE_OVERHEAD = 48
#: Average rows an expert up to which tiles of 64 rows are taken.
_FEW_ROWS = 64
#: An expert's GEMM1 weights should fit in the L2 cache, beside others', to be worth walking several row tiles at once.
_L2_SHARE = 48 * 2**20
_SWIZZLE = 8
#: Calls of more tokens than this are served by the tactic for so many.
MOST_TOKENS = 65536


@dataclass(frozen=True, slots=True)
class Tactic:
    """Tile shapes of both GEMMs. rows: of a tile, in both; swizzle: row tiles that GEMM1 walks side by side."""

    rows: int
    columns1: int
    swizzle: int
    columns2: int

    def vendor(self) -> tuple[int, tuple[tuple[int, int], int], tuple[tuple[int, int], tuple[int, int], bool]]:
        """As FlashInfer's `tactic` argument."""
        return (
            self.rows,
            ((self.rows, self.columns1), self.swizzle),
            ((self.rows, self.columns2), (1, 1), False),
        )


@dataclass(frozen=True, slots=True)
class Shape:
    """What a layer's tactics depend on. experts: of the model; local: of this rank; wide: rows of w13 an expert."""

    experts: int
    local: int
    top_k: int
    hidden: int
    inner: int
    wide: int
    item: int
    sms: int


def most_tiles(slots: int, local_experts: int, rows: int) -> int:
    """The most tiles that `slots` slots over `local_experts` experts can fill: all but one expert with one row each."""
    return slots if slots <= local_experts else (slots + (rows - 1) * local_experts) // rows


def _width(columns: int, tiles: float, choices: Iterable[int], sms: int) -> int:
    """The tile width with which the SM that has the most tiles is done first; the widest of equals."""

    def cost(width: int) -> float:
        each = tiles * -(-columns // width) / sms
        whole = int(each) + (each > int(each))
        # Many rounds even out: what is left over costs less than a round.
        rounds = whole if whole <= 2 else each + 0.5
        return rounds * (min(width, columns) + _TILE_OVERHEAD)

    return min(choices, key=lambda width: (round(cost(width), 3), -width))


def choose(shape: Shape, tokens: int) -> Tactic:
    """The tactic for a call of `tokens` tokens with an even routing."""
    slots = max(1.0, tokens * shape.top_k * shape.local / shape.experts)
    each = tokens * shape.top_k / shape.experts
    rows = TILE_ROWS[0] if each <= _FEW_ROWS else TILE_ROWS[1]
    active = min(float(shape.local), slots)
    # On average half a tile of an expert is padding, and one with a single row has one tile.
    tiles = active * max(1.0, each / rows + 0.5)
    stays = shape.wide * shape.hidden * shape.item < _L2_SHARE or shape.local <= 16
    swizzle = _SWIZZLE if stays and each > rows else 1
    return Tactic(
        rows,
        _width(shape.wide, tiles, GEMM1_COLUMNS[rows], shape.sms),
        swizzle,
        _width(shape.hidden, tiles, GEMM2_COLUMNS[rows], shape.sms),
    )


def parsed(value: object) -> Tactic:
    """The option `tactic`: [rows, columns of GEMM1, swizzle, columns of GEMM2]. Raises ConfigError for any other."""
    numbers = list(value) if isinstance(value, (list, tuple)) else []
    if len(numbers) == 4 and all(type(number) is int for number in numbers):
        rows, columns1, swizzle, columns2 = numbers
        known = rows in TILE_ROWS and columns1 in GEMM1_COLUMNS[rows] and columns2 in GEMM2_COLUMNS[rows]
        if known and swizzle >= 1:
            return Tactic(rows, columns1, swizzle, columns2)
    raise ConfigError(
        f"the option 'tactic' of 'cutedsl_sm90' is {value!r}",
        hint="it takes [rows, columns of GEMM1, swizzle, columns of GEMM2]: rows and columns "
        f"{GEMM1_COLUMNS} for GEMM1, {GEMM2_COLUMNS} for GEMM2, swizzle from 1 on",
    )


class Tactics:
    """The tactics of one layer by number of tokens, decided when a plan is bound: a look-up in a forward."""

    def __init__(self, shape: Shape, max_tokens: int | None, pick: Callable[[int], Tactic] | None = None) -> None:
        most = min(max_tokens or MOST_TOKENS, MOST_TOKENS)
        pick = pick or (lambda tokens: choose(shape, tokens))
        # Powers of two: the entry of a call is that of the next power.
        self._table = [pick(min(1 << bit, most)) for bit in range(max(1, (most - 1).bit_length() + 1))]

    def __call__(self, tokens: int) -> Tactic:
        """For a call of `tokens` >= 1 tokens."""
        return self._table[min((tokens - 1).bit_length(), len(self._table) - 1)]

    def all(self) -> list[Tactic]:
        """Every tactic of the table, once."""
        return list(dict.fromkeys(self._table))
