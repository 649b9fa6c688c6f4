"""`moe-core doctor`: real forwards, plugins' checks, settings and their sources, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_core import Registry, Requires, forget_plugins
from moe_core.cli._app import app
from moe_core.doctor import DoctorCheck, DoctorResult
from moe_core.testing import fake_plugin, runner_like
from moe_core.vocabulary import STANDARD

ROOT = Path(__file__).parents[2]


def explode():
    raise OSError("no driver")


def checks():
    return (
        DoctorCheck("fine", lambda: DoctorResult(True, "all there")),
        DoctorCheck("driver", explode),
        DoctorCheck("clock", lambda: DoctorResult(False, "too slow", hint="buy a faster one")),
    )


POST = """
from moe_core.runners.reference import post_standard
def post(binding):
    inner = post_standard(binding)
    def wrong(*args):
        result = inner(*args)
        result.hidden_states.add_(1.0)
        return result
    return wrong
"""


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    forget_plugins()
    yield
    forget_plugins()


@pytest.fixture
def wrong(monkeypatch, tmp_path):
    (tmp_path / "moe_core_wrong_post.py").write_text(POST)
    monkeypatch.syspath_prepend(str(tmp_path))
    runner = runner_like(
        "reference",
        "wrong",
        formats=[STANDARD],
        adapter={"post": "moe_core_wrong_post:post"},
        last_resort=False,
        support={"requires": (Requires(module="torch"),)},
    )
    registry = Registry([fake_plugin("wrong", **runner, hooks={"moe_core_doctor": checks})], autoload=False)
    monkeypatch.setattr("moe_core.cli.doctor.visible_registry", lambda: registry)
    yield
    sys.modules.pop("moe_core_wrong_post", None)


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["doctor", *args], prog_name="moe-core")


def test_the_core_passes_on_this_machine():
    result = call("--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document["ok"] is True
    assert document["problems"] == []
    tried = {(f["candidate"], f["layer"]) for f in document["forwards"]}
    assert ("standard+reference/split", "float32") in tried
    assert all(f["ok"] and f["error"] <= f["tolerance"] for f in document["forwards"])
    assert {f["force"] for f in document["forwards"]} >= {
        "MOE_CORE_RUNNER=reference MOE_CORE_DISPATCHER=standard MOE_CORE_PATH=split"
    }
    assert {"torch", "python", "cuda", "rocm", "moe_core"} <= set(document["software"])


def test_80_columns():
    result = call()
    assert result.exit_code == 0, result.output
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "all is well" in result.stdout
    assert "…" not in result.stdout


@pytest.mark.usefixtures("wrong")
def test_a_wrong_result_and_failing_checks_are_found():
    result = call("--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    bad = [f for f in document["forwards"] if not f["ok"]]
    assert {f["candidate"] for f in bad} == {"standard+wrong/split"}
    assert all("off by" in f["detail"] for f in bad)
    assert [(c["name"], c["ok"]) for c in document["checks"]] == [("fine", True), ("driver", False), ("clock", False)]
    assert document["checks"][1]["detail"] == "it raised OSError: no driver"
    assert [d["state"] for d in document["dependencies"] if d["for"] == "runner:wrong"] == ["ok"]
    text = " ".join(call().stdout.split())
    assert "FAIL standard+wrong/split" in text
    assert "-> buy a faster one" in text


def test_settings_and_where_they_come_from(monkeypatch, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("[moe_core]\nallow_last_resort = false\n")
    monkeypatch.setenv("MOE_CORE_CONFIG", str(file))
    monkeypatch.setenv("MOE_CORE_RUNNER", "reference")
    monkeypatch.setenv("MOE_CORE_RUNER", "cpu")
    document = json.loads(call("--json").stdout)
    found = {row["name"]: (row["value"], row["source"]) for row in document["settings"]}
    assert found["runner"] == ("reference", "environment, MOE_CORE_RUNNER")
    assert found["allow_last_resort"] == (False, f"file, {file}")
    assert found["path"] == (None, "default")
    assert any("MOE_CORE_RUNER" in warning and "MOE_CORE_RUNNER" in warning for warning in document["warnings"])
    # What the environment forces must not keep the others from being tried.
    assert len({f["candidate"] for f in document["forwards"]}) > 1


def test_two_copies_and_stale_metadata(monkeypatch, tmp_path):
    for place, version in (("a", "0.0.1"), ("b", "0.0.2")):
        info = tmp_path / place / f"moe_core-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: moe-core\nVersion: {version}\n")
        monkeypatch.syspath_prepend(str(tmp_path / place))
    from moe_core.cli._machine import metadata_problems

    text = "\n".join(metadata_problems())
    assert "moe-core is installed" in text
    assert "0.0.1 in " in text


def test_it_needs_no_pytest():
    code = (
        "import sys; sys.modules['pytest'] = None; sys.argv = ['moe-core', 'doctor', '--json']\n"
        "from moe_core.cli import main; main()"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
