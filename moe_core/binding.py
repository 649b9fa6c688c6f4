"""Binding: a Resolution and weights become one callable, and everything else gets out of the way.

Targets are imported, the dispatcher and runner built with the agreed terms, weights prepared and their layout checked
here. A forward touches bound callables only.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from moe_core import _contract, _lazy, explanation
from moe_core.errors import BindError, ContractViolation, LayoutMismatch
from moe_core.protocols import Binding, RunningState
from moe_core.resolution import Resolution
from moe_core.specs import FusedSpec, Terms
from moe_core.vocabulary import TOPK_STANDARD, FormatId, Owner, Phase, Step
from moe_core.weights import WeightRequirements, torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.registry import Registry
    from moe_core.topk import AnyTopK
    from moe_core.weights import CanonicalWeights

logger = logging.getLogger(__name__)


class MoePlan:
    """One layer, ready to run: `y = plan(hidden_states, topk_output)`.

    hidden_states: [T, H] of the layer's dtype on the plan's device; topk_output: a TopKOutput with [T, K] tensors (or
    BypassedTopK where the plan was made for it). Returns [T, H] ([T, K, H] with no_combine). Attributes: `resolution`
    (why this plan), `terms` (by format), `quant_info` (the prepared weights), `fingerprint`.
    """

    __slots__ = (
        "_binding",
        "_bound_hooks",
        "_combine",
        "_device",
        "_dispatch",
        "_dtype",
        "_group",
        "_hidden_size",
        "_id_dtypes",
        "_paths",
        "_registry",
        "_runner_spec",
        "_topk_format",
        "_topk_shape",
        "_whole",
        "dispatcher",
        "fingerprint",
        "quant_info",
        "resolution",
        "runner",
        "terms",
    )

    def __init__(
        self, resolution: Resolution, registry: Registry, binding: Binding, quant_info: Any, group: Any
    ) -> None:
        """Use `moe_core.plan` or `bind`."""
        candidate = resolution.require()
        self.resolution, self.quant_info, self._group, self._binding = resolution, quant_info, group, binding
        self.fingerprint = resolution.fingerprint
        self.terms = binding.all_terms
        self._registry, self._runner_spec = registry, registry.runners[candidate.runner]
        self._hidden_size, self._dtype, self._device = (
            binding.config.hidden_size,
            binding.dtype,
            binding.device,
        )
        self._topk_format = resolution.request.topk_format
        self._topk_shape = binding.config.top_k if self._topk_format == TOPK_STANDARD else None
        self._id_dtypes = (torch_dtype("int32"), torch_dtype("int64"))
        self._bound_hooks = resolution.request.hooks
        self._whole: Callable[..., Tensor] | None = None
        self._paths: dict[FormatId, Callable[[Any, RunningState], Any]] = {}
        self.runner = binding.runner
        self.dispatcher: Any = None
        if candidate.fused_path is not None:
            target = registry.fused_paths[candidate.fused_path].target
            self._whole = _lazy.load(target, wanted_by=candidate.id)(binding)
            return
        for _, choice in candidate.paths:
            if choice.format not in self._paths:
                path_binding = replace_binding(binding, format=choice.format, terms=choice.terms)
                self._paths[choice.format] = _bind_path(choice.spec, path_binding, quant_info, candidate.id)
        spec = registry.dispatchers[candidate.dispatcher]
        options = _options(resolution, spec.name, spec.options)
        factory = _lazy.load(spec.factory, wanted_by=spec.subject)
        self.dispatcher = factory(replace_binding(binding, options=options, runner=None))
        dispatch = self.dispatcher.dispatch
        if resolution.request.settings.check:
            dispatch = _contract.checked_dispatch(dispatch, resolution.request)
        self._dispatch, self._combine = dispatch, self.dispatcher.combine

    def __call__(
        self,
        hidden_states: Tensor,
        topk_output: AnyTopK,
        *,
        phase: Phase = Phase.PREFILL,
        state: RunningState | None = None,
    ) -> Tensor:
        """Run the layer. `state` carries this call's hooks, output tensor and overlap arguments (it wins over `phase`).

        Raises ContractViolation for tensors of a wrong shape, dtype or device, before any kernel runs.
        """
        if (
            hidden_states.dim() != 2
            or hidden_states.shape[1] != self._hidden_size
            or hidden_states.dtype != self._dtype
            or hidden_states.device != self._device
            or hidden_states.requires_grad
            or getattr(topk_output, "format", None) != self._topk_format
        ):
            _contract.check_input(hidden_states, topk_output, self._binding, self._topk_format)
        if self._topk_shape is not None:
            ids, weights = topk_output.topk_ids, topk_output.topk_weights  # type: ignore[union-attr]
            expected = (hidden_states.shape[0], self._topk_shape)
            if (
                ids.shape != expected
                or weights.shape != expected
                or ids.dtype not in self._id_dtypes
                or not weights.is_floating_point()
                or ids.device != hidden_states.device
                or weights.device != hidden_states.device
            ):
                _contract.refuse_topk(hidden_states, topk_output, self._topk_shape)
        if state is None:
            state = RunningState(phase)
        elif state.hooks is not None:
            _contract.check_hooks(state.hooks, self._bound_hooks)
        if self._whole is not None:
            return self._whole(hidden_states, topk_output, self.quant_info, self._binding.config, state)
        dispatched = self._dispatch(hidden_states, topk_output, state)
        return self._combine(self._paths[dispatched.format](dispatched, state), state)  # type: ignore[no-any-return]

    def run(self, dispatched: Any, state: RunningState | None = None) -> Any:
        """Experts only, for servers that drive the dispatcher themselves: dispatch output -> combine input."""
        if dispatched.format not in self._paths:
            raise ContractViolation(
                f"this plan was bound for the formats {sorted(self._paths)}, got {dispatched.format!r}"
            )
        return self._paths[dispatched.format](dispatched, state if state is not None else RunningState())

    def update_weights(self, weights: CanonicalWeights) -> None:
        """New values for the same layer, in place: addresses stay, captured graphs see the new weights.

        What the plan holds is overwritten. A runner that keeps your own tensors instead of a copy (`reference`; `cpu`
        with pack_weights=False) writes into those that the plan was made with.
        """
        weights = _fit(weights, self.resolution, self._registry)
        update = self._runner_spec.update
        if update is not None:
            _lazy.load(update, wanted_by=self._runner_spec.subject)(self.quant_info, weights, self._binding)
            return
        fresh = _prepare(self._runner_spec, weights, self._binding)
        _contract.copy_in_place(self.quant_info, fresh, self._runner_spec.name)

    def step_owner(self, step: Step) -> Owner | None:
        """Who performs a step of the layer; None where it has no such step. The same in every format of the plan."""
        if not self.terms:  # a fused path does everything
            return Owner.RUNNER if step in self.resolution.request.steps else None
        return next(iter(self.terms.values())).owner(step)

    def explain(self, *, brief: bool = False) -> str:
        """The selection report as text; see `moe_core.explanation.text`."""
        return explanation.text(self.resolution, brief=brief)

    def __repr__(self) -> str:
        return f"<MoePlan {self.resolution.require().id} {self.fingerprint}>"

    def __reduce__(self) -> tuple[Any, ...]:
        if self._group is not None:
            raise pickle.PicklingError(
                f"{self!r} holds a process group, which cannot travel between processes; "
                "pickle plan.resolution and bind it again with the other process's group"
            )
        return (_rebuild, (self.resolution, self.quant_info, self._device))


def replace_binding(binding: Binding, **changes: Any) -> Binding:
    """A copy of a binding with `changes`."""
    from dataclasses import replace

    return replace(binding, **changes)


def bind(resolution: Resolution, weights: CanonicalWeights, registry: Registry, *, group: Any = None) -> MoePlan:
    """Bind the chosen candidate of `resolution` to `weights` (this rank's). Raises BindError or its subclasses."""
    request, candidate = resolution.request, resolution.require()
    if not request.hardware.present and "dependencies" in request.assume:
        raise BindError(
            f"this resolution takes {', '.join(sorted(request.assume))} for granted: it explains, it cannot be bound",
            hint="resolve again without assume=",
        )
    weights = _fit(weights, resolution, registry)
    if weights.device.type != request.hardware.torch_device_type:
        raise BindError(
            f"the plan was made for {request.hardware}, but the weights are on {weights.device}",
            hint="move the weights, or make the plan for the device where they are",
        )
    _check_group(resolution, group)
    binding = _make_binding(resolution, registry, weights.device, group)
    quant_info = _prepare(registry.runners[candidate.runner], weights, binding)
    plan = MoePlan(resolution, registry, binding, quant_info, group)
    registry.call("moe_core_plan_bound", resolution=resolution, plan=plan)
    _log_once(resolution.fingerprint, explanation.one_line(resolution), _is_loud(resolution, registry))
    return plan


def required_sizes(resolution: Resolution, registry: Registry) -> WeightRequirements:
    """The sizes that the chosen runner wants allocated on this rank; the layer's own where it asks for nothing."""
    request = resolution.request
    spec = registry.runners[resolution.require().runner]
    own = WeightRequirements(hidden_size=request.config.hidden_size, intermediate_size=request.local_intermediate_size)
    if spec.requirements is None:
        return own
    required: WeightRequirements = _lazy.load(spec.requirements, wanted_by=spec.subject)(request)
    return required


def _fit(weights: CanonicalWeights, resolution: Resolution, registry: Registry) -> CanonicalWeights:
    """`weights` in the sizes that the runner asked for: as they are if they were allocated so, else padded."""
    from moe_core._pad import pad

    request = resolution.request
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
    """A correct-but-slow runner that nobody named must not be met silently, unless it is all that a CPU has."""
    spec, settings = registry.runners[resolution.require().runner], resolution.request.settings
    return spec.last_resort and settings.runner != spec.name


@lru_cache(maxsize=1024)
def _log_once(fingerprint: str, line: str, loud: bool) -> None:
    logger.log(logging.WARNING if loud else logging.INFO, "%s%s", "slow fallback: " if loud else "", line)


def _check_group(resolution: Resolution, group: Any) -> None:
    candidate, parallel = resolution.require(), resolution.request.parallel
    owned = {s for _, c in candidate.paths for s, owner in c.terms.steps.items() if owner is Owner.DISPATCHER}
    reduces = sorted(owned & {Step.EP_REDUCE, Step.TP_REDUCE})
    if reduces and group is None:
        raise BindError(
            f"with tp_size {parallel.tp_size} and ep_size {parallel.ep_size} the dispatcher does "
            f"{' and '.join(reduces)}, and no process group was given",
            hint="pass group=..., or sum the results yourself and say so with ParallelConfig(reduce='caller')",
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
        options=_options(resolution, spec.name, spec.options),
        group=group,
    )
    runner = _lazy.load(spec.factory, wanted_by=spec.subject)(binding)
    return replace_binding(binding, runner=runner)


def _options(resolution: Resolution, name: str, declared: Mapping[str, str]) -> Mapping[str, Any]:
    from moe_core.errors import ConfigError, did_you_mean

    given = resolution.request.settings.options.get(name, {})
    for option in given:
        if option not in declared:
            raise ConfigError(f"{name!r} has no option {option!r}", hint=did_you_mean(option, declared))
    return given


def _prepare(spec: Any, weights: CanonicalWeights, binding: Binding) -> Any:
    quant_info = _lazy.load(spec.prepare, wanted_by=spec.subject)(weights, binding)
    if quant_info.scheme != binding.config.scheme or quant_info.layout not in spec.layouts:
        raise LayoutMismatch(
            f"runner {spec.name!r} takes {binding.config.scheme!r} in layout {' or '.join(sorted(spec.layouts))}, "
            f"but its prepare returned scheme {quant_info.scheme!r} in layout {quant_info.layout!r}",
            hint="this is a bug of the plugin: its spec and its prepare disagree",
        )
    return quant_info


def _bind_path(spec: Any, binding: Binding, quant_info: Any, wanted_by: str) -> Callable[[Any, RunningState], Any]:
    config = binding.config
    if isinstance(spec, FusedSpec):
        fused = _lazy.load(spec.target, wanted_by=wanted_by)(binding)

        def run_fused(dispatched: Any, state: RunningState) -> Any:
            return fused(dispatched, quant_info, config, state)

        return run_fused
    pre = _lazy.load(spec.pre, wanted_by=wanted_by)(binding)
    post = _lazy.load(spec.post, wanted_by=wanted_by)(binding)
    run = binding.runner.run

    def run_split(dispatched: Any, state: RunningState) -> Any:
        return post(run(pre(dispatched, quant_info, config, state), quant_info, state), quant_info, config, state)

    return run_split


def _rebuild(resolution: Resolution, quant_info: Any, device: Any) -> MoePlan:
    """Bind again in another process, with weights that are already prepared."""
    from moe_core.registry import default_registry

    registry = default_registry(resolution.request.settings)
    registry.runner(resolution.require().runner)  # a plugin given in code, or one not installed here: say so
    binding = _make_binding(resolution, registry, device, None)
    return MoePlan(resolution, registry, binding, quant_info, None)
