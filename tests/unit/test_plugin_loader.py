"""The five states of a plugin, from real distributions written to a folder on sys.path."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from moe_core import _metadata
from moe_core.errors import ConfigError, PluginApiError, PluginConflictError, PluginLoadError
from moe_core.plugins import PluginRecord, PluginState
from moe_core.registry import Registry, default_registry, forget_plugins
from moe_core.settings import Settings

TEMPLATE = """
from moe_core import hookimpl
from moe_core._builtin import CPU_RUNNER
from moe_core.specs import PluginInfo, FormatSpec

def format_called(name):
    return FormatSpec(id=name, summary="s", dispatch_output="a:B", combine_input="a:C")

class Plugin:
    @hookimpl
    def moe_core_plugin_info(self):
        {info}

    @hookimpl
    def {hook}(self{argument}):
        {body}

plugin = Plugin()
"""


def code(name: str = "acme", **changes: str) -> str:
    """A plugin that registers a format of its own name."""
    parts = {
        "info": f'return PluginInfo(name="{name}", summary="a good one")',
        "hook": "moe_core_formats",
        "argument": "",
        "body": f'return (format_called("{name}"),)',
    }
    return TEMPLATE.format(**(parts | changes))


Install = Callable[..., Path]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Entry points are looked up as always; those of what happens to be installed here are left out."""
    before, lookup = set(sys.modules), _metadata.entry_points

    def ours(group: str) -> list[object]:
        return [e for e in lookup(group) if str(e.dist.locate_file("")).startswith(str(tmp_path))]

    monkeypatch.setattr(_metadata, "entry_points", ours)
    yield tmp_path
    for module in {m for m in set(sys.modules) - before if m.startswith("plug_")}:
        del sys.modules[module]


@pytest.fixture
def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """install("acme", code): distribution plug-acme 1.0 with the entry point acme, in a folder of its own."""

    def install_one(
        name: str,
        source: str | None = None,
        *,
        dist: str | None = None,
        requires: str | None = None,
        target: str = "plugin",
        first: bool = True,
    ) -> Path:
        dist = dist or f"plug-{name}"
        module, place = dist.replace("-", "_"), folder / f"site-{dist}"
        info = place / f"{module}-1.0.dist-info"
        info.mkdir(parents=True)
        metadata = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata + (f"Requires-Dist: {requires}\n" if requires else ""))
        (info / "entry_points.txt").write_text(f"[moe_core.plugins]\n{name} = {module}:{target}\n")
        (place / f"{module}.py").write_text(code(name) if source is None else source)
        if first:
            monkeypatch.syspath_prepend(str(place))
        else:
            monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
        return place

    return install_one


def load(**settings: object) -> tuple[Registry, dict[str, PluginRecord]]:
    registry = Registry(settings=Settings(**settings))  # type: ignore[arg-type]
    return registry, {record.name: record for record in registry.records}


def states(**settings: object) -> dict[str, str]:
    registry, _ = load(**settings)
    return {record.name: record.state.value for record in registry.records if record.name != "core"}


def test_a_good_plugin_is_loaded_with_all_that_is_known_about_it(install: Install) -> None:
    install("acme")
    registry, records = load()
    record = records["acme"]
    assert (record.state, record.distribution, record.version) == (PluginState.LOADED, "plug-acme", "1.0")
    assert record.info is not None
    assert record.info.summary == "a good one"
    assert record.to_json()["target"] == "plug_acme:plugin"
    assert record.load_ms > 0
    assert "acme" in registry.formats
    assert registry.owner("format", "acme") == "acme"
    assert registry.version_of("acme") == "1.0"


def test_the_core_needs_no_entry_point(folder: Path) -> None:
    registry, records = load()
    assert list(records) == ["core"]
    assert {"reference", "cpu"} <= set(registry.runners)


@pytest.mark.parametrize(
    ("settings", "detail"),
    [
        ({"disable": ("acme",)}, "MOE_CORE_DISABLE"),
        ({"plugins": ("other",)}, "MOE_CORE_PLUGINS"),
        ({"plugins": ()}, "MOE_CORE_PLUGINS"),
        ({"plugins": ("acme",), "disable": ("acme",)}, "MOE_CORE_DISABLE"),
    ],
)
def test_a_blocked_plugin_is_never_imported(settings: dict[str, object], detail: str, install: Install) -> None:
    install("acme", "raise SystemExit('imported')\n")
    install("other")
    _, records = load(**settings)
    assert records["acme"].state is PluginState.BLOCKED
    assert detail in records["acme"].detail
    assert "plug_acme" not in sys.modules


