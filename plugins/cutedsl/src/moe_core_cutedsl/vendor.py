"""FlashInfer's entry points: imported when a plan is bound, and held against the keywords that this plugin passes.

FlashInfer has inserted parameters in the middle of signatures from release to release, so every call is by keyword, and
a release that would not take one is found here and not in a forward.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from moe_core.errors import BindError, DependencyError

_DISTRIBUTION = "flashinfer-python"
_HINT = (
    "pip install -U flashinfer-python nvidia-cutlass-dsl; FlashInfer leaves its CuTe DSL names out, without a word, "
    "where nvidia-cutlass-dsl or triton cannot be imported"
)
_POSITIONAL = inspect.Parameter.POSITIONAL_ONLY
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


@dataclass(frozen=True, slots=True)
class Entry:
    """One function or class of FlashInfer and the keywords that it is called with.

    module, name: where it is ("Class.method" for a method, whose `self` is not counted). passed: always passed.
    through: keywords that go through its **kwargs, and must be named there by no parameter. optional: passed where the
    installed version has them; the values that older ones assume must mean the same.
    """

    module: str
    name: str
    passed: frozenset[str]
    through: frozenset[str] = field(default=frozenset())
    optional: frozenset[str] = field(default=frozenset())

    @property
    def path(self) -> str:
        """As it is written in an error."""
        return f"{self.module}.{self.name}"


def entry(
    module: str, name: str, passed: Iterable[str], *, through: Iterable[str] = (), optional: Iterable[str] = ()
) -> Entry:
    """An `Entry` from lists."""
    return Entry(module, name, frozenset(passed), frozenset(through), frozenset(optional))


def version() -> str:
    """Of the installed FlashInfer, for errors."""
    try:
        return metadata.version(_DISTRIBUTION)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def find(module: str, name: str) -> Any:
    """An attribute ("Class.method") of a module of FlashInfer. Raises DependencyError where it is not there."""
    try:
        found: Any = importlib.import_module(module)
    except Exception as error:  # a vendor package may fail in any way while it is imported
        raise DependencyError(f"{module} cannot be imported ({type(error).__name__}: {error})", hint=_HINT) from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise DependencyError(f"the installed FlashInfer {version()} has no {module}.{name}", hint=_HINT)
        found = getattr(found, part)
    return found


def problems(parameters: Mapping[str, inspect.Parameter], wanted: Entry) -> list[str]:
    """Why a function with these parameters (without `self`) cannot be called as `wanted` says; empty where it can."""
    named = {n for n, p in parameters.items() if p.kind not in (*_VARIADIC, _POSITIONAL)}
    takes_more = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    lacking = wanted.passed - named
    if not takes_more:
        lacking |= wanted.through - named
    found = [f"it takes no {', '.join(sorted(lacking))}"] if lacking else []
    given = wanted.passed | wanted.through | wanted.optional
    needs = [
        name
        for name, p in parameters.items()
        if p.default is inspect.Parameter.empty
        and p.kind not in _VARIADIC
        and (name not in given or p.kind is _POSITIONAL)
    ]
    if needs:
        found.append(f"it needs {', '.join(sorted(needs))}")
    return found


def load(wanted: Entry) -> Callable[..., Any]:
    """The entry point, which takes the keywords. Raises DependencyError, with every difference, where it does not."""
    found = find(wanted.module, wanted.name)
    parameters = _parameters(found, wanted)
    wrong = problems(parameters, wanted)
    if wrong:
        raise DependencyError(
            f"{wanted.path} of the installed FlashInfer {version()} is another than this plugin calls: "
            + "; ".join(wrong),
            hint="install a FlashInfer release that moe-core-cutedsl's README names, or a newer moe-core-cutedsl",
        )
    call: Callable[..., Any] = found
    return call


def has(wanted: Entry, name: str) -> bool:
    """Whether the installed version has the optional keyword `name`."""
    return name in _parameters(find(wanted.module, wanted.name), wanted)


def _parameters(found: Any, wanted: Entry) -> dict[str, inspect.Parameter]:
    try:
        parameters = dict(inspect.signature(found).parameters)
    except (TypeError, ValueError) as error:
        raise BindError(f"{wanted.path} has no signature that could be checked ({error})") from error
    if "." in wanted.name:
        parameters.pop("self", None)
    return parameters
