"""The decode path of `kernels.decode`: which calls it takes, and its two launches."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import triton
from torch import Tensor

from moe_core.protocols import RunningState
from moe_core_triton.calls import Call, ExpertRows
from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.kernels.decode import decode_down, decode_up
from moe_core_triton.kernels.launching import dependent_launch, early_bytes, is_hopper_or_newer
from moe_core_triton.weights import Projection, TritonWeights

if TYPE_CHECKING:
    from moe_core_triton.sequence import LayerSequence

#: A scheme's activation payload in the words of the kernels.
_QUANT = {None: "", "fp8_group128": "group", "fp8_token": "fp8", "int8_token": "int8", "fp8_tensor": "fp8"}


def decodes(layer: LayerSequence, rows: ExpertRows, weights: TritonWeights, state: RunningState) -> bool:
    """Whether the two kernels compute this call: a scale over the whole tensor, for one, they cannot know."""
    if rows.ids is None or rows.scale is not None or rows.num_valid is not None or state.hooks is not None:
        return False
    if weights.up.pack == "mxfp4_words":
        return False
    if layer.payload == "fp8_tensor":
        static = weights.up.input_scale is not None and weights.down.input_scale is not None
        return static and not layer.weigh_input
    return True


def _arguments(w: Projection, config: GemmConfig, payload: str | None) -> dict[str, Any]:
    width = config.block_k
    if w.pack:
        width = max(width, w.pack_width)
    elif payload == "fp8_group128":
        width = max(width, 128)
    return {
        "QUANT": _QUANT[payload],
        "NATIVE": is_hopper_or_newer(w.data.device),
        "W_SCALE": w.weight_scale,
        "W_GROUP": w.group,
        "PACK": w.pack,
        "PACK_HALF": max(w.pack_width // 2, 1),
        "HAS_ZERO": w.zero is not None,
        "HAS_BIAS": w.bias is not None,
        "ROWS": max(config.block_n // w.parts, 1),
        "WIDTH": width,
        "STAGES": config.num_stages,
        "num_warps": config.num_warps,
    }


def decode_layer(layer: LayerSequence, call: Call, weights: TritonWeights, state: RunningState) -> Call:
    """The whole layer into `call.result`."""
    rows, up, down, config = call.rows, weights.up, weights.down, call.config
    if rows.ids is None or config is None:
        raise TypeError("a call that `decodes` took has ids and a configuration")
    ids = rows.ids.contiguous()
    tokens, top_k = ids.shape
    activation = layer.config.activation
    mapped = 0 if rows.expert_map is None else rows.expert_map.shape[0]
    hidden = torch.empty(tokens * top_k, up.n, dtype=layer.dtype, device=rows.data.device)
    given = _arguments(up, config.up, layer.payload)
    decode_up[(triton.cdiv(up.n, given["ROWS"]), tokens * top_k)](
        rows.data,
        up.data,
        up.scale,
        up.zero,
        up.bias,
        up.input_scale,
        ids,
        rows.weights,
        rows.expert_map,
        hidden,
        activation.alpha,
        activation.beta,
        0.0 if activation.limit is None else activation.limit,
        layer.experts,
        mapped,
        up.n,
        up.k,
        up.data.shape[2],
        rows.data.stride(0),
        up.scale_stride,
        TOP_K=top_k,
        PARTS=up.parts,
        ACT=activation.name,
        HAS_LIMIT=activation.limit is not None,
        WEIGH_IN=layer.weigh_input,
        **given,
        **dependent_launch(hidden),
    )
    call.result, call.complete = layer.output(rows, state), True
    _down(layer, rows, ids, hidden, down, call.result, config.down, mapped)
    return call


def _down(
    layer: LayerSequence,
    rows: ExpertRows,
    ids: Tensor,
    hidden: Tensor,
    down: Projection,
    out: Tensor,
    config: GemmConfig,
    mapped: int,
) -> None:
    given, launch = _arguments(down, config, layer.payload), dependent_launch(hidden)
    summed = ids.shape[1] if layer.sums else 1
    results, blocks = ids.numel() // summed, triton.cdiv(down.n, given["ROWS"])
    decode_down[(blocks, results)](
        hidden,
        down.data,
        down.scale,
        down.zero,
        down.bias,
        down.input_scale,
        ids,
        rows.weights,
        rows.expert_map,
        out,
        layer.factor,
        layer.experts,
        mapped,
        down.n,
        down.k,
        down.data.shape[2],
        out.stride(-2),
        down.scale_stride,
        early_bytes(out.device) // max(1, down.n * ids.numel()) if launch["PDL"] else 0,
        TOP_K=summed,
        LANES=triton.next_power_of_2(summed),
        WEIGH=layer.weigh,
        PREFETCH=launch["PDL"],
        **given,
        **launch,
    )
