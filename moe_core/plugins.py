"""Discovery: entry points in, plugin records out. Import-free towards torch and vendors, and isolated.

This is our own loader over pluggy's plugin manager: pluggy's stops at the first entry point that raises. A broken,
duplicate, blocked or incompatible plugin becomes a visible state with a message, and takes nothing else down.
"""

from __future__ import annotations

import itertools
import logging
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import pluggy
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from moe_core import _metadata, hookspecs
from moe_core._version import __version__
from moe_core.errors import ConfigError, PluginApiError, PluginConflictError, PluginLoadError, did_you_mean
from moe_core.settings import Settings
from moe_core.specs import PluginInfo
from moe_core.vocabulary import ENTRY_POINT_GROUP, PLUGIN_API

logger = logging.getLogger(__name__)

CORE = "core"


class PluginState(StrEnum):
    """What became of a plugin."""

    LOADED = "loaded"
    BLOCKED = "blocked"  # by the settings; never imported
    DUPLICATE = "duplicate"  # its name, or a name it declares, is taken
    INCOMPATIBLE = "incompatible"  # needs another moe_core
    BROKEN = "broken"  # importing or registering it raised


@dataclass(slots=True)
class PluginRecord:
    """One entry point of the group, or one object given in code."""

    name: str
    state: PluginState
    distribution: str | None = None
    version: str | None = None
    target: str | None = None
    info: PluginInfo | None = None
    detail: str = ""
    traceback: str | None = None
    load_ms: float = 0.0
    plugin: Any = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"{self.distribution} {self.version}" if self.distribution else (self.target or "given in code")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "name": self.name,
            "state": self.state.value,
            "distribution": self.distribution,
            "version": self.version,
            "target": self.target,
            "summary": self.info.summary if self.info else None,
            "api": list(self.info.api) if self.info else None,
            "load_ms": round(self.load_ms, 3),
            "detail": self.detail,
            "traceback": self.traceback,
        }


class PluginSet:
    """The plugins of one registry: records, and hook calls one plugin at a time."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._manager = pluggy.PluginManager(hookspecs.PROJECT)
        self._manager.add_hookspecs(hookspecs)
        self.records: list[PluginRecord] = []

    def add(self, record: PluginRecord) -> None:
        """Check, register and record one plugin whose object is loaded."""
        start = time.perf_counter()
        try:
            self._register(record)
        except PluginApiError as error:
            record.state, record.detail, record.plugin = PluginState.INCOMPATIBLE, error.message, None
        except PluginConflictError as error:
            record.state, record.detail, record.plugin = PluginState.DUPLICATE, error.message, None
        except Exception as error:
            record.plugin = None  # `_register` has taken it out again
            self.mark_broken(record, error)
        else:
            record.state = PluginState.LOADED
        record.load_ms += (time.perf_counter() - start) * 1e3
        self.records.append(record)

    def _register(self, record: PluginRecord) -> None:
        if self._manager.is_registered(record.plugin):
            raise PluginConflictError(f"its object is loaded already, as {self._manager.get_name(record.plugin)!r}")
        if self._manager.has_plugin(record.name):
            raise PluginConflictError(f"the name {record.name!r} is taken")
        self._manager.register(record.plugin, name=record.name)
        try:
            self._manager.check_pending()  # a misspelled hook name is an error, not a silent no-op
            infos = self.call(record, "moe_core_plugin_info")
            if not infos:
                raise PluginLoadError("it does not implement moe_core_plugin_info")
            record.info = infos[0]
            if record.distribution is not None and record.info.name != record.name:
                raise PluginLoadError(
                    f"its entry point is called {record.name!r}, but its plugin info says {record.info.name!r}"
                )
            major, minor = record.info.api
            if major != PLUGIN_API[0] or minor > PLUGIN_API[1]:
                raise PluginApiError(
                    f"written for plugin API {major}.{minor}, this moe_core {__version__} has "
                    f"{PLUGIN_API[0]}.{PLUGIN_API[1]}"
                )
        except Exception:
            self._manager.unregister(record.plugin)
            raise

    def call(self, record: PluginRecord, hook: str, **arguments: Any) -> list[Any]:
        """Call one hook of one plugin alone; the results that are not None."""
        others = [p for p in self._manager.get_plugins() if p is not record.plugin]
        result = self._manager.subset_hook_caller(hook, others)(**arguments)
        return result if isinstance(result, list) else [] if result is None else [result]

    @property
    def loaded(self) -> list[PluginRecord]:
        """Records of plugins that can be called, the core first."""
        return [r for r in self.records if r.state is PluginState.LOADED]

    def mark_broken(self, record: PluginRecord, error: BaseException) -> None:
        """Turn a plugin into a visible, harmless state."""
        if record.plugin is not None and self._manager.is_registered(record.plugin):
            self._manager.unregister(record.plugin)
        record.state, record.plugin = PluginState.BROKEN, None
        record.detail = f"{type(error).__name__}: {error}"
        record.traceback = "".join(traceback.format_exception(error))

    def mark_duplicate(self, record: PluginRecord, detail: str) -> None:
        """A name that it declares is taken."""
        if record.plugin is not None and self._manager.is_registered(record.plugin):
            self._manager.unregister(record.plugin)
        record.state, record.plugin, record.detail = PluginState.DUPLICATE, None, detail

    def report(self) -> None:
        """Warn once about every plugin that is not usable; raise instead in strict mode."""
        for record in self.records:
            if record.state in (PluginState.LOADED, PluginState.BLOCKED):
                continue
            message = f"plugin {record.name!r} ({record.where}) is {record.state.value}: {record.detail}"
            if self._settings.strict:
                kinds = {PluginState.DUPLICATE: PluginConflictError, PluginState.INCOMPATIBLE: PluginApiError}
                raise kinds.get(record.state, PluginLoadError)(
                    message, hint="uninstall or repair it, or disable it with MOE_CORE_DISABLE"
                )
            logger.warning("%s", message)


def discover(settings: Settings, *, plugins: Iterable[Any] = (), autoload: bool = True, core: Any = None) -> PluginSet:
    """Load the core's own specs, `plugins` given in code, then (with `autoload`) every installed entry point."""
    found = PluginSet(settings)
    if core is not None:
        found.add(PluginRecord(CORE, PluginState.LOADED, "moe-core", __version__, plugin=core))
    for plugin in plugins:
        target = f"{type(plugin).__module__}:{type(plugin).__qualname__}"
        name = str(getattr(plugin, "__name__", None) or type(plugin).__name__)
        taken = {r.name for r in found.records}
        free = (f"{name}_{i}" for i in itertools.count(2) if f"{name}_{i}" not in taken)
        unique = next(free) if name in taken else name  # two authors may both call their class Plugin
        found.add(PluginRecord(unique, PluginState.LOADED, target=target, plugin=plugin))
    if autoload:
        for record, entry_point in _entry_points():
            found.add(record) if _load(record, entry_point, settings) else found.records.append(record)
        _check_names(found, settings)
    return found


