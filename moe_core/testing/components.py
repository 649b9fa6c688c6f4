"""What there is to check of one plugin: its components, their lanes, and the values that checks range over.

A *lane* is one way into a runner: an adapter pair or a fused func for one format, or a fused path. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moe_core.capability import Support
from moe_core.config import DTYPES
from moe_core.errors import ConfigError, PluginError, did_you_mean
from moe_core.hardware import PROFILES
from moe_core.plugins import PluginRecord, PluginState
from moe_core.registry import Registry
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedPathSpec, FusedSpec, RunnerSpec
from moe_core.vocabulary import Phase

#: The core's activation names; a runner may declare others.
ACTIVATION_NAMES = ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_oai")
HOOK_NAMES = ("after_gate_up", "after_down")
PLACEMENTS = ("linear", "round_robin", "map")
ROUTING_PATTERNS = ("uniform", "one_hot", "skewed", "dropped", "duplicate")


@dataclass(frozen=True, slots=True)
class Lane:
    """One way into a runner. kind: "split", "fused" or "whole"."""

    runner: RunnerSpec
    kind: str
    format: str
    spec: AdapterSpec | FusedSpec | FusedPathSpec

    @property
    def label(self) -> str:
        """ "standard/split", "batched/fused", ...; "whole" for a fused path."""
        return self.kind if self.kind == "whole" else f"{self.format}/{self.kind}"

    @property
    def gives_up(self) -> frozenset[str]:
        """Features of the runner that this lane has not."""
        return frozenset() if isinstance(self.spec, AdapterSpec) else self.spec.gives_up


@dataclass(frozen=True, slots=True)
class Component:
    """Something that a plugin declares. `spec` is None for the plugin itself."""

    kind: str
    name: str
    spec: Any = None
    runner: RunnerSpec | None = None
    lanes: tuple[Lane, ...] = ()

    @property
    def id(self) -> str:
        """ "runner:cpu", "dispatcher:standard", "plugin:core", "adapter:grouped+cpu", ..."""
        return f"{self.kind}:{self.name}"

    @property
    def support(self) -> Support:
        """What the component, or the runner that it leads into, declares."""
        source = self.spec if hasattr(self.spec, "support") else self.runner
        if source is None:
            raise TypeError(f"{self.id} declares no support")
        support: Support = source.support
        return support

    @property
    def subject(self) -> str:
        """Its name in reasons."""
        return f"runner:{self.runner.name}" if self.kind in ("adapter", "fused") and self.runner else self.id


def find_plugin(name: str, registry: Registry) -> PluginRecord:
    """The record of a loaded plugin. ConfigError for an unknown name, PluginError for one that did not load."""
    found = [r for r in registry.records if name in (r.name, r.info.name if r.info else None)]
    if not found:
        raise ConfigError(f"no plugin is called {name!r}", hint=did_you_mean(name, [r.name for r in registry.records]))
    record = found[0]
    if record.state is not PluginState.LOADED:
        raise PluginError(f"plugin {name!r} ({record.where}) is {record.state.value}: {record.detail}")
    return record


def components(record: PluginRecord, registry: Registry) -> list[Component]:
    """The plugin itself, and everything that it declares."""

    def mine(kind: str, key: object) -> bool:
        return registry.owner(kind, key) == record.name

    found = [Component("plugin", record.info.name if record.info else record.name)]
    found += [Component("format", f.id, f) for f in registry.formats.values() if mine("format", f.id)]
    lanes: dict[str, list[Lane]] = {}
    foreign: list[Component] = []
    rows: list[tuple[str, str, str, Any]] = [
        ("adapter", "split", format_id, s) for (format_id, _), s in registry.adapters.items()
    ]
    rows += [("fused func", "fused", format_id, s) for (format_id, _), s in registry.fused.items()]
    for kind, way, format_id, spec in rows:
        if not mine(kind, (format_id, spec.runner)):
            continue
        runner = registry.runners.get(spec.runner)
        lane = () if runner is None else (Lane(runner, way, format_id, spec),)
        if runner is not None and mine("runner", runner.name):
            lanes.setdefault(runner.name, []).extend(lane)
        else:
            name = f"{format_id}+{spec.runner}"
            foreign.append(Component(kind.partition(" ")[0], name, spec, runner, lane))
    for runner in registry.runners.values():
        if mine("runner", runner.name):
            found.append(Component("runner", runner.name, runner, runner, tuple(lanes.get(runner.name, ()))))
    for whole in registry.fused_paths.values():
        if mine("fused path", whole.name):
            runner = registry.runners.get(whole.runner)
            lane = () if runner is None else (Lane(runner, "whole", "", whole),)
            found.append(Component("fused_path", whole.name, whole, runner, lane))
    found += [Component("dispatcher", d.name, d) for d in registry.dispatchers.values() if mine("dispatcher", d.name)]
    return found + foreign


def parameters(each: str, component: Component, registry: Registry) -> Sequence[str]:
    """The values that a check of a component ranges over: all known names and all declared ones."""
    if each == "lane":
        return [lane.label for lane in component.lanes]
    if each == "format":
        spec = component.spec
        return list(dict.fromkeys(spec.formats.values())) if isinstance(spec, DispatcherSpec) else []
    fixed = {
        "placement": PLACEMENTS,
        "pattern": ROUTING_PATTERNS,
        "profile": tuple(PROFILES),
        "form": ("gated", "plain"),
        "phase": tuple(str(p) for p in Phase),
    }
    if each == "category":
        return refusable(component)
    if each in fixed:
        return fixed[each]
    if component.kind in ("adapter", "fused") and component.runner is None:
        return []
    support = component.support
    declared: dict[str, tuple[Sequence[str], frozenset[str]]] = {
        "scheme": (list(registry.schemes), support.schemes),
        "dtype": (DTYPES, support.dtypes),
        "activation": (ACTIVATION_NAMES, support.activations),
        "hook": (HOOK_NAMES, support.hooks),
        "group_size": ((), frozenset(str(size) for size in support.group_sizes)),
    }
    known, more = declared[each]
    return [*known, *sorted(more - set(known))]


def refusable(component: Component) -> list[str]:
    """What `capability.refuses` can ask for: names that nobody declared, and values beyond a declared limit."""
    support = component.support
    computes = component.kind != "dispatcher"
    sizes = (support.max_top_k, support.max_experts, support.max_tokens)
    beyond = {
        "device": "*" not in support.devices,
        "scheme": computes,
        "dtype": computes and not support.dtypes.issuperset(DTYPES),
        "activation": computes,
        "gated": computes and len(support.gated) < 2,
        "limit": computes and not support.activation_limit,
        "feature": computes,
        "hook": computes,
        "topk_format": True,
        "graph_capture": support.graph_capture != frozenset(Phase),
        "ep_size": support.ep_sizes != (1, None),
        "placement": not support.placements.issuperset(PLACEMENTS),
        "sizes": support.needs_max_tokens
        or bool(support.hidden_sizes)
        or max(support.hidden_multiple, support.intermediate_multiple) > 1
        or any(limit is not None for limit in sizes),
    }
    return [name for name, possible in beyond.items() if possible]
