"""`moe-core new-plugin`: names and folders that it takes and refuses. tests/packaging runs what it writes."""

from __future__ import annotations

import json
import os
import tomllib

import pytest
from click.testing import CliRunner, Result

from moe_core import __version__, forget_plugins
from moe_core.cli._app import app
from moe_core.scaffold import FILES, variables


@pytest.fixture(autouse=True)
def only_core(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("MOE_CORE_PLUGINS", "")
    monkeypatch.setenv("COLUMNS", "80")
    forget_plugins()
    yield
    forget_plugins()


def call(*args: object) -> Result:
    return CliRunner().invoke(app, ["new-plugin", *map(str, args)], prog_name="moe-core")


@pytest.mark.parametrize("kind", ["runner", "dispatcher"])
def test_every_file_is_written_and_complete(tmp_path, kind):
    result = call("my_acme2", f"--{kind}", "--directory", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    folder = tmp_path / "moe-core-my-acme2"
    assert document["folder"] == str(folder)
    written = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert written == sorted(document["files"])
    assert len(written) == len(FILES[kind])
    for name in written:
        text = (folder / name).read_text()
        assert "$" not in text, name
        if name.endswith(".py"):
            compile(text, name, "exec")
            assert max(map(len, text.splitlines()), default=0) <= 120, name
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["moe_core.plugins"] == {"my_acme2": "moe_core_my_acme2.plugin:plugin"}
    major, minor = __version__.split(".")[:2]
    assert project["dependencies"][0].startswith(f"moe-core>={major}.{minor},<")
    assert "class MyAcme2" in (folder / f"src/moe_core_my_acme2/{kind}.py").read_text()


def test_a_runner_is_the_default_and_the_next_steps_are_shown(tmp_path):
    result = call("acme", "--directory", tmp_path)
    assert result.exit_code == 0
    assert (tmp_path / "moe-core-acme/src/moe_core_acme/runner.py").exists()
    assert "moe-core check acme" in result.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Acme", "'acme'"),
        ("acme-fast", "'acme_fast'"),
        ("moe-core-acme", "'acme'"),
        ("2fast", "starting with a letter"),
        ("", "cannot be the name of a plugin"),
        ("a b", "'a_b'"),
        ("moe_core_acme", "leave the prefix out"),
        ("acme_", "single underscores"),
        ("core", "a plugin called 'core' is installed already"),
        ("cpu", "plugin 'core' has a runner called 'cpu'"),
        ("standard", "plugin 'core' has a dispatcher called 'standard'"),
    ],
)
def test_names_that_cannot_be(tmp_path, name, message):
    result = call(name, "--directory", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_importable_package_of_that_name(tmp_path, monkeypatch):
    (tmp_path / "moe_core_taken.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "a package called moe_core_taken is installed already" in call("taken", "--directory", tmp_path).stderr


def test_folders_that_are_in_use(tmp_path):
    folder = tmp_path / "moe-core-acme"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    result = call("acme", "--directory", tmp_path)
    assert result.exit_code == 2
    assert "exists and is not empty" in result.stderr
    assert [path.name for path in folder.iterdir()] == ["notes.txt"]
    (tmp_path / "moe-core-other").write_text("a file")
    assert "is not a folder" in call("other", "--directory", tmp_path).stderr


def test_an_empty_folder_is_used(tmp_path):
    (tmp_path / "moe-core-acme").mkdir()
    assert call("acme", "--directory", tmp_path).exit_code == 0


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    result = call("acme", "--directory", tmp_path / "file" / "below")
    assert result.exit_code == 2
    assert "error" in result.stderr.lower()


def test_the_next_version_is_excluded(monkeypatch):
    for version, requirement in (("0.1.0", ">=0.1,<0.2"), ("0.12.3", ">=0.12,<0.13"), ("2.4.0", ">=2.4,<3")):
        monkeypatch.setattr("moe_core.scaffold.__version__", version)
        assert variables("acme", "runner")["requirement"] == f"moe-core{requirement}"
