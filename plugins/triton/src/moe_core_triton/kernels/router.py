"""Router logits to a top-k choice in one launch: `moe_core.routing.route` on the device.

One warp takes a row and keeps it in registers. The best are taken one by one: scores are compared as integers of
the same order, because a warp reduces those in one instruction, and because every tie then falls to the lowest index
and a NaN, as in torch, counts as the largest.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from moe_core.config import RoutingConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.routing import route as core_route
from moe_core.topk import TopKOutput
from moe_core_triton.kernels.launching import dependent_launch, wait_for_inputs

LOWEST = tl.constexpr(-0x7FFFFFFF - 1)  # under the key of every float, -inf included: what cannot be chosen


@triton.jit
def _ordered(x):
    """int32 keys in the order of the float32 `x`: zeros are equal, and a NaN is the largest."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def _value(key):
    """The float32 of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _scores(x, high, total, METHOD: tl.constexpr):
    """Scores of the logits `x`, float32; for softmax with the row's maximum and its sum of exponentials."""
    if METHOD == "softmax":
        x = tl.exp(x - high) / total
    elif METHOD == "sigmoid":
        x = 1.0 / (1.0 + tl.exp(-x))
    return x


@triton.jit
def _best_groups(key, expert, group, GROUPS: tl.constexpr, TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr):
    """int32 scalar: bit g says that group g is among the best by its largest key of key [EB], or by its largest two."""
    G: tl.constexpr = triton.next_power_of_2(GROUPS)
    g = tl.arange(0, G)
    score = tl.full((G,), LOWEST, tl.int32)
    # Unrolled, so that the reductions of the groups overlap.
    for i in tl.static_range(GROUPS):
        members = tl.where(group == i, key, LOWEST)
        high = tl.max(members, 0)
        if TOP2:
            first = tl.min(tl.where((members == high) & (group == i), expert, 0x7FFFFFFF), 0)
            second = tl.max(tl.where(expert == first, LOWEST, members), 0)
            high = _ordered(_value(high) + _value(second))
        score = tl.where(g == i, high, score)
    best = 0
    for _ in tl.static_range(TOPK_GROUPS):
        taken = tl.min(tl.where(score == tl.max(score, 0), g, G), 0)
        best = best | (1 << taken)
        score = tl.where(g == taken, LOWEST, score)
    return best


