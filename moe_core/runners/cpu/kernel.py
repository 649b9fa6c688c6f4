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
neither. Inference only: gradients do not flow. The same input gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.runners.cpu.weights import CpuWeights

if TYPE_CHECKING:
    from moe_core.config import Activation
    from moe_core.protocols import RunnerHooks

_PHASED_ROWS = 256
"""Up to so many rows, a whole intermediate result fits in the L2 cache and phases save calls; above, they
cost misses."""
_CHUNK_ROWS = 256


class _Slots(NamedTuple):
    """The slots that are computed, sorted by expert (stable), so row i belongs to flat slot order[i].

    experts, counts: the distinct experts and their rows, in the order of the rows (a single token's slots
    are not sorted: an expert may come twice). order: int64 [S]. kept: bool [T*K], or None if no slot was
    dropped.
    """

    experts: list[int]
    counts: list[int]
    order: Tensor
    kept: Tensor | None


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
    if hooks is not None or rows <= _PHASED_ROWS:
        result = _phased(hidden, slots, sources, input_scales, weights, activation, hooks, top_k)
    else:
        result = _by_expert(hidden, slots, sources, input_scales, weights, activation)

    if not combine:
        return _scatter(result, slots, scales, output_scale, tokens, top_k)
    if tokens == 1:
        return _sum_one(result, slots, scales, output_scale)
    return _sum(result, slots, scales, output_scale, tokens, top_k)


def _sort(topk_ids: Tensor, num_experts: int) -> _Slots:
    flat = topk_ids.reshape(-1)
    if topk_ids.size(0) == 1:  # one token: nothing to sort, and lists are faster than tensors
        ids = flat.tolist()
        keep = [i for i, e in enumerate(ids) if 0 <= e < num_experts]
        kept = None
        if len(keep) < len(ids):
            kept = (flat >= 0) & (flat < num_experts)
        return _Slots([ids[i] for i in keep], [1] * len(keep), torch.tensor(keep, dtype=torch.int64), kept)
    inside = (flat >= 0) & (flat < num_experts)
    flat = flat.where(inside, num_experts)  # dropped slots sort behind all experts
    every = torch.bincount(flat, minlength=num_experts + 1).tolist()
    rows = flat.size(0) - every.pop()
    order = torch.argsort(flat, stable=True)[:rows]
    experts = [e for e, count in enumerate(every) if count]
    return _Slots(experts, [every[e] for e in experts], order, None if rows == flat.size(0) else inside)


def _linear(weights: CpuWeights) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    if not weights.onednn:
        return F.linear
    product = torch.ops.mkldnn._linear_pointwise.default

    def onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y: Tensor = product(x, weight, bias, "none", [], "")
        return y

    return onednn


def _gather(hidden: Tensor, sources: Tensor | None, scales: Tensor | None, rows: int) -> Tensor:
    """hidden [T, H] -> its rows `sources` (None: the only row, repeated), times scales [rows, 1] float32."""
    x = hidden.expand(rows, -1) if sources is None else hidden.index_select(0, sources)
    return x if scales is None else (x.float() * scales).to(hidden.dtype)


def _phased(
    hidden: Tensor,
    slots: _Slots,
    sources: Tensor | None,
    input_scales: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
    hooks: RunnerHooks | None,
    top_k: int,
) -> Tensor:
    """All first products, one activation, all second products. Returns [S, H] in sorted order."""
    linear = _linear(weights)
    w13, w2, bias13, bias2 = weights.w13, weights.w2, weights.bias13, weights.bias2
    experts, counts = slots.experts, slots.counts
    x = _gather(hidden, sources, input_scales, slots.order.size(0)).split_with_sizes(counts)
    gate_up = torch.cat([linear(part, w13[e], bias13[e]) for part, e in zip(x, experts, strict=True)])
    info = None
    if hooks is not None:
        from moe_core.protocols import HookRows

        info = HookRows(
            hidden_states=hidden,
            token_ids=slots.order // top_k,
            slot_ids=slots.order % top_k,
            expert_ids=torch.repeat_interleave(torch.tensor(experts), torch.tensor(counts)),
        )
        if hooks.after_gate_up is not None:
            hooks.after_gate_up(gate_up, info)
    inner = activate(gate_up, activation).split_with_sizes(counts)
    down = torch.cat([linear(part, w2[e], bias2[e]) for part, e in zip(inner, experts, strict=True)])
    if hooks is not None and info is not None and hooks.after_down is not None:
        hooks.after_down(down, info)
    return down


def _by_expert(
    hidden: Tensor,
    slots: _Slots,
    sources: Tensor | None,
    input_scales: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
) -> Tensor:
    """Expert after expert, so that intermediate results stay in cache. Returns [S, H] in sorted order."""
    linear = _linear(weights)
    w13, w2, bias13, bias2 = weights.w13, weights.w2, weights.bias13, weights.bias2
    counts = slots.counts
    result = hidden.new_empty((slots.order.size(0), weights.hidden_size))
    parts = zip(
        slots.experts,
        counts,
        result.split_with_sizes(counts),
        (None,) * len(counts) if sources is None else sources.split_with_sizes(counts),
        (None,) * len(counts) if input_scales is None else input_scales.split_with_sizes(counts),
        strict=True,
    )
    for e, count, target, source, scale in parts:
        gate_up = linear(_gather(hidden, source, scale, count), w13[e], bias13[e])
        target.copy_(linear(activate(gate_up, activation), w2[e], bias2[e]))
    return result


def activate(x: Tensor, activation: Activation) -> Tensor:
    """x [rows, 2I] gate, up -> [rows, I], or [rows, I] -> [rows, I], computed in float32. May overwrite x."""
    wide = x.float()
    limit = activation.limit
    if not activation.gated:
        if limit is not None:
            wide.clamp_(max=limit)
        return _FUNCTIONS[activation.name](wide).to(x.dtype)
    gate, up = torch.chunk(wide, 2, 1)
    if limit is not None:
        gate.clamp_(max=limit)
        up.clamp_(-limit, limit)
    if activation.name == "swiglu_oai":
        gate = torch.sigmoid(gate * activation.alpha).mul_(gate)
        up = up.add_(activation.beta)
    else:
        gate = _FUNCTIONS[activation.name](gate)
    if x.dtype == torch.float32:
        return gate * up
    # The product rounds once, while it writes; separate passes would read [rows, I] twice more.
    return torch.mul(gate, up, out=x.new_empty(up.shape))


# Each may overwrite its float32 argument.
_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": lambda x: F.silu(x, inplace=True),
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": torch.relu_,
    "relu2": lambda x: x.relu_().square_(),
    "identity": lambda x: x,
}


def _sum_one(result: Tensor, slots: _Slots, scales: Tensor | None, output_scale: float) -> Tensor:
    """result [S, H] of one token -> [1, H]."""
    wide = result.float()
    if scales is None:
        total = wide.sum(0, keepdim=True)
    else:
        total = torch.mm((scales if slots.kept is None else scales[slots.kept]).float().unsqueeze(0), wide)
    if output_scale != 1.0:
        total *= output_scale
    return total.to(result.dtype)


def _sum(result: Tensor, slots: _Slots, scales: Tensor | None, output_scale: float, tokens: int, top_k: int) -> Tensor:
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
    result: Tensor, slots: _Slots, scales: Tensor | None, output_scale: float, tokens: int, top_k: int
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
