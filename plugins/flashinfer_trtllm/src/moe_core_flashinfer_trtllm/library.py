"""FlashInfer, imported when a plan is bound: its entry points, and whether they still take what is passed to them."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Collection, Mapping
from functools import partial
from types import ModuleType
from typing import Any

from moe_core.errors import BindError, DependencyError

#: What the calls were written against; tests/test_trtllm_signatures.py compares them with an installed FlashInfer.
WRITTEN_FOR = "0.7.2"
_HINT = f"install flashinfer-python {WRITTEN_FOR}, or choose another runner by name"


def module(name: str = "flashinfer.fused_moe") -> ModuleType:
    """FlashInfer or a part of it. Raises DependencyError."""
    try:
        return importlib.import_module(name)
    except Exception as error:  # a missing CUDA driver or compiler raises far more than ImportError
        raise DependencyError(
            f"importing {name} failed: {type(error).__name__}: {error}",
            hint="repair flashinfer-python and what it imports, or choose another runner by name",
        ) from error


def version() -> str:
    """The imported FlashInfer's own version."""
    return str(getattr(module("flashinfer"), "__version__", "of unknown version"))


def function(name: str, place: str = "flashinfer.fused_moe") -> Callable[..., Any]:
    """One of FlashInfer's functions. Raises BindError where this version has none of that name."""
    found: Callable[..., Any] | None = getattr(module(place), name, None)
    if found is None:
        raise BindError(f"FlashInfer {version()} has no {place}.{name}", hint=_HINT)
    return found


def member(enum: str, name: str) -> Any:
    """A member of one of FlashInfer's enums: their numbers have changed between versions, their names have not."""
    found = getattr(getattr(module("flashinfer.tllm_enums"), enum, None), name, None)
    if found is None:
        raise BindError(f"FlashInfer {version()} has no {enum}.{name}", hint=_HINT)
    return found


def check_call(called: Callable[..., Any], passed: Collection[str], name: str = "") -> None:
    """Raise BindError, naming every difference, unless `called` takes exactly these keywords and asks for no other."""
    name = name or getattr(called, "__name__", str(called))
    try:
        parameters = inspect.signature(called).parameters
    except (TypeError, ValueError) as error:
        raise BindError(f"the signature of FlashInfer's {name} cannot be read: {error}", hint=_HINT) from error
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise BindError(f"FlashInfer {version()} hides the arguments of {name} behind **keywords", hint=_HINT)
    unknown = sorted(set(passed) - set(parameters))
    asked = [p.name for p in parameters.values() if p.default is p.empty and p.name not in passed]
    if unknown or asked:
        differences = [f"it does not take {', '.join(unknown)}"] if unknown else []
        differences += [f"it asks for {', '.join(asked)}"] if asked else []
        raise BindError(
            f"FlashInfer {version()} has another {name} than this plugin was written for ({WRITTEN_FOR}): "
            + " and ".join(differences),
            hint=_HINT,
        )


def bind_call(
    name: str, fixed: Mapping[str, Any], given: Collection[str], place: str = "flashinfer.fused_moe"
) -> Callable[..., Any]:
    """FlashInfer's function with `fixed` keywords, to be called with the keywords `given`. Raises BindError."""
    called = function(name, place)
    check_call(called, {*fixed, *given}, name)
    return partial(called, **fixed)
