"""`moe-core check`: the kit's outcomes as a table, JSON and an exit code."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner, Result

from moe_core import forget_plugins
from moe_core.cli._app import app
from moe_core.testing import CheckResult


@pytest.fixture(autouse=True)
def only_core(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    monkeypatch.setenv("COLUMNS", "80")
    forget_plugins()
    yield
    forget_plugins()


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["check", *args], prog_name="moe-core")


def outcomes(monkeypatch, *found: str) -> None:
    """Let the kit answer these."""
    results = [CheckResult(f"group.{o}", "runner:cpu", o, f"why it {o}, at length " * 5, 0.1) for o in found]
    monkeypatch.setattr("moe_core.testing.list_checks", lambda *a, **k: results_as_checks(results))
    monkeypatch.setattr("moe_core.testing.iter_checks", lambda *a, **k: iter(results))


def results_as_checks(results):
    return [type("Check", (), {"id": r.id, "component": r.component, "doc": "What it checks."})() for r in results]


@pytest.mark.parametrize(
    ("found", "code"),
    [
        (("passed", "refused", "xfailed", "skipped"), 0),
        (("passed", "failed"), 1),
        (("passed", "xpassed"), 1),
    ],
)
def test_exit_codes(monkeypatch, found, code):
    outcomes(monkeypatch, *found)
    result = call("core", "--json")
    assert result.exit_code == code
    document = json.loads(result.stdout)
    assert document["ok"] is (code == 0)
    assert [row["outcome"] for row in document["results"]] == list(found)
    assert call("core").exit_code == code


def test_details_are_never_cut(monkeypatch):
    outcomes(monkeypatch, "failed", "passed")
    result = call("core")
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert " ".join(result.stdout.split()).count("why it failed, at length") == 5
    assert "why it passed" not in result.stdout
    assert "why it passed" in call("core", "-v").stdout


def test_the_list():
    document = json.loads(call("core", "--list", "--json").stdout)
    ids = [row["id"] for row in document["checks"]]
    assert ids
    assert all(row["component"] and row["doc"] for row in document["checks"])
    some = json.loads(call("core", "--list", "-k", "reference", "--json").stdout)["checks"]
    assert {row["component"] for row in some} == {"runner:reference"}
    assert call("core", "--list").exit_code == 0


def test_a_real_run():
    result = call("core", "-k", "plugin:core", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["counts"]["passed"] > 0


def test_unknown_names():
    result = call("cor")
    assert (result.exit_code, "did you mean 'core'?" in result.stderr) == (2, True)
    result = call("core", "-k", "no_such_check")
    assert (result.exit_code, "no check of plugin 'core' matches" in result.stderr) == (2, True)
