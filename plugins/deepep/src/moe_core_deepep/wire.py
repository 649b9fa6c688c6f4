"""Ids and results at DeepEP's edge: -1 for a dropped slot on the wire, whatever the plan's two sides write."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.protocols import Binding
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot


class Wire:
    """The caller's ids and weights -> those that DeepEP takes. Comparisons alone where they are so already."""

    def __init__(self, binding: Binding, dtype: torch.dtype) -> None:
        self._dtype, self._experts = dtype, binding.config.num_experts
        self._sink = binding.incoming is DroppedSlot.SINK

    def __call__(self, topk: TopKOutput) -> tuple[Tensor, Tensor]:
        """(ids [T, K] of the wire's dtype, -1 for a dropped slot; weights float32 [T, K]), both contiguous."""
        ids, weights = topk.topk_ids, topk.topk_weights
        if ids.dtype is not self._dtype:
            ids = ids.to(self._dtype)
        if self._sink:
            ids = torch.where(ids < self._experts, ids, -1)
        if weights.dtype is not torch.float32:
            weights = weights.to(torch.float32)
        if not ids.shape[0]:  # DeepEP asserts that both have an address or none; empty tensors have one or not
            ids, weights = (tensor.new_empty(1, tensor.shape[1])[:0] for tensor in (ids, weights))
        return ids.contiguous(), weights.contiguous()


class Distinct:
    """Ids in which a row names an expert twice -> the first slot has the sum of the weights, the others are dropped.

    V2's kernels trap on such rows.
    """

    def __init__(self, binding: Binding) -> None:
        square = torch.ones(binding.config.top_k, binding.config.top_k, dtype=torch.bool, device=binding.device)
        self._later, self._own_and_later = square.triu(1), square.triu()

    def __call__(self, ids: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """ids [T, K], -1 for a dropped slot, and weights [T, K]; both stay bit for bit where nothing is named twice."""
        same = ids[:, :, None] == ids[:, None, :]
        again = (same & self._later).any(dim=1)
        # A weight of a slot that is not summed may be NaN.
        weights = torch.where(same & self._own_and_later, weights[:, None, :], 0.0).sum(dim=2)
        return torch.where(again, -1, ids), weights


def given(result: Tensor, scale: float, output: Tensor | None) -> Tensor:
    """The layer's result: times `scale`, in `output` where the caller gave one."""
    if scale != 1.0:
        result = result * scale
    return result if output is None or output is result else output.copy_(result)
