"""Public fakes: plugins, hardware and specs to compose registries from, without an installed package.

    registry = Registry(plugins=[fake_plugin("acme", **runner_like("reference", "acme"))], autoload=False)

Never imports torch; `make_layer` and `make_routing` load it when they are first touched.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from moe_core import hardware as _hardware
from moe_core.errors import ConfigError, did_you_mean
from moe_core.hookspecs import all_hooks, hookimpl
from moe_core.registry import Registry
from moe_core.specs import (
    AdapterSpec,
    DispatcherSpec,
    FormatSpec,
    FusedPathSpec,
    FusedSpec,
    PluginInfo,
    RunnerSpec,
)
from moe_core.testing.targets import as_target

if TYPE_CHECKING:
    from moe_core.hardware import HardwareInfo
    from moe_core.quant import QuantScheme
    from moe_core.testing.layers import make_layer as make_layer
    from moe_core.testing.layers import make_routing as make_routing
    from moe_core.testing.profile import ConformanceProfile


def fake_plugin(
    name: str,
    *,
    runners: Iterable[RunnerSpec] = (),
    dispatchers: Iterable[DispatcherSpec] = (),
    adapters: Iterable[AdapterSpec] = (),
    fused: Iterable[FusedSpec | FusedPathSpec] = (),
    formats: Iterable[FormatSpec] = (),
    schemes: Iterable[QuantScheme] = (),
    info: PluginInfo | None = None,
    conformance: ConformanceProfile | None = None,
    hooks: Mapping[str, Callable[..., Any]] | None = None,
) -> Any:
    """A plugin object called `name` that declares these specs. hooks: further hook functions by name, without self."""
    answers: dict[str, Callable[..., Any]] = {
        "moe_core_plugin_info": lambda: info or PluginInfo(name=name, summary=f"the fake plugin {name}"),
        "moe_core_runners": lambda: tuple(runners),
        "moe_core_dispatchers": lambda: tuple(dispatchers),
        "moe_core_adapters": lambda: tuple(adapters),
        "moe_core_fused_funcs": lambda: tuple(fused),
        "moe_core_formats": lambda: tuple(formats),
        "moe_core_quant_schemes": lambda: tuple(schemes),
    }
    if conformance is not None:
        answers["moe_core_conformance"] = lambda: conformance
    answers.update(hooks or {})
    for hook in answers:
        if hook not in all_hooks():
            raise ConfigError(f"moe_core has no hook {hook!r}", hint=did_you_mean(hook, all_hooks()))
    return type("FakePlugin", (), {"__name__": name, **{h: staticmethod(hookimpl(f)) for h, f in answers.items()}})()


def fake_hardware(profile: str = "cpu", **changes: Any) -> HardwareInfo:
    """A named profile with changes: `fake_hardware("h200", present=True, device_count=1)`."""
    return replace(_hardware.profile(profile), **changes)


def runner_like(
    base: str,
    name: str,
    *,
    registry: Registry | None = None,
    formats: Iterable[str] | None = None,
    adapter: Mapping[str, Any] | None = None,
    fused: Mapping[str, Any] | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Keywords of `fake_plugin` for a runner called `name` that is `base` in all but `changes`.

    formats: keep only adapters and fused funcs of these. adapter, fused: changes of all its adapters, of all its fused
    funcs. Targets (`factory`, `prepare`, `pre`, ...) may be callables; `support` and `wants` mappings of changes.
    """
    source = registry or Registry(autoload=False)
    spec = source.runner(base)
    kept = set(formats) if formats is not None else {f for f, r in (*source.adapters, *source.fused) if r == base}
    new = replace(spec, name=name, **_changes(spec, changes))
    adapters = [
        replace(found, runner=name, **_changes(found, adapter or {}))
        for (format_id, runner), found in source.adapters.items()
        if runner == base and format_id in kept
    ]
    funcs = [
        replace(found, runner=name, **_changes(found, fused or {}))
        for (format_id, runner), found in source.fused.items()
        if runner == base and format_id in kept
    ]
    return {"runners": (new,), "adapters": tuple(adapters), "fused": tuple(funcs)}


def dispatcher_like(
    base: str | DispatcherSpec, name: str, *, registry: Registry | None = None, **changes: Any
) -> dict[str, Any]:
    """Keywords of `fake_plugin` for a dispatcher called `name` that is `base` in all but `changes`."""
    spec = base if isinstance(base, DispatcherSpec) else (registry or Registry(autoload=False)).dispatcher(base)
    return {"dispatchers": (replace(spec, name=name, **_changes(spec, changes)),)}


def _changes(spec: Any, changes: Mapping[str, Any]) -> dict[str, Any]:
    result = {key: as_target(value) if callable(value) else value for key, value in changes.items()}
    for key, value in changes.items():
        if key in ("support", "wants") and isinstance(value, Mapping):
            given = getattr(spec, key)
            many = isinstance(given, tuple)
            result[key] = tuple(replace(w, **value) for w in given) if many else replace(given, **value)
    return result


def __getattr__(name: str) -> object:
    if name in ("make_layer", "make_routing"):
        from moe_core.testing import layers

        return getattr(layers, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
