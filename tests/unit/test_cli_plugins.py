"""`moe-core plugins` with real installed metadata: a good plugin and one of each faulty kind."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from moe_core import forget_plugins
from moe_core.cli._app import app

GOOD = """
from moe_core.hookspecs import hookimpl
from moe_core.specs import AdapterSpec, PluginInfo, RunnerSpec, Wants
from moe_core.capability import Support
from moe_core.vocabulary import Maturity

class Plugin:
    @hookimpl
    def moe_core_plugin_info(self):
        return PluginInfo(name="tgood", summary="a good plugin with a summary that is rather long, so it has to wrap")

    @hookimpl
    def moe_core_runners(self):
        return (RunnerSpec(name="tgood", summary="s", factory="tgood_plugin:f", prepare="tgood_plugin:p",
                layouts=frozenset({"rows"}), support=Support(devices={"cuda": ("*",)}, schemes=frozenset({"bf16"})),
                maturity={"sm_90": Maturity.COMPILED}),)

    @hookimpl
    def moe_core_adapters(self):
        return (AdapterSpec(runner="not_here", format="standard", pre="a:b", post="a:b", wants=Wants()),)

plugin = Plugin()
"""
LONG = "the driver of this machine is too old for the library that this plugin needs, which is a long story to tell"


def install(folder: Path, name: str, source: str, *, distribution: str | None = None, requires: str = "") -> None:
    """A distribution as pip leaves it: a module and its metadata."""
    dist = distribution or f"moe-core-{name}"
    module = dist.replace("-", "_") + "_plugin"
    module = module.removeprefix("moe_core_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{dist.replace('-', '_')}-1.2.0.dist-info"
    info.mkdir()
    requirement = f"Requires-Dist: {requires}\n" if requires else ""
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.2.0\n{requirement}")
    (info / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name} = {module}:plugin\n")


@pytest.fixture
def site(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("MOE_CORE_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("MOE_CORE_PLUGINS", "tgood,tbroken,ttwice,told")
    monkeypatch.syspath_prepend(str(tmp_path))
    forget_plugins()
    yield tmp_path
    forget_plugins()


def call(*args: str) -> Result:
    return CliRunner().invoke(app, ["plugins", *args], prog_name="moe-core")


def squeeze(text: str) -> str:
    """Without the line breaks of wrapping."""
    return " ".join(text.split())


def install_all(site: Path) -> None:
    install(site, "tgood", GOOD)
    install(site, "tbroken", f"raise OSError({LONG!r})\n")
    install(site, "ttwice", GOOD, distribution="moe-core-ttwice")
    install(site, "ttwice", GOOD, distribution="moe-core-ttwice-fork")
    install(site, "told", GOOD, requires="moe-core<0.0.1")


def test_a_good_plugin(site):
    install(site, "tgood", GOOD)
    result = call()
    assert result.exit_code == 0, result.output
    text = squeeze(result.stdout)
    assert "loaded tgood moe-core-tgood 1.2.0 1.0" in text
    assert "runner tgood tgood sm_90: compiled" in text
    assert "adapter (standard, not_here): no runner 'not_here' is installed" in text


def test_faulty_states_are_shown_and_make_the_exit_code_1(site):
    install_all(site)
    result = call()
    assert result.exit_code == 1
    text = squeeze(result.stdout)
    assert f"OSError: {LONG}" in text  # wrapped, never cut
    assert "moe-core plugins --trace tbroken" in text
    assert "the name 'ttwice' is also claimed by moe-core-ttwice-fork 1.2.0" in text
    assert "it requires moe-core<0.0.1" in text
    assert "…" not in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert result.stderr == ""  # the table says it; the log need not


def test_json(site):
    install_all(site)
    result = call("--json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    states = {(p["name"], p["state"]) for p in document["plugins"]} - {("core", "loaded")}
    assert {s for s in states if s[1] != "blocked"} == {
        ("tgood", "loaded"),
        ("tbroken", "broken"),
        ("ttwice", "duplicate"),
        ("told", "incompatible"),
    }
    runner = next(c for c in document["components"] if c["name"] == "tgood")
    assert runner["maturity"] == {"sm_90": "compiled"}
    assert runner["devices"] == {"cuda": ["*"]}
    assert runner["schemes"] == ["bf16"]
    dispatcher = next(c for c in document["components"] if c["kind"] == "dispatcher")
    assert dispatcher["formats"] == ["standard"]


def test_blocked_is_not_a_fault(site, monkeypatch):
    install_all(site)
    monkeypatch.setenv("MOE_CORE_PLUGINS", "tgood")
    forget_plugins()
    result = call()
    assert result.exit_code == 0
    assert "not in the allow-list" in squeeze(result.stdout)


def test_strict_still_shows_everything(site, monkeypatch):
    install_all(site)
    monkeypatch.setenv("MOE_CORE_STRICT", "1")
    result = call()
    assert result.exit_code == 1
    assert "OSError" in result.stdout


def test_trace(site):
    install_all(site)
    result = call("--trace", "tbroken")
    assert result.exit_code == 1
    assert "Traceback (most recent call last)" in result.stdout
    assert squeeze(result.stdout).count("raise OSError") == 1
    assert json.loads(call("--trace", "tbroken", "--json").stdout)["plugins"][0]["traceback"].startswith("Traceback")
    assert call("--trace", "tgood").exit_code == 0
    unknown = call("--trace", "tbrokn")
    assert unknown.exit_code == 2
    assert "did you mean 'tbroken'" in unknown.stderr
