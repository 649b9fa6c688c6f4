"""Targets for objects that have no importable place, such as a function inside a test.

Specs name their code by strings. `as_target` puts an object into this module and returns the string that finds it.
Never imports torch.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from typing import Any

_numbers = itertools.count()


def as_target(value: Callable[..., Any] | str) -> str:
    """The target of a callable (a string passes through). It stays there until the process ends."""
    if isinstance(value, str):
        return value
    readable = re.sub(r"\W", "_", getattr(value, "__name__", type(value).__name__))
    name = f"{readable}_{next(_numbers)}"
    globals()[name] = value
    return f"{__name__}:{name}"
