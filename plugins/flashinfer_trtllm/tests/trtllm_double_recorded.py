"""Signatures as FlashInfer 0.7.2 has them, for doubles that are written with keywords alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("trtllm_double_signatures.txt")
_LINES = [line for line in _FILE.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
SIGNATURES: dict[str, inspect.Signature] = {}


def _signature(text: str) -> inspect.Signature:
    parameters, kind = [], inspect.Parameter.POSITIONAL_OR_KEYWORD
    for word in text.split():
        if word == "*":
            kind = inspect.Parameter.KEYWORD_ONLY
            continue
        default = ... if word.endswith("=") else inspect.Parameter.empty
        parameters.append(inspect.Parameter(word.rstrip("="), kind, default=default))
    return inspect.Signature(parameters)


for _line in _LINES:
    _name, _, _text = _line.partition(": ")
    SIGNATURES[_name] = _signature(_text)


def recorded(place: str, name: str, work: Callable[[dict[str, Any]], Any]) -> Callable[..., Any]:
    """A function with the recorded signature that hands what it was called with to `work`; absent ones are `...`."""
    signature = SIGNATURES[f"{place}.{name}"]

    def function(*positional: Any, **keywords: Any) -> Any:
        if positional:
            raise AssertionError(f"{name} was called with positional arguments, whose order changes between versions")
        bound = signature.bind(**keywords)  # TypeError for what is unknown or missing
        bound.apply_defaults()
        return work(dict(bound.arguments))

    function.__name__, function.__signature__ = name, signature  # type: ignore[attr-defined]
    return function
