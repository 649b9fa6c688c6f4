"""Weights of `flashinfer_cutlass`: rows [up; gate], and for four-bit schemes the order that the kernels read."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_flashinfer_trtllm.library import bind_call
from moe_core_flashinfer_trtllm.rows import up_first
from moe_core_flashinfer_trtllm.scales import Calibration, calibration, require_linear_up
from moe_core_flashinfer_trtllm.states import Portable

UP_GATE_ROWS, MXFP4_SM90, NVFP4_SWIZZLED = "up_gate_rows", "mxfp4_sm90_interleaved", "nvfp4_swizzled"
LAYOUTS = {
    "bf16": UP_GATE_ROWS,
    "fp8_tensor": UP_GATE_ROWS,
    "fp8_block128": UP_GATE_ROWS,
    "mxfp4_w4a16": MXFP4_SM90,
    "nvfp4": NVFP4_SWIZZLED,
}


@dataclass(slots=True)
class CutlassWeights(Portable):
    """What `cutlass_fused_moe` takes. R = 2I rows [up; gate], or I without a gate; sizes with padding.

    w13: [E, R, H] and w2: [E, H, I] in their dtype; mxfp4: uint8 with K/2, interleaved; nvfp4: int64 with K/16, 16
    codes each. scales: the call's `quant_scales`, which differ by scheme (see `_scales_*`). biases: [E, R] and [E, H]
    in the layer's dtype, or both None. input_scale: float32 [], what a float8 code of a token means, or None.
    """

    scheme: str
    layout: str
    w13: Tensor
    w2: Tensor
    scales: list[Tensor] = field(default_factory=list)
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    input_scale: Tensor | None = None


def prepare(weights: CanonicalWeights, binding: Binding) -> CutlassWeights:
    """Canonical weights as the kernels read them. `weights.w2` is kept, not copied, where its order is the same."""
    scheme, gated = binding.scheme.id, binding.config.activation.gated
    if scheme in ("fp8_tensor", "nvfp4"):
        require_linear_up(weights, binding, "flashinfer_cutlass")
    w13, w2 = up_first(weights.w13, gated), weights.w2
    prepared = CutlassWeights(scheme, LAYOUTS[scheme], w13, w2)
    if scheme == "fp8_block128":
        prepared.scales = [_float(up_first(_need(weights.w13_scale), gated)), _float(_need(weights.w2_scale))]
    elif scheme == "fp8_tensor":
        _fp8_tensor(prepared, calibration(weights, binding))
    elif scheme == "mxfp4_w4a16":
        _mxfp4(prepared, weights, gated)
    elif scheme == "nvfp4":
        _nvfp4(prepared, weights, calibration(weights, binding), gated)
    if binding.config.bias:
        prepared.w13_bias = up_first(_need(weights.w13_bias), gated).to(binding.dtype).contiguous()
        # The kernels take both biases or none; ranks of TP above 0 have no second one.
        missing = weights.w2.new_zeros(w13.shape[0], weights.w2.shape[1], dtype=binding.dtype)
        prepared.w2_bias = missing if weights.w2_bias is None else weights.w2_bias.to(binding.dtype).contiguous()
    return prepared


def _fp8_tensor(prepared: CutlassWeights, c: Calibration) -> None:
    """[what a product of GEMM1 means [E], what GEMM2's tokens are multiplied by [E], GEMM2's product [E], the input
    []].

    Tokens are quantized once for all experts, so all share the largest input scale.
    """
    shared = c.input13.amax()
    prepared.scales = [c.gate * shared, c.up_over_gate / c.input2, c.w2 * c.input2, shared]
    prepared.input_scale = shared


def _mxfp4(prepared: CutlassWeights, weights: CanonicalWeights, gated: bool) -> None:
    """[scales of w13, scales of w2], folded to [E, rows / 64, K / 128, 16, 16] bytes and read as int32."""
    interleave = bind_call("interleave_moe_weights_for_sm90_mixed_gemm", {"quant_type": "fp4"}, ("weight",))
    fold = bind_call("interleave_moe_scales_for_sm90_mixed_gemm", {"group_size": 32}, ("scales",))
    scale13, scale2 = up_first(_bytes(weights.w13_scale), gated), _bytes(weights.w2_scale)
    prepared.w13 = interleave(weight=prepared.w13)
    prepared.w2 = interleave(weight=prepared.w2)
    prepared.scales = [fold(scales=s.contiguous()).view(torch.int32) for s in (scale13, scale2)]


def _nvfp4(prepared: CutlassWeights, weights: CanonicalWeights, c: Calibration, gated: bool) -> None:
    """[GEMM1's tokens times [E], block scales of w13, GEMM1's product [E], GEMM2's tokens times [E], those of w2,
    product].

    Block scales: e4m3 in 128 x 4 tiles, read as int32 [E, rows, K / 64].
    """
    swizzle = bind_call("block_scale_interleave", {}, ("unswizzled_sf",), "flashinfer")
    blocks = []
    for scale in (up_first(_bytes(weights.w13_scale), gated), _bytes(weights.w2_scale)):
        experts, rows, columns = scale.shape
        tiled = swizzle(unswizzled_sf=scale.contiguous()).view(torch.uint8)
        blocks.append(tiled.reshape(experts, -(-rows // 128) * 128, -(-columns // 4) * 4).view(torch.int32))
    prepared.w13, prepared.w2 = prepared.w13.view(torch.int64), prepared.w2.view(torch.int64)
    prepared.scales = [
        1 / c.input13,
        blocks[0],
        c.gate * c.input13,
        c.up_over_gate / c.input2,
        blocks[1],
        c.w2 * c.input2,
    ]


def _bytes(scale: Tensor | None) -> Tensor:
    return _need(scale).view(torch.uint8)


def _float(scale: Tensor) -> Tensor:
    return scale.to(torch.float32).contiguous()


def _need(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise WeightError("the scheme needs scales (or the layer biases) that these weights do not have")
    return tensor
