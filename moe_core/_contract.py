"""Input checks of a plan: cheap refusals always, the whole contract in checked mode (MOE_CORE_CHECK=1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding, RunnerHooks, RunningState
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_STANDARD, DroppedSlot

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


def refuse_topk(hidden_states: Tensor, topk_output: Any, top_k: int) -> NoReturn:
    """Say everything that is wrong with a TopKOutput."""
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
    raise ContractViolation(
        "the plan cannot take this router decision:\n    " + "\n    ".join(problems or ["it is malformed"])
    )


def check_hooks(hooks: RunnerHooks, bound: frozenset[str]) -> None:
    """Refuse hooks that the plan was not made for: its kernels might never call them."""
    wanted = {f.name for f in fields(hooks) if getattr(hooks, f.name) is not None}
    if not wanted <= bound:
        raise ContractViolation(
            f"this call brings the hooks {sorted(wanted)}, the plan was made for {sorted(bound) or 'none'}",
            hint=f"make the plan with hooks={sorted(wanted)}",
        )


def checked_dispatch(
    dispatch: Callable[[Tensor, Any, RunningState], Any], request: PlanRequest
) -> Callable[[Tensor, Any, RunningState], Any]:
    """`dispatch` behind a check of every value that the contract speaks about. Synchronizes with the device."""
    import torch

    experts, incoming = request.config.num_experts, request.incoming
    dropped = {DroppedSlot.NEGATIVE: -1, DroppedSlot.SINK: experts}.get(incoming)

    def check(hidden_states: Tensor, topk_output: Any, state: RunningState) -> Any:
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
        if not bool(torch.isfinite(hidden_states).all()):
            row = int((~torch.isfinite(hidden_states)).any(dim=1).nonzero()[0])
            raise ContractViolation(f"hidden_states has values that are not finite, first in row {row}")
        return dispatch(hidden_states, topk_output, state)

    return check


def _tensors(value: Any) -> dict[str, Any]:
    if not is_dataclass(value) or isinstance(value, type):
        return {}
    found: dict[str, Any] = {}
    for f in fields(value):
        item = getattr(value, f.name)
        if hasattr(item, "data_ptr") and hasattr(item, "copy_"):
            found[f.name] = item
        else:
            found |= {f"{f.name}.{name}": tensor for name, tensor in _tensors(item).items()}
    return found


def copy_in_place(old: Any, new: Any, runner: str) -> None:
    """Copy the tensors of one quant info into another of the same kind."""
    into, out_of = _tensors(old), _tensors(new)
    if not into or into.keys() != out_of.keys():
        raise BindError(
            f"the weights of runner {runner!r} cannot be updated in place: its quant info is no dataclass of tensors",
            hint="bind a new plan, or ask the plugin for an `update` target",
        )
    for name, tensor in into.items():
        tensor.copy_(out_of[name])
