"""The command as a whole: help, errors, exit codes, and what it may import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_core import __version__, forget_plugins
from moe_core.cli._app import COMMANDS, app
from moe_core.errors import MoeCoreError

ROOT = Path(__file__).parents[2]


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
    return CliRunner().invoke(app, args, prog_name="moe-core")


def spawn(*command: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env, timeout=120, check=False)


def test_help_lists_every_command():
    result = call("--help")
    assert result.exit_code == 0
    for name in COMMANDS:
        assert name in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name):
    result = call(name, "-h")
    assert result.exit_code == 0
    assert "--json" in result.stdout
    assert "--debug" in result.stdout


def test_version():
    assert call("--version").stdout == f"moe-core {__version__} (plugin API 1.0)\n"


def test_no_command_shows_the_help_and_is_an_error():
    result = call()
    assert result.exit_code == 2
    assert "Usage:" in result.output


def test_an_unknown_command_gets_a_suggestion():
    result = call("explian")
    assert result.exit_code == 2
    assert "no command is called 'explian'; did you mean 'explain'?" in result.stderr


def test_an_unknown_option_gets_a_suggestion():
    result = call("explain", "--hardwar", "cpu")
    assert result.exit_code == 2
    assert "--hardware" in result.stderr


def test_our_errors_are_one_message_without_a_traceback():
    result = call("explain", "--model", "mixtral-8x7c", "--hardware", "cpu")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: cannot tell a model from 'mixtral-8x7c'")
    assert "mixtral-8x7b" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "args",
    [
        ("--debug", "explain", "--model", "nothing", "--hardware", "cpu"),
        ("explain", "--model", "nothing", "--hardware", "cpu", "--debug"),
    ],
)
def test_debug_shows_the_traceback(args):
    result = call(*args)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert "\nerror: cannot tell a model from 'nothing'" in result.stderr


def test_errors_leave_stdout_empty_with_json():
    result = call("explain", "--model", "nothing", "--hardware", "cpu", "--json")
    assert (result.exit_code, result.stdout) == (2, "")


def test_other_exceptions_are_not_hidden(monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("moe_core.cli.plugins.default_registry", broken)
    assert isinstance(call("plugins").exception, ZeroDivisionError)


def test_any_error_of_ours_is_caught(monkeypatch):
    def refuse(*args, **kwargs):
        raise MoeCoreError("no", hint="try again")

    monkeypatch.setattr("moe_core.cli.plugins.default_registry", refuse)
    result = call("plugins")
    assert (result.exit_code, result.stderr) == (2, "error: no\n  -> try again\n")


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["plugins"],
        ["plugins", "--json"],
        ["explain", "--model", "deepseek-v3", "--hardware", "h200", "--ep", "8"],
        ["explain", "--model", "gpt-oss-20b", "--hardware", "mi300x", "--json"],
    ],
    ids=lambda args: " ".join(args[:2]),
)
def test_neither_torch_nor_a_vendor_is_imported(args):
    code = (
        "import sys\n"
        "from moe_core.cli import main\n"
        f"sys.argv = ['moe-core', *{args!r}]\n"
        "try:\n    main()\n"
        "except SystemExit as done:\n    assert done.code in (0, 3), done.code\n"
        "heavy = {'torch', 'triton', 'flashinfer', 'aiter', 'deep_ep', 'mori', 'transformers', 'numpy'}\n"
        "found = sorted(heavy & set(sys.modules))\n"
        "print('HEAVY', found, file=sys.stderr)\n"
    )
    done = spawn("-c", code)
    assert done.stderr.endswith("HEAVY []\n"), done.stderr


def test_python_m_and_exit_codes():
    assert spawn("-m", "moe_core", "--version").stdout.startswith("moe-core ")
    assert spawn("-m", "moe_core", "explain", "--model", "olmoe", "--hardware", "cpu").returncode == 0
    refused = ["explain", "--model", "olmoe", "--hardware", "cpu", "--feature", "nobody_has_this"]
    assert spawn("-m", "moe_core", *refused).returncode == 3
    bad = spawn("-m", "moe_core", "explain", "--model", "olmoe", "--hardware", "h2000")
    assert bad.returncode == 2
    assert "error: unknown hardware profile 'h2000'\n  -> did you mean 'h200'" in bad.stderr


def test_run_hands_everything_to_the_demo(monkeypatch):
    calls = []

    def fake(model, *, prompt, max_new_tokens, dtype, json):
        calls.append((model, prompt, max_new_tokens, dtype, json))
        return 1

    monkeypatch.setattr("moe_core.demo.run", fake)
    result = call("run", "--model", "m", "--prompt", "p", "--max-new-tokens", "4", "--dtype", "float32", "--json")
    assert result.exit_code == 1
    assert calls == [("m", "p", 4, "float32", True)]
    assert call("run", "--dtype", "int8").exit_code == 2
