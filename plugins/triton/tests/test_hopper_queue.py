"""Where a drawn tile lies: the functions of the kernels themselves, on plain numbers in the place of Gluon's."""

from __future__ import annotations

import random
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from moe_core_triton.row_table import most_tiles

queue = pytest.importorskip("moe_core_triton.kernels.hopper_queue", reason="Triton 3.6 or later")


class Pointer:
    """Into a list of numbers; a read beside it is an error."""

    def __init__(self, values: list[int], at: int = 0) -> None:
        self.values, self.at = values, at

    def __add__(self, offset: int) -> Pointer:
        return Pointer(self.values, self.at + offset)

    def load(self) -> int:
        assert 0 <= self.at < len(self.values)
        return self.values[self.at]


def divided(a: int, b: int) -> int:
    """As the device divides: towards zero. Nothing here may be negative."""
    assert a >= 0
    assert b > 0
    return a // b


GLUON = SimpleNamespace(
    constexpr=int,
    maximum=max,
    minimum=min,
    load=Pointer.load,
    cdiv=lambda a, b: divided(a + b - 1, b),
    where=lambda condition, yes, no: yes if condition else no,
)


def plain(function: Any) -> Any:
    """A Gluon function's source as a Python function."""
    return getattr(function, "fn", function)


def table(counts: list[int], block_m: int, gap: int) -> tuple[list[int], ...]:
    """(tile_expert, tile_start, starts, ends), with `gap` rows that nobody owns between experts."""
    starts, ends, experts, firsts, row = [], [], [], [], 0
    for expert, count in enumerate(counts):
        starts.append(row)
        ends.append(row + count)
        for first in range(0, count, block_m):
            experts.append(expert)
            firsts.append(row + first)
        row += count + gap
    unused = max(1, most_tiles(sum(counts), len(counts), block_m)) - len(experts)
    return experts + [-1] * unused, firsts + [0] * unused, starts, ends


def all_tiles(
    counts: list[int], block_m: int, group_m: int, n_tiles: int, grid: int, tail: bool, gap: int
) -> list[Any]:
    """What `locate` says of every tile, and of the ones behind the last."""
    lists = table(counts, block_m, gap)
    live = sum(expert >= 0 for expert in lists[0])
    halved = min(live * n_tiles, grid) if tail else 0
    total = live * n_tiles + halved
    held = (None, None, tuple(map(Pointer, lists)), None, total, n_tiles, halved)
    found = [plain(queue.locate)(held, tile, block_m, group_m, tail) for tile in range(total + 3)]
    assert all(entry[0] == -1 for entry in found[total:])
    return found[:total]


@pytest.mark.parametrize("tail", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_every_row_and_column_once(monkeypatch: pytest.MonkeyPatch, seed: int, tail: bool) -> None:
    monkeypatch.setattr(queue, "gl", GLUON)
    pick = random.Random(seed)
    block_m, group_m = pick.choice([32, 64, 128, 192]), pick.choice([1, 4, 8, 16])
    n_tiles, grid, gap = pick.randint(1, 7), pick.choice([1, 5, 132]), pick.choice([0, 9])
    counts = [pick.choice([0, 0, 1, block_m - 1, block_m, 3 * block_m + 1, pick.randint(0, 2500)]) for _ in range(9)]
    entries = all_tiles(counts, block_m, group_m, n_tiles, grid, tail, gap)
    lists = table(counts, block_m, gap)
    units = 256  # columns of a whole tile
    seen: Counter[tuple[int, int, int]] = Counter()
    for expert, place, start, count in entries:
        begin, end = lists[2][expert], lists[3][expert]
        assert begin <= start < end
        assert (start - begin) % block_m == 0
        assert count == min(end - start, block_m)
        first = plain(queue.first_column)(place, units, tail)
        half = tail and plain(queue.is_half)(place)
        for column in range(first, first + units // (2 if half else 1), units // 2):
            seen[expert, start, column] += 1
    wanted = Counter(
        (expert, start, column * units // 2)
        for expert, start in zip(lists[0], lists[1], strict=True)
        if expert >= 0
        for column in range(2 * n_tiles)
    )
    assert seen == wanted
    if tail:
        halves = [entry for entry in entries if plain(queue.is_half)(entry[1])]
        whole = len(entries) - len(halves)
        assert len(halves) == 2 * min(sum(e >= 0 for e in lists[0]) * n_tiles, grid)
        assert halves == entries[whole:]


def test_an_experts_tiles_are_neighbors(monkeypatch: pytest.MonkeyPatch) -> None:
    """All its rows under one tile of columns, then under the next: so its weights are shared while they are in L2."""
    monkeypatch.setattr(queue, "gl", GLUON)
    entries = all_tiles([300, 0, 1000, 20], 128, 8, 3, 132, False, 0)
    assert [(expert, place) for expert, place, _, _ in entries] == [
        *((0, n) for n in range(3) for _ in range(3)),
        *((2, n) for n in range(3) for _ in range(8)),
        *((3, n) for n in range(3)),
    ]
    # More tiles than a group: even groups, one after the other.
    many = [start // 128 for _, _, start, _ in all_tiles([10 * 128], 128, 8, 2, 132, False, 0)]
    assert many == [*range(5), *range(5), *range(5, 10), *range(5, 10)]
