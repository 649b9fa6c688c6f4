"""`list_checks`: every check of every component of a plugin, as callables."""

from __future__ import annotations

import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from moe_core.errors import ConfigError, did_you_mean
from moe_core.registry import Registry, default_registry
from moe_core.testing.case import Case
from moe_core.testing.components import components, find_plugin, parameters
from moe_core.testing.profile import ConformanceProfile, check_reasons
from moe_core.testing.registration import DEFINITIONS, CheckFailed, CheckSkipped, Definition, Refused
from moe_core.testing.stage import Stage
from moe_core.testing.tolerances import loosened


@dataclass(frozen=True)
class Check:
    """One check of one component. Call it: it raises CheckFailed, or CheckSkipped where it cannot be made here."""

    definition: Definition
    case: Case

    @property
    def id(self) -> str:
        """The stable name, "contract.zero_tokens[standard/fused]"."""
        param = self.case.param
        return f"{self.definition.id}[{param}]" if param else self.definition.id

    @property
    def component(self) -> str:
        """What it is made on, "runner:cpu"."""
        return self.case.component.id

    @property
    def name(self) -> str:
        """Unique within a plugin: "runner:cpu/contract.zero_tokens[standard/fused]"."""
        return f"{self.component}/{self.id}"

    @property
    def doc(self) -> str:
        """What is checked."""
        return self.definition.doc

    @property
    def computes(self) -> bool:
        """Whether it says something about computed values."""
        return "run" in self.definition.needs

    def __call__(self) -> None:
        self.perform()

    def perform(self) -> Refused | None:
        """As a call; returns the refusal where the capability is not declared."""
        from moe_core.testing.refusals import unless_declared

        try:
            for need in self.definition.needs:
                token = need.replace("{}", self.case.param)
                if token in ("run", "cuda"):
                    site = self.case.site
                    if token == "cuda" and site.device.partition(":")[0] != "cuda":
                        raise CheckSkipped(f"needs a CUDA or ROCm device, this runs on {site.device}")
                elif (refusal := unless_declared(self.case, token)) is not None:
                    return refusal
            return self.definition.function(self.case)
        except CheckSkipped:
            raise
        except AssertionError as error:
            raise CheckFailed(self._message(str(error))) from error
        except Exception as error:
            place = "".join(traceback.format_tb(error.__traceback__)[-2:]).rstrip()
            raise CheckFailed(self._message(f"{type(error).__name__}: {error}\n{place}")) from error

    def _message(self, what: str) -> str:
        return f"{self.component} does not pass {self.id}\n  checked: {self.doc}\n  found:   {what}"

    def __repr__(self) -> str:
        return f"<Check {self.name}>"


def list_checks(
    plugin: str,
    *,
    registry: Registry | None = None,
    device: str | None = None,
    expected_failures: Mapping[str, str] | None = None,
) -> list[Check]:
    """Every check of a plugin ("core", "acme"): its own hygiene, and those of all its components.

    registry: where it is loaded (default: the installed plugins). device: "cpu", "cuda", ...; None lets every component
    run on the best device of this machine that it supports. `expected_failures` is looked at for unknown ids only.
    Raises ConfigError for an unknown plugin or id, PluginError for a plugin that did not load.
    """
    from moe_core.testing import checks as _checks  # registers them all

    source = registry or default_registry()
    record = find_plugin(plugin, source)
    stage = Stage(record, source, device)
    found = [
        Check(definition, Case(component, stage, param))
        for component in components(record, source)
        for definition in DEFINITIONS.values()
        if component.kind in definition.kinds
        for param in (parameters(definition.each, component, source) if definition.each else ("",))
    ]
    stage.cache["checks"] = found
    profile, _ = profile_of(stage)
    stage.profile = profile
    check_reasons(expected_failures or {})
    if unknown := unknown_ids(expected_failures or {}, found):
        raise ConfigError(
            f"expected failures name checks that plugin {plugin!r} does not have: {', '.join(map(repr, unknown))}",
            hint=did_you_mean(unknown[0], {c.id for c in found}),
        )
    assert_registered(_checks)
    return found


def assert_registered(module: object) -> None:
    """The import above is for its effect."""
    if not DEFINITIONS:
        raise ConfigError(f"{module!r} registered no check")


def unknown_ids(expected_failures: Mapping[str, str], checks: list[Check]) -> list[str]:
    """Keys that name no check."""
    known = {name for c in checks for name in (c.id, c.name)}
    return [name for name in expected_failures if name not in known]


def profile_of(stage: Stage) -> tuple[ConformanceProfile, list[str]]:
    """What the plugin's hook says, without what is wrong in it; and what is wrong in it."""
    name = stage.record.name
    failures: list[str] = []
    answers = [a for r, a in stage.source.call("moe_core_conformance", failures) if r.name == name]
    if not answers:
        return ConformanceProfile(), [line for line in failures if f"plugin {name!r}" in line]
    profile = answers[0]
    if not isinstance(profile, ConformanceProfile):
        return ConformanceProfile(), [f"moe_core_conformance returned {profile!r}, not a ConformanceProfile"]
    problems = [f"tolerances: {problem}" for problem in loosened(profile.tolerances)]
    unknown = unknown_ids(profile.expected_failures, stage.cache["checks"])
    problems += [f"expected_failures names {name!r}, which is no check of this plugin" for name in unknown]
    kept = {name: why for name, why in profile.expected_failures.items() if name not in unknown}
    tight = {k: v for k, v in profile.tolerances.items() if not loosened({k: v})}
    return ConformanceProfile(expected_failures=kept, tolerances=tight), problems


def expectation(check: Check, expected_failures: Mapping[str, str] | None) -> str | None:
    """Why a check is expected to fail, from the caller's list or the plugin's profile; None where it is not."""
    merged = {**check.case.stage.profile.expected_failures, **(expected_failures or {})}
    return merged.get(check.name, merged.get(check.id))
