"""The router's decision as FlashInfer's kernels take it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.formats import StandardDispatchOutput
from moe_core.protocols import Binding
from moe_core.vocabulary import Step
from moe_core_flashinfer_trtllm.layer import flag

TopK = tuple[Tensor, Tensor]


def merge_duplicates(ids: Tensor, weights: Tensor, later: Tensor) -> TopK:
    """The same layer with no expert twice in a row: the first slot takes the weights of all, the others are dropped.

    ids: int32 [T, K], -1 for dropped. weights: float32 [T, K], anything where dropped. later: bool [K, K], true below
    the diagonal. FlashInfer's sorting kernels lose or misplace a slot whose expert the row already has.
    """
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    repeated = (same & later).any(dim=2)
    # where, not a product: the weight of a dropped slot may be NaN, and must not reach the others.
    total = torch.where(same, weights.unsqueeze(1), 0.0).sum(dim=2)
    return ids.masked_fill(repeated, -1), total


def topk_reader(binding: Binding) -> Callable[[StandardDispatchOutput], TopK]:
    """int32 ids [T, K] (global, -1 for dropped, none twice) and float32 weights [T, K], both contiguous."""
    config, terms = binding.config, binding.terms
    scaling = config.routed_scaling_factor if terms is not None and terms.runner_does(Step.ROUTED_SCALING) else 1.0
    padded = terms is not None and "num_valid" in terms.extras
    later = None
    if not flag(binding, "distinct_experts") and config.top_k > 1:
        later = torch.ones(config.top_k, config.top_k, dtype=torch.bool, device=binding.device).tril(-1)

    def read(d: StandardDispatchOutput) -> TopK:
        ids, weights = d.topk_ids, d.topk_weights
        if ids is None or weights is None:
            raise ContractViolation("this plan was made for the router's choice, and got its logits")
        if padded and d.num_valid is not None:
            row = torch.arange(ids.shape[0], device=ids.device, dtype=torch.int32)
            ids = torch.where((row < d.num_valid).unsqueeze(1), ids, -1)
        if later is not None:
            ids, weights = merge_duplicates(ids, weights, later)
        if scaling != 1.0:
            weights = weights * scaling
        return ids.contiguous(), weights.contiguous()

    return read


def pack_topk(ids: Tensor, weights: Tensor) -> Tensor:
    """int32 [T, K]: the expert's id in the upper 16 bits, the bits of its weight as bfloat16 in the lower ones.

    ids: integers in [-32768, 32767]; negative ones stay negative, so that the kernels skip the slot. weights: floating
    point, rounded to the nearest bfloat16, a sign among their bits.
    """
    halves = torch.empty(*ids.shape, 2, dtype=torch.int16, device=ids.device)
    # Little-endian: the first half of a word is its lower one.
    halves.view(torch.bfloat16)[..., 0].copy_(weights)
    halves[..., 1].copy_(ids)
    return halves.view(torch.int32).squeeze(-1)
