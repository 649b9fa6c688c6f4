"""Targets ("package.module:attribute"): loading them, and asking whether they exist without importing anything."""

from __future__ import annotations

import pkgutil
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from typing import Any

from moe_core.errors import BindError, DependencyError, MoeCoreError


def load(target: str, *, wanted_by: str) -> Any:
    """Import `target`. Raises DependencyError with the original error as its cause."""
    try:
        return pkgutil.resolve_name(target)
    except Exception as error:
        # Vendor packages raise far more than ImportError when a driver or a library is missing.
        raise DependencyError(
            f"{wanted_by} needs {target!r}, and importing it failed: {type(error).__name__}: {error}",
            hint="repair or uninstall what it imports, or choose another backend by name; `moe-core doctor` tells more",
        ) from error


def module_exists(target: str) -> bool:
    """Whether the module of `target` can be found. Imports nothing but, for a submodule, looks into folders."""
    module = target.partition(":")[0]
    top, *rest = module.split(".")
    try:
        spec = find_spec(top)
    except (ImportError, ValueError):
        return False
    for part in rest:
        spec = find_child(spec, part)
    return spec is not None


def find_child(parent: ModuleSpec | None, name: str) -> ModuleSpec | None:
    """The spec of a module inside a package, found without executing the package as find_spec("a.b") would.

    The bare name is looked up on the package's path: with a dotted one PathFinder asks sys.modules for the parent.
    """
    if parent is None or parent.submodule_search_locations is None:
        return None
    return PathFinder.find_spec(name, list(parent.submodule_search_locations))


def call(target: str, wanted_by: str, *arguments: Any) -> Any:
    """Load `target` and call it. What a plugin's code raises becomes a BindError that names it; ours pass through."""
    function = load(target, wanted_by=wanted_by)
    try:
        return function(*arguments)
    except MoeCoreError:
        raise
    except Exception as error:  # a plugin's code may raise anything
        raise BindError(f"{wanted_by}: {target} raised {type(error).__name__}: {error}") from error
