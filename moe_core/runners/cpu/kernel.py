"""The experts of a layer on the CPU: sort by expert, two products an expert, weighted sum.

Roofline, for a layer that touches A distinct experts with S token-expert pairs and b bytes an element
(gated):

* decode (few rows an expert): time >= A * 3 * I * H * b / memory bandwidth. The products do nothing but
  stream weights, so the layout of the weights decides (see weights.py), and every call an expert (11
  microseconds of operator and oneDNN set-up) shows: that is why few rows run in phases, with one activation
  for all experts.
* prefill (32 rows an expert and more): time >= S * 6 * I * H / peak flop rate. The rest must stay in cache:
  each expert runs from gather to copy before the next one starts, and the sum over slots is one pass.

Products with fewer rows than the CPU has registers for cost as much as full ones, so time in between is
neither; which product is then fastest depends on the CPU and its libraries, so it is measured (see
calibration.py). Inference only: gradients do not flow. The same input gives the same bits within a plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.runners.cpu.products import Slots, by_expert, choose_linear, grouped, phased
from moe_core.runners.cpu.weights import CpuWeights

if TYPE_CHECKING:
    from moe_core.config import Activation
    from moe_core.protocols import RunnerHooks

_CHUNK_ROWS = 256


def experts_forward(
    hidden: Tensor,
    topk_ids: Tensor,
    topk_weights: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
    *,
    router_weight_on_input: bool = False,
    combine: bool = True,
    output_scale: float = 1.0,
    hooks: RunnerHooks | None = None,
) -> Tensor:
    """Experts' outputs for routed tokens, summed over the slots of a token in float32.

    hidden [T, H] in the dtype of the weights. topk_ids [T, K] int32 or int64, local ids; a slot whose id is
    outside [0, E) is dropped: nothing is computed or read for it and it adds exactly zero, whatever its
    weight. topk_weights [T, K] float32 or the layer's dtype, or None for weight 1; applied to the output,
    or to the input with `router_weight_on_input`. Returns [T, H] in hidden's dtype, or with combine=False
    the weighted slots, [T, K, H].
    """
    if hidden.dtype is not weights.dtype:
        raise ContractViolation(f"hidden states are {hidden.dtype}, but weights are {weights.dtype}")
    hidden = hidden.detach()
    tokens, top_k = topk_ids.shape
    slots = _sort(topk_ids, weights.num_experts)
    rows = slots.order.size(0)
    if rows == 0:
        width = weights.hidden_size
        return hidden.new_zeros((tokens, width) if combine else (tokens, top_k, width))

    scales = None if topk_weights is None else topk_weights.detach().reshape(-1)
    sources = slots.order // top_k if tokens > 1 else None
    input_scales = None
    if router_weight_on_input and scales is not None:
        input_scales, scales = scales[slots.order].float().unsqueeze(1), None

    if hooks is not None and hooks.after_gate_up is None and hooks.after_down is None:
        hooks = None
    table, used = weights.products, len(slots.experts)
    regime = table.regime(rows, used)
    stacks = weights.stacks
    # One token is not sorted; and of many experts without rows, grouped_mm still looks at each.
    if table.grouped[regime] and stacks is not None and hooks is None and tokens > 1 and used * 4 >= len(weights.w13):
        result = grouped(hidden, slots, sources, input_scales, stacks, activation, table.phased_rows)
    else:
        linear = choose_linear(table.onednn[regime])
        if hooks is not None or rows <= table.phased_rows:
            result = phased(hidden, slots, sources, input_scales, weights, activation, linear, hooks, top_k)
        else:
            result = by_expert(hidden, slots, sources, input_scales, weights, activation, linear)

    if not combine:
        return _scatter(result, slots, scales, output_scale, tokens, top_k)
    if tokens == 1:
        return _sum_one(result, slots, scales, output_scale)
    return _sum(result, slots, scales, output_scale, tokens, top_k)


def _sort(topk_ids: Tensor, num_experts: int) -> Slots:
    flat = topk_ids.reshape(-1)
    if topk_ids.size(0) == 1:  # one token: nothing to sort, and lists are faster than tensors
        ids = flat.tolist()
        keep = [i for i, e in enumerate(ids) if 0 <= e < num_experts]
        kept = None
        if len(keep) < len(ids):
            kept = (flat >= 0) & (flat < num_experts)
        return Slots([ids[i] for i in keep], [1] * len(keep), torch.tensor(keep, dtype=torch.int64), kept)
    inside = (flat >= 0) & (flat < num_experts)
    flat = flat.where(inside, num_experts)  # dropped slots sort behind all experts
    every = torch.bincount(flat, minlength=num_experts + 1).tolist()
    rows = flat.size(0) - every.pop()
    order = torch.argsort(flat, stable=True)[:rows]
    experts = [e for e, count in enumerate(every) if count]
    return Slots(experts, [every[e] for e in experts], order, None if rows == flat.size(0) else inside)


def _sum_one(result: Tensor, slots: Slots, scales: Tensor | None, output_scale: float) -> Tensor:
    """result [S, H] of one token -> [1, H]."""
    wide = result.float()
    if scales is None:
        total = wide.sum(0, keepdim=True)
    else:
        total = torch.mm((scales if slots.kept is None else scales[slots.kept]).float().unsqueeze(0), wide)
    if output_scale != 1.0:
        total *= output_scale
    return total.to(result.dtype)


def _sum(result: Tensor, slots: Slots, scales: Tensor | None, output_scale: float, tokens: int, top_k: int) -> Tensor:
    """result [S, H] sorted by expert -> [T, H]: gather, scale and float32 sum in one pass (an embedding bag
    a token)."""
    order, kept, dtype = slots.order, slots.kept, result.dtype
    rows = order.size(0)
    row_of = order.new_empty(tokens * top_k)
    row_of[order] = torch.arange(rows)
    if kept is None:
        starts = torch.arange(0, rows, top_k)
    else:
        # A dropped slot is not in its bag at all, so its weight is never read.
        row_of = row_of[kept]
        sizes = kept.view(tokens, top_k).sum(1)
        starts = sizes.cumsum(0) - sizes
        scales = None if scales is None else scales[kept]
    if output_scale != 1.0:
        scales = torch.full((rows,), output_scale) if scales is None else scales.float() * output_scale
    if scales is not None and scales.dtype != dtype:
        # A bag's scales have the dtype of its rows. A float32 scale is the sum of a high and a low part, so
        # each row is taken twice (from cache) and no precision of the router is lost.
        high = scales.to(dtype)
        low = (scales - high.float()).to(dtype)
        scales = torch.stack((high, low), 1).reshape(-1)
        row_of, starts = row_of.repeat_interleave(2), starts * 2
    total: Tensor = torch.embedding_bag(result, row_of, starts, False, 0, False, scales)[0]
    return total


def _scatter(
    result: Tensor, slots: Slots, scales: Tensor | None, output_scale: float, tokens: int, top_k: int
) -> Tensor:
    """result [S, H] sorted by expert -> [T, K, H], weighted; dropped slots are zero."""
    rows, width = result.shape
    new = result.new_empty if slots.kept is None else result.new_zeros
    out = new((tokens * top_k, width))
    for start in range(0, rows, _CHUNK_ROWS):  # bounds the float32 copy
        part, order = result[start : start + _CHUNK_ROWS], slots.order[start : start + _CHUNK_ROWS]
        if scales is not None or output_scale != 1.0:
            wide = part.float()
            if scales is not None:
                wide = wide * scales[order].float()[:, None]
            part = (wide * output_scale).to(result.dtype)
        out.index_copy_(0, order, part)
    return out.view(tokens, top_k, width)
