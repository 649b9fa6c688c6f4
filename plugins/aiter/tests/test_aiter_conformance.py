"""The conformance kit on the runner, over the double. On an AMD GPU: `moe-core check aiter`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from moe_core_aiter.testing import OnCpu, double

from moe_core.registry import Registry
from moe_core.testing import Check, parametrize_with_checks


@pytest.fixture(autouse=True, scope="module")
def _installed() -> Iterator[None]:
    with double("gfx950"):
        yield


@parametrize_with_checks("aiter", registry=Registry([OnCpu()], autoload=False), device="cpu")
def test_conformance(check: Check) -> None:
    check()