def _entry_points() -> list[tuple[PluginRecord, Any]]:
    rows = []
    seen: set[tuple[str, str, str]] = set()
    for entry_point in _metadata.entry_points(ENTRY_POINT_GROUP):
        dist = entry_point.dist
        dist_name, version = _identity(dist)
        key = (entry_point.name, canonicalize_name(dist_name or ""), entry_point.value)
        if key in seen:  # one distribution found twice on sys.path (an editable install beside its build folder)
            continue
        seen.add(key)
        record = PluginRecord(
            entry_point.name,
            PluginState.LOADED,
            dist_name or None,
            version,
            entry_point.value,
        )
        rows.append((record, entry_point))
    # The order of sys.path must not decide anything.
    rows.sort(key=lambda row: (row[0].name, canonicalize_name(row[0].distribution or ""), row[0].target or ""))
    counts = Counter(record.name for record, _ in rows)
    for record, _ in rows:
        if counts[record.name] > 1:
            others = [r.where for r, _ in rows if r.name == record.name and r is not record]
            record.state = PluginState.DUPLICATE
            record.detail = (
                f"the name {record.name!r} is also claimed by {', '.join(others)}; none of them is loaded "
                "(uninstall all but one)"
            )
    return rows


def _identity(dist: Any) -> tuple[str, str | None]:
    """Name and version; unknown where an interrupted uninstall left entry points without metadata."""
    try:
        return dist.metadata["Name"] or "", dist.version
    except Exception:
        return "", None


def _load(record: PluginRecord, entry_point: Any, settings: Settings) -> bool:
    """Whether the plugin object is there; otherwise the record says why not. Filters before it imports."""
    if record.name in settings.disable:
        record.state, record.detail = (
            PluginState.BLOCKED,
            "disabled by the setting 'disable' (MOE_CORE_DISABLE)",
        )
    elif settings.plugins is not None and record.name not in settings.plugins:
        record.state = PluginState.BLOCKED
        record.detail = "not in the allow-list of the setting 'plugins' (MOE_CORE_PLUGINS)"
    elif record.state is PluginState.LOADED:
        problem = _incompatibility(entry_point.dist)
        if problem:
            record.state, record.detail = PluginState.INCOMPATIBLE, problem
    if record.state is not PluginState.LOADED:
        return False
    start = time.perf_counter()
    try:
        record.plugin = entry_point.load()
        if record.plugin is None:
            raise PluginLoadError(f"{record.target} is None, not a plugin object")
    except (Exception, SystemExit) as error:  # a plugin's import may raise anything; the others must still load
        record.state, record.detail = PluginState.BROKEN, f"{type(error).__name__}: {error}"
        record.traceback = traceback.format_exc()
    record.load_ms = (time.perf_counter() - start) * 1e3
    return record.plugin is not None


def _incompatibility(dist: Any) -> str | None:
    """Why the distribution's own metadata excludes this moe_core, found without importing it."""
    if not _identity(dist)[0]:
        return None
    for line in _metadata.requirements(dist):
        if not re.match(r"(?i)^moe[-_.]core\b(?![-_.])", line):
            continue
        try:
            requirement = Requirement(line)
        except InvalidRequirement:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            return f"it requires {line}, this is moe-core {__version__}"
    return None


def _check_names(found: PluginSet, settings: Settings) -> None:
    """Names in the settings that match nothing are shown: silence would mean a typo runs something else."""
    known = {r.name for r in found.records}
    for kind, names in (("plugins", settings.plugins or ()), ("disable", settings.disable)):
        for name in names:
            if name in known:
                continue
            text = f"the setting {kind!r} names {name!r}, which is not installed"
            if settings.strict:
                raise ConfigError(text, hint=did_you_mean(name, known))
            logger.warning("%s; %s", text, did_you_mean(name, known))
