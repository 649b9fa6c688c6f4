"""The functions behind `import moe_core`: ask (`explain`, `resolve`) and bind (`plan`). Only binding needs torch."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypeVar

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
    from moe_core.moe_plan import MoePlan
    from moe_core.weights import CanonicalWeights, WeightRequirements

E = TypeVar("E", bound=StrEnum)


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
    input_scales: bool | None = None,
    assume: Iterable[str] = (),
    **choices: Any,
) -> PlanRequest:
    """A PlanRequest with its defaults filled in. `choices` are settings: runner=, dispatcher=, path=, options=, ...

    hardware: a HardwareInfo, a profile name ("h200"), or None or "detect" for this machine.
    """
    if parallel is not None and not isinstance(parallel, ParallelConfig):
        raise ConfigError(f"parallel must be a ParallelConfig, got {parallel!r}", hint="ParallelConfig(ep_size=8, ...)")
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
        phases=tuple(_member(Phase, "phase", p) for p in _sequence(phases)),
        features=_names(features),
        hooks=_names(hooks),
        graph_capture=frozenset(_member(Phase, "phase", p) for p in _names(graph_capture)),
        no_host_sync=frozenset(_member(Phase, "phase", p) for p in _names(no_host_sync)),
        topk_format=topk_format,
        incoming=_member(DroppedSlot, "incoming", incoming),
        caller_does=frozenset(_member(Step, "step", step) for step in _names(caller_does)),
        caller_can=frozenset(_member(Step, "step", step) for step in _names(caller_can)),
        max_tokens=max_tokens,
        input_scales=input_scales,
        assume=_names(assume),
        settings=settings or Settings.load(**choices),
    )


def _sequence(values: Iterable[Any]) -> tuple[Any, ...]:
    # A string is one name, not its letters.
    return (values,) if isinstance(values, str) else tuple(values)


def _names(values: Iterable[Any]) -> frozenset[Any]:
    return frozenset(_sequence(values))


def _member(kind: type[E], what: str, value: Any) -> E:
    try:
        return kind(value)
    except ValueError:
        known = [str(member) for member in kind]
        raise ConfigError(f"unknown {what} {str(value)!r}", hint=did_you_mean(str(value), known)) from None


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
    from moe_core.agreement import everywhere, verify_agreement
    from moe_core.binding import bind

    if not isinstance(config, MoeConfig) or not hasattr(weights, "w13"):
        raise ConfigError(
            f"plan takes a MoeConfig and CanonicalWeights, got {type(config).__name__} and {type(weights).__name__}",
            hint="moe_core.preset('olmoe') or MoeConfig.from_hf(dir); CanonicalWeights(w13=..., w2=...)",
        )

    def choose() -> tuple[Resolution, Registry]:
        # The weights say where the layer runs: on a machine with a GPU they may still be on the CPU.
        where = hardware
        if where is None:
            where = _hardware.detect_cpu() if weights.device.type == "cpu" else detect_hardware(registry)
        scales = weights.w13_input_scale is not None and weights.w2_input_scale is not None
        made = make_request(config, parallel, where, registry=registry, **{"input_scales": scales, **request})
        if made.assume:
            raise BindError("assume= is for explaining hardware that is not here; a plan can take nothing for granted")
        installed = registry or default_registry(made.settings)
        return resolve_request(made, installed), installed

    # A rank that fails takes the others along with an error; they would wait for it in the first collective.
    resolution, installed = everywhere(group, choose)
    if group is not None:
        verify_agreement(resolution, group)
    return everywhere(group, lambda: bind(resolution, weights, installed, group=group))
