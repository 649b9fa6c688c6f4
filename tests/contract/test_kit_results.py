"""What the kit reports: outcomes, expected failures, selection, and components that cannot run here."""

from __future__ import annotations

from typing import Any

import pytest

from moe_core.capability import Requires
from moe_core.errors import ConfigError, PluginError
from moe_core.registry import Registry
from moe_core.testing import (
    Check,
    CheckFailed,
    CheckSkipped,
    ConformanceProfile,
    fake_plugin,
    list_checks,
    parametrize_with_checks,
    run_checks,
    runner_like,
)


def registry_of(name: str = "acme", *, conformance: ConformanceProfile | None = None, **changes: Any) -> Registry:
    parts = runner_like("reference", name, formats=("standard",), **changes)
    return Registry(plugins=[fake_plugin(name, conformance=conformance, **parts)], autoload=False)


def elsewhere() -> Registry:
    """A runner for a device that this machine has not."""
    return registry_of(support={"devices": {"abacus": ("*",)}})


def test_checks_have_stable_unique_names_and_docs() -> None:
    checks = list_checks("core", registry=Registry(autoload=False))
    names = [check.name for check in checks]
    assert len(names) == len(set(names))
    assert all(check.doc and "." in check.id for check in checks)
    assert {check.component for check in checks} >= {
        "plugin:core",
        "runner:cpu",
        "dispatcher:standard",
        "format:grouped",
    }
    known = {check.name for check in checks}
    for name in (
        "runner:reference/contract.negative_ids_contribute_zero[batched/split]",
        "runner:cpu/numerics.fused_equals_split",
        "runner:cpu/numerics.scheme[fp8_block128]",
        "dispatcher:standard/dispatcher.round_trip[standard]",
        "plugin:core/hygiene.light_import",
    ):
        assert name in known


def test_outcomes() -> None:
    registry = Registry(autoload=False)
    select = ["numerics.scheme[bf16]", "numerics.scheme[nvfp4]", "graph.capture[decode]", "overhead.frames"]
    found = {(r.component, r.id): r for r in run_checks("core", registry=registry, select=select, device="cpu")}
    assert found["runner:cpu", "numerics.scheme[bf16]"].outcome == "passed"
    assert found["runner:cpu", "numerics.scheme[nvfp4]"].outcome == "refused"
    assert "[quant.scheme]" in found["runner:cpu", "numerics.scheme[nvfp4]"].detail
    assert found["runner:reference", "overhead.frames[standard/split]"].outcome == "skipped"
    assert all(r.ok for r in found.values())
    assert all(r.seconds >= 0 and set(r.to_json()) >= {"id", "component", "outcome"} for r in found.values())


def test_a_scheme_whose_default_group_is_not_declared_is_checked_with_one_that_is() -> None:
    from moe_core.testing.layer_search import Search, candidates

    registry = registry_of(support={"schemes": frozenset({"int4_w4a16"}), "group_sizes": frozenset({32, 64})})
    support, schemes = registry.runners["acme"].support, registry.schemes
    found = {c.group_size for c in candidates(support, Search(scheme="int4_w4a16"), schemes, None)}
    assert found == {32}
    everything = registry.runners["reference"].support
    found = {c.group_size for c in candidates(everything, Search(scheme="int4_w4a16"), schemes, None)}
    assert found == {None}


def test_component_that_cannot_run_here_is_not_absent() -> None:
    results = run_checks("acme", registry=elsewhere())
    by_group: dict[str, set[str]] = {}
    for result in results:
        by_group.setdefault(result.id.partition(".")[0], set()).add(result.outcome)
    assert "skipped" in by_group["contract"]
    assert by_group["contract"] <= {"skipped", "refused"}  # refused: what is not declared
    assert by_group["weights"] <= {"skipped", "refused"}
    assert by_group["capability"] <= {"passed", "refused"}
    assert "refused" in {r.outcome for r in results if r.id.startswith("numerics.")} or by_group["numerics"] == {
        "skipped"
    }
    assert all("abacus" in r.detail for r in results if r.outcome == "skipped" and r.id != "hygiene.light_explain")
    assert results[-1].id == "coverage.numerics"
    assert "nothing is known about computed values" in results[-1].detail


def test_missing_dependency_is_the_reason_of_the_skip() -> None:
    needs = (Requires(module="no_such_vendor", hint="buy one"),)
    results = run_checks("acme", registry=registry_of(support={"requires": needs}), select="contract.one_token")
    assert {r.outcome for r in results} == {"skipped"}
    assert "'no_such_vendor' is not installed" in results[0].detail


