"""moe_core: run mixture-of-experts layers for LLM inference; every backend is a plugin.

    config = moe_core.MoeConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024)
    plan = moe_core.plan(config, moe_core.CanonicalWeights(w13=w13, w2=w2))
    y = plan(hidden_states, moe_core.TopKOutput(topk_ids, topk_weights))

Importing this imports neither torch nor any backend.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from moe_core._version import __version__
from moe_core.api import detect_hardware, explain, make_request, plan, resolve, weight_requirements
from moe_core.capability import Reason, Requires, Support
from moe_core.config import Activation, MoeConfig, ParallelConfig, RoutingConfig
from moe_core.errors import (
    BindError,
    CommunicationError,
    ConfigError,
    ContractViolation,
    DependencyError,
    LayoutMismatch,
    MoeCoreError,
    NoUsableBackend,
    PluginError,
    RankDisagreement,
    SelectionError,
    UnsupportedOverride,
    WeightError,
)
from moe_core.hardware import HardwareInfo
from moe_core.hookspecs import hookimpl
from moe_core.presets import preset
from moe_core.protocols import Binding, HookRows, RunnerHooks, RunningState
from moe_core.registry import Registry, default_registry, forget_plugins
from moe_core.settings import Settings, override
from moe_core.topk import BypassedTopK, TopKOutput
from moe_core.vocabulary import PLUGIN_API, DroppedSlot, IdSpace, Maturity, Owner, Phase, Step

if TYPE_CHECKING:
    from moe_core.balancing import ExpertLoad, ExpertReplicas
    from moe_core.layer import MoeLayer
    from moe_core.moe_plan import MoePlan
    from moe_core.routing import route
    from moe_core.weights import CanonicalWeights, canonical_gate_up

__all__ = [
    "PLUGIN_API",
    "Activation",
    "BindError",
    "Binding",
    "BypassedTopK",
    "CanonicalWeights",
    "CommunicationError",
    "ConfigError",
    "ContractViolation",
    "DependencyError",
    "DroppedSlot",
    "ExpertLoad",
    "ExpertReplicas",
    "HardwareInfo",
    "HookRows",
    "IdSpace",
    "LayoutMismatch",
    "Maturity",
    "MoeConfig",
    "MoeCoreError",
    "MoeLayer",
    "MoePlan",
    "NoUsableBackend",
    "Owner",
    "ParallelConfig",
    "Phase",
    "PluginError",
    "RankDisagreement",
    "Reason",
    "Registry",
    "Requires",
    "RoutingConfig",
    "RunnerHooks",
    "RunningState",
    "SelectionError",
    "Settings",
    "Step",
    "Support",
    "TopKOutput",
    "UnsupportedOverride",
    "WeightError",
    "__version__",
    "canonical_gate_up",
    "default_registry",
    "detect_hardware",
    "explain",
    "forget_plugins",
    "hookimpl",
    "make_request",
    "override",
    "plan",
    "preset",
    "resolve",
    "route",
    "weight_requirements",
]

# What needs torch is loaded when it is first touched.
_LAZY = {
    "CanonicalWeights": "moe_core.weights",
    "ExpertLoad": "moe_core.balancing",
    "ExpertReplicas": "moe_core.balancing",
    "MoeLayer": "moe_core.layer",
    "MoePlan": "moe_core.moe_plan",
    "canonical_gate_up": "moe_core.weights",
    "route": "moe_core.routing",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_LAZY])
