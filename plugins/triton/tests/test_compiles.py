"""Every kernel compiles ahead of time for every architecture that the plugin declares, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from moe_core_triton.configs.specialized import HEIGHTS

pytest.importorskip("triton")
SCRIPT = Path(__file__).parent / "compile_report.py"

_TOY = """
import triton, triton.language as tl

@triton.jit
def helper(x):
    return x * 2

@triton.jit
def copy(source, out, count, SIZE: tl.constexpr):
    index = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    tl.store(out + index, helper(tl.load(source + index, mask=index < count)), mask=index < count)

@triton.jit
def greedy(source, out, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    x = tl.load(source + index).to(tl.float32)
    y = x
    for _ in range(4):
        y = y * tl.sum(x * y) + x
    tl.store(out + index, y.to(tl.bfloat16))

@triton.jit
def broken(source):
    tl.store(source, no_such_name)
"""

_TOY_MAIN = """
import json, sys, torch
sys.path[:0] = [{folder!r}, {here!r}]
import compile_report as report, toy

def launches():
    x = torch.empty(1 << 16, dtype=torch.bfloat16)
    for count in (7, 9, 32):
        toy.copy[(1,)](x, x, count, SIZE=64)
    toy.greedy[(1,)](x, x, SIZE=16384, num_warps=1)
    toy.broken[(1,)](x)

variants = [v for name in ("sm_90", "gfx942") for v in report.record(launches, report.TARGETS[name])]
rows = report.compile_all(variants)
print(json.dumps([rows, sorted(report.entry_kernels("toy"))]))
"""


def _environment(cache: Path) -> dict[str, str]:
    """That of a process that compiles: no interpreter, and a cache that goes away."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(Path(p).resolve()) for p in sys.path if p]
    return kept | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join(paths)}


def _run(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=_environment(cache), check=False
    )


def test_the_report_sees_what_it_should(tmp_path: Path) -> None:
    """On kernels of known faults: the same binary once, spilled registers, a kernel that does not compile."""
    (tmp_path / "toy.py").write_text(_TOY)
    (tmp_path / "main.py").write_text(_TOY_MAIN.format(folder=str(tmp_path), here=str(SCRIPT.parent)))
    done = _run([str(tmp_path / "main.py")], tmp_path / "cache")
    assert done.returncode == 0, done.stderr
    rows, entries = json.loads(done.stdout)
    assert entries == ["toy.broken", "toy.copy", "toy.greedy"]
    for target in ("sm_90", "gfx942"):
        mine: dict[str, list[dict[str, Any]]] = {}
        for row in rows:
            if row["target"] == target:
                mine.setdefault(row["kernel"], []).append(row)
        assert len(mine["copy"]) == 2  # 7 and 9 share a binary, 32 is a multiple of 16
        assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in mine["copy"])
        assert mine["greedy"][0]["spill_bytes"] > 0
        assert "no_such_name" in mine["broken"][0]["error"]


def _report(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    done = _run([str(SCRIPT), "--out", str(tmp_path), *arguments], tmp_path / "cache")
    assert done.returncode == 0, f"{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    found: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return found


def _needs_kernels() -> None:
    if importlib.util.find_spec("moe_core_triton.sequence") is None:
        pytest.skip("the kernels are not in this version")


def test_a_few_variants_compile(tmp_path: Path) -> None:
    """The main layers, for one architecture of each vendor; Hopper gets the instructions that make it fast."""
    _needs_kernels()
    found = _report(tmp_path, "--subset", "--targets", "sm_90,gfx942")
    hopper = [row for row in found["rows"] if row["target"] == "sm_90"]
    assert any(row["wgmma"] and row["tma"] for row in hopper)
    # The specialised kernels, which are the default there, as well: for each height of their tiles.
    theirs = [row for row in hopper if row["module"].startswith("hopper_") and row["kernel"] != "_wide_order"]
    kinds = {"bf16": "", "fp8_block128": "_fp8", "mxfp4_w4a16": "_mxfp4"}
    assert {row["kernel"] for row in theirs} == {f"{part}{k}_kernel" for k in kinds.values() for part in ("up", "down")}
    for scheme, kind in kinds.items():
        for part in ("up", "down"):
            assert sum(row["kernel"] == f"{part}{kind}_kernel" for row in theirs) >= len(HEIGHTS[scheme])
    assert all(row["wgmma"] and row["tma"] for row in theirs)
    assert any(row["kernel"] == "_wide_order" for row in hopper)
    # Those that write to peers, with the time limit that the interpreter does not have: both phases at once, and each.
    for name in ("send_tokens", "sum_results"):
        assert sum(row["kernel"] == name for row in hopper) >= 3
    # By name, for the compiler says nothing where it widens: gfx942 multiplies e4m3fnuz, and not the e4m3fn of the
    # layers, which therefore go to its 16-bit instructions: exact, and not faster than those.
    cdna3 = [row for row in found["rows"] if row["target"] == "gfx942" and row["kernel"] == "grouped_gemm"]
    assert cdna3
    for row in cdna3:
        types = "f16" if "fp8e4nv" in row["variant"] else "bf16"
        assert {name.rpartition("_")[2] for name in row["mfma_names"]} == {types}, row["variant"]


@pytest.mark.slow
@pytest.mark.skipif(
    "MOE_CORE_COMPILE_ALL" not in os.environ, reason="takes ten minutes each; set MOE_CORE_COMPILE_ALL=1"
)
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "gfx942", "gfx950"])
def test_everything_compiles(tmp_path: Path, target: str) -> None:
    """No kernel is left out, none is too large for the shared memory."""
    _needs_kernels()
    found = _report(tmp_path, "--targets", target)
    assert found["summary"]["failed"] == 0
    assert found["summary"]["never_launched"] == []
