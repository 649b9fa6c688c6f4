"""What `moe-core doctor` asks of the installed MoRI: whether it loads, and takes the calls that this plugin makes."""

from __future__ import annotations

from collections.abc import Callable

from moe_core.capability import Requires
from moe_core.doctor import DoctorCheck, DoctorResult
from moe_core.errors import BindError


def checks(requirements: tuple[Requires, Requires]) -> tuple[DoctorCheck, ...]:
    """One for each interface; where MoRI is not installed there is nothing to check."""
    first, second = requirements
    return (
        DoctorCheck("mori: the first interface", _check(first, second=False)),
        DoctorCheck("mori: the second interface", _check(second, second=True)),
    )


def _check(requirement: Requires, *, second: bool) -> Callable[[], DoctorResult]:
    def run() -> DoctorResult:
        absent = requirement.why_not("dispatcher:mori")
        if absent:
            return DoctorResult(True, f"not here, nothing to check: {absent[0].message}", absent[0].hint)
        from moe_core_mori import calls

        try:
            calls.check(*((calls.V2,) if second else (calls.V1, calls.ASYNCHRONOUS)))
        except BindError as error:
            return DoctorResult(False, error.message, error.hint)
        return DoctorResult(True, "loads, and takes every call")

    return run
