"""Writing the folder of a new plugin from the templates in `moe_core/_templates/plugin`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib import resources
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING, Final

from moe_core._version import __version__
from moe_core.errors import ConfigError
from moe_core.vocabulary import ENTRY_POINT_GROUP, PLUGIN_API

if TYPE_CHECKING:
    from moe_core.registry import Registry

_NAME: Final = re.compile(r"[a-z][a-z0-9_]*")

#: kind -> template (below _templates/plugin) -> path in the new folder, where ${package} is the import name.
FILES: Final[dict[str, dict[str, str]]] = {
    "runner": {
        "pyproject.toml.tmpl": "pyproject.toml",
        "LICENSE.tmpl": "LICENSE",
        "runner/README.md.tmpl": "README.md",
        "runner/init.py.tmpl": "src/${package}/__init__.py",
        "runner/plugin.py.tmpl": "src/${package}/plugin.py",
        "runner/runner.py.tmpl": "src/${package}/runner.py",
        "runner/kernels.py.tmpl": "src/${package}/kernels.py",
        "runner/adapters.py.tmpl": "src/${package}/adapters.py",
        "runner/weights.py.tmpl": "src/${package}/weights.py",
        "py.typed.tmpl": "src/${package}/py.typed",
        "test_conformance.py.tmpl": "tests/test_conformance.py",
    },
    "dispatcher": {
        "pyproject.toml.tmpl": "pyproject.toml",
        "LICENSE.tmpl": "LICENSE",
        "dispatcher/README.md.tmpl": "README.md",
        "dispatcher/init.py.tmpl": "src/${package}/__init__.py",
        "dispatcher/plugin.py.tmpl": "src/${package}/plugin.py",
        "dispatcher/dispatcher.py.tmpl": "src/${package}/dispatcher.py",
        "py.typed.tmpl": "src/${package}/py.typed",
        "test_conformance.py.tmpl": "tests/test_conformance.py",
    },
}


@dataclass(frozen=True, slots=True)
class NewPlugin:
    """What was written."""

    folder: Path
    files: tuple[str, ...]


def create_plugin(name: str, kind: str, directory: Path, registry: Registry | None = None) -> NewPlugin:
    """Write `directory`/moe-core-NAME. kind: "runner" or "dispatcher". Nothing is written where anything is wrong."""
    check_name(name, registry)
    if kind not in FILES:
        raise ConfigError(f"unknown kind of plugin {kind!r}", hint="use 'runner' or 'dispatcher'")
    words = variables(name, kind)
    folder = directory / words["distribution"]
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{str(folder)!r} exists and is not a folder", hint="choose another --directory")
    if folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"the folder {str(folder)!r} exists and is not empty", hint="choose another --directory")
    source = resources.files("moe_core") / "_templates" / "plugin"
    contents = {
        Template(target).substitute(words): Template(
            source.joinpath(*template.split("/")).read_text(encoding="utf-8")
        ).substitute(words)
        for template, target in FILES[kind].items()
    }
    try:
        for path, text in contents.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{str(folder)!r} cannot be written: {error.strerror}") from error
    return NewPlugin(folder, tuple(contents))


def variables(name: str, kind: str) -> dict[str, str]:
    """The words of the templates."""
    major, minor = (int(part) for part in __version__.split(".")[:2])
    # Before 1.0 a minor version may change the interface.
    following = f"{major + 1}" if major else f"0.{minor + 1}"
    return {
        "name": name,
        "kind": kind,
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "NAME": name.upper(),
        "package": f"moe_core_{name}",
        "distribution": f"moe-core-{name.replace('_', '-')}",
        "requirement": f"moe-core>={major}.{minor},<{following}",
        "version": __version__,
        "api": f"{PLUGIN_API[0]}.{PLUGIN_API[1]}",
        "api_tuple": f"({PLUGIN_API[0]}, {PLUGIN_API[1]})",
        "group": ENTRY_POINT_GROUP,
    }


def check_name(name: str, registry: Registry | None = None) -> None:
    """Raise ConfigError for a name that cannot be a plugin's, or that is taken."""
    if not _NAME.fullmatch(name):
        fixed = re.sub(r"\W+", "_", name.lower()).strip("_")
        fixed = fixed.removeprefix("moe_core_")
        good = _NAME.fullmatch(fixed)
        raise ConfigError(
            f"{name!r} cannot be the name of a plugin: it becomes a Python package and the name of a backend",
            hint="use lower-case letters, digits and underscores, starting with a letter"
            + (f": {fixed!r}" if good else ""),
        )
    if name.startswith("moe_core"):
        raise ConfigError(f"{name!r} would become the package moe_core_{name}", hint="leave the prefix out")
    if name.endswith("_") or "__" in name:
        raise ConfigError(f"{name!r} cannot be part of the name of a distribution", hint="use single underscores")
    if registry is not None:
        record = next((record for record in registry.records if record.name == name), None)
        if record is not None:
            raise ConfigError(
                f"a plugin called {name!r} is installed already: {record.where}", hint="choose another name"
            )
        for kind, table in (("runner", registry.runners), ("dispatcher", registry.dispatchers)):
            if name in table:
                owner = registry.owner(kind, name)
                raise ConfigError(f"plugin {owner!r} has a {kind} called {name!r}", hint="choose another name")
    if find_spec(f"moe_core_{name}") is not None:
        raise ConfigError(f"a package called moe_core_{name} is installed already", hint="choose another name")
