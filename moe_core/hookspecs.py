"""The hooks of moe_core. They are called while discovering, planning or reporting, and never in a forward.

A plugin is a module-level object whose methods are marked with `moe_core.hookimpl`, named by an entry point of the
group `moe_core.plugins`. It implements what it needs and leaves the rest; a hook may be written with fewer arguments
than its specification. Collection hooks are called plugin by plugin, so one that raises hides only itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Final

import pluggy

if TYPE_CHECKING:
    from moe_core.doctor import DoctorCheck
    from moe_core.hardware import HardwareInfo
    from moe_core.moe_plan import MoePlan
    from moe_core.quant import QuantScheme
    from moe_core.request import PlanRequest
    from moe_core.resolution import Candidate, PriorityNote, Resolution
    from moe_core.specs import (
        AdapterSpec,
        DispatcherSpec,
        FormatSpec,
        FusedPathSpec,
        FusedSpec,
        PluginInfo,
        RunnerSpec,
    )
    from moe_core.testing.profile import ConformanceProfile

PROJECT: Final = "moe_core"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def moe_core_plugin_info() -> PluginInfo:  # type: ignore[empty-body]
    """Who the plugin is, and the plugin API that it was written for. Every plugin must implement this one."""


@hookspec
def moe_core_formats() -> Iterable[FormatSpec]:  # type: ignore[empty-body]
    """Formats beside the core's, for a layout that none of those describes."""


@hookspec
def moe_core_quant_schemes() -> Iterable[QuantScheme]:  # type: ignore[empty-body]
    """Quant schemes beside the core's, each with a reference codec for the oracle."""


@hookspec
def moe_core_dispatchers() -> Iterable[DispatcherSpec]:  # type: ignore[empty-body]
    """Dispatchers."""


@hookspec
def moe_core_runners() -> Iterable[RunnerSpec]:  # type: ignore[empty-body]
    """Runner cores."""


@hookspec
def moe_core_adapters() -> Iterable[AdapterSpec]:  # type: ignore[empty-body]
    """Pre- and post-permutes. They may join anybody's format with anybody's runner."""


@hookspec
def moe_core_fused_funcs() -> Iterable[FusedSpec | FusedPathSpec]:  # type: ignore[empty-body]
    """Fused funcs (replacing pre-permute, run, post-permute) and fused paths (replacing everything)."""


@hookspec(firstresult=True)
def moe_core_detect_hardware() -> HardwareInfo | None:
    """The device of this machine, or None to let the next plugin look. The core's own detection comes last."""


@hookspec
def moe_core_adjust_priority(request: PlanRequest, candidate: Candidate) -> PriorityNote | None:
    """A change of a candidate's priority for this request, with its reason; None for no opinion. Must be pure."""


@hookspec
def moe_core_plan_bound(resolution: Resolution, plan: MoePlan) -> None:
    """Called after a plan is bound, for telemetry."""


@hookspec
def moe_core_doctor() -> Iterable[DoctorCheck]:  # type: ignore[empty-body]
    """Checks for `moe-core doctor`; running one may import heavy modules."""


@hookspec
def moe_core_conformance() -> ConformanceProfile:  # type: ignore[empty-body]
    """What the conformance kit should know: expected failures with reasons, tighter tolerances."""


@hookspec
def moe_core_doubles() -> Mapping[str, str]:  # type: ignore[empty-body]
    """Strict doubles of vendors' libraries, for tests without them: name -> target; see `moe_core.testing.double`."""


#: Hooks that return an iterable of specs; the registry collects them.
COLLECTION_HOOKS: Final[tuple[str, ...]] = (
    "moe_core_formats",
    "moe_core_quant_schemes",
    "moe_core_dispatchers",
    "moe_core_runners",
    "moe_core_adapters",
    "moe_core_fused_funcs",
)


def all_hooks() -> dict[str, Any]:
    """Name -> specification function of every hook."""
    return {name: value for name, value in globals().items() if name.startswith("moe_core_")}
