"""`moe-core plugins`: every plugin's state, what it brings, and how that was verified."""

from __future__ import annotations

import dataclasses
from typing import Any

import click
from rich.console import RenderableType
from rich.text import Text

from moe_core._version import __version__
from moe_core.cli._report import Report, facts, heading, outline, quiet_discovery, reports, table
from moe_core.errors import ConfigError, did_you_mean
from moe_core.plugins import PluginRecord, PluginState
from moe_core.registry import Registry, default_registry
from moe_core.resolution import Component
from moe_core.settings import Settings
from moe_core.vocabulary import PLUGIN_API, Maturity

#: States that make the exit code 1.
FAULTY = (PluginState.BROKEN, PluginState.DUPLICATE, PluginState.INCOMPATIBLE)


def visible_registry() -> Registry:
    """The registry under the settings in force, but never strict: a command that shows states must not stop at one."""
    with quiet_discovery():
        return default_registry(dataclasses.replace(Settings.load(), strict=False))


def faulty(registry: Registry) -> list[PluginRecord]:
    """Plugins that are installed and cannot be used, and that nobody blocked."""
    return [record for record in registry.records if record.state in FAULTY]


def state_rows(registry: Registry) -> list[tuple[tuple[object, ...], list[str]]]:
    """Rows of the table of plugins, with what to say below each."""
    rows: list[tuple[tuple[object, ...], list[str]]] = []
    for record in registry.records:
        api = ".".join(map(str, record.info.api)) if record.info else "-"
        cells = (record.state.value, record.name, record.where, api, f"{record.load_ms:.1f}")
        details = [record.info.summary] if record.info and record.state is PluginState.LOADED else []
        if record.detail:
            details.append(record.detail)
        if record.traceback:
            details.append(f"-> moe-core plugins --trace {record.name}")
        rows.append((cells, details))
    return rows


STATE_HEADERS = ("state", "name", "distribution", "API", "load ms")


@click.command()
@click.option("--trace", metavar="NAME", help="Print the traceback of a broken plugin.")
@reports
def plugins(trace: str | None) -> Report:
    """Show every plugin: its state, its distribution, what it brings and how that was verified.

    Imports neither torch nor a vendor package. Exit code 1 where a plugin is broken, a duplicate or incompatible.
    """
    registry = visible_registry()
    if trace is not None:
        return _trace(registry, trace)
    components = _components(registry)
    show: list[RenderableType] = [outline(STATE_HEADERS, state_rows(registry))]
    show.append(
        table(
            ("kind", "name", "plugin", "maturity by architecture"),
            [(c["kind"], c["name"], c["plugin"], _maturity_text(c["maturity"])) for c in components],
            title="what they bring",
        )
    )
    options = [(f"{c['name']}.{name}", what) for c in components for name, what in c["options"].items()]
    if options:
        show += [heading("options (Settings.options, see docs/reference.md)"), facts(options)]
    if registry.notes:
        show.append(heading("notes"))
        show += [Text(f"- {note}", overflow="fold") for note in registry.notes]
    data = {
        "moe_core": __version__,
        "api": PLUGIN_API,
        "plugins": [record.to_json() for record in registry.records],
        "components": components,
        "notes": registry.notes,
    }
    return Report(data, show, code=1 if faulty(registry) else 0)


def _components(registry: Registry) -> list[dict[str, Any]]:
    found = []
    for _, dispatcher in sorted(registry.dispatchers.items()):
        row = _component("dispatcher", dispatcher, registry)
        found.append(row | {"formats": sorted(set(dispatcher.formats.values()))})
    for name, runner in sorted(registry.runners.items()):
        formats = {f for f, r in (*registry.adapters, *registry.fused) if r == name}
        row = _component("runner", runner, registry)
        found.append(row | {"formats": sorted(formats), "schemes": sorted(runner.support.schemes)})
    for _, whole in sorted(registry.fused_paths.items()):
        found.append(_component("fused path", whole, registry) | {"runner": whole.runner})
    return found


def _component(kind: str, spec: Component, registry: Registry) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": spec.name,
        "plugin": registry.owner(kind, spec.name),
        "summary": getattr(spec, "summary", ""),
        "priority": spec.priority,
        "devices": {device: list(archs) for device, archs in spec.support.devices.items()},
        "maturity": {arch: Maturity(level).value for arch, level in spec.maturity.items()},
        "options": dict(getattr(spec, "options", {})),
    }


def _maturity_text(maturity: dict[str, str]) -> str:
    return ", ".join(f"{arch}: {level}" for arch, level in maturity.items()) or "untested everywhere"


def _trace(registry: Registry, name: str) -> Report:
    records = [record for record in registry.records if record.name == name]
    if not records:
        raise ConfigError(
            f"no plugin is called {name!r}", hint=did_you_mean(name, [record.name for record in registry.records])
        )
    lines = []
    for record in records:
        lines.append(f"{record.name} ({record.where}) is {record.state.value}. {record.detail}".strip())
        lines.append((record.traceback or "There is no traceback: nothing in it raised.").rstrip())
    data = {"plugins": [record.to_json() for record in records]}
    code = 1 if any(record.state in FAULTY for record in records) else 0
    return Report(data, [Text(line, overflow="fold") for line in lines], code)
