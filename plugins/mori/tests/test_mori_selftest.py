"""The script for real GPUs, over the double: it passes, it notices mistakes, and it says what it found."""

from __future__ import annotations

from typing import Any

RANKS = (2,)
SCRIPT = """
from moe_core_mori import selftest


def tested(name, combine=calls.combine_v1):
    before, selftest.NAMES, calls.combine_v1 = (selftest.NAMES, calls.combine_v1), (name,), combine
    try:
        return selftest.Bench(torch.device("cpu"), tiny=True).run()
    finally:
        selftest.NAMES, calls.combine_v1 = before
"""
SOURCES = {
    "right": "tested('mori')",
    "wrong": "tested('mori', lambda *a, right=calls.combine_v1: right(*a) * 2)",
    "absent": "(testing.install(version='1.1.1'), tested('mori_v2'), testing.install())[1]",
}


def test_it_passes_over_the_double(said: list[dict[str, Any]]) -> None:
    for result in (rank["right"] for rank in said):
        assert [check["check"] for check in result["checks"] if not check["passed"]] == []
        assert len(result["checks"]) == 10
        assert result["double"] is True
        assert [row["dispatcher"] for row in result["times"]] == ["mori"]
        assert {"date", "device", "arch", "torch", "mori", "ranks"} <= result.keys()


def test_it_notices_wrong_sums(said: list[dict[str, Any]]) -> None:
    for result in (rank["wrong"] for rank in said):
        passed = {check["check"] for check in result["checks"] if check["passed"]}
        assert passed == {"mori, nobody"}


def test_what_is_not_installed_is_said(said: list[dict[str, Any]]) -> None:
    for result in (rank["absent"] for rank in said):
        assert all("does not load" in check["raised"] for check in result["checks"])
        assert result["times"] == []