@triton.jit(do_not_specialize=["experts", "scaling"])
def _route(
    logits, bias, ids, weights, stride, experts, scaling,
    K: tl.constexpr, KB: tl.constexpr, EB: tl.constexpr, METHOD: tl.constexpr, GROUPS: tl.constexpr,
    TOPK_GROUPS: tl.constexpr, TOP2: tl.constexpr, BIASED: tl.constexpr, RENORMALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """ids, weights [T, K] of logits [T, experts], one row a program."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = logits + row * stride
    expert = tl.arange(0, EB)
    there = expert < experts
    x = tl.load(at + expert, mask=there, other=float("-inf")).to(tl.float32)
    high = tl.max(x, 0)
    total = tl.sum(tl.exp(x - high), 0) if METHOD == "softmax" else high
    choice = _scores(x, high, total, METHOD)
    if BIASED:
        choice += tl.load(bias + expert, mask=there, other=0.0).to(tl.float32)
    key = tl.where(there, _ordered(choice), LOWEST)
    if GROUPS > 1:
        group = expert // (experts // GROUPS)
        best = _best_groups(key, expert, group, GROUPS, TOPK_GROUPS, TOP2)
        key = tl.where(there & (((best >> (group & 31)) & 1) != 0), key, LOWEST)
    k = tl.arange(0, KB)
    chosen = tl.zeros((KB,), tl.int32)
    for i in range(K):
        taken = tl.min(tl.where(key == tl.max(key, 0), expert, EB), 0)
        chosen = tl.where(k == i, taken, chosen)
        key = tl.where(expert == taken, LOWEST, key)

    # The logits of the chosen are read again (from the L1): cheaper than to carry scores through the loop.
    w = tl.load(at + chosen, mask=k < K, other=float("-inf")).to(tl.float32)
    if METHOD == "topk_softmax":
        w = tl.exp(w - tl.max(w, 0))
        w /= tl.sum(w, 0)
    elif METHOD == "topk_sigmoid":
        w = _scores(w, high, total, "sigmoid")
    else:
        w = _scores(w, high, total, METHOD)
    if RENORMALIZE:
        w /= tl.sum(tl.where(k < K, w, 0.0), 0) + 1e-20
    tl.store(ids + row * K + k, chosen, mask=k < K)
    tl.store(weights + row * K + k, w * scaling, mask=k < K)


def fits(experts: int, top_k: int, routing: RoutingConfig) -> bool:
    """Whether the kernel is made for this. Choosing all groups is no restriction, however many there are."""
    restricted = routing.num_groups if routing.topk_groups < routing.num_groups else 1
    return experts <= 1024 and top_k <= 32 and restricted <= 32


@lru_cache(maxsize=256)
def _check_routing(experts: int, top_k: int, routing: RoutingConfig, bias: tuple[int, ...] | None) -> None:
    """Raise what the core raises. On the meta device its `route` checks and computes nothing, once a configuration."""
    logits = torch.empty(1, experts, device="meta")
    core_route(logits, top_k, routing, None if bias is None else torch.empty(bias, device="meta"))


def route(
    router_logits: Tensor,
    top_k: int,
    routing: RoutingConfig,
    correction_bias: Tensor | None = None,
    scaling_factor: float = 1.0,
) -> TopKOutput:
    """Choose `top_k` experts a token: the contract and formula of `moe_core.routing.route`, in one launch.

    router_logits: floating point [T, E], E up to 1024, rows of any stride; correction_bias: floating point [E];
    top_k up to 32, groups up to 32. Returns topk_ids int32 [T, K], best first, and topk_weights float32 [T, K].
    Between equal scores the lowest id wins. All arithmetic is float32.

    Roofline: (E * itemsize + 8 K) bytes a token (T = 16384, E = 256, bf16: 9.4 MB, 2.2 us at 4.3 TB/s). Latency of
    K selections counts: expected 3 to 4 us up to T = 1024, about 10 at 16384.

    Raises ConfigError where `top_k` or `routing` do not fit E, ContractViolation for a wrong tensor.
    """
    if router_logits.dim() != 2 or not router_logits.is_floating_point():
        raise ContractViolation(
            f"router_logits must be floating point [T, E], got {router_logits.dtype} {list(router_logits.shape)}"
        )
    tokens, experts = router_logits.shape
    _check_routing(experts, top_k, routing, None if correction_bias is None else tuple(correction_bias.shape))
    if correction_bias is not None and correction_bias.device != router_logits.device:
        raise ContractViolation(
            f"correction_bias must be on {router_logits.device}, like router_logits, got {correction_bias.device}"
        )
    groups = routing.num_groups if routing.topk_groups < routing.num_groups else 1
    if not fits(experts, top_k, routing):
        raise ConfigError(
            f"the Triton router takes up to 1024 experts, top_k 32 and 32 groups, got {experts}, {top_k} and {groups}"
        )
    ids = router_logits.new_empty((tokens, top_k), dtype=torch.int32)
    weights = router_logits.new_empty((tokens, top_k), dtype=torch.float32)
    if tokens == 0:
        return TopKOutput(ids, weights)
    logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    bias = logits if correction_bias is None else correction_bias.contiguous()
    _route[(tokens,)](
        logits, bias, ids, weights, logits.stride(0), experts, float(scaling_factor),
        K=top_k, KB=triton.next_power_of_2(top_k), EB=triton.next_power_of_2(experts), METHOD=routing.method,
        GROUPS=groups, TOPK_GROUPS=routing.topk_groups, TOP2=routing.group_score == "top2_sum",
        BIASED=correction_bias is not None, RENORMALIZE=routing.renormalize,
        num_warps=1, **dependent_launch(logits),
    )  # fmt: skip
    return TopKOutput(ids, weights)
