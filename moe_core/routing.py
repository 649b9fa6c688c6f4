"""The router's arithmetic: logits to a top-k choice, as `RoutingConfig` describes it.

Formula sources, all in transformers 5.23: `MixtralTopKRouter`, `Qwen3MoeTopKRouter` (softmax),
`GptOssTopKRouter` (topk_softmax), `DeepseekV2TopkRouter` (groups by max), `DeepseekV3TopkRouter` (sigmoid,
bias, groups by top2_sum), `MiniMaxM2TopKRouter` (sigmoid, bias), `Llama4Router` (topk_sigmoid). Some of them
compute in the dtype of the logits; this one always computes in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.config import RoutingConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.topk import TopKOutput

_TINY = 1e-20  # DeepSeek's guard: without effect on any normal sum, and no NaN where every weight underflowed


def _check(logits: Tensor, top_k: int, routing: RoutingConfig, bias: Tensor | None) -> None:
    if logits.dim() != 2 or not logits.is_floating_point():
        raise ContractViolation(f"router_logits must be floating point [T, E], got {logits.dtype} {list(logits.shape)}")
    experts, groups = logits.shape[1], routing.num_groups
    if not 1 <= top_k <= experts:
        raise ConfigError(f"top_k must be between 1 and the {experts} experts of router_logits, got {top_k}")
    if routing.correction_bias and bias is None:
        raise ContractViolation("the routing has a correction bias, but none was given")
    if bias is not None and not routing.correction_bias:
        raise ConfigError(
            "a correction bias was given, but the routing has none", hint="set RoutingConfig.correction_bias"
        )
    if bias is not None and (tuple(bias.shape) != (experts,) or bias.device != logits.device):
        raise ContractViolation(
            f"correction_bias must be [{experts}] on {logits.device}, like router_logits,"
            f" got {list(bias.shape)} on {bias.device}"
        )
    if groups == 1:
        return
    if experts % groups:
        raise ConfigError(f"{experts} experts cannot be divided into {groups} routing groups")
    size, chosen = experts // groups, routing.topk_groups
    if routing.group_score == "top2_sum" and size < 2:
        raise ConfigError(f"group_score 'top2_sum' needs two experts a group, but {groups} groups have {size}")
    if top_k > chosen * size:
        raise ConfigError(f"top_k is {top_k}, but the {chosen} chosen groups of {size} have {chosen * size} experts")


def _best_groups(choice: Tensor, routing: RoutingConfig) -> Tensor:
    """choice: float32 [T, E]. The same with -inf for every expert outside the `topk_groups` best groups."""
    tokens, experts = choice.shape
    grouped = choice.view(tokens, routing.num_groups, experts // routing.num_groups)
    counted = 2 if routing.group_score == "top2_sum" else 1
    scores = grouped.topk(counted, dim=-1).values.sum(dim=-1)
    best = scores.topk(routing.topk_groups, dim=-1).indices
    dropped = torch.ones_like(scores, dtype=torch.bool).scatter(1, best, False)
    return grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).view(tokens, experts)


def route(
    router_logits: Tensor,
    top_k: int,
    routing: RoutingConfig,
    correction_bias: Tensor | None = None,
    scaling_factor: float = 1.0,
) -> TopKOutput:
    """Choose `top_k` experts a token.

    router_logits: floating point [T, E]; correction_bias: [E], given exactly where the routing has one, and
    used for the choice only. `scaling_factor` multiplies the weights: leave it at 1.0 unless the router owns
    `routed_scaling_factor`. Returns topk_ids int32 [T, K], best first, and topk_weights float32 [T, K].
    Between equal scores torch.topk decides.

    With s the logits (`topk_softmax`, `topk_sigmoid`), else their softmax or sigmoid over all experts:
    ids = top-k of s + bias within the best groups, weights = s[ids], through softmax or sigmoid for the
    `topk_` methods, divided by their sum with `renormalize`, times `scaling_factor`.

    Raises ConfigError where `top_k` or `routing` do not fit E, ContractViolation for a wrong tensor.
    """
    _check(router_logits, top_k, routing, correction_bias)
    scores = router_logits.float()
    if routing.method == "softmax":
        scores = scores.softmax(dim=-1)
    elif routing.method == "sigmoid":
        scores = scores.sigmoid()
    choice = scores if correction_bias is None else scores + correction_bias.float()
    if routing.num_groups > 1:
        choice = _best_groups(choice, routing)
    ids = choice.topk(top_k, dim=-1).indices
    weights = scores.gather(1, ids)
    if routing.method == "topk_softmax":
        weights = weights.softmax(dim=-1)
    elif routing.method == "topk_sigmoid":
        weights = weights.sigmoid()
    if routing.renormalize:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + _TINY)
    if scaling_factor != 1.0:
        weights = weights * scaling_factor
    return TopKOutput(ids.to(torch.int32), weights)
