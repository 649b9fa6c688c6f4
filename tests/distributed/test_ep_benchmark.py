"""`benchmarks/gpu_ep.py` without a GPU: every step over gloo, and right results."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_a_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "-P", "benchmarks/gpu_ep.py", "--dry", "--ranks", "2", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu_ep.json").read_text())["rows"]
    assert {(row["dispatcher"], row["tokens"]) for row in rows} == {
        (name, tokens) for name in ("allgather", "alltoall", "alltoall_grouped") for tokens in (3, 5)
    }
    for row in rows:
        assert row["error"] < 1e-5
        assert min(row["travel_us"], row["compute_us"], row["layer_us"]) > 0
        # A token travels at most once: never more than `allgather` moves.
        assert 0 < row["remote_bytes"] <= row["tokens"] * (2 * 4 * 128 + 8 * 2)
