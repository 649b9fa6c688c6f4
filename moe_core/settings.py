"""Choices that a person makes beside the layer itself. Code beats context beats environment beats file.

Everything is read when a registry or a plan is made, never in a forward.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Final

from moe_core._frozen import FrozenDict
from moe_core.errors import ConfigError, did_you_mean
from moe_core.vocabulary import Maturity

#: Environment variable of each setting that has one.
ENVIRONMENT: Final[Mapping[str, str]] = {
    "plugins": "MOE_CORE_PLUGINS",
    "disable": "MOE_CORE_DISABLE",
    "strict": "MOE_CORE_STRICT",
    "check": "MOE_CORE_CHECK",
    "runner": "MOE_CORE_RUNNER",
    "dispatcher": "MOE_CORE_DISPATCHER",
    "path": "MOE_CORE_PATH",
    "measurements": "MOE_CORE_MEASUREMENTS",
    "tuning": "MOE_CORE_TUNING",
    "min_maturity": "MOE_CORE_MIN_MATURITY",
    "allow_last_resort": "MOE_CORE_ALLOW_LAST_RESORT",
}
#: Names the settings file: a TOML file with a [moe_core] table, or a pyproject.toml with [tool.moe_core].
CONFIG_FILE_VARIABLE: Final = "MOE_CORE_CONFIG"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings with their defaults.

    plugins: names to load (None: all installed; empty: none). disable: names never to load. strict: a broken or
    duplicate plugin is an error. check: verify the contract on every call (slow). runner, dispatcher, path ("fused",
    "split" or "whole"): force a choice; it raises where it cannot be honored. measurements: a file written by
    `moe-core bench --save`, used to rank by time. tuning: a file written by `moe-core tune --store` (or a folder of
    them), which the runner reads when it is bound. min_maturity: exclude backends verified less than this on the
    architecture. allow_last_resort: whether a correct-but-slow runner may be chosen without being named.
    options: runner or dispatcher name -> its own options.
    """

    plugins: tuple[str, ...] | None = None
    disable: tuple[str, ...] = ()
    strict: bool = False
    check: bool = False
    runner: str | None = None
    dispatcher: str | None = None
    path: str | None = None
    measurements: str | None = None
    tuning: str | None = None
    min_maturity: Maturity = Maturity.UNTESTED
    allow_last_resort: bool = True
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        # Code may say what a file may: a list of names, "executed", a path object.
        for f in fields(self):
            value = getattr(self, f.name)
            if value is not None:
                object.__setattr__(self, f.name, _parse(f.name, value, "Settings"))
        if self.path not in (None, "fused", "split", "whole"):
            raise ConfigError(
                f"unknown path {self.path!r}", hint=did_you_mean(self.path or "", ("fused", "split", "whole"))
            )

    @classmethod
    def load(cls, **explicit: Any) -> Settings:
        """The settings in force: `explicit` arguments, then `override(...)` contexts, the environment, the file."""
        known = {f.name for f in fields(cls)}
        for name in explicit:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r}", hint=did_you_mean(name, known))
        values = _from_file(known) | _from_environment(os.environ) | _CONTEXT.get() | explicit
        return cls(**values)


_CONTEXT: ContextVar[dict[str, Any]] = ContextVar("moe_core_settings", default={})  # noqa: B039 - never mutated


@contextmanager
def override(**values: Any) -> Iterator[Settings]:
    """Settings for every plan made in the block: `with moe_core.override(runner="triton"): ...`."""
    Settings.load(**values)  # refuse bad values here, where they were written
    token = _CONTEXT.set(_CONTEXT.get() | values)
    try:
        yield Settings.load()
    finally:
        _CONTEXT.reset(token)


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, variable in ENVIRONMENT.items():
        text = environment.get(variable)
        # An empty allow-list means "no plugin"; anywhere else empty means "not set".
        if text is not None and (text.strip() or name == "plugins"):
            values[name] = _parse(name, text, variable)
    return values


def _from_file(known: set[str]) -> dict[str, Any]:
    named = os.environ.get(CONFIG_FILE_VARIABLE)
    if not named:
        return {}
    path = Path(named)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{CONFIG_FILE_VARIABLE} names {named!r}, which cannot be read: {error.strerror}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{CONFIG_FILE_VARIABLE} names {named!r}, which is not valid TOML: {error}") from error
    table = document.get("moe_core", document.get("tool", {}).get("moe_core", {}))
    for name in table:
        if name not in known:
            raise ConfigError(f"unknown setting {name!r} in {named}", hint=did_you_mean(name, known))
    values = {name: _parse(name, value, named) for name, value in table.items()}
    return values


def _parse(name: str, value: Any, source: str) -> Any:
    if name in ("plugins", "disable"):
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list | tuple | set | frozenset) or not all(isinstance(item, str) for item in items):
            raise ConfigError(f"{source} sets {name} to {value!r}", hint="list names of plugins")
        return tuple(item.strip() for item in items if item.strip())
    if name == "options":
        if not isinstance(value, Mapping) or not all(isinstance(given, Mapping) for given in value.values()):
            raise ConfigError(f"{source} sets options to {value!r}", hint="write {'cpu': {'pack_weights': False}}")
        return FrozenDict({owner: FrozenDict(given) for owner, given in value.items()})
    if name in ("strict", "check", "allow_last_resort"):
        if isinstance(value, bool):
            return value
        lowered = str(value).strip().lower()
        if lowered in ("1", "true", "yes", "on"):
            return True
        if lowered in ("0", "false", "no", "off"):
            return False
        raise ConfigError(f"{source} sets {name} to {value!r}", hint="use 1 or 0")
    if name == "min_maturity":
        try:
            return Maturity(str(value).strip())
        except ValueError:
            raise ConfigError(
                f"{source} sets min_maturity to {value!r}", hint=did_you_mean(str(value), list(Maturity))
            ) from None
    if not isinstance(value, str | os.PathLike):
        raise ConfigError(f"{source} sets {name} to {value!r}", hint="give a name")
    return os.fspath(value).strip()
