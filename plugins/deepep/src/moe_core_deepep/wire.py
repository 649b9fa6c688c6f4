"""Ids and results at DeepEP's edge: -1 for a dropped slot on the wire, whatever the plan's two sides write."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.protocols import Binding
from moe_core.vocabulary import DroppedSlot


def ids_sent(ids: Tensor, binding: Binding, dtype: torch.dtype) -> Tensor:
    """[T, K] global ids as the caller writes them -> dtype, -1 for a dropped slot."""
    ids = ids.to(dtype)
    if binding.incoming is DroppedSlot.SINK:
        ids = torch.where(ids < binding.config.num_experts, ids, -1)
    return ids.contiguous()


def given(result: Tensor, scale: float, output: Tensor | None) -> Tensor:
    """The layer's result: times `scale`, in `output` where the caller gave one."""
    if scale != 1.0:
        result = result * scale
    return result if output is None or output is result else output.copy_(result)