def test_an_allow_list_loads_what_it_names(install: Install) -> None:
    install("acme")
    install("other")
    assert states(plugins=("acme",)) == {"acme": "loaded", "other": "blocked"}


def test_of_two_distributions_with_one_name_none_is_loaded_and_both_are_named(install: Install) -> None:
    install("acme", dist="plug-one")
    install("acme", dist="plug-two")
    install("other")
    registry = Registry(settings=Settings())
    twins = [record for record in registry.records if record.name == "acme"]
    assert [(r.state, r.distribution) for r in twins] == [
        (PluginState.DUPLICATE, "plug-one"),
        (PluginState.DUPLICATE, "plug-two"),
    ]
    assert "plug-two 1.0" in twins[0].detail
    assert "plug-one 1.0" in twins[1].detail
    assert not {"plug_one", "plug_two"} & set(sys.modules)
    assert {"acme", "other"} & set(registry.formats) == {"other"}


def test_one_distribution_found_twice_is_one_plugin(install: Install, monkeypatch: pytest.MonkeyPatch) -> None:
    place = install("acme")
    monkeypatch.setattr(sys, "path", [*sys.path, str(place)])
    assert states() == {"acme": "loaded"}


@pytest.mark.parametrize("first", [True, False])
def test_a_declared_name_that_is_taken_drops_the_whole_later_plugin(first: bool, install: Install) -> None:
    install("b", code("b", body='return (format_called("only_b"), format_called("shared"))'))
    # By name, whatever the order of sys.path.
    install("a", code("a", body='return (format_called("shared"),)'), first=first)
    registry, records = load()
    assert {name: records[name].state.value for name in "ab"} == {"a": "loaded", "b": "duplicate"}
    assert records["b"].detail == "it declares the format 'shared', which a declares too"
    assert registry.owner("format", "shared") == "a"
    assert "only_b" not in registry.formats


def test_a_runner_of_the_core_cannot_be_taken_over(install: Install) -> None:
    install("acme", code(hook="moe_core_runners", body="return (CPU_RUNNER,)"))
    registry, records = load()
    assert records["acme"].state is PluginState.DUPLICATE
    assert records["acme"].detail == "it declares the runner 'cpu', which core declares too"
    assert registry.owner("runner", "cpu") == "core"


def test_a_plugin_that_declares_a_name_twice_is_a_duplicate_of_itself(install: Install) -> None:
    install("acme", code(body='return 2 * (format_called("acme"),)'))
    registry, records = load()
    assert records["acme"].state is PluginState.DUPLICATE
    assert records["acme"].detail == "it declares the format 'acme', which it declares too"
    assert "acme" not in registry.formats


@pytest.mark.parametrize("requires", ["moe-core>=99", "moe_core==0.0.1", "MOE.Core[triton]<0.0.1", "moe-core (>=99)"])
def test_a_plugin_for_another_version_is_not_even_imported(requires: str, install: Install) -> None:
    install("acme", "raise SystemExit('imported')\n", requires=requires)
    _, records = load()
    assert records["acme"].state is PluginState.INCOMPATIBLE
    assert records["acme"].detail.startswith(f"it requires {requires}, this is moe-core 0.")
    assert "plug_acme" not in sys.modules


@pytest.mark.parametrize(
    "requires",
    ["moe-core>=0.0.1", "moe-core-triton>=99", "moe-core>=99; extra == 'later'", "moe-core>=99; sys_platform == 'x'"],
)
def test_requirements_that_do_not_exclude_this_version_do_not_matter(requires: str, install: Install) -> None:
    install("acme", requires=requires)
    assert states() == {"acme": "loaded"}


@pytest.mark.parametrize("api", ["(2, 0)", "(0, 1)", "(1, 9)"])
def test_a_plugin_for_another_api_is_incompatible(api: str, install: Install) -> None:
    install("acme", code(info=f'return PluginInfo(name="acme", summary="", api={api})'))
    registry, records = load()
    assert records["acme"].state is PluginState.INCOMPATIBLE
    assert "written for plugin API" in records["acme"].detail
    assert "acme" not in registry.formats


