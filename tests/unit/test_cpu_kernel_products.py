"""The CPU runner's choice of layout and products, and the grouped path, against the packed or looped one."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.runners.cpu import calibration, weights
from moe_core.runners.cpu.calibration import GROUPED, LINEAR, ONEDNN, PACKED, calibrate
from moe_core.runners.cpu.kernel import experts_forward
from moe_core.runners.cpu.products import can_group
from moe_core.runners.cpu.table import Products
from moe_core.runners.cpu.weights import BLOCKED, ROWS, CpuWeights, can_pack, prepare

E, H, I = 6, 48, 40  # noqa: E741
DTYPES = [torch.float32, torch.bfloat16]
YES, NO = (True,) * 4, (False,) * 4


def layer(dtype: torch.dtype, bias: bool, gated: bool = True) -> list[Tensor | None]:
    random = torch.Generator().manual_seed(3)
    rows = I * (2 if gated else 1)
    w13 = (torch.randn(E, rows, H, generator=random) * H**-0.5).to(dtype)
    w2 = (torch.randn(E, H, I, generator=random) * I**-0.5).to(dtype)
    if not bias:
        return [w13, w2, None, None]
    return [w13, w2, torch.randn(E, rows, generator=random), torch.randn(E, H, generator=random)]


def grouped(monkeypatch: pytest.MonkeyPatch, args: list[Any], phased_rows: int, gated: bool = True) -> CpuWeights:
    table = Products(NO, YES, phased_rows)
    found = calibration.Calibration(False, table, table, {})
    monkeypatch.setattr(calibration, "calibrate", lambda *args: found)
    return prepare(*args, gated=gated, pack=False)


@pytest.mark.parametrize("phased_rows", [1, 40, 1000])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_products(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, bias: bool, gated: bool, phased_rows: int
) -> None:
    if not can_group(dtype):
        pytest.skip("no grouped_mm for this dtype here")
    args = layer(dtype, bias, gated)
    looped = prepare(*args, gated=gated, pack=False)  # type: ignore[arg-type]
    prepared = grouped(monkeypatch, args, phased_rows, gated)
    assert prepared.stacks is not None
    act = Activation(name="silu", gated=gated)
    torch.manual_seed(0)
    for tokens in (1, 2, 50):
        x, ids = torch.randn(tokens, H).to(dtype), torch.randint(-1, E, (tokens, 3))
        ids[ids == 2] = 3  # an expert without rows
        scales = torch.rand(tokens, 3)
        for on_input in (True, False):
            wanted = experts_forward(x, ids, scales, looped, act, router_weight_on_input=on_input)
            for other in (prepared, copy.deepcopy(prepared)):
                found = experts_forward(x, ids, scales, other, act, router_weight_on_input=on_input)
                error = (found.float() - wanted.float()).abs().max() / wanted.float().abs().max().clamp(min=1e-3)
                assert error < (2e-2 if dtype == torch.bfloat16 else 1e-5)  # with a bias, one rounding more
                assert torch.equal(found, experts_forward(x, ids, scales, other, act, router_weight_on_input=on_input))


def test_rows_that_are_not_aligned_are_not_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    w13, w2 = torch.randn(E, 2 * 41, H).bfloat16(), torch.randn(E, H, 41).bfloat16()  # 82 bytes a row of w2
    prepared = grouped(monkeypatch, [w13, w2], 256)
    assert prepared.stacks is None
    assert experts_forward(
        torch.randn(9, H).bfloat16(), torch.arange(9)[:, None] % E, None, prepared, Activation()
    ).any()


def test_update_in_place_reaches_the_stacks(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_group(torch.float32):
        pytest.skip("no grouped_mm here")
    args = layer(torch.float32, True)
    prepared = grouped(monkeypatch, args, 256)
    new = [2 * a for a in layer(torch.float32, True) if a is not None]
    weights.update_in_place(prepared, *new)
    assert prepared.stacks is not None
    assert all(torch.equal(a, b) for a, b in zip(prepared.stacks, new, strict=True) if a is not None)


def test_small_layers_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "_measure", lambda *args: pytest.fail("measured"))
    for pack in ("auto", True, False):
        prepared = prepare(*layer(torch.float32, False), gated=True, pack=pack)  # type: ignore[arg-type]
        assert prepared.layout == (BLOCKED if pack and can_pack(torch.float32) else ROWS)


def test_the_choice() -> None:
    def choose(packed: tuple[float, ...], grouped_mm: tuple[float, ...]) -> calibration.Calibration:
        seconds = {PACKED: packed, ONEDNN: (1.0, 2.0, 3.0, 4.0), LINEAR: (2.0, 1.9, 4.0, 5.0), GROUPED: grouped_mm}
        return calibration._choose(seconds, torch.float32, 16)

    found = choose((0.5, 1.0, 1.5, 3.0), (2.0, 2.0, 2.0, 5.0))
    assert found.pack
    assert found.rows.grouped == (False, False, True, False)
    assert found.rows.onednn == (True, False, True, True)
    assert not choose((0.96, 1.85, 2.9, 3.9), (9.0,) * 4).pack  # not enough for a second copy
    assert not choose((0.1, 0.1, 0.1, 5.0), (9.0,) * 4).pack  # clearly slower in one regime
    table = found.rows
    assert [table.regime(rows, 10) for rows in (10, 20, 21, 80, 81, 320, 321, 9999)] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert table.describe()[2] == "16 rows: grouped_mm"


def test_measuring_and_a_busy_machine(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(calibration, "_SECONDS", (0.01, 20.0))
    found = calibration._measure(torch.float32, True, 256, 128)
    assert LINEAR in found
    assert all(len(times) == 4 and min(times) > 0 for times in found.values())
    count = iter(range(10**9))
    monkeypatch.setattr(calibration, "_SECONDS", (0.01, 0.05))
    monkeypatch.setattr(calibration, "_preemptions", lambda: next(count))
    calibration._measured.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert calibrate(torch.float32, True, 256, 128, 2**30).pack
    calibration._measured.cache_clear()
    assert "too busy" in caplog.text


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")
def test_auto_falls_back_to_rows_where_a_copy_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(weights, "available_bytes", lambda: 2**10)
    with caplog.at_level(logging.WARNING):
        prepared = prepare(*layer(torch.float32, False), gated=True, pack="auto")  # type: ignore[arg-type]
    assert prepared.layout == ROWS
    assert "rows" in caplog.text
    assert "GiB" in caplog.text
