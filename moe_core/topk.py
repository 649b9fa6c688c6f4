"""The router's decision, as it is handed to a plan. Never imports torch; `moe_core.routing` computes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, TypeAlias

from moe_core.vocabulary import TOPK_BYPASSED, TOPK_STANDARD

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class TopKOutput:
    """topk_ids: int32 (or int64) [T, K], global expert ids, -1 for a dropped slot. topk_weights: float32 [T, K]."""

    topk_ids: Tensor
    topk_weights: Tensor
    router_logits: Tensor | None = None
    format: ClassVar[str] = TOPK_STANDARD


@dataclass(slots=True)
class BypassedTopK:
    """Router logits [T, E] for kernels that route themselves; correction_bias: float32 [E] where routing has one."""

    router_logits: Tensor
    correction_bias: Tensor | None = None
    format: ClassVar[str] = TOPK_BYPASSED


AnyTopK: TypeAlias = TopKOutput | BypassedTopK
