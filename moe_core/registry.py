"""An immutable, validated index of every spec of every loaded plugin."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from moe_core.errors import ConfigError, SpecError, did_you_mean
from moe_core.hookspecs import COLLECTION_HOOKS
from moe_core.plugins import PluginRecord, PluginSet, discover
from moe_core.settings import Settings
from moe_core.specs import AdapterSpec, DispatcherSpec, FormatSpec, FusedPathSpec, FusedSpec, RunnerSpec

if TYPE_CHECKING:
    from moe_core.quant import QuantScheme

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Index:
    """Specs while they are collected. Keys are what must be unique."""

    formats: dict[str, FormatSpec] = field(default_factory=dict)
    schemes: dict[str, QuantScheme] = field(default_factory=dict)
    dispatchers: dict[str, DispatcherSpec] = field(default_factory=dict)
    runners: dict[str, RunnerSpec] = field(default_factory=dict)
    adapters: dict[tuple[str, str], AdapterSpec] = field(default_factory=dict)
    fused: dict[tuple[str, str], FusedSpec] = field(default_factory=dict)
    fused_paths: dict[str, FusedPathSpec] = field(default_factory=dict)
    owners: dict[tuple[str, object], str] = field(default_factory=dict)

    def place(self, spec: Any) -> tuple[str, dict[Any, Any], Any]:
        """(kind, table, key) of a spec."""
        from moe_core.quant import QuantScheme

        if isinstance(spec, FormatSpec):
            return "format", self.formats, spec.id
        if isinstance(spec, QuantScheme):
            return "quant scheme", self.schemes, spec.id
        if isinstance(spec, DispatcherSpec):
            return "dispatcher", self.dispatchers, spec.name
        if isinstance(spec, RunnerSpec):
            return "runner", self.runners, spec.name
        if isinstance(spec, AdapterSpec):
            return "adapter", self.adapters, (spec.format, spec.runner)
        if isinstance(spec, FusedSpec):
            return "fused func", self.fused, (spec.format, spec.runner)
        if isinstance(spec, FusedPathSpec):
            return "fused path", self.fused_paths, spec.name
        raise SpecError(f"a hook returned {type(spec).__name__}, which is not a spec: {spec!r}")


class Registry:
    """All specs, by name. Made from installed plugins, from objects given in code, or both."""

    def __init__(self, plugins: Iterable[Any] = (), *, autoload: bool = True, settings: Settings | None = None) -> None:
        """`plugins`: plugin objects, for tests and embedders; `autoload`: also load installed entry points."""
        from moe_core._builtin import plugin as core

        self.settings = settings or Settings.load()
        self._plugins: PluginSet = discover(self.settings, plugins=plugins, autoload=autoload, core=core)
        self._index = _Index()
        for record in self._plugins.loaded:
            self._collect(record)
        self._plugins.report()
        self.formats: Mapping[str, FormatSpec] = MappingProxyType(self._index.formats)
        self.schemes: Mapping[str, QuantScheme] = MappingProxyType(self._index.schemes)
        self.dispatchers: Mapping[str, DispatcherSpec] = MappingProxyType(self._index.dispatchers)
        self.runners: Mapping[str, RunnerSpec] = MappingProxyType(self._index.runners)
        self.adapters: Mapping[tuple[str, str], AdapterSpec] = MappingProxyType(self._index.adapters)
        self.fused: Mapping[tuple[str, str], FusedSpec] = MappingProxyType(self._index.fused)
        self.fused_paths: Mapping[str, FusedPathSpec] = MappingProxyType(self._index.fused_paths)

    @property
    def records(self) -> list[PluginRecord]:
        """What became of every plugin."""
        return list(self._plugins.records)

    @property
    def notes(self) -> list[str]:
        """Adapters and fused funcs that join something not installed: harmless, and worth knowing."""
        lines = []
        for (format_id, runner), spec in (*self._index.adapters.items(), *self._index.fused.items()):
            kind = "adapter" if isinstance(spec, AdapterSpec) else "fused func"
            if runner not in self._index.runners:
                lines.append(f"{kind} ({format_id}, {runner}): no runner {runner!r} is installed")
            if format_id not in self._index.formats:
                lines.append(f"{kind} ({format_id}, {runner}): no format {format_id!r} is registered")
        return lines

    def call(self, hook: str, failures: list[str] | None = None, **arguments: Any) -> list[tuple[PluginRecord, Any]]:
        """(plugin, result) of a hook for every loaded plugin that implements it, plugin by plugin.

        A plugin whose hook raises hides only itself: it is logged as a warning, and added to `failures`.
        """
        results = []
        for record in self._plugins.loaded:
            try:
                results += [(record, value) for value in self._plugins.call(record, hook, **arguments)]
            except Exception as error:  # a plugin's hook may raise anything; the others must still answer
                line = f"hook {hook} of plugin {record.name!r} raised {type(error).__name__}: {error}"
                logger.warning("%s; its answer is left out", line)
                if failures is not None:
                    failures.append(line)
        return results

    def owner(self, kind: str, key: object) -> str:
        """The plugin that declared a spec; kind: "runner", "dispatcher", "adapter", "fused func", ..."""
        return self._index.owners[(kind, key)]

    def version_of(self, plugin: str) -> str | None:
        """The installed version of a plugin's distribution."""
        return next((r.version for r in self._plugins.records if r.name == plugin), None)

    def _collect(self, record: PluginRecord) -> None:
        """Take all specs of one plugin, or none: half a plugin would be worse than a missing one."""
        staged: list[tuple[str, dict[Any, Any], Any, Any]] = []
        try:
            for hook in COLLECTION_HOOKS:
                for specs in self._plugins.call(record, hook):
                    for spec in specs:
                        staged.append((*self._index.place(spec), spec))
        except Exception as error:  # whatever a plugin's hook raises is that plugin's state
            self._plugins.mark_broken(record, error)
            return
        keys = [(kind, key) for kind, _, key, _ in staged]
        for kind, table, key, _ in staged:
            taken = self._index.owners.get((kind, key)) if key in table else None
            if taken is not None or keys.count((kind, key)) > 1:
                self._plugins.mark_duplicate(
                    record, f"it declares the {kind} {key!r}, which {taken or 'it'} declares too"
                )
                return
        for kind, table, key, spec in staged:
            table[key] = spec
            self._index.owners[(kind, key)] = record.name

    def runner(self, name: str) -> RunnerSpec:
        """The runner spec, or ConfigError with the known names and the state of a plugin of that name."""
        return cast(RunnerSpec, self._get("runner", self.runners, name))

    def dispatcher(self, name: str) -> DispatcherSpec:
        """The dispatcher spec, or ConfigError with the known names and the state of a plugin of that name."""
        return cast(DispatcherSpec, self._get("dispatcher", self.dispatchers, name))

    def _get(self, kind: str, table: Mapping[str, Any], name: str) -> Any:
        if name in table:
            return table[name]
        hint = did_you_mean(name, table)
        record = next((r for r in self._plugins.records if r.name == name), None)
        if record is not None and record.plugin is None:
            hint = f"plugin {name!r} ({record.where}) is {record.state.value}: {record.detail}"
        raise ConfigError(f"no {kind} is called {name!r}", hint=hint)


@lru_cache(maxsize=16)
def _cached(plugins: tuple[str, ...] | None, disable: tuple[str, ...], strict: bool) -> Registry:
    return Registry(settings=Settings(plugins=plugins, disable=disable, strict=strict))


def default_registry(settings: Settings | None = None) -> Registry:
    """The registry of installed plugins under the settings in force. Discovered once a process and setting."""
    active = settings or Settings.load()
    return _cached(active.plugins, active.disable, active.strict)


def forget_plugins() -> None:
    """Discover again at the next use, after packages were installed or removed in this process."""
    _cached.cache_clear()
