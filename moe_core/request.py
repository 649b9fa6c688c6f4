"""One question to the selection: this layer, on this hardware, under these settings. Frozen and hashable."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from typing import Any

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError
from moe_core.hardware import HardwareInfo
from moe_core.settings import Settings
from moe_core.vocabulary import TOPK_STANDARD, DroppedSlot, Phase, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanRequest:
    """Everything that selection depends on, beside the specs.

    features: must-haves beside those that the layer implies. hooks: hook points that will be used. graph_capture and
    no_host_sync: phases that must be capturable in a device graph / must not synchronize. incoming: how the caller
    writes dropped slots. caller_does: steps already done when the plan is called, or done by the caller afterwards;
    caller_can: steps it will do if the plan says so. max_tokens: the most tokens of one call, for workspaces.
    input_scales: whether the weights bring static input scales; None: not known yet, and taken as given.
    assume: what is taken for granted on hardware that is not here: "dependencies", "targets".
    """

    config: MoeConfig
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    hardware: HardwareInfo
    phases: tuple[Phase, ...] = (Phase.PREFILL, Phase.DECODE)
    features: frozenset[str] = frozenset()
    hooks: frozenset[str] = frozenset()
    graph_capture: frozenset[Phase] = frozenset()
    no_host_sync: frozenset[Phase] = frozenset()
    topk_format: str = TOPK_STANDARD
    incoming: DroppedSlot = DroppedSlot.NEGATIVE
    caller_does: frozenset[Step] = frozenset()
    caller_can: frozenset[Step] = frozenset()
    max_tokens: int | None = None
    input_scales: bool | None = None
    assume: frozenset[str] = frozenset()
    settings: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        if not self.phases:
            raise ConfigError("PlanRequest.phases is empty: name prefill, decode or both")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"max_tokens must be positive or None, got {self.max_tokens}")
        config, parallel = self.config, self.parallel
        if config.intermediate_size % parallel.tp_size:
            raise ConfigError(
                f"intermediate size {config.intermediate_size} cannot be divided by tp_size {parallel.tp_size}"
            )
        if parallel.ep_size > config.num_experts:
            raise ConfigError(f"ep_size {parallel.ep_size} is larger than the number of experts {config.num_experts}")
        parallel.owners(config.num_experts)

    @property
    def num_local_experts(self) -> int:
        """Experts on this EP rank."""
        return len(self.parallel.local_experts(self.config.num_experts))

    @property
    def local_intermediate_size(self) -> int:
        """Intermediate size on this TP rank."""
        return self.config.intermediate_size // self.parallel.tp_size

    @property
    def layer_features(self) -> frozenset[str]:
        """Features that the layer itself implies (see `Support.features`)."""
        config = self.config
        implied = {
            "bias": config.bias,
            "router_weight_on_input": config.router_weight_on_input,
            "no_combine": config.no_combine,
        }
        return frozenset(name for name, needed in implied.items() if needed)

    @property
    def steps(self) -> frozenset[Step]:
        """Steps that must have exactly one owner."""
        config, parallel = self.config, self.parallel
        needed = {
            Step.ROUTER_WEIGHT: True,
            Step.ROUTED_SCALING: config.routed_scaling_factor != 1.0,
            Step.TOPK_SUM: not config.no_combine,
            Step.EP_REDUCE: parallel.ep_size > 1,
            Step.TP_REDUCE: parallel.tp_size > 1,
        }
        return frozenset(step for step, wanted in needed.items() if wanted)

    def to_json(self) -> dict[str, Any]:
        """A JSON-able, canonical form (mappings and sets sorted)."""
        result = plain(self)
        if not isinstance(result, dict):  # for the type checker: a dataclass always gives a dict
            raise TypeError(type(result))
        return result


def plain(value: Any) -> Any:
    """`value` in JSON types, in a canonical order."""
    if isinstance(value, Enum):
        return value.value
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (frozenset, set)):
        return sorted((plain(v) for v in value), key=str)
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    if hasattr(value, "items"):
        return {str(plain(k)): plain(v) for k, v in sorted(value.items(), key=lambda item: str(item[0]))}
    return value
