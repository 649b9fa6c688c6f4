"""The arithmetic that both doubles share: one layer from its decoded matrices, in the kernels' own order of steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Experts:
    """Decoded weights. w13: float [E, R, H], rows [up; gate] or plain; w2: float [E, H, I]; b13, b2: their biases."""

    w13: Tensor
    w2: Tensor
    gated: bool
    alpha: Tensor | None = None
    beta: Tensor | None = None
    limit: Tensor | None = None
    b13: Tensor | None = None
    b2: Tensor | None = None


def activate(rows: Tensor, e: Experts, expert: int, up_scale: float = 1.0) -> Tensor:
    """[S, R] -> [S, I]; up_scale multiplies up after everything else."""
    if not e.gated:
        return rows.clamp(min=0).square()
    up, gate = rows.chunk(2, dim=1)
    if e.limit is not None:
        bound = float(e.limit[expert])
        up, gate = up.clamp(-bound, bound), gate.clamp(max=bound)
    alpha = 1.0 if e.alpha is None else float(e.alpha[expert])
    beta = 0.0 if e.beta is None else float(e.beta[expert])
    return gate * torch.sigmoid(alpha * gate) * (up + beta) * up_scale


def layer(
    x: Tensor,
    ids: Tensor,
    weights: Tensor,
    e: Experts,
    *,
    first: int,
    middle: Callable[[Tensor, int], Tensor],
    enter: Callable[[Tensor, int], Tensor] = lambda rows, expert: rows,
    gemm1: Callable[[Tensor, int], Tensor] = lambda rows, expert: rows,
    gemm2: Callable[[Tensor, int], Tensor] = lambda rows, expert: rows,
    weigh_input: bool = False,
) -> Tensor:
    """float32 [T, H]. ids: global; those outside [first, first + E) are skipped, and their weights are not read.

    enter: [S, H], the tokens of an expert as GEMM1 gets them. gemm1, gemm2: what scales a product means. middle: [S, I]
    as GEMM2 gets it, quantized or rounded.
    """
    out = torch.zeros(x.shape[0], e.w2.shape[1])
    for expert in range(e.w13.shape[0]):
        token, slot = (ids == expert + first).nonzero(as_tuple=True)
        if token.numel() == 0:
            continue
        rows, share = enter(x[token], expert), weights[token, slot].float().unsqueeze(1)
        if weigh_input:
            rows, share = rows * share, torch.ones_like(share)
        hidden = gemm1(rows @ e.w13[expert].t(), expert)
        if e.b13 is not None:
            hidden = hidden + e.b13[expert].float()
        down = gemm2(middle(activate(hidden, e, expert), expert) @ e.w2[expert].t(), expert)
        if e.b2 is not None:
            down = down + e.b2[expert].float()
        out.index_add_(0, token, down * share)
    return out


def refuse_duplicates(ids: Tensor) -> bool:
    """Whether no row names an expert twice (dropped slots apart)."""
    same = (ids.unsqueeze(2) == ids.unsqueeze(1)) & (ids >= 0).unsqueeze(1)
    return not bool((same.sum(dim=2) > 1).any())


def round_e4m3(values: Tensor) -> Tensor:
    """float -> the nearest e4m3 value, saturated."""
    return values.clamp(-448, 448).to(torch.float8_e4m3fn).float()


def through_groups(values: Tensor, size: int = 128) -> Tensor:
    """[S, K] -> what is left after quantizing each `size` of K to e4m3 with a float32 scale."""
    groups = values.float().unflatten(1, (-1, size))
    scale = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (round_e4m3(groups / scale) * scale).flatten(1)


def through_nvfp4(values: Tensor, multiplier: float) -> Tensor:
    """[S, K] -> what is left after quantizing to e2m1 with e4m3 scales of 16; values times `multiplier` fit them."""
    groups = (values.float() * multiplier).unflatten(1, (-1, 16))
    scale = round_e4m3(groups.abs().amax(-1, keepdim=True) / 6).clamp(min=2.0**-9)
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    near = (groups / scale).abs().unsqueeze(-1).sub(table).abs().argmin(-1)
    return (table[near] * groups.sign() * scale / multiplier).flatten(1)


def through_mxfp8(values: Tensor) -> Tensor:
    """[S, K] -> what is left after quantizing to e4m3 with power-of-two scales of 32."""
    groups = values.float().unflatten(1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-120)
    scale = torch.exp2(torch.floor(torch.log2(amax)) - 8)
    return (round_e4m3(groups / scale) * scale).flatten(1)
