"""FlashInfer's routing methods as formulas, and its packed choice, for the double of TensorRT-LLM's kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trtllm_double_enums import RoutingMethodType as Method
from trtllm_double_formats import need, tensor
from trtllm_double_layer import refuse_duplicates

_BF16, _F32, _I32 = torch.bfloat16, torch.float32, torch.int32


def choice(given: dict[str, Any], tokens: int) -> tuple[Tensor, Tensor]:
    """ids [T, K] (negative: dropped) and weights [T, K], from either kind of function."""
    experts, top_k = given["num_experts"], given["top_k"]
    need(1 <= top_k <= min(experts, 32), f"top_k {top_k} of {experts} experts")
    local, first = given["local_num_experts"], given["local_expert_offset"]
    need(local > 0 and first >= 0 and first + local <= experts, f"experts {first} to {first + local} of {experts}")
    method = Method(given["routing_method_type"])
    groups, chosen = given["n_group"] or 0, given["topk_group"] or 0
    need(method is Method.DeepSeekV3 or (groups <= 1 and chosen <= 1), f"groups with {method!r}")
    if "topk_ids" in given:
        return _packed(given["topk_ids"], tokens, experts, top_k)
    logits, bias = given["routing_logits"], given["routing_bias"]
    tensor("routing_logits", logits, (_F32, _BF16), (tokens, experts))
    if bias is not None:
        tensor("routing_bias", bias, (_F32, _BF16), (experts,))
    need((bias is not None) == (method in (Method.DeepSeekV3, Method.MiniMax2)), f"a bias, or none, with {method!r}")
    ids, weights = _route(logits.float(), bias, top_k, method, groups, chosen, given["routed_scaling_factor"])
    return ids, weights.to(_BF16).float()


def _packed(words: Any, tokens: int, experts: int, top_k: int) -> tuple[Tensor, Tensor]:
    tensor("topk_ids", words, _I32, (tokens, top_k))
    ids = words >> 16
    need(bool((ids < experts).all()), "an id outside of the experts")
    need(refuse_duplicates(ids), "an expert twice in a row: a slot would be lost")
    return ids, (words & 0xFFFF).to(torch.int16).view(_BF16).float()


def _compiled(method: Method, experts: int, top_k: int) -> bool:
    """Whether there is a kernel: the tiers of FlashInfer 0.7.2, experts and slots that one covers."""
    if method is Method.Llama4:
        return experts <= 128 and top_k == 1
    if method is Method.DeepSeekV3:
        return experts <= 512 and top_k <= 32
    if method in (Method.Renormalize, Method.RenormalizeNaive, Method.MiniMax2):
        return experts <= 1024 and top_k <= 32
    return experts <= 256 and top_k <= 8


def _route(
    logits: Tensor, bias: Tensor | None, top_k: int, method: Method, groups: int, chosen: int, factor: float | None
) -> tuple[Tensor, Tensor]:
    need(_compiled(method, logits.shape[1], top_k), f"no {method!r} for {logits.shape[1]} experts, {top_k} slots")
    need(factor in (None, 1.0) or method is Method.DeepSeekV3, f"{method!r} does not scale in every version")
    if method in (Method.Renormalize, Method.Llama4, Method.TopKSigmoid):
        values, ids = logits.topk(top_k, dim=1)
        return ids, values.softmax(1) if method is Method.Renormalize else values.sigmoid()
    soft = method in (Method.Default, Method.RenormalizeNaive)
    scores = logits.softmax(1) if soft else logits.sigmoid()
    ranked = scores if bias is None else scores + bias.float()
    if method is Method.DeepSeekV3:
        need(groups > 0 and chosen > 0 and logits.shape[1] % groups == 0, "DeepSeekV3 without groups")
        need(logits.shape[1] % 4 == 0 and groups <= 8, "experts that are not in fours, or too many groups")
        need(groups == 1 or logits.shape[1] // groups <= 32, "more experts in a group than a warp has lanes")
        need(chosen <= min(4, groups) and top_k <= (8 if logits.shape[1] <= 384 else 22), "too many groups or slots")
        need(top_k < chosen * logits.shape[1] // groups, "as many slots as experts in the chosen groups")
        best = ranked.unflatten(1, (groups, -1)).topk(2, dim=2).values.sum(2).topk(chosen, dim=1).indices
        open_ = torch.zeros(logits.shape[0], groups, dtype=torch.bool).scatter(1, best, True)
        ranked = ranked.masked_fill(~open_.repeat_interleave(logits.shape[1] // groups, dim=1), float("-inf"))
    ids = ranked.topk(top_k, dim=1).indices
    weights = scores.gather(1, ids)
    if method not in (Method.Default, Method.Sigmoid):
        weights = weights / (weights.sum(1, keepdim=True) + 1e-20)
    return ids, weights * (factor or 1.0)
