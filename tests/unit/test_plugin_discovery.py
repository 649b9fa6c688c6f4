"""Discovery of the six plugins of this repository: nothing heavy is imported, and it is quick."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("aiter", "cutedsl", "deepep", "flashinfer_trtllm", "mori", "triton")
HEAVY = ("torch", "triton", "flashinfer", "cutlass", "aiter", "deep_ep", "mori", "transformers", "numpy")

SCRIPT = """
import json, sys, time
from moe_core import _metadata
from moe_core.registry import Registry
from moe_core.settings import Settings

list(_metadata.entry_points("moe_core.plugins"))  # fills the caches of the path finders
start = time.process_time()
list(_metadata.entry_points("moe_core.plugins"))
scan = time.process_time() - start
start = time.process_time()
registry = Registry(settings=Settings())
took = time.process_time() - start
print(json.dumps({
    "states": {r.name: [r.state.value, r.detail, r.distribution] for r in registry.records},
    "runners": sorted(registry.runners),
    "dispatchers": sorted(registry.dispatchers),
    "notes": registry.notes,
    "modules": sorted(m for m in sys.modules if m.split(".")[0] in %r),
    "beyond_scan_ms": (took - scan) * 1e3,
}))
"""


@pytest.fixture(scope="module")
def discover(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], dict[str, Any]]:
    """Runs discovery in a fresh process; the plugins' sources are on its path with what an installer writes."""
    folder = tmp_path_factory.mktemp("installed")
    for name in PLUGINS:
        module = f"moe_core_{name}"
        info = folder / f"{module}-0.0.dist-info"
        info.mkdir()
        dist = module.replace("_", "-")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 0.0\nRequires-Dist: moe-core\n")
        (info / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name} = {module}.plugin:plugin\n")
    paths = [str(folder), str(ROOT), *(str(ROOT / "plugins" / name / "src") for name in PLUGINS)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MOE_CORE_")}
    environment["PYTHONPATH"] = os.pathsep.join(paths)

    def run() -> dict[str, Any]:
        result = subprocess.run(
            [sys.executable, "-W", "error", "-c", SCRIPT % (HEAVY,)],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        found: dict[str, Any] = json.loads(result.stdout)
        return found

    return run


@pytest.fixture(scope="module")
def found(discover: Any) -> Any:
    return discover()


def test_all_six_are_loaded_beside_the_core(found: dict[str, Any]) -> None:
    states = {name: state for name, (state, _, _) in found["states"].items()}
    assert states == dict.fromkeys(("core", *PLUGINS), "loaded"), found["states"]
    assert {"reference", "cpu", "triton", "aiter", "flashinfer_trtllm", "cutedsl"} <= set(found["runners"])
    assert {"standard", "deepep", "mori"} <= set(found["dispatchers"])


def test_they_join_only_what_is_there(found: dict[str, Any]) -> None:
    assert found["notes"] == []


def test_discovery_imports_nothing_heavy(found: dict[str, Any]) -> None:
    assert found["modules"] == []


def test_discovery_takes_under_50_ms_beyond_the_metadata_scan(discover: Any) -> None:
    # Processor time: what other tests do on this machine must not count.
    best = min(discover()["beyond_scan_ms"] for _ in range(4))
    assert best < 50
