"""Facts about this installation for `moe-core doctor`: versions, settings and their sources, metadata, dependencies."""

from __future__ import annotations

import dataclasses
import os
import platform
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moe_core import _metadata, settings
from moe_core._version import __version__
from moe_core.errors import did_you_mean
from moe_core.registry import Registry
from moe_core.request import plain
from moe_core.resolution import Component
from moe_core.settings import CONFIG_FILE_VARIABLE, ENVIRONMENT, Settings

_OTHER_VARIABLES: Final = frozenset({CONFIG_FILE_VARIABLE})


def software() -> dict[str, Any]:
    """Versions of what everything stands on."""
    import torch

    return {
        "moe_core": __version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "rocm": torch.version.hip,
        "threads": torch.get_num_threads(),
    }


def settings_in_force() -> list[dict[str, Any]]:
    """Every setting, its value and where that comes from."""
    names = [f.name for f in dataclasses.fields(Settings)]
    file, environment = settings._from_file(set(names)), settings._from_environment(os.environ)
    active = Settings.load()
    rows = []
    for name in names:
        source = "default"
        if name in environment:
            source = f"environment, {ENVIRONMENT[name]}"
        elif name in file:
            source = f"file, {os.environ[CONFIG_FILE_VARIABLE]}"
        rows.append({"name": name, "value": plain(getattr(active, name)), "source": source})
    return rows


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Variables that look like ours and mean nothing: probably a typing error, which would otherwise be silent."""
    known = {*ENVIRONMENT.values(), *_OTHER_VARIABLES}
    return [
        f"the environment sets {name}, which means nothing to moe_core; {did_you_mean(name, known)}"
        for name in sorted(environment)
        if name.startswith("MOE_CORE_") and name not in known
    ]


def metadata_problems() -> list[str]:
    """Installed metadata that contradicts itself: two copies of a distribution, or another version than the code."""
    found: dict[str, dict[str, str]] = {}
    for dist in _metadata.distributions():
        name = str(canonicalize_name(dist.metadata["Name"] or ""))
        if name == "moe-core" or name.startswith("moe-core-"):
            found.setdefault(name, {})[str(dist.locate_file(""))] = dist.version
    problems = []
    for name, places in sorted(found.items()):
        if len(places) > 1:
            copies = ", ".join(f"{version} in {place}" for place, version in sorted(places.items()))
            problems.append(f"{name} is installed {len(places)} times: {copies}; uninstall the one that you do not use")
    core = set(found.get("moe-core", {}).values())
    if not core:
        problems.append(f"moe-core is not installed: it runs from {Path(__file__).parents[2]}, without metadata")
    if core and __version__ not in core:
        problems.append(
            f"the metadata says moe-core {', '.join(sorted(core))}, the code is {__version__}: stale; install it again"
        )
    return problems


def core_dependencies() -> list[dict[str, Any]]:
    """What moe-core itself requires, from its metadata."""
    rows = []
    for line in _requirements_of_core():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = _metadata.version(requirement.name)
        fits = version is not None and requirement.specifier.contains(version, prereleases=True)
        problem = None if fits else f"{requirement} is needed, found {version or 'nothing'}"
        rows.append(_dependency("moe-core", requirement.name, version, problem, None))
    return rows


def _requirements_of_core() -> list[str]:
    for entry in _metadata.distributions():
        if canonicalize_name(entry.metadata["Name"] or "") == "moe-core":
            return _metadata.requirements(entry)
    return []


def vendor_dependencies(registry: Registry) -> list[dict[str, Any]]:
    """What each component's `Requires` ask for, and whether it is there. Nothing is imported."""
    rows = []
    specs: list[Component] = [*registry.dispatchers.values(), *registry.runners.values()]
    specs += registry.fused_paths.values()
    for spec in specs:
        for requires in spec.support.requires:
            reasons = requires.why_not(spec.subject)
            version = _metadata.version(requires.distribution or re.sub(r"[._]", "-", requires.module))
            problem = f"[{reasons[0].code}] {reasons[0].message}" if reasons else None
            rows.append(_dependency(spec.subject, requires.module, version, problem, requires.hint))
    return rows


def _dependency(owner: str, module: str, version: str | None, problem: str | None, hint: str | None) -> dict[str, Any]:
    state = "missing" if problem else "ok"
    return {"for": owner, "module": module, "state": state, "version": version, "problem": problem, "hint": hint}
