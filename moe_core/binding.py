"""Binding: a Resolution and weights become one callable, and everything else gets out of the way.

Targets are imported, the dispatcher and runner built with the agreed terms, weights prepared and their layout checked.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moe_core import _contract, _lazy, explanation
from moe_core.errors import BindError, ConfigError, LayoutMismatch, did_you_mean
from moe_core.hardware import HardwareInfo
from moe_core.moe_plan import MoePlan
from moe_core.protocols import Binding, BoundRouter
from moe_core.resolution import Resolution
from moe_core.specs import FusedSpec, RunnerSpec, Terms
from moe_core.vocabulary import FormatId, Owner, Step
from moe_core.weights import WeightRequirements, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.registry import Registry
    from moe_core.topk import TopKOutput
    from moe_core.weights import CanonicalWeights

logger = logging.getLogger(__name__)


def bind(resolution: Resolution, weights: CanonicalWeights, registry: Registry, *, group: Any = None) -> MoePlan:
    """Bind the chosen candidate of `resolution` to `weights` (this rank's). Raises BindError or its subclasses."""
    request, candidate = resolution.request, resolution.require()
    if not request.hardware.present and "dependencies" in request.assume:
        raise BindError(
            f"this resolution takes {', '.join(sorted(request.assume))} for granted: it explains, it cannot be bound",
            hint="resolve again without assume=",
        )
    weights = _fit(weights, resolution, registry)
    _check_device(request.hardware, weights.device)
    _check_group(resolution, group)
    binding = _make_binding(resolution, registry, weights.device, group)
    quant_info = _prepare(registry.runners[candidate.runner], weights, binding, resolution)
    plan = _assemble(resolution, registry, binding, quant_info)
    registry.call("moe_core_plan_bound", resolution=resolution, plan=plan)
    _log_once(resolution.fingerprint, explanation.one_line(resolution), _is_loud(resolution, registry))
    return plan


def rebind(resolution: Resolution, quant_info: Any, device: Any) -> MoePlan:
    """A plan in another process, with weights that are already prepared: what unpickling calls."""
    from moe_core.registry import default_registry

    registry, candidate = default_registry(resolution.request.settings), resolution.require()
    spec = registry.runner(candidate.runner)  # a plugin given in code, or one not installed here: say so
    if candidate.fused_path is None:
        registry.dispatcher(candidate.dispatcher)
    for plugin, version in resolution.versions.items():
        here = registry.version_of(plugin)
        if here != version:
            raise BindError(
                f"the plan was pickled with plugin {plugin!r} {version}, here is {here}: its layout may be another",
                hint="install the same version, or pickle plan.resolution and bind it again with the weights",
            )
    _check_layout(spec, quant_info, resolution)
    return _assemble(resolution, registry, _make_binding(resolution, registry, device, None), quant_info)


def _assemble(resolution: Resolution, registry: Registry, binding: Binding, quant_info: Any) -> MoePlan:
    """All callables of the chosen candidate, bound."""
    candidate = resolution.require()
    runner = registry.runners[candidate.runner]
    paths: dict[FormatId, tuple[Any, Any, Any]] = {}
    dispatcher, whole, split_phases = None, None, False
    if candidate.fused_path is not None:
        whole = _lazy.call(registry.fused_paths[candidate.fused_path].target, candidate.id, binding)
    else:
        for _, choice in candidate.paths:
            if choice.format not in paths:
                path_binding = replace(binding, format=choice.format, terms=choice.terms)
                paths[choice.format] = _bind_path(choice.spec, path_binding, candidate.id)
        spec = registry.dispatchers[candidate.dispatcher]
        options = _options(resolution, registry, spec.name, spec.options)
        quantizer = None if runner.quantizer is None else _lazy.call(runner.quantizer, runner.subject, binding)
        # What a dispatcher quantizes with (a global scale, say) belongs to the weights, so it may look at them.
        dispatcher_binding = replace(binding, options=options, runner=None, quant_info=quant_info, quantizer=quantizer)
        dispatcher, split_phases = _lazy.call(spec.factory, spec.subject, dispatcher_binding), spec.split_phases

    router = core_router(binding) if runner.router is None else _lazy.call(runner.router, runner.subject, binding)

    def update(plan: MoePlan, weights: CanonicalWeights) -> None:
        _update(plan.quant_info, _fit(weights, resolution, registry), binding, resolution, registry)

    return MoePlan(
        resolution,
        binding,
        quant_info,
        paths=paths,
        dispatcher=dispatcher,
        whole=whole,
        split_phases=split_phases,
        router=router,
        update=update,
    )


def core_router(binding: Binding) -> BoundRouter:
    """The core's routing function for this layer: what a runner without kernels for it gets."""
    from moe_core.routing import route

    config = binding.config

    def bound(router_logits: Tensor, correction_bias: Tensor | None = None, scaling_factor: float = 1.0) -> TopKOutput:
        return route(router_logits, config.top_k, config.routing, correction_bias, scaling_factor)

    return bound


def _update(
    quant_info: Any, weights: CanonicalWeights, binding: Binding, resolution: Resolution, registry: Registry
) -> None:
    spec = registry.runners[resolution.require().runner]
    if spec.update is not None:
        _lazy.call(spec.update, spec.subject, quant_info, weights, binding)
        return
    _contract.copy_in_place(quant_info, _prepare(spec, weights, binding, resolution), spec.name)


def _check_device(hardware: HardwareInfo, device: Any) -> None:
    if device.type != hardware.torch_device_type:
        raise BindError(
            f"the plan was made for {hardware}, but the weights are on {device}",
            hint="move the weights, or make the plan for the device where they are",
        )
    if hardware.present:
        return
    from moe_core import hardware as machine

    here = machine.detect_cpu() if device.type == "cpu" else machine.detect(device)
    if here.arch != hardware.arch:
        raise BindError(
            f"the plan was made for {hardware}, this machine is {here}",
            hint="leave hardware= out to plan for the machine where the weights are",
        )


def required_sizes(resolution: Resolution, registry: Registry) -> WeightRequirements:
    """The sizes that the chosen runner wants allocated on this rank; the layer's own where it asks for nothing."""
    request = resolution.request
    spec = registry.runners[resolution.require().runner]
    own = WeightRequirements(hidden_size=request.config.hidden_size, intermediate_size=request.local_intermediate_size)
    if spec.requirements is None:
        return own
    required: WeightRequirements = _lazy.call(spec.requirements, spec.subject, request)
    return required


def _fit(weights: CanonicalWeights, resolution: Resolution, registry: Registry) -> CanonicalWeights:
    """`weights` in the sizes that the runner asked for: as they are if they were allocated so, else padded."""
    from moe_core._pad import pad

    request, weights = resolution.request, weights.detach()
    config, parallel, scheme = request.config, request.parallel, registry.schemes[request.config.scheme]
    required = required_sizes(resolution, registry)
    own = WeightRequirements(hidden_size=config.hidden_size, intermediate_size=request.local_intermediate_size)
    if required == own:
        weights.validate(config, parallel, scheme)
        return weights
    expected = scheme.storage_shape(required.hidden_size, required.intermediate_size)
    if tuple(weights.w2.shape[1:]) == tuple(expected):
        weights.validate(config, parallel, scheme, required)
        return weights
    weights.validate(config, parallel, scheme)
    return pad(weights, config, request.local_intermediate_size, scheme, required)


def _is_loud(resolution: Resolution, registry: Registry) -> bool:
    """A correct-but-slow runner that nobody named must not be met silently."""
    spec, settings = registry.runners[resolution.require().runner], resolution.request.settings
    return spec.last_resort and settings.runner != spec.name


@lru_cache(maxsize=1024)
def _log_once(fingerprint: str, line: str, loud: bool) -> None:
    logger.log(logging.WARNING if loud else logging.INFO, "%s%s", "slow fallback: " if loud else "", line)


def _check_group(resolution: Resolution, group: Any) -> None:
    """The group must span exactly the ranks whose results the dispatcher sums."""
    candidate, request = resolution.require(), resolution.request
    parallel, both = request.parallel, {Step.EP_REDUCE, Step.TP_REDUCE}
    owned: set[Step] = set(request.steps & both)
    if candidate.fused_path is None:
        owned = {s for _, c in candidate.paths for s, owner in c.terms.steps.items() if owner is Owner.DISPATCHER}
    sizes = {Step.EP_REDUCE: parallel.ep_size, Step.TP_REDUCE: parallel.tp_size}
    reduces = sorted(owned & both)
    if not reduces:
        return
    if group is None:
        raise BindError(
            f"with tp_size {parallel.tp_size} and ep_size {parallel.ep_size} the dispatcher does "
            f"{' and '.join(reduces)}, and no process group was given",
            hint="pass group=..., or sum the results yourself and say so with ParallelConfig(reduce='caller')",
        )
    import torch.distributed as dist

    if not dist.is_available():
        return
    wanted = math.prod(sizes[step] for step in reduces)
    if group is dist.GroupMember.NON_GROUP_MEMBER:
        raise BindError("this rank is not a member of the process group that was given")
    if isinstance(group, dist.ProcessGroup) and dist.get_world_size(group) != wanted:
        raise BindError(
            f"the process group has {dist.get_world_size(group)} ranks, but {' and '.join(reduces)} spans {wanted}",
            hint="pass the group of exactly the ranks that share this layer (data-parallel replicas do not)",
        )


def _make_binding(resolution: Resolution, registry: Registry, device: Any, group: Any) -> Binding:
    request, candidate = resolution.request, resolution.require()
    spec = registry.runners[candidate.runner]
    all_terms: Mapping[FormatId, Terms] = {c.format: c.terms for _, c in candidate.paths}
    first = candidate.paths[0][1] if candidate.paths else None
    binding = Binding(
        request=request,
        config=request.config,
        parallel=request.parallel,
        hardware=request.hardware,
        scheme=registry.schemes[request.config.scheme],
        device=device,
        dtype=torch_dtype(request.config.dtype),
        num_local_experts=request.num_local_experts,
        local_intermediate_size=request.local_intermediate_size,
        format=first.format if first else "",
        terms=first.terms if first else None,
        all_terms=all_terms,
        incoming=request.incoming,
        max_tokens=request.max_tokens,
        options=_options(resolution, registry, spec.name, spec.options),
        group=group,
        layouts=candidate.layouts,
    )
    return replace(binding, runner=_lazy.call(spec.factory, spec.subject, binding))


def _options(resolution: Resolution, registry: Registry, name: str, declared: Mapping[str, str]) -> Mapping[str, Any]:
    options = resolution.request.settings.options
    known = {*registry.runners, *registry.dispatchers}
    for component in options:
        if component not in known:
            raise ConfigError(
                f"options are given for {component!r}, which is not here", hint=did_you_mean(component, known)
            )
    for option in options.get(name, {}):
        if option not in declared:
            raise ConfigError(f"{name!r} has no option {option!r}", hint=did_you_mean(option, declared))
    return options.get(name, {})


def _prepare(spec: RunnerSpec, weights: CanonicalWeights, binding: Binding, resolution: Resolution) -> Any:
    quant_info = _lazy.call(spec.prepare, spec.subject, weights, binding)
    _check_layout(spec, quant_info, resolution)
    return quant_info


def _check_layout(spec: RunnerSpec, quant_info: Any, resolution: Resolution) -> None:
    scheme, layouts = resolution.request.config.scheme, resolution.require().layouts
    found = getattr(quant_info, "scheme", None), getattr(quant_info, "layout", None)
    if found[0] != scheme or found[1] not in layouts:
        raise LayoutMismatch(
            f"runner {spec.name!r} takes {scheme!r} in layout {' or '.join(sorted(layouts))} here, "
            f"but its weights are scheme {found[0]!r} in layout {found[1]!r}",
            hint="this is a bug of the plugin: its prepare must return one of Binding.layouts",
        )


def _bind_path(spec: Any, binding: Binding, wanted_by: str) -> tuple[Any, Any, Any]:
    """(pre, run, post), or (None, fused func, None)."""
    if isinstance(spec, FusedSpec):
        return None, _lazy.call(spec.target, wanted_by, binding), None
    return _lazy.call(spec.pre, wanted_by, binding), binding.runner.run, _lazy.call(spec.post, wanted_by, binding)