BROKEN = {
    "raises on import": ("import vendor_nowhere\n", "ModuleNotFoundError: No module named 'vendor_nowhere'"),
    "raises oddly on import": ("raise OSError('libhip.so: cannot open')\n", "OSError: libhip.so: cannot open"),
    "syntax": ("def\n", "SyntaxError"),
    "no such attribute": ("", "AttributeError"),
    "none": ("plugin = None\n", "PluginLoadError: plug_acme:plugin is None, not a plugin object"),
    "misspelled hook": (code(hook="moe_core_fromats"), "moe_core_fromats"),
    "unknown argument": (code(argument=", color"), "color"),
    "no info": (code().replace("    @hookimpl\n", "", 1), "does not implement moe_core_plugin_info"),
    "not an info": (code(info="return {}"), "AttributeError"),
    "info raises": (code(info="raise RuntimeError('no license')"), "RuntimeError: no license"),
    "hook raises": (code(body="raise RuntimeError('no license')"), "RuntimeError: no license"),
    "hook raises halfway": (code(body="yield format_called('acme'); raise KeyError('half')"), "KeyError: 'half'"),
    "not a spec": (code(body="return ({},)"), "SpecError: a hook returned dict"),
    "not iterable": (code(body="return 3"), "TypeError"),
    "invalid spec": (code(body="return (format_called('Acme!'),)"), "SpecError: format has the name 'Acme!'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_plugin_is_visible_and_takes_nothing_else_down(
    how: str, install: Install, caplog: pytest.LogCaptureFixture
) -> None:
    source, detail = BROKEN[how]
    install("acme", source)
    install("good")
    install("zebra")
    with caplog.at_level(logging.WARNING, "moe_core"):
        registry, records = load()
    assert {n: records[n].state.value for n in ("acme", "good", "zebra")} == {
        "acme": "broken",
        "good": "loaded",
        "zebra": "loaded",
    }
    record = records["acme"]
    assert detail in record.detail
    assert record.traceback
    assert "Traceback" in record.traceback
    assert record.plugin is None
    assert set(registry.formats) == {"standard", "batched", "grouped", "good", "zebra"}
    (warning,) = [r.getMessage() for r in caplog.records]
    assert warning.startswith("plugin 'acme' (plug-acme 1.0) is broken: ")
    assert detail in warning


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"source": "import vendor_nowhere\n"}, PluginLoadError, r"\(plug-acme 1.0\) is broken: .*vendor_nowhere"),
        ({"requires": "moe-core>=99"}, PluginApiError, "is incompatible: it requires moe-core>=99"),
        (
            {"source": code(body='return (format_called("standard"),)')},
            PluginConflictError,
            "is duplicate: .*'standard'",
        ),
    ],
)
def test_strict_mode_raises_typed_errors(
    given: dict[str, str], error: type[Exception], message: str, install: Install
) -> None:
    install("acme", **given)
    with pytest.raises(error, match=message) as caught:
        load(strict=True)
    assert "MOE_CORE_DISABLE" in str(caught.value)
    assert states(strict=True, disable=("acme",)) == {"acme": "blocked"}


def test_names_in_the_settings_that_match_nothing_are_told(install: Install, caplog: pytest.LogCaptureFixture) -> None:
    install("triton")
    with caplog.at_level(logging.WARNING, "moe_core"):
        load(disable=("tritn",))
    assert [r.getMessage() for r in caplog.records] == [
        "the setting 'disable' names 'tritn', which is not installed; did you mean 'triton'?"
    ]
    with pytest.raises(ConfigError, match=r"(?s)'plugins' names 'tritno'.*did you mean 'triton'"):
        load(plugins=("tritno",), strict=True)


def test_the_order_of_sys_path_decides_nothing(install: Install) -> None:
    for name in ("delta", "alpha", "charlie", "bravo"):
        install(name, first=name < "c")
    forward = list(states())
    before = list(sys.path)
    try:
        sys.path.reverse()
        assert list(states()) == forward == sorted(forward)
    finally:
        sys.path[:] = before


def test_a_name_that_is_asked_for_tells_why_its_plugin_is_not_there(install: Install) -> None:
    install("acme", "import vendor_nowhere\n")
    registry, _ = load()
    with pytest.raises(
        ConfigError, match=r"(?s)no runner is called 'acme'.*\(plug-acme 1.0\) is broken: .*vendor_nowhere"
    ):
        registry.runner("acme")
    with pytest.raises(ConfigError, match=r"(?s)no dispatcher is called 'standart'.*did you mean 'standard'"):
        registry.dispatcher("standart")


def test_the_default_registry_is_made_once_a_setting_and_again_when_asked(install: Install) -> None:
    forget_plugins()
    try:
        one = default_registry(Settings())
        assert default_registry(Settings(runner="cpu")) is one
        install("late")
        assert "late" not in default_registry(Settings()).formats
        forget_plugins()
        assert "late" in default_registry(Settings()).formats
        assert "late" not in default_registry(Settings(disable=("late",))).formats
    finally:
        forget_plugins()
