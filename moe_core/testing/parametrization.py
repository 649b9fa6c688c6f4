"""`parametrize_with_checks`: all checks of a plugin as cases of one pytest test."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from moe_core.errors import MoeCoreError
from moe_core.registry import Registry

if TYPE_CHECKING:
    from moe_core.testing.catalog import Check

F = TypeVar("F", bound=Callable[..., Any])


def parametrize_with_checks(
    plugin: str,
    *,
    expected_failures: Mapping[str, str] | None = None,
    registry: Registry | None = None,
    device: str | None = None,
) -> Callable[[F], F]:
    """A decorator for a test with one argument, `check`, to be called.

        @parametrize_with_checks("acme", expected_failures={"numerics.scheme[mxfp4]": "notyet: needs acme 2"})
        def test_conformance(check):
            check()

    expected_failures: check id, or "component/check id" -> a reason that starts with notimpl:, notyet: or never:. They
    join those of the plugin's own profile. An unknown id is an error, an expected failure that passes is a failure.
    """
    try:
        import pytest
    except ImportError as error:
        raise MoeCoreError("parametrize_with_checks needs pytest", hint="pip install 'moe-core[testing]'") from error
    from moe_core.testing.catalog import expectation, list_checks
    from moe_core.testing.registration import CheckFailed

    parameters = []
    for check in list_checks(plugin, registry=registry, device=device, expected_failures=expected_failures):
        why = expectation(check, expected_failures)
        marks = [] if why is None else [pytest.mark.xfail(reason=why, raises=CheckFailed, strict=True)]
        parameters.append(pytest.param(_skipping(check), id=check.name, marks=marks))
    decorator: Callable[[F], F] = pytest.mark.parametrize("check", parameters)
    return decorator


def _skipping(check: Check) -> Check:
    import pytest

    from moe_core.testing.catalog import Check
    from moe_core.testing.registration import CheckSkipped

    class PytestCheck(Check):
        """A check whose skip is pytest's."""

        def __call__(self) -> None:
            __tracebackhide__ = True
            try:
                self.perform()
            except CheckSkipped as error:
                pytest.skip(str(error))

    return PytestCheck(check.definition, check.case)
