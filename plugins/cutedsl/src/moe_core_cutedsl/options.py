"""The options of a runner, with their values checked when a plan is bound. Imports no torch and no vendor package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from moe_core.errors import ConfigError


def choice(options: Mapping[str, Any], runner: str, name: str, allowed: tuple[Any, ...]) -> Any:
    """The value of an option; the first of `allowed` where it is not given. Raises ConfigError for any other value."""
    value = options.get(name, allowed[0])
    if not any(type(value) is type(known) and value == known for known in allowed):
        known = " or ".join(repr(each) for each in allowed)
        raise ConfigError(f"the option {name!r} of {runner!r} is {value!r}", hint=f"it takes {known}")
    return value
