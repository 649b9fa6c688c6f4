"""align and cover against a plain sort. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moe_core_triton.kernels import align as module
from moe_core_triton.kernels.align import align, cover
from moe_core_triton.row_table import RowTable, most_tiles

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def local_experts(
    ids: torch.Tensor, num_experts: int, expert_map: torch.Tensor | None, num_valid: int | None
) -> list[int]:
    out = []
    for t, row in enumerate(ids.tolist()):
        for e in row:
            if expert_map is not None:
                e = int(expert_map[e]) if 0 <= e < len(expert_map) else -1
            dead = num_valid is not None and t >= num_valid
            out.append(-1 if dead or not 0 <= e < num_experts else e)
    return out


def check_tiles(table: RowTable, counts: list[int], starts: list[int]) -> None:
    assert table.ticket.tolist() == [0]
    want = [(e, starts[e] + m) for e, n in enumerate(counts) for m in range(0, n, table.block_m)]
    got = list(zip(table.tile_expert.tolist(), table.tile_start.tolist(), strict=True))
    assert len(want) <= table.tiles
    assert got[: len(want)] == want
    assert all(tile == (-1, 0) for tile in got[len(want) :])


def check(
    ids: torch.Tensor,
    num_experts: int,
    block_m: int,
    expert_map: torch.Tensor | None = None,
    num_valid: int | None = None,
) -> None:
    scalar = None if num_valid is None else torch.tensor([num_valid], dtype=torch.int32, device=DEVICE)
    device_map = None if expert_map is None else expert_map.to(DEVICE)
    placed = ids if ids.device.type == DEVICE else ids.to(DEVICE)
    table = align(placed, num_experts=num_experts, block_m=block_m, expert_map=device_map, num_valid=scalar)
    local = local_experts(ids, num_experts, expert_map, num_valid)
    order = sorted((p for p, e in enumerate(local) if e >= 0), key=lambda p: (local[p], p))
    counts = [local.count(e) for e in range(num_experts)]
    starts = [sum(counts[:e]) for e in range(num_experts)]
    assert table.positions == len(local)
    assert table.tiles == most_tiles(len(local), num_experts, block_m)
    assert table.slots is not None
    assert table.local_ids is not None
    assert table.local_ids.tolist() == local
    assert table.starts.tolist() == starts
    assert table.ends.tolist() == [s + n for s, n in zip(starts, counts, strict=True)]
    assert table.slots.tolist() == order + [0] * (len(local) - len(order))
    check_tiles(table, counts, starts)
    for part in (table.starts, table.ends, table.tile_expert, table.tile_start, table.slots, table.local_ids):
        assert part.dtype == torch.int32
        assert part.data_ptr() % 16 == 0


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block_m"),
    [
        (1, 8, 128, 16),
        (1, 1, 1, 16),
        (5, 3, 7, 4),
        (64, 8, 128, 16),
        (300, 2, 1, 64),
        (200, 6, 160, 16),
        (9, 2, 1024, 8),
        (500, 3, 4, 192),
    ],
)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_random_ids(tokens: int, top_k: int, experts: int, block_m: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    check(torch.randint(0, experts, (tokens, top_k), dtype=dtype), experts, block_m)


def test_ids_outside_the_experts_are_dropped() -> None:
    torch.manual_seed(1)
    ids = torch.randint(-3, 9, (150, 4), dtype=torch.int64)
    ids[0, 0], ids[1, 1] = 2**40, -(2**40)
    check(ids, 6, 16)


def test_every_slot_dropped() -> None:
    check(torch.full((40, 4), -1, dtype=torch.int32), 6, 16)
    check(torch.full((3, 2), 6, dtype=torch.int32), 6, 16)


def test_all_slots_on_one_expert() -> None:
    check(torch.full((70, 4), 3, dtype=torch.int32), 5, 16)


def test_skewed_and_duplicate_experts() -> None:
    torch.manual_seed(2)
    ids = (torch.rand(120, 4) ** 4 * 20).to(torch.int32)
    ids[:, 1] = ids[:, 0]
    check(ids, 20, 16)


@pytest.mark.parametrize("num_valid", [0, 1, 37, 90, 1000])
def test_rows_from_num_valid_on_are_dropped(num_valid: int) -> None:
    torch.manual_seed(3)
    check(torch.randint(0, 12, (90, 4), dtype=torch.int32), 12, 16, num_valid=num_valid)


def test_expert_map() -> None:
    torch.manual_seed(4)
    owned = torch.full((24,), -1, dtype=torch.int32)
    owned[torch.randperm(24)[:9]] = torch.arange(9, dtype=torch.int32)
    check(torch.randint(-2, 27, (77, 3), dtype=torch.int32), 9, 16, expert_map=owned, num_valid=60)


def test_strided_rows_and_columns() -> None:
    torch.manual_seed(5)
    wide = torch.randint(-1, 11, (50, 9), dtype=torch.int32, device=DEVICE)
    check(wide[:, 2:6], 11, 16, num_valid=45)
    check(wide.t()[:4], 11, 16)
    check(wide[:, :1], 11, 16)


def test_no_tokens_launch_nothing() -> None:
    table = align(torch.empty(0, 4, dtype=torch.int32, device=DEVICE), num_experts=5, block_m=16)
    assert (table.positions, table.tiles) == (0, 0)
    assert table.starts.tolist() == table.ends.tolist() == [0] * 5
    assert table.slots is not None
    assert table.slots.shape == (0,)


@pytest.mark.parametrize("most_programs", [128, 2])
@pytest.mark.parametrize("two_launches", [100, 10_000])
def test_more_launches(monkeypatch: pytest.MonkeyPatch, two_launches: int, most_programs: int) -> None:
    monkeypatch.setattr(module, "ONE_LAUNCH", 100)
    monkeypatch.setattr(module, "TWO_LAUNCHES", two_launches)
    monkeypatch.setattr(module, "MOST_PROGRAMS", most_programs)
    monkeypatch.setattr(module, "CHUNKS", 4)  # several rounds of them
    torch.manual_seed(6)
    ids = torch.randint(-1, 21, (260, 3), dtype=torch.int32)
    check(ids, 20, 16)
    check(ids, 20, 16, num_valid=100)
    check(ids.t().contiguous().t(), 20, 16, expert_map=torch.arange(19, -1, -1, dtype=torch.int32))


def test_refusals() -> None:
    good = torch.zeros(2, 2, dtype=torch.int32, device=DEVICE)
    for ids, experts, block_m in (
        (good.float(), 4, 16),
        (good[0], 4, 16),
        (good, 0, 16),
        (good, 1025, 16),
        (good, 4, 0),
    ):
        with pytest.raises(ValueError, match=r"topk_ids|experts|block_m"):
            align(ids, num_experts=experts, block_m=block_m)
    with pytest.raises(ValueError, match="int32"):
        cover(good[0].long(), good[0].long(), positions=4, block_m=16)


def test_cover_of_grouped_rows() -> None:
    offsets = torch.tensor([0, 0, 17, 33, 33, 34], dtype=torch.int32, device=DEVICE)
    table = cover(offsets[:-1], offsets[1:], positions=40, block_m=16)
    assert (table.slots, table.local_ids, table.positions) == (None, None, 40)
    check_tiles(table, [0, 17, 16, 0, 1], offsets[:-1].tolist())


def test_cover_of_batched_rows() -> None:
    rows, experts = 20, 70
    counts = [(7 * e) % (rows + 1) for e in range(experts)]
    starts = torch.arange(0, rows * experts, rows, dtype=torch.int32, device=DEVICE)
    ends = starts + torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    table = cover(starts, ends, positions=rows * experts, block_m=8, tiles=experts * 3)
    assert table.tiles == experts * 3
    check_tiles(table, counts, starts.tolist())


def test_cover_of_nothing() -> None:
    nothing = torch.zeros(3, dtype=torch.int32, device=DEVICE)
    assert cover(nothing, nothing, positions=0, block_m=16).tiles == 0
    check_tiles(cover(nothing, nothing, positions=0, block_m=16, tiles=6), [0, 0, 0], [0, 0, 0])
