"""The functions behind `import moe_core`: ask (`explain`, `resolve`) and bind (`plan`). Only binding needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from moe_core import hardware as _hardware
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import BindError, ConfigError, did_you_mean
from moe_core.hardware import HardwareInfo
from moe_core.measurements import Measurements
from moe_core.registry import Registry, default_registry
from moe_core.request import PlanRequest
from moe_core.resolution import Resolution
from moe_core.selection import resolve as _resolve
from moe_core.settings import Settings
from moe_core.vocabulary import TOPK_STANDARD, DroppedSlot, Phase, Step

if TYPE_CHECKING:
    from moe_core.binding import MoePlan
    from moe_core.weights import CanonicalWeights, WeightRequirements


def detect_hardware(registry: Registry | None = None) -> HardwareInfo:
    """The device of this machine: a plugin's answer where one has one, else the core's. Imports torch."""
    records = (registry or default_registry()).call("moe_core_detect_hardware")
    # The core's own detection always answers; a plugin that knows the device better comes before it.
    for record, found in sorted(records, key=lambda row: row[0].name == "core"):
        if isinstance(found, HardwareInfo):
            return found
        raise ConfigError(f"plugin {record.name!r} detected {found!r}, which is not a HardwareInfo")
    return _hardware.detect()


def make_request(
    config: MoeConfig,
    parallel: ParallelConfig | None = None,
    hardware: HardwareInfo | str | None = None,
    *,
    registry: Registry | None = None,
    settings: Settings | None = None,
    phases: Iterable[Phase] = (Phase.PREFILL, Phase.DECODE),
    features: Iterable[str] = (),
    hooks: Iterable[str] = (),
    graph_capture: Iterable[Phase] = (),
    no_host_sync: Iterable[Phase] = (),
    topk_format: str = TOPK_STANDARD,
    incoming: DroppedSlot = DroppedSlot.NEGATIVE,
    caller_does: Iterable[Step] = (),
    caller_can: Iterable[Step] = (),
    max_tokens: int | None = None,
    assume: Iterable[str] = (),
    **choices: Any,
) -> PlanRequest:
    """A PlanRequest with its defaults filled in. `choices` are settings: runner=, dispatcher=, path=, options=, ...

    hardware: a HardwareInfo, a profile name ("h200"), or None or "detect" for this machine.
    """
    if settings is not None and choices:
        raise ConfigError(f"give settings= or single settings ({', '.join(sorted(choices))}), not both")
    if hardware is None or hardware == "detect":
        hardware = detect_hardware(registry)
    elif isinstance(hardware, str):
        hardware = _hardware.profile(hardware)
    return PlanRequest(
        config=config,
        parallel=parallel or ParallelConfig(),
        hardware=hardware,
        phases=tuple(_phase(phase) for phase in phases),
        features=frozenset(features),
        hooks=frozenset(hooks),
        graph_capture=frozenset(_phase(phase) for phase in graph_capture),
        no_host_sync=frozenset(_phase(phase) for phase in no_host_sync),
        topk_format=topk_format,
        incoming=incoming,
        caller_does=frozenset(caller_does),
        caller_can=frozenset(caller_can),
        max_tokens=max_tokens,
        assume=frozenset(assume),
        settings=settings or Settings.load(**choices),
    )


def _phase(value: Phase | str) -> Phase:
    try:
        return Phase(value)
    except ValueError:
        raise ConfigError(f"unknown phase {value!r}", hint=did_you_mean(str(value), list(Phase))) from None


def resolve(
    config: MoeConfig,
    parallel: ParallelConfig | None = None,
    hardware: HardwareInfo | str | None = None,
    *,
    registry: Registry | None = None,
    **request: Any,
) -> Resolution:
    """What would run, and why: never raises for a layer that nothing can run (`Resolution.require` does)."""
    return resolve_request(make_request(config, parallel, hardware, registry=registry, **request), registry)


def resolve_request(request: PlanRequest, registry: Registry | None = None) -> Resolution:
    """`resolve` for a request that is already made."""
    path = request.settings.measurements
    measurements = Measurements.read(path) if path else None
    return _resolve(request, registry or default_registry(request.settings), measurements)


def explain(
    config: MoeConfig,
    parallel: ParallelConfig | None = None,
    hardware: HardwareInfo | str | None = None,
    **request: Any,
) -> str:
    """The answer of `resolve` as text: every component, every reason, the choice."""
    from moe_core.explanation import text

    return text(resolve(config, parallel, hardware, **request))


def weight_requirements(
    config: MoeConfig,
    parallel: ParallelConfig | None = None,
    hardware: HardwareInfo | str | None = None,
    *,
    registry: Registry | None = None,
    **request: Any,
) -> WeightRequirements:
    """The sizes to allocate on this rank for the runner that would be chosen, so that `plan` need not copy to pad."""
    from moe_core.binding import required_sizes

    made = make_request(config, parallel, hardware, registry=registry, **request)
    registry = registry or default_registry(made.settings)
    return required_sizes(resolve_request(made, registry), registry)


def plan(
    config: MoeConfig,
    weights: CanonicalWeights,
    parallel: ParallelConfig | None = None,
    hardware: HardwareInfo | str | None = None,
    *,
    group: Any = None,
    registry: Registry | None = None,
    **request: Any,
) -> MoePlan:
    """Choose the best combination for a layer, prepare its weights and bind it: one callable.

    weights: this rank's (see `CanonicalWeights.shard`). hardware: None means the device where the weights are.
    group: what the dispatcher communicates over (a torch.distributed process group for the core's).
    request: keywords of `make_request`. Raises ConfigError, SelectionError or BindError before any kernel runs.
    """
    from moe_core.agreement import verify_agreement
    from moe_core.binding import bind

    if hardware is None:
        # The weights say where the layer runs: on a machine with a GPU they may still be on the CPU.
        hardware = _hardware.detect_cpu() if weights.device.type == "cpu" else detect_hardware(registry)
    made = make_request(config, parallel, hardware, registry=registry, **request)
    if made.assume:
        raise BindError("assume= is for explaining hardware that is not here; a plan can take nothing for granted")
    registry = registry or default_registry(made.settings)
    resolution = resolve_request(made, registry)
    if group is not None:
        verify_agreement(resolution, group)
    return bind(resolution, weights, registry, group=group)
