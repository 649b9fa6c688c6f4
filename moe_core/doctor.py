"""Checks that `moe-core doctor` runs: on this machine, with real imports. Plugins add theirs by a hook."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DoctorResult:
    """Outcome of a check. hint: what to do about it."""

    ok: bool
    detail: str
    hint: str | None = None


@dataclass(frozen=True, slots=True)
class DoctorCheck:
    """A named check. `run` may import and compute, and should take seconds at most; raising counts as failing."""

    name: str
    run: Callable[[], DoctorResult]
