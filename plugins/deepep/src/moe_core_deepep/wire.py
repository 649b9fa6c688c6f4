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


def given(result: Tensor, scale: float, output: Tensor | None) -> Tensor:
    """The layer's result: times `scale`, in `output` where the caller gave one."""
    if scale != 1.0:
        result = result * scale
    return result if output is None or output is result else output.copy_(result)
