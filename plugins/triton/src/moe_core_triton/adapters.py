"""Between the formats of the core and the kernel sequence."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

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
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import IdSpace, Step
from moe_core_triton.calls import Call, ExpertRows
from moe_core_triton.sequence import LayerSequence
from moe_core_triton.weights import TritonWeights


def _standard_rows(d: StandardDispatchOutput, mapped: bool, weighs: bool) -> ExpertRows:
    if weighs and d.topk_weights is None:
        raise _no_row_weights("standard")
    if d.topk_ids is None:
        raise ContractViolation("the triton runner needs top-k ids, but the router was bypassed")
    return ExpertRows(
        d.hidden_states,
        tokens=d.topk_ids.shape[0],
        scale=d.hidden_scale,
        weights=None if d.topk_weights is None else d.topk_weights.contiguous(),
        ids=d.topk_ids,
        expert_map=d.expert_map if mapped else None,
        num_valid=d.num_valid,
    )


def _mapped(binding: Binding) -> bool:
    """Whether ids are global: then the dispatcher's map says which live here."""
    return binding.terms is not None and binding.terms.id_space is IdSpace.GLOBAL


def standard_reader(binding: Binding) -> Callable[[StandardDispatchOutput], ExpertRows]:
    """What `LayerSequence.prepare` takes, from a dispatch output of the format `standard`."""
    return partial(_standard_rows, mapped=_mapped(binding), weighs=_weighs(binding))


def pre_standard(binding: Binding) -> Callable[..., Call]:
    """Pre-permute of the format `standard`."""
    layer, read = LayerSequence(binding), standard_reader(binding)

    def pre(d: StandardDispatchOutput, q: TritonWeights, c: MoeConfig, s: RunningState) -> Call:
        call = layer.prepare(read(d), q, s)
        call.layer, call.handle = layer, d.handle
        return call

    return pre


def post_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """Post-permute of the format `standard`: the sum over slots, where it is the runner's."""

    def post(call: Call, q: TritonWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        return StandardCombineInput(call.layer.finish(call, s), call.handle)

    return post


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The same steps in one call."""
    layer, read = LayerSequence(binding), standard_reader(binding)

    def fused(d: StandardDispatchOutput, q: TritonWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        call = layer.compute(layer.prepare(read(d), q, s), q, s)
        return StandardCombineInput(layer.finish(call, s), d.handle)

    return fused


def pre_batched(binding: Binding) -> Callable[..., Call]:
    """Pre-permute of the format `batched`: expert e owns rows e * M to e * M + masked_m[e]."""
    layer, weighs = LayerSequence(binding), _weighs(binding)

    def pre(d: BatchedDispatchOutput, q: TritonWeights, c: MoeConfig, s: RunningState) -> Call:
        if weighs and d.row_weights is None:
            raise _no_row_weights("batched")
        experts, m = d.hidden_states.shape[:2]
        starts = torch.arange(0, experts * m, m, device=d.masked_m.device, dtype=torch.int32) if m else d.masked_m
        usual = m if d.expected_m is None else d.expected_m
        rows = ExpertRows(
            d.hidden_states.flatten(0, 1),
            tokens=max(1, experts * usual // c.top_k),
            scale=None if d.hidden_scale is None else d.hidden_scale.flatten(0, -2),
            weights=None if d.row_weights is None else d.row_weights.reshape(-1),
            starts=starts,
            ends=starts + d.masked_m.to(torch.int32),
            rows_per_expert=m,
            usual_rows=d.expected_m,
        )
        call = layer.prepare(rows, q, s)
        call.layer, call.handle = layer, d
        return call

    return pre


def post_batched(binding: Binding) -> Callable[..., BatchedCombineInput]:
    """Post-permute of the format `batched`."""

    def post(call: Call, q: TritonWeights, c: MoeConfig, s: RunningState) -> BatchedCombineInput:
        d: BatchedDispatchOutput = call.handle
        rows = call.layer.finish(call, s).view(*d.hidden_states.shape[:2], -1)
        return BatchedCombineInput(rows, d.topk_ids, d.topk_weights, d.handle)

    return post


def pre_grouped(binding: Binding) -> Callable[..., Call]:
    """Pre-permute of the format `grouped`."""
    layer, weighs = LayerSequence(binding), _weighs(binding)

    def pre(d: GroupedDispatchOutput, q: TritonWeights, c: MoeConfig, s: RunningState) -> Call:
        if weighs and d.row_weights is None:
            raise _no_row_weights("grouped")
        rows = ExpertRows(
            d.hidden_states,
            tokens=max(1, d.hidden_states.shape[0] // c.top_k),
            scale=d.hidden_scale,
            weights=d.row_weights,
            starts=d.offsets[:-1].to(torch.int32),
            ends=d.offsets[1:].to(torch.int32),
            live=None if d.row_ids is None else d.row_ids >= 0,
        )
        call = layer.prepare(rows, q, s)
        call.layer, call.handle = layer, d.handle
        return call

    return pre


def post_grouped(binding: Binding) -> Callable[..., GroupedCombineInput]:
    """Post-permute of the format `grouped`."""

    def post(call: Call, q: TritonWeights, c: MoeConfig, s: RunningState) -> GroupedCombineInput:
        return GroupedCombineInput(call.layer.finish(call, s), call.handle)

    return post


def _weighs(binding: Binding) -> bool:
    return binding.terms is not None and binding.terms.runner_does(Step.ROUTER_WEIGHT)


def _no_row_weights(format_id: str) -> ContractViolation:
    return ContractViolation(f"the runner multiplies by the router's weight, but the {format_id} rows carry none")
