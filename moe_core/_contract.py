"""Input checks of a plan: cheap refusals always, the whole contract in checked mode (MOE_CORE_CHECK=1)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from moe_core.config import MoeConfig
from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding, RunnerHooks, RunningState
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_STANDARD, DroppedSlot, Phase

if TYPE_CHECKING:
    from torch import Tensor


def check_input(hidden_states: Tensor, topk_output: Any, binding: Binding, topk_format: str) -> None:
    """Say everything that is wrong with the tensors of a call; return if gradients are off after all."""
    import torch

    problems = []
    if hidden_states.requires_grad and torch.is_grad_enabled():
        problems.append("hidden_states wants a gradient, and moe_core runs inference only: call it in torch.no_grad()")
    if hidden_states.dim() != 2 or hidden_states.shape[-1] != binding.config.hidden_size:
        problems.append(
            f"hidden_states has shape {tuple(hidden_states.shape)}, expected [tokens, {binding.config.hidden_size}]"
        )
    elif binding.max_tokens is not None and hidden_states.shape[0] > binding.max_tokens:
        problems.append(
            f"there are {hidden_states.shape[0]} tokens, the plan was made for max_tokens={binding.max_tokens}"
        )
    if hidden_states.dtype != binding.dtype:
        problems.append(f"hidden_states is {hidden_states.dtype}, the plan was made for {binding.dtype}")
    if hidden_states.device != binding.device:
        problems.append(f"hidden_states is on {hidden_states.device}, the weights are on {binding.device}")
    found = getattr(topk_output, "format", None)
    if found is None:
        problems.append(
            f"the router's decision is a {type(topk_output).__name__}, expected a TopKOutput or BypassedTopK"
        )
    elif found != topk_format:
        problems.append(f"the router's decision is {found!r}, the plan was made for {topk_format!r}")
    if problems:
        raise ContractViolation("the plan cannot take these tensors:\n    " + "\n    ".join(problems))


def check_topk(hidden_states: Tensor, topk_output: Any, top_k: int) -> None:
    """Say everything that is wrong with a TopKOutput; return if only a gradient was suspected and they are off."""
    import torch

    expected = (hidden_states.shape[0], top_k)
    problems = []
    for name in ("topk_ids", "topk_weights"):
        tensor = getattr(topk_output, name)
        if tuple(tensor.shape) != expected:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {expected} ([tokens, top_k])")
        if tensor.device != hidden_states.device:
            problems.append(f"{name} is on {tensor.device}, hidden_states on {hidden_states.device}")
    if str(topk_output.topk_ids.dtype) not in ("torch.int32", "torch.int64"):
        problems.append(f"topk_ids is {topk_output.topk_ids.dtype}, expected int32 or int64")
    if not topk_output.topk_weights.is_floating_point():
        problems.append(f"topk_weights is {topk_output.topk_weights.dtype}, expected float32")
    if topk_output.topk_weights.requires_grad and torch.is_grad_enabled():
        problems.append("topk_weights wants a gradient, and moe_core runs inference only: call it in torch.no_grad()")
    if problems:
        raise ContractViolation("the plan cannot take this router decision:\n    " + "\n    ".join(problems))


def refuse_logits(hidden_states: Tensor, topk_output: Any, config: MoeConfig) -> NoReturn:
    """Router logits of a wrong shape, where kernels route themselves."""
    raise ContractViolation(
        f"router_logits has shape {tuple(topk_output.router_logits.shape)}, expected "
        f"{(hidden_states.shape[0], config.num_experts)} ([tokens, experts])"
    )


def check_state(
    state: RunningState, phase: Phase | None, default: Phase, hidden_states: Tensor, binding: Binding
) -> None:
    """Complete the phase of a caller's state, and hold its output tensor to the result's shape, dtype and device."""
    if state.phase is None:
        state.phase = default if phase is None else phase
    elif phase is not None and phase != state.phase:
        raise ContractViolation(f"this call says phase {phase!s}, its running state says {state.phase!s}")
    if state.output is None:
        return
    config, output = binding.config, state.output
    expected = (hidden_states.shape[0], *((config.top_k,) if config.no_combine else ()), config.hidden_size)
    problems = []
    if tuple(output.shape) != expected:
        problems.append(f"it has shape {tuple(output.shape)}, the result has {expected}")
    if output.dtype != binding.dtype or output.device != hidden_states.device:
        problems.append(
            f"it is {output.dtype} on {output.device}, the result {binding.dtype} on {hidden_states.device}"
        )
    if output.data_ptr() == hidden_states.data_ptr() and output.numel() and "inplace" not in binding.request.features:
        problems.append("it is the input itself, and the plan was not made with features={'inplace'}")
    if problems:
        raise ContractViolation("the plan cannot write into state.output:\n    " + "\n    ".join(problems))


def refuse_phase(phase: object, phases: tuple[Phase, ...]) -> NoReturn:
    """A phase that the plan was not made for."""
    raise ContractViolation(
        f"this call is for phase {phase!s}, the plan was made for {' and '.join(phases)}",
        hint="make the plan with phases=[...]",
    )


def refuse_closed(*_: Any) -> NoReturn:
    """A call after `MoePlan.close`."""
    raise ContractViolation("the plan was closed", hint="make a new plan")


def check_hooks(hooks: RunnerHooks, bound: frozenset[str]) -> None:
    """Refuse hooks that the plan was not made for: its kernels might never call them."""
    wanted = {f.name for f in fields(hooks) if getattr(hooks, f.name) is not None}
    if not wanted <= bound:
        raise ContractViolation(
            f"this call brings the hooks {sorted(wanted)}, the plan was made for {sorted(bound) or 'none'}",
            hint=f"make the plan with hooks={sorted(wanted)}",
        )


def checked(function: Callable[..., Any], request: PlanRequest) -> Callable[..., Any]:
    """A dispatch (or fused path) behind a check of every value that the contract speaks about. Synchronizes.

    The tokens of a row without a live slot are padding, and may be anything.
    """
    import torch

    experts, incoming = request.config.num_experts, request.incoming
    dropped = {DroppedSlot.NEGATIVE: -1, DroppedSlot.SINK: experts}.get(incoming)

    def check(hidden_states: Tensor, topk_output: Any, *rest: Any) -> Any:
        live = torch.ones(hidden_states.shape[0], dtype=torch.bool, device=hidden_states.device)
        if topk_output.format == TOPK_STANDARD:
            ids, weights = topk_output.topk_ids, topk_output.topk_weights
            valid = (ids >= 0) & (ids < experts)
            is_dropped = ids == dropped if dropped is not None else torch.zeros_like(valid)
            bad = ~(valid | is_dropped)
            if bool(bad.any()):
                row, slot = (int(i) for i in bad.nonzero()[0])
                raise ContractViolation(
                    f"topk_ids[{row}, {slot}] is {int(ids[row, slot])}: expert ids are 0 to {experts - 1}"
                    + (f", dropped slots are {dropped}" if dropped is not None else ", and no slot may be dropped")
                    + f" ({int(bad.sum())} such slots)",
                    hint="fix the router, or declare how it writes dropped slots with incoming=DroppedSlot....",
                )
            broken = valid & ~torch.isfinite(weights)
            if bool(broken.any()):
                row, slot = (int(i) for i in broken.nonzero()[0])
                raise ContractViolation(
                    f"topk_weights[{row}, {slot}] is {float(weights[row, slot])}, and its slot is not dropped"
                )
            live = valid.any(dim=1)
        infinite = live & ~torch.isfinite(hidden_states).all(dim=1)
        if bool(infinite.any()):
            row = int(infinite.nonzero()[0])
            raise ContractViolation(f"hidden_states has values that are not finite, first in row {row}")
        return function(hidden_states, topk_output, *rest)

    return check


def leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and plain value inside dataclasses, lists, tuples and mappings, with its place."""
    if is_dataclass(value) and not isinstance(value, type):
        for f in fields(value):
            yield from leaves(getattr(value, f.name), f"{name}.{f.name}")
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from leaves(item, f"{name}[{i}]")
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, f"{name}[{key!r}]")
    else:
        yield name, value


def copy_in_place(old: Any, new: Any, runner: str) -> None:
    """Copy the tensors of one quant info into another of the same kind: all of them, or none and a BindError."""
    import torch

    into, out_of = dict(leaves(old)), dict(leaves(new))
    hint = "bind a new plan, or ask the plugin for an `update` target"
    problems = sorted(set(into) ^ set(out_of))
    for name in into.keys() & out_of.keys():
        a, b = into[name], out_of[name]
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            if (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device):
                problems.append(f"{name}: {tuple(a.shape)} {a.dtype} and {tuple(b.shape)} {b.dtype}")
        elif type(a) is not type(b) or a != b:
            problems.append(f"{name}: {a!r} and {b!r}")
    if problems:
        raise BindError(
            f"the weights of runner {runner!r} cannot be updated in place, more than values would change:\n    "
            + "\n    ".join(problems),
            hint=hint,
        )
    tensors = [(a, out_of[name]) for name, a in into.items() if isinstance(a, torch.Tensor)]
    if not tensors:
        raise BindError(f"the weights of runner {runner!r} cannot be updated in place: they hold no tensor", hint=hint)
    with torch.no_grad():
        for a, b in tensors:
            a.copy_(b)
