"""The `reference` runner: the oracle. Any device, scheme, format and option; float32 (or float64) throughout.

It loops over experts, dequantizes one at a time and emulates the quantization of activations that a scheme states, so
it is slow and exact about semantics. No kernel of ours is judged by anything else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.errors import ContractViolation
from moe_core.formats import (
    BatchedCombineInput,
    BatchedDispatchOutput,
    GroupedCombineInput,
    GroupedDispatchOutput,
    StandardCombineInput,
    StandardDispatchOutput,
)
from moe_core.protocols import Binding, HookRows, RunnerHooks, RunningState
from moe_core.quant import QuantizedTensor, dequantize, dequantize_activation, roundtrip_activation
from moe_core.runners.activation import apply_activation
from moe_core.specs import Terms
from moe_core.vocabulary import Step
from moe_core.weights import CanonicalWeights

LAYOUT = "canonical"


@dataclass(slots=True)
class ReferenceWeights:
    """Canonical weights as they are; experts are dequantized when they are used."""

    scheme: str
    weights: CanonicalWeights
    layout: str = LAYOUT


@dataclass(slots=True)
class ReferenceInput:
    """rows: [N, H] float. expert_ids: int64 [N, K], local, -1 for dropped. weights: float [N, K] or None for 1."""

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor | None


def prepare(weights: CanonicalWeights, binding: Binding) -> ReferenceWeights:
    """Nothing is converted."""
    return ReferenceWeights(binding.config.scheme, weights)


class ReferenceRunner:
    """GEMM1, activation, GEMM2, one expert at a time."""

    def __init__(self, binding: Binding) -> None:
        self._binding = binding
        self._compute = torch.float64 if binding.dtype is torch.float64 else torch.float32
        self._payload = binding.scheme.activation if binding.options.get("emulate_activations", True) else None

    def run(self, runner_input: ReferenceInput, quant_info: ReferenceWeights, state: RunningState) -> Tensor:
        """-> [N, K, H] in the compute dtype; rows of dropped slots are zero."""
        if torch.compiler.is_compiling():
            raise ContractViolation(
                "the reference runner loops over the experts that occur and cannot be compiled",
                hint="make the plan with features={'compile'}: a runner that can is chosen, or the reasons say why not",
            )
        ids, weights = runner_input.expert_ids, quant_info.weights
        rows = runner_input.rows.to(self._compute)
        result = rows.new_zeros(*ids.shape, self._binding.config.hidden_size)
        token, slot = (ids >= 0).nonzero(as_tuple=True)
        order = torch.argsort(ids[token, slot], stable=True)
        token, slot = token[order], slot[order]
        expert = ids[token, slot]
        # (expert, its rows) of every expert that has any.
        parts = [(int(e), (expert == e).nonzero().squeeze(1)) for e in torch.unique(expert).tolist()]
        x = rows[token]
        if self._binding.config.router_weight_on_input and runner_input.weights is not None:
            x = x * runner_input.weights[token, slot, None].to(self._compute)
        hook_rows = HookRows(runner_input.rows, token, slot, expert)
        hooks: RunnerHooks | None = state.hooks if token.numel() else None
        hidden = self._linear(x, "w13", parts, weights)
        if hooks is not None and hooks.after_gate_up is not None:
            hooks.after_gate_up(hidden, hook_rows)
        hidden = apply_activation(hidden, self._binding.config.activation)
        down = self._linear(hidden, "w2", parts, weights)
        if hooks is not None and hooks.after_down is not None:
            hooks.after_down(down, hook_rows)
        result[token, slot] = down
        return result

    def _linear(self, x: Tensor, name: str, parts: list[tuple[int, Tensor]], weights: CanonicalWeights) -> Tensor:
        """x: [S, K] -> [S, N], each row by the matrix of its expert."""
        scheme, config = self._binding.scheme, self._binding.config
        static = getattr(weights, f"{name}_input_scale")
        if self._payload is not None and static is None:
            # One tensor of all live rows: a scale of a whole tensor must not depend on how rows are grouped.
            x = roundtrip_activation(x.float(), self._payload).to(self._compute)
        width = getattr(weights, name).shape[1]
        result = x.new_empty(x.shape[0], width)
        for expert, rows in parts:

            def part(suffix: str, expert: int = expert) -> Tensor | None:
                tensor = getattr(weights, f"{name}_{suffix}")
                return None if tensor is None else tensor[expert]

            data, given = getattr(weights, name)[expert], x[rows]
            if scheme.scale is None:
                matrix = data.to(self._compute)
            else:
                quantized = QuantizedTensor(data, part("scale"), part("zero"), part("global_scale"))
                matrix = dequantize(quantized, scheme, group_size=config.group_size, dtype=self._compute)
            if self._payload is not None and static is not None:
                given = roundtrip_activation(given.float(), self._payload, scale=static[expert]).to(self._compute)
            bias = part("bias")
            bias = None if bias is None else bias.to(self._compute)
            result[rows] = torch.nn.functional.linear(given, matrix, bias)
        return result


def _terms(binding: Binding) -> Terms:
    if binding.terms is None:
        raise TypeError("adapters are bound with terms")
    return binding.terms


def _tokens(dispatched: object, terms: Terms) -> Tensor:
    """The tokens as floats, whatever the payload."""
    hidden: Tensor = dispatched.hidden_states  # type: ignore[attr-defined]
    if terms.payload == "bf16":
        return hidden
    scale: Tensor = dispatched.hidden_scale  # type: ignore[attr-defined]
    if hidden.dim() == 2:
        return dequantize_activation(hidden, scale, terms.payload)
    rows = dequantize_activation(hidden.flatten(0, 1), scale.flatten(0, -2), terms.payload)
    return rows.reshape(*hidden.shape[:2], -1)


def pre_standard(binding: Binding) -> Callable[..., ReferenceInput]:
    """Pre-permute of the format `standard`."""
    terms = _terms(binding)
    weighs = terms.runner_does(Step.ROUTER_WEIGHT)

    def pre(d: StandardDispatchOutput, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> ReferenceInput:
        if d.topk_ids is None:
            raise TypeError("the reference runner needs top-k ids")
        ids = d.topk_ids.long()
        if d.num_valid is not None:
            padding = torch.arange(ids.shape[0], device=ids.device) >= d.num_valid
            ids = ids.masked_fill(padding[:, None], -1)
        s.private["reference.ids"], s.private["reference.weights"] = ids, d.topk_weights
        s.private["reference.handle"] = d.handle
        return ReferenceInput(_tokens(d, terms), ids, d.topk_weights if weighs else None)

    return pre


def post_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """Post-permute of the format `standard`: the steps that the terms give to the runner."""
    terms, dtype = _terms(binding), binding.dtype
    weigh = terms.runner_does(Step.ROUTER_WEIGHT) and not binding.config.router_weight_on_input
    scale = binding.config.routed_scaling_factor if terms.runner_does(Step.ROUTED_SCALING) else 1.0
    total = terms.runner_does(Step.TOPK_SUM)

    def post(out: Tensor, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        if weigh:
            ids, weights = s.private["reference.ids"], s.private["reference.weights"]
            # The weight of a dropped slot may be anything, NaN included.
            out = out * torch.where(ids >= 0, weights.to(out.dtype), 0.0)[..., None]
        out = out * scale
        result = (out.sum(dim=1) if total else out).to(dtype)
        if s.output is not None:
            result = s.output.copy_(result)
        return StandardCombineInput(result, s.private["reference.handle"])

    return post


def pre_batched(binding: Binding) -> Callable[..., ReferenceInput]:
    """Pre-permute of the format `batched`."""
    terms = _terms(binding)

    def pre(d: BatchedDispatchOutput, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> ReferenceInput:
        _need_row_weights(terms, d.row_weights, "batched")
        experts, m = d.hidden_states.shape[:2]
        row = torch.arange(m, device=d.masked_m.device)
        expert = torch.arange(experts, device=d.masked_m.device)[:, None]
        ids = torch.where(row < d.masked_m[:, None], expert, -1)
        ids = ids.reshape(-1, 1)
        s.private["reference.batched"], s.private["reference.ids"] = d, ids
        weights = None if d.row_weights is None else d.row_weights.reshape(-1, 1)
        return ReferenceInput(_tokens(d, terms).reshape(experts * m, -1), ids, weights)

    return pre


def post_batched(binding: Binding) -> Callable[..., BatchedCombineInput]:
    """Post-permute of the format `batched`."""
    finish = _row_steps(binding)

    def post(out: Tensor, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> BatchedCombineInput:
        d: BatchedDispatchOutput = s.private["reference.batched"]
        rows = finish(out[:, 0], d.row_weights, s.private["reference.ids"])
        shaped = rows.reshape(*d.hidden_states.shape[:2], -1).to(binding.dtype)
        return BatchedCombineInput(shaped, d.topk_ids, d.topk_weights, d.handle)

    return post


def pre_grouped(binding: Binding) -> Callable[..., ReferenceInput]:
    """Pre-permute of the format `grouped`."""
    terms = _terms(binding)

    def pre(d: GroupedDispatchOutput, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> ReferenceInput:
        _need_row_weights(terms, d.row_weights, "grouped")
        row = torch.arange(d.hidden_states.shape[0], device=d.offsets.device)
        expert = torch.searchsorted(d.offsets[1:].contiguous().long(), row, right=True)
        ids = torch.where(row < d.offsets[-1], expert, -1)
        if d.row_ids is not None:
            ids = torch.where(d.row_ids >= 0, ids, -1)
        ids = ids[:, None]
        s.private["reference.grouped"], s.private["reference.ids"] = d, ids
        weights = None if d.row_weights is None else d.row_weights[:, None]
        return ReferenceInput(_tokens(d, terms), ids, weights)

    return pre


def post_grouped(binding: Binding) -> Callable[..., GroupedCombineInput]:
    """Post-permute of the format `grouped`."""
    finish = _row_steps(binding)

    def post(out: Tensor, q: ReferenceWeights, c: MoeConfig, s: RunningState) -> GroupedCombineInput:
        d: GroupedDispatchOutput = s.private["reference.grouped"]
        rows = finish(out[:, 0], d.row_weights, s.private["reference.ids"])
        return GroupedCombineInput(rows.to(binding.dtype), d.handle)

    return post


def _need_row_weights(terms: Terms, weights: Tensor | None, format_id: str) -> None:
    if weights is None and terms.runner_does(Step.ROUTER_WEIGHT):
        raise ContractViolation(f"the runner multiplies by the router's weight, but the {format_id} rows carry none")


def _row_steps(binding: Binding) -> Callable[[Tensor, Tensor | None, Tensor], Tensor]:
    """Router weight and scaling of formats with one expert a row, as far as the terms give them to the runner."""
    terms = _terms(binding)
    weigh = terms.runner_does(Step.ROUTER_WEIGHT) and not binding.config.router_weight_on_input
    scale = binding.config.routed_scaling_factor if terms.runner_does(Step.ROUTED_SCALING) else 1.0

    def finish(rows: Tensor, weights: Tensor | None, ids: Tensor) -> Tensor:
        if weigh and weights is not None:
            # Padding rows are zero; their weight may be anything.
            rows = rows * torch.where(ids >= 0, weights.reshape(-1, 1).to(rows.dtype), 0.0)
        return rows * scale

    return finish
