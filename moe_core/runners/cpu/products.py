"""The products of a layer's experts on rows sorted by expert, in the three ways that a CPU may prefer.

`phased`: all first products, one activation, all second products. `by_expert`: expert after expert. `grouped`:
phases whose products are one `grouped_mm` each, a loop in C++ instead of one in Python; only for stacked rows.
All return [S, H] in sorted order. calibration.py measures which is fastest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from moe_core.config import Activation
    from moe_core.protocols import RunnerHooks
    from moe_core.runners.cpu.weights import CpuWeights, Stacks

Linear = Callable[[Tensor, Tensor, Tensor | None], Tensor]

_grouped_mm: Any = getattr(F, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)


class Slots(NamedTuple):
    """The slots that are computed, sorted by expert (stable), so row i belongs to flat slot order[i].

    experts, counts: the distinct experts and their rows, in the order of the rows (a single token's slots
    are not sorted: an expert may come twice). order: int64 [S]. kept: bool [T*K], or None if no slot was
    dropped.
    """

    experts: list[int]
    counts: list[int]
    order: Tensor
    kept: Tensor | None


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias through oneDNN, for packed weights and for rows."""
    y: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return y


def choose_linear(onednn: bool) -> Linear:
    """The product of one expert."""
    return onednn_linear if onednn else F.linear


@functools.cache
def can_group(dtype: torch.dtype) -> bool:
    """True if this torch has a correct `grouped_mm` on the CPU for `dtype` (tried once, then known)."""
    if _grouped_mm is None:
        return False
    x = (torch.arange(5 * 32).reshape(5, 32) % 7 - 3).to(dtype)
    w = (torch.arange(3 * 16 * 32).reshape(3, 16, 32) % 5 - 2).to(dtype)
    try:
        found = _grouped_mm(x, w.transpose(1, 2), offs=torch.tensor([2, 2, 5], dtype=torch.int32))
    except (AttributeError, RuntimeError, TypeError):
        return False
    wanted = torch.cat([x[:2].float() @ w[0].float().t(), x[2:].float() @ w[2].float().t()])
    return bool(torch.equal(found.float(), wanted))


def gather(hidden: Tensor, sources: Tensor | None, scales: Tensor | None, rows: int) -> Tensor:
    """hidden [T, H] -> its rows `sources` (None: the only row, repeated), times scales [rows, 1] float32."""
    x = hidden.expand(rows, -1) if sources is None else hidden.index_select(0, sources)
    return x if scales is None else (x.float() * scales).to(hidden.dtype)


def phased(
    hidden: Tensor,
    slots: Slots,
    sources: Tensor | None,
    input_scales: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
    linear: Linear,
    hooks: RunnerHooks | None = None,
    top_k: int = 1,
) -> Tensor:
    """All first products, one activation, all second products."""
    w13, w2, bias13, bias2 = weights.w13, weights.w2, weights.bias13, weights.bias2
    experts, counts = slots.experts, slots.counts
    x = gather(hidden, sources, input_scales, slots.order.size(0)).split_with_sizes(counts)
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


def by_expert(
    hidden: Tensor,
    slots: Slots,
    sources: Tensor | None,
    input_scales: Tensor | None,
    weights: CpuWeights,
    activation: Activation,
    linear: Linear,
) -> Tensor:
    """Expert after expert, so that intermediate results stay in cache."""
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
        gate_up = linear(gather(hidden, source, scale, count), w13[e], bias13[e])
        target.copy_(linear(activate(gate_up, activation), w2[e], bias2[e]))
    return result


def grouped(
    hidden: Tensor,
    slots: Slots,
    sources: Tensor | None,
    input_scales: Tensor | None,
    stacks: Stacks,
    activation: Activation,
    chunk_rows: int,
) -> Tensor:
    """Phases over chunks of whole experts, of at most chunk_rows rows where an expert has not more. The
    experts of `slots` ascend."""
    experts, counts = slots.experts, slots.counts
    rows = slots.order.size(0)
    if rows <= chunk_rows:
        return _group(gather(hidden, sources, input_scales, rows), experts, counts, stacks, activation)
    result = hidden.new_empty((rows, stacks.w2.size(1)))
    first = start = 0
    while first < len(experts):
        last, end = first + 1, start + counts[first]
        while last < len(experts) and end + counts[last] - start <= chunk_rows:
            end += counts[last]
            last += 1
        source = None if sources is None else sources[start:end]
        scale = None if input_scales is None else input_scales[start:end]
        x = gather(hidden, source, scale, end - start)
        result[start:end] = _group(x, experts[first:last], counts[first:last], stacks, activation)
        first, start = last, end
    return result


def _group(x: Tensor, experts: list[int], counts: list[int], stacks: Stacks, activation: Activation) -> Tensor:
    """x [rows, H] of some ascending experts -> [rows, H]."""
    low, high = experts[0], experts[-1] + 1
    ends, total, i = [], 0, 0
    for e in range(low, high):
        if experts[i] == e:
            total, i = total + counts[i], i + 1
        ends.append(total)
    offs = torch.tensor(ends, dtype=torch.int32)
    owner = None
    if stacks.bias13 is not None or stacks.bias2 is not None:
        owner = torch.repeat_interleave(torch.tensor(experts), torch.tensor(counts))
    y = _grouped_mm(x.contiguous(), stacks.w13[low:high].transpose(1, 2), offs=offs)
    if stacks.bias13 is not None and owner is not None:
        y += stacks.bias13.index_select(0, owner)
    down: Tensor = _grouped_mm(activate(y, activation), stacks.w2[low:high].transpose(1, 2), offs=offs)
    if stacks.bias2 is not None and owner is not None:
        down += stacks.bias2.index_select(0, owner)
    return down


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