def test_expected_failures_from_the_caller() -> None:
    registry = elsewhere()
    with pytest.raises(ConfigError, match="did you mean") as error:
        list_checks("acme", registry=registry, expected_failures={"numerics.bais": "notyet: no"})
    assert "'numerics.bais'" in str(error.value)
    with pytest.raises(ConfigError, match="notimpl:, notyet:, never:"):
        list_checks("acme", registry=registry, expected_failures={"numerics.bias": "someday"})


BROKEN = {"factory": lambda binding: None}


def test_expected_failure_that_fails_and_one_that_passes() -> None:
    registry = registry_of(**BROKEN)
    listed = {"numerics.bias": "notyet: acme 2", "runner:acme/hygiene.frozen": "never: a lie"}
    results = run_checks(
        "acme", registry=registry, select=["numerics.bias", "hygiene.frozen"], expected_failures=listed
    )
    outcomes = {(r.component, r.id): r for r in results}
    assert outcomes["runner:acme", "numerics.bias"].outcome == "xfailed"
    assert outcomes["runner:acme", "numerics.bias"].detail == "notyet: acme 2"
    assert outcomes["runner:acme", "hygiene.frozen"].outcome == "xpassed"
    assert not outcomes["runner:acme", "hygiene.frozen"].ok


def test_expected_failures_from_the_profile() -> None:
    profile = ConformanceProfile(expected_failures={"numerics.bias": "never: the hardware has none"})
    registry = registry_of(conformance=profile, **BROKEN)
    assert [r.outcome for r in run_checks("acme", registry=registry, select="numerics.bias")] == ["xfailed"]


def test_profile_that_names_an_unknown_check() -> None:
    profile = ConformanceProfile(expected_failures={"numerics.nothing": "never: it is not there"})
    results = run_checks("acme", registry=registry_of(conformance=profile), select="hygiene.profile")
    assert [r.outcome for r in results] == ["failed"]
    assert "'numerics.nothing', which is no check" in results[0].detail


def test_unknown_plugin_and_broken_plugin() -> None:
    with pytest.raises(ConfigError, match="no plugin is called 'acne'"):
        list_checks("acne", registry=registry_of())
    broken = fake_plugin("bad", hooks={"moe_core_runners": lambda: 1 / 0})
    with pytest.raises(PluginError, match="is broken: ZeroDivisionError"):
        list_checks("bad", registry=Registry(plugins=[broken], autoload=False))


def test_selection() -> None:
    registry = Registry(autoload=False)
    by_component = run_checks("core", registry=registry, select="format:*")
    assert {r.component for r in by_component} == {"format:standard", "format:batched", "format:grouped"}
    lane = run_checks("core", registry=registry, select="contract.one_token[*fused]")
    assert [r.id for r in lane] == ["contract.one_token[standard/fused]"]
    with pytest.raises(ConfigError, match="no check of plugin 'core' matches"):
        run_checks("core", registry=registry, select="contract.nothing")


def test_a_check_raises_what_it_found() -> None:
    check = next(c for c in list_checks("acme", registry=registry_of(**BROKEN)) if c.id == "numerics.form[gated]")
    with pytest.raises(CheckFailed) as error:
        check()
    assert "runner:acme does not pass numerics.form[gated]" in str(error.value)
    assert check.doc in str(error.value)
    skipped = next(c for c in list_checks("acme", registry=elsewhere()) if c.id == "numerics.form[gated]")
    with pytest.raises(CheckSkipped, match="cannot run on this machine"):
        skipped()


def marks_of(function: Any) -> dict[str, Any]:
    (mark,) = function.pytestmark
    return {parameter.id: parameter for parameter in mark.args[1]}


def test_parametrize_marks_expected_failures_strictly() -> None:
    @parametrize_with_checks("acme", expected_failures={"numerics.bias": "notyet: no"}, registry=registry_of())
    def test_conformance(check: Check) -> None:
        check()

    parameters = marks_of(test_conformance)
    (mark,) = parameters["runner:acme/numerics.bias"].marks
    assert mark.name == "xfail"
    assert mark.kwargs["strict"] is True
    assert mark.kwargs["reason"] == "notyet: no"
    assert not parameters["runner:acme/numerics.routed_scaling"].marks


def test_parametrize_skips_as_pytest_does() -> None:
    @parametrize_with_checks("acme", registry=elsewhere())
    def test_conformance(check: Check) -> None:
        check()

    parameter = marks_of(test_conformance)["runner:acme/contract.zero_tokens[standard/split]"]
    with pytest.raises(pytest.skip.Exception, match="cannot run on this machine"):
        parameter.values[0]()
