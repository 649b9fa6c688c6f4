"""Where checks are made: the registry with the kit's dispatchers added, and the device of each component."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Final

from moe_core import hardware
from moe_core.api import detect_hardware, resolve
from moe_core.capability import Reason
from moe_core.config import Activation, MoeConfig
from moe_core.errors import ConfigError
from moe_core.hardware import PROFILES, HardwareInfo
from moe_core.plugins import CORE, PluginRecord
from moe_core.registry import Registry
from moe_core.resolution import Resolution, Verdict
from moe_core.settings import Settings
from moe_core.testing.components import Component
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.testing.profile import ConformanceProfile
from moe_core.testing.registration import CheckSkipped

#: Reasons about the machine, not about the layer.
ENVIRONMENT: Final = ("device.", "dep.", "target.", "probe.")
MAX_TOKENS: Final = 1024


@dataclass(frozen=True, slots=True)
class Site:
    """A device on which checks run."""

    hardware: HardwareInfo
    device: str


def is_environment(reason: Reason) -> bool:
    """Whether a reason is about the machine."""
    return reason.code.startswith(ENVIRONMENT)


def sentence(reasons: list[Reason] | tuple[Reason, ...]) -> str:
    """Reasons in one line."""
    return "; ".join(dict.fromkeys(f"{r.subject}: [{r.code}] {r.message}" for r in reasons)) or "no reason was given"


def _registry(source: Registry, plugin: Any) -> Registry:
    others = [r.plugin for r in source.records if r.plugin not in (None, plugin) and r.name != CORE]
    return Registry(plugins=[*others, plugin], autoload=False, settings=Settings())


@dataclass
class Stage:
    """Shared by all checks of one run over one plugin. device: "cpu", "cuda", ..., None for the best each can use."""

    record: PluginRecord
    source: Registry
    device: str | None = None
    profile: ConformanceProfile = field(default_factory=ConformanceProfile)
    cache: dict[Any, Any] = field(default_factory=dict)

    @cached_property
    def registry(self) -> Registry:
        """The plugins of `source`, and the kit's dispatchers."""
        return _registry(self.source, testing_plugin)

    def with_plugin(self, plugin: Any) -> Registry:
        """`registry` and one plugin more."""
        return _registry(self.registry, plugin)

    @cached_property
    def sites(self) -> list[Site]:
        """The devices of this machine that checks may use, the fastest first."""
        cpu = Site(hardware.detect_cpu(), "cpu")
        if self.device == "cpu":
            return [cpu]
        found = detect_hardware(self.registry)
        best = Site(found, found.torch_device_type)
        if self.device is None:
            return [cpu] if best.device == "cpu" else [best, cpu]
        if best.device != self.device.partition(":")[0]:
            raise ConfigError(f"this machine has no device {self.device!r}, it has {found}")
        return [replace(best, device=self.device)]

    def site(self, component: Component) -> Site:
        """Where `component` can run. Raises CheckSkipped with the reasons where it cannot."""
        outcome = self.cache.get(("site", component.id))
        if outcome is None:
            outcome = self._find_site(component)
            self.cache["site", component.id] = outcome
        if isinstance(outcome, CheckSkipped):
            raise CheckSkipped(str(outcome))
        site: Site = outcome
        return site

    def _find_site(self, component: Component) -> Site | CheckSkipped:
        if component.runner is None and component.kind in ("adapter", "fused", "fused_path"):
            return CheckSkipped(f"no runner {component.spec.runner!r} is installed")
        reasons: list[Reason] = []
        for site in self.sites:
            for scheme in sorted(component.support.schemes) or ["bf16"]:
                config = any_config(component, scheme=scheme)
                against = [
                    r
                    for verdict in self.verdicts(component, self.ask(config, site.hardware))
                    for r in verdict.reasons
                    if is_environment(r)
                ]
                if not against:
                    return site
                reasons += against
        return CheckSkipped(f"cannot run on this machine: {sentence(reasons)}")

    def ask(self, config: MoeConfig, on: HardwareInfo, **request: Any) -> Resolution:
        """A resolution that depends on nothing but its arguments."""
        settings = Settings(**{k: request.pop(k) for k in ("runner", "dispatcher", "path", "options") if k in request})
        request.setdefault("max_tokens", MAX_TOKENS)
        request.setdefault("registry", self.registry)
        return resolve(config, request.pop("parallel", None), on, settings=settings, **request)

    def verdicts(self, component: Component, resolution: Resolution) -> list[Verdict]:
        """What a resolution says about a component (and about the runner of a fused path)."""
        wanted = {component.subject, *(lane.runner.subject for lane in component.lanes)}
        return [v for v in resolution.verdicts if v.spec.subject in wanted]

    def any_hardware(self, component: Component) -> HardwareInfo:
        """Hardware that the component declares: this machine where it can run here, else a named profile."""
        try:
            return self.site(component).hardware
        except CheckSkipped:
            found = [h for h in PROFILES.values() if component.support.arch_supported(h.device_type, h.arch)]
            return found[0] if found else PROFILES["cpu"]


def any_config(component: Component, **changes: Any) -> MoeConfig:
    """A layer of declared properties. Together they may still break a rule of the plugin."""
    support = component.support
    gated = True in support.gated or not support.gated
    names = sorted(support.activations - {"swiglu_oai"}) or ["silu"]
    multiple = support.hidden_multiple
    values: dict[str, Any] = {
        "num_experts": min(8, support.max_experts or 8),
        "top_k": min(2, support.max_top_k or 2),
        "hidden_size": min(support.hidden_sizes, default=-(-256 // multiple) * multiple),
        "intermediate_size": -(-256 // support.intermediate_multiple) * support.intermediate_multiple,
        "scheme": "bf16" if "bf16" in support.schemes or not support.schemes else min(support.schemes),
        "dtype": "bfloat16" if "bfloat16" in support.dtypes or not support.dtypes else min(support.dtypes),
        "activation": Activation(name="silu" if "silu" in names else names[0], gated=gated),
    }
    return MoeConfig(**(values | changes))
