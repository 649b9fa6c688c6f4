"""The three formats of the core: how tokens lie in memory between a dispatcher and a runner.

A format names a layout, never a product. `handle` is the dispatcher's own and travels from its output to the combine
input, so that a dispatcher keeps nothing between its two calls. `hidden_scale` belongs to a quantized payload; its
layout is stated by the payload's name. Never imports torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Final

from moe_core.specs import FormatSpec
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, FormatId

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(slots=True)
class StandardDispatchOutput:
    """Token-major rows.

    hidden_states: [rows, H]. topk_ids: [rows, K] in the agreed id space and dtype. topk_weights: float32 [rows, K].
    Both are None where the router is bypassed (`router_logits` [rows, E] then). num_valid: int32 device scalar; rows at
    and above it are padding. host_counts: rows of each local expert, where agreed. expert_map: int32 [E], global ->
    local or -1; expert_mask: int32 over the agreed id space ([E] or [E_local]), 1 for local experts, and one more
    entry, 0, with the sink encoding.
    """

    hidden_states: Tensor
    topk_ids: Tensor | None
    topk_weights: Tensor | None
    router_logits: Tensor | None = None
    correction_bias: Tensor | None = None
    hidden_scale: Tensor | None = None
    num_valid: Tensor | None = None
    host_counts: list[int] | None = None
    expert_map: Tensor | None = None
    expert_mask: Tensor | None = None
    handle: Any = None
    format: ClassVar[FormatId] = STANDARD


@dataclass(slots=True)
class StandardCombineInput:
    """hidden_states: [rows, H], or [rows, K, H] where the top-k sum is not the runner's."""

    hidden_states: Tensor
    handle: Any = None
    format: ClassVar[FormatId] = STANDARD


@dataclass(slots=True)
class BatchedDispatchOutput:
    """Expert-major rows.

    hidden_states: [E_local, M, H]; only the first masked_m[e] rows of expert e count. masked_m: int32 [E_local].
    expected_m: a hint of the usual count. topk_ids, topk_weights: the *origin* rank's, [T, K], for `combine`.
    row_weights: float32 [E_local, M], where the runner's side applies the router weight.
    """

    hidden_states: Tensor
    masked_m: Tensor
    expected_m: int | None = None
    hidden_scale: Tensor | None = None
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
    row_weights: Tensor | None = None
    handle: Any = None
    format: ClassVar[FormatId] = BATCHED


@dataclass(slots=True)
class BatchedCombineInput:
    """hidden_states: [E_local, M, H]. Rows at and above masked_m[e] are undefined."""

    hidden_states: Tensor
    topk_ids: Tensor | None = None
    topk_weights: Tensor | None = None
    handle: Any = None
    format: ClassVar[FormatId] = BATCHED


@dataclass(slots=True)
class GroupedDispatchOutput:
    """Rows sorted by local expert.

    hidden_states: [rows, H]. offsets: int32 [E_local + 1]; expert e owns rows offsets[e] to offsets[e + 1], each a
    multiple of `alignment`. row_ids: int32 [rows], -1 on padding rows, else the dispatcher's own row number (None
    where there is no padding). row_weights: float32 [rows], where the runner's side applies the router weight.
    """

    hidden_states: Tensor
    offsets: Tensor
    alignment: int = 1
    row_ids: Tensor | None = None
    row_weights: Tensor | None = None
    hidden_scale: Tensor | None = None
    host_counts: list[int] | None = None
    handle: Any = None
    format: ClassVar[FormatId] = GROUPED


@dataclass(slots=True)
class GroupedCombineInput:
    """hidden_states: [rows, H] in the order of the dispatch output. Padding rows are undefined."""

    hidden_states: Tensor
    handle: Any = None
    format: ClassVar[FormatId] = GROUPED


BUILTIN_FORMATS: Final = (
    FormatSpec(
        id=STANDARD,
        summary="token-major rows with ids and weights a row",
        dispatch_output="moe_core.formats:StandardDispatchOutput",
        combine_input="moe_core.formats:StandardCombineInput",
    ),
    FormatSpec(
        id=BATCHED,
        summary="expert-major [E_local, M, H] with a row count an expert",
        dispatch_output="moe_core.formats:BatchedDispatchOutput",
        combine_input="moe_core.formats:BatchedCombineInput",
    ),
    FormatSpec(
        id=GROUPED,
        summary="rows sorted by expert, with offsets",
        dispatch_output="moe_core.formats:GroupedDispatchOutput",
        combine_input="moe_core.formats:GroupedCombineInput",
    ),
)
