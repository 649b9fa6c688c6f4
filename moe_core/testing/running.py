"""`run_checks`: all checks of a plugin without pytest, as results. The command `moe-core check` prints them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from moe_core.errors import ConfigError, did_you_mean
from moe_core.registry import Registry
from moe_core.testing.catalog import Check, expectation, list_checks
from moe_core.testing.registration import CheckFailed, CheckSkipped


@dataclass(frozen=True, slots=True)
class CheckResult:
    """What became of a check.

    outcome: "passed"; "failed"; "refused" (the capability is not declared, and selection says so: good); "skipped" (it
    cannot be made here, `detail` says why); "xfailed" (failed as expected); "xpassed" (expected to fail and passed: an
    error). seconds: how long it took.
    """

    id: str
    component: str
    outcome: str
    detail: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return self.outcome not in ("failed", "xpassed")

    def to_json(self) -> dict[str, Any]:
        """A JSON-able form."""
        return {
            "id": self.id,
            "component": self.component,
            "outcome": self.outcome,
            "detail": self.detail,
            "seconds": round(self.seconds, 4),
        }


def iter_checks(
    plugin: str,
    *,
    registry: Registry | None = None,
    select: str | Iterable[str] | None = None,
    device: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> Iterator[CheckResult]:
    """`run_checks`, one result at a time."""
    checks = list_checks(plugin, registry=registry, device=device, expected_failures=expected_failures)
    chosen = [
        c for c in checks if select is None or _selected(c, [select] if isinstance(select, str) else list(select))
    ]
    if not chosen:
        raise ConfigError(
            f"no check of plugin {plugin!r} matches {select!r}", hint=did_you_mean(str(select), _groups(checks))
        )
    computing: list[CheckResult] = []
    for check in chosen:
        result = run_check(check, expected_failures)
        if check.computes and result.outcome != "refused":
            computing.append(result)
        yield result
    if computing and all(result.outcome == "skipped" for result in computing):
        reasons = "; ".join(dict.fromkeys(result.detail for result in computing))
        yield CheckResult(
            "coverage.numerics",
            f"plugin:{plugin}",
            "skipped",
            f"every numeric check was skipped, so nothing is known about computed values: {reasons}",
            0.0,
        )


def run_checks(
    plugin: str,
    *,
    registry: Registry | None = None,
    select: str | Iterable[str] | None = None,
    device: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[CheckResult]:
    """Make all checks of a plugin. Never raises for a check that fails.

    select: groups ("numerics"), ids, components ("runner:cpu") or patterns with * of any of them. Where every numeric
    check was skipped, the last result is "coverage.numerics", skipped, and says so. Others: see `list_checks`.
    """
    return list(
        iter_checks(plugin, registry=registry, select=select, device=device, expected_failures=expected_failures)
    )


def run_check(check: Check, expected_failures: Mapping[str, str] | None = None) -> CheckResult:
    """Make one check."""
    start = time.perf_counter()
    why = expectation(check, expected_failures)
    try:
        refusal = check.perform()
    except CheckSkipped as error:
        outcome, detail = "skipped", str(error)
    except CheckFailed as error:
        outcome, detail = ("failed", str(error)) if why is None else ("xfailed", why)
    else:
        outcome, detail = ("passed", "") if refusal is None else ("refused", refusal.detail)
        if why is not None:
            outcome, detail = "xpassed", f"expected to fail ({why}), and passes: take it off the list"
    return CheckResult(check.id, check.component, outcome, detail, time.perf_counter() - start)


def _selected(check: Check, patterns: list[str]) -> bool:
    names = (check.id, check.definition.id, check.component, check.name, check.id.partition(".")[0])
    return any(name == p or fnmatchcase(name, p.replace("[", "[[]")) for name in names for p in patterns)


def _groups(checks: list[Check]) -> set[str]:
    return {name for c in checks for name in (c.id.partition(".")[0], c.component, c.definition.id)}
