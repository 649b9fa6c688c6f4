"""The conformance kit: what every dispatcher, runner, adapter and fused func must do, as checks that anyone can run.

    from moe_core.testing import parametrize_with_checks

    @parametrize_with_checks("acme")
    def test_conformance(check):
        check()

`run_checks("acme")` does the same without pytest. `fakes` composes registries, `tolerances` holds the one table.
Importing this package imports neither torch nor pytest; its names are loaded when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moe_core.testing.catalog import Check, list_checks
    from moe_core.testing.doubles import double
    from moe_core.testing.fakes import dispatcher_like, fake_hardware, fake_plugin, runner_like
    from moe_core.testing.layers import Layer, make_layer, make_routing
    from moe_core.testing.parametrization import parametrize_with_checks
    from moe_core.testing.processes import run_ranks
    from moe_core.testing.profile import ConformanceProfile
    from moe_core.testing.registration import CheckFailed, CheckSkipped, check
    from moe_core.testing.running import CheckResult, iter_checks, run_checks
    from moe_core.testing.targets import as_target
    from moe_core.testing.tolerances import assert_close, tolerance

__all__ = [
    "Check",
    "CheckFailed",
    "CheckResult",
    "CheckSkipped",
    "ConformanceProfile",
    "Layer",
    "as_target",
    "assert_close",
    "check",
    "dispatcher_like",
    "double",
    "fake_hardware",
    "fake_plugin",
    "iter_checks",
    "list_checks",
    "make_layer",
    "make_routing",
    "parametrize_with_checks",
    "run_checks",
    "run_ranks",
    "runner_like",
    "tolerance",
]

_LAZY = {
    "Check": "catalog",
    "CheckFailed": "registration",
    "CheckResult": "running",
    "CheckSkipped": "registration",
    "ConformanceProfile": "profile",
    "Layer": "layers",
    "as_target": "targets",
    "assert_close": "tolerances",
    "check": "registration",
    "dispatcher_like": "fakes",
    "double": "doubles",
    "fake_hardware": "fakes",
    "fake_plugin": "fakes",
    "iter_checks": "running",
    "list_checks": "catalog",
    "make_layer": "layers",
    "make_routing": "layers",
    "parametrize_with_checks": "parametrization",
    "run_checks": "running",
    "run_ranks": "processes",
    "runner_like": "fakes",
    "tolerance": "tolerances",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(f"moe_core.testing.{_LAZY[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
