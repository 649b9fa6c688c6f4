"""Weights that a kernel asks for before its inputs are there: no more than the L2 cache holds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_core_triton import products
from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.kernels import launching
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection

BUDGET = 3_000_000


def test_two_fifths_of_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    launching.early_bytes.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=50_000_000))
    assert launching.early_bytes(torch.device("cuda", 0)) == 20_000_000
    assert launching.early_bytes(torch.device("cpu")) == 0
    launching.early_bytes.cache_clear()


@pytest.mark.parametrize("tiles", [1, 7, 400])
@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("pdl", [False, True])
def test_what_a_launch_asks_for(monkeypatch: pytest.MonkeyPatch, tiles: int, prefetch: bool, pdl: bool) -> None:
    """Programs that may be early, times their rows, times the bytes of a row: within the budget."""
    seen: dict[str, Any] = {}
    names = products.grouped_gemm.arg_names

    class Kernel:
        def __getitem__(self, grid: tuple[int]) -> Any:
            def launch(*given: Any, **named: Any) -> None:
                seen.update(grid=grid[0], early=given[names.index("early_bytes")], programs=named["PREFETCH"])

            return launch

    monkeypatch.setattr(products, "grouped_gemm", Kernel())
    monkeypatch.setattr(products, "dependent_launch", lambda tensor: {"PDL": pdl})
    monkeypatch.setattr(products, "early_bytes", lambda device: BUDGET)
    monkeypatch.setattr(products, "processors", lambda device: 10)
    few = torch.zeros(tiles, dtype=torch.int32)
    table = RowTable(tiles, 16, few, few, few, few, few)
    w = Projection(torch.zeros(3, 256, 4096, dtype=torch.bfloat16), 1, 256, 4096)
    config = GemmConfig(64, 128, 4, 3, True, False)
    rows = products.Rows(torch.zeros(tiles, 4096, dtype=torch.bfloat16))
    out = torch.zeros(tiles, 256, dtype=torch.bfloat16)
    products.grouped_product(rows, w, table, out, products.Epilogue(), config, prefetch=prefetch)
    if not (prefetch and pdl):
        assert (seen["early"], seen["programs"]) == (0, 0)
        return
    early = min(seen["grid"], seen["programs"]) * config.block_n * seen["early"]
    assert 0.9 * BUDGET < early <= BUDGET
