"""The script for owners of an AMD GPU, as far as a CPU and the double can run it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from moe_core_aiter import layouts, verify
from moe_core_aiter.schemes import SCHEMES
from moe_core_aiter.testing import OnCpu

import moe_core
from moe_core.hardware import detect_cpu
from moe_core.registry import Registry


def small(case: verify.Case) -> verify.Case:
    """The same on a layer that a CPU can take."""
    sizes = {"num_experts": 4, "top_k": 2, "hidden_size": 256, "intermediate_size": 256}
    return verify.Case(case.scheme, case.rows, case.pattern, sizes | case.changes)


def test_every_kind_of_case_runs(bench: Any) -> None:
    bench("gfx950")
    registry = Registry([OnCpu()], autoload=False)
    rows = [verify.run(small(case), registry, detect_cpu()) for case in verify.cases("gfx950", rows=(17,))]
    assert {row["scheme"] for row in rows} == set(SCHEMES)
    assert [row for row in rows if not row["ok"]] == []
    assert not any(case.scheme.startswith("mx") for case in verify.cases("gfx942"))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_controls_fail_and_leave_nothing_behind(scheme: str, bench: Any) -> None:
    bench("gfx950")
    before = layouts.shuffled
    row = verify.run(small(verify.Case(scheme, 17)), Registry([OnCpu()], autoload=False), detect_cpu(), spoil=True)
    assert row["ok"]
    assert row["error"] > 0.5
    assert layouts.shuffled is before


def test_a_kernel_that_raises_is_a_row(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    bench("gfx950")
    monkeypatch.setattr(verify, "make_layer", lambda *_, **more: 1 / 0)
    row = verify.run(small(verify.Case("bf16", 4)), Registry([OnCpu()], autoload=False), detect_cpu())
    assert not row["ok"]
    assert row["detail"].startswith("ZeroDivisionError")


def test_the_file(bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    bench("gfx950")
    registry = Registry([OnCpu()], autoload=False)
    monkeypatch.setattr(moe_core, "default_registry", lambda: registry)
    monkeypatch.setattr(moe_core, "detect_hardware", detect_cpu)
    monkeypatch.setattr(verify, "kit", lambda *_: {"counts": {"passed": 1}, "failed": [], "ok": True})
    monkeypatch.setattr(verify, "cases", lambda arch: [small(verify.Case("bf16", 4))])
    spoiled = verify.run

    def narrow(case: verify.Case, *more: Any, **flags: Any) -> dict[str, Any]:
        return spoiled(small(case), *more, **flags)

    monkeypatch.setattr(verify, "run", narrow)
    assert verify.main(["--out", str(tmp_path / "results"), "--tokens", ""]) == 0
    (place,) = (tmp_path / "results").glob("aiter_*.json")
    report = json.loads(place.read_text(encoding="utf-8"))
    assert report["environment"]["aiter_arguments_as_in"] == "e4048607"
    assert (report["ok"], len(report["layers"]), len(report["controls"])) == (True, 1, 2)
    assert "3 of 3 right" in capsys.readouterr().out
