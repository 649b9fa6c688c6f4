"""Every exception that moe_core raises on purpose.

    MoeCoreError
    |-- ConfigError            a setting, name or shape that makes no sense (often with "did you mean")
    |-- PluginError            a plugin cannot be used
    |   |-- PluginLoadError        importing it failed, or strict mode met a broken plugin
    |   |-- PluginApiError         written for another plugin API
    |   |-- PluginConflictError    two plugins claim one name
    |   `-- SpecError              a spec is invalid, or names something that does not exist
    |-- SelectionError         no plan can be made; carries the resolution with every reason
    |   |-- NoUsableBackend        nothing installed can run the request
    |   |-- UnsupportedOverride    the backend that was asked for by name cannot run it
    |   `-- RankDisagreement       ranks resolved to different plans
    |-- BindError              the chosen plan cannot be bound
    |   |-- DependencyError        a target could not be imported
    |   |-- LayoutMismatch         weights in another scheme or layout than the runner declared
    |   `-- WeightError            wrong shapes, dtypes, devices or strides of weights
    |-- ContractViolation      a value broke the agreed terms (bad input; the full check is MOE_CORE_CHECK=1)
    `-- CommunicationError     a collective failed or timed out

`str(error)` says what was asked, what was found and what to do. Catch `MoeCoreError` to catch them all.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_core.capability import Reason
    from moe_core.resolution import Resolution


class MoeCoreError(Exception):
    """Base class. `hint` is what to do next, already part of the message."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(f"{message}\n  -> {hint}" if hint else message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries (workers, pytest-xdist); the default would lose the keywords.
        return (_rebuild, (type(self), self.args, self.__dict__))


def _rebuild(cls: type[MoeCoreError], args: tuple[object, ...], state: dict[str, object]) -> MoeCoreError:
    error = cls.__new__(cls, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(MoeCoreError):
    """A configuration, setting or name is wrong."""


class PluginError(MoeCoreError):
    """A plugin cannot be used."""


class PluginLoadError(PluginError):
    """Importing or registering a plugin failed."""


class PluginApiError(PluginError):
    """A plugin was written for another plugin API."""


class PluginConflictError(PluginError):
    """Two plugins claim the same name."""


class SpecError(PluginError):
    """A spec is invalid, or refers to something that does not exist."""


class SelectionError(MoeCoreError):
    """No plan can be made for a request. `resolution` holds every candidate, `reasons` those that matter."""

    def __init__(
        self,
        message: str,
        *,
        hint: str | None = None,
        resolution: Resolution | None = None,
        reasons: Sequence[Reason] = (),
    ) -> None:
        super().__init__(message, hint=hint)
        self.resolution = resolution
        self.reasons = tuple(reasons)


class NoUsableBackend(SelectionError):
    """Nothing that is installed can run the request."""


class UnsupportedOverride(SelectionError):
    """A backend was asked for by name and cannot run the request."""


class RankDisagreement(SelectionError):
    """The ranks of one layer resolved to different plans."""


class BindError(MoeCoreError):
    """The chosen plan cannot be bound to this process or these weights."""


class DependencyError(BindError):
    """A target of a spec could not be imported."""


class LayoutMismatch(BindError):
    """Prepared weights carry another scheme or layout than the runner declared."""


class WeightError(BindError):
    """Weights of a wrong shape, dtype, device or stride."""


class ContractViolation(MoeCoreError):
    """A value broke the agreed terms."""


class CommunicationError(MoeCoreError):
    """A collective failed or timed out: another rank is dead, late, or elsewhere."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the close matches first, else everything that is known."""
    options = sorted({str(option) for option in known})  # members of an enum by their values
    close = difflib.get_close_matches(name, options, n=3, cutoff=0.6)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(options) if options else "nothing of that kind is known here"
