"""What `moe-core new-plugin` writes: imports, passes the conformance kit, builds as a wheel, and is found installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_core import __version__
from moe_core.scaffold import create_plugin

ROOT = Path(__file__).parents[2]
KINDS = ("runner", "dispatcher")


def run(*command: object, path: list[Path], cwd: Path, code: int = 0) -> str:
    """stdout of a command of this Python, with `path` before everything else."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MOE_CORE_", "PYTEST_"))}
    # Plugins that are installed in this environment are none of this test's business.
    env |= {"PYTHONPATH": os.pathsep.join(map(str, [*path, ROOT])), "MOE_CORE_PLUGINS": "gen_runner,gen_dispatcher"}
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=env, cwd=cwd, timeout=600, check=False
    )
    assert done.returncode == code, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def editable(folder: Path, name: str) -> Path:
    """What an editable install leaves on sys.path: the sources, and metadata with the entry point."""
    source = folder / "src"
    info = source / f"moe_core_{name}-0.1.0.dist-info"
    info.mkdir()
    distribution = f"moe-core-{name.replace('_', '-')}"
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name} = moe_core_{name}.plugin:plugin\n")
    return source


@pytest.fixture(params=KINDS)
def generated(request, tmp_path):
    """(name, kind, folder) of a new plugin."""
    name = f"gen_{request.param}"
    return name, request.param, create_plugin(name, request.param, tmp_path).folder


def test_discovery_of_it_imports_no_torch(generated, tmp_path):
    name, kind, folder = generated
    code = (
        f"import sys; from moe_core_{name}.plugin import plugin; from moe_core import Registry\n"
        f"registry = Registry([plugin], autoload=False)\n"
        f"assert [r.state.value for r in registry.records] == ['loaded', 'loaded'], registry.records\n"
        f"assert {name!r} in registry.{kind}s\n"
        "assert 'torch' not in sys.modules\n"
    )
    run("-c", code, path=[folder / "src"], cwd=tmp_path)


def test_its_own_conformance_tests_pass(generated, tmp_path):
    name, kind, folder = generated
    source = editable(folder, name)
    text = run("-m", "pytest", "-q", "-p", "no:cacheprovider", folder, path=[source], cwd=folder)
    assert " passed" in text
    assert "failed" not in text
    shown = json.loads(run("-m", "moe_core", "plugins", "--json", path=[source], cwd=tmp_path))
    record = next(plugin for plugin in shown["plugins"] if plugin["name"] == name)
    assert (record["state"], record["version"]) == ("loaded", "0.1.0")
    checked = json.loads(run("-m", "moe_core", "check", name, "--json", path=[source], cwd=tmp_path))
    assert checked["ok"]
    assert checked["counts"]["passed"] > 20
    assert not any(row["id"] == "coverage.numerics" for row in checked["results"])
    forced = {"runner": ["--runner", name], "dispatcher": ["--dispatcher", name]}[kind]
    answer = run("-m", "moe_core", "explain", "--model", "olmoe", *forced, "--json", path=[source], cwd=tmp_path)
    assert name in json.loads(answer)["chosen"]


def test_nobody_gets_it_unasked(generated, tmp_path):
    name, _, folder = generated
    source = editable(folder, name)
    answer = run("-m", "moe_core", "explain", "--model", "olmoe", "--json", path=[source], cwd=tmp_path)
    assert name not in json.loads(answer)["chosen"]


@pytest.mark.wheels
def test_it_builds_as_a_wheel_and_is_found_when_installed(generated, tmp_path):
    name, _, folder = generated
    out, site, elsewhere = tmp_path / "dist", tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, folder, path=[], cwd=elsewhere)
    (wheel,) = out.glob("*.whl")
    assert wheel.name == f"moe_core_{name}-0.1.0-py3-none-any.whl"
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, path=[], cwd=elsewhere)
    assert (site / f"moe_core_{name}" / "py.typed").exists()
    shown = json.loads(run("-m", "moe_core", "plugins", "--json", path=[site], cwd=elsewhere))
    record = next(plugin for plugin in shown["plugins"] if plugin["name"] == name)
    assert (record["state"], record["distribution"]) == ("loaded", f"moe-core-{name.replace('_', '-')}")
    doctor = json.loads(run("-m", "moe_core", "doctor", "--json", path=[site], cwd=elsewhere))
    assert any(name in forward["candidate"] and forward["ok"] for forward in doctor["forwards"])


@pytest.mark.wheels
def test_the_wheel_of_the_core_brings_the_templates(tmp_path):
    """An installed moe-core, and not only this repository, can write plugins."""
    out, site = tmp_path / "dist", tmp_path / "site"
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT, path=[], cwd=tmp_path)
    (wheel,) = out.glob(f"moe_core-{__version__}-*.whl")
    run("-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", site, wheel, path=[], cwd=tmp_path)
    code = (
        f"import moe_core; assert moe_core.__file__.startswith({str(site)!r}), moe_core.__file__\n"
        "from moe_core.cli import main; main()"
    )
    for kind in KINDS:
        made = run("-c", code, "new-plugin", f"x{kind}", f"--{kind}", "--json", path=[site], cwd=tmp_path)
        assert json.loads(made)["kind"] == kind
