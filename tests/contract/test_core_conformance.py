"""The core passes its own conformance kit, written as a third party would write it."""

from __future__ import annotations

from moe_core.registry import Registry
from moe_core.testing import Check, parametrize_with_checks
from moe_core.testing.dispatchers import plugin


@parametrize_with_checks("core")
def test_core(check: Check) -> None:
    check()


@parametrize_with_checks("testing", registry=Registry(plugins=[plugin], autoload=False))
def test_the_dispatchers_of_the_kit(check: Check) -> None:
    check()
