"""Weights of `flashinfer_trtllm`: the tensors of a call, by the names of its arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_flashinfer_trtllm.layer import activation_tensors
from moe_core_flashinfer_trtllm.rows import up_first
from moe_core_flashinfer_trtllm.scales import Calibration, calibration, gate_equals_up
from moe_core_flashinfer_trtllm.states import Portable
from moe_core_flashinfer_trtllm.trtllm_layouts import blocked, shuffled, swizzled

LAYOUTS = {
    "bf16": "bf16_block_major",
    "fp8_block128": "fp8_up_gate_rows",
    "fp8_tensor": "fp8_tensor_shuffled",
    "mxfp8": "mxfp8_shuffled",
    "nvfp4": "nvfp4_shuffled",
    "mxfp4_w4a16": "mxfp4_shuffled",
    "int4_w4a16": "mxint4_block_major",
}
Tensors = dict[str, Tensor]


@dataclass(slots=True)
class TrtllmWeights(Portable):
    """What FlashInfer's `trtllm_*_moe` functions take. Sizes are with padding.

    tensors: by the names of the arguments; the same for the routed function and the one that routes. input_scale: how
    tokens are quantized: fp8_tensor: float32 [], what a code means; nvfp4: float32 [1], what values are multiplied by.
    """

    scheme: str
    layout: str
    tensors: Tensors = field(default_factory=dict)
    input_scale: Tensor | None = None


def prepare(weights: CanonicalWeights, binding: Binding) -> TrtllmWeights:
    """Canonical weights as the kernels read them. Raises WeightError for what they cannot express."""
    scheme = binding.scheme.id
    prepared = TrtllmWeights(scheme, LAYOUTS[scheme])
    prepared.tensors = {f"gemm1_{_argument(n)}": t for n, t in activation_tensors(binding).items()}
    _SCHEMES[scheme](prepared, weights, binding)
    if binding.config.bias:
        gated = binding.config.activation.gated
        second = weights.w2_bias
        if second is None:  # ranks of TP above 0 have none
            second = weights.w2.new_zeros(weights.w2.shape[0], weights.w2.shape[1], dtype=torch.float32)
        prepared.tensors["gemm1_bias"] = shuffled(_float(weights.w13_bias), gated)
        prepared.tensors["gemm2_bias"] = shuffled(_float(second), False)
    return prepared


def _argument(name: str) -> str:
    return {"limit": "clamp_limit"}.get(name, name)


def _bf16(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    prepared.tensors |= {
        "gemm1_weights": blocked(shuffled(weights.w13, binding.config.activation.gated)),
        "gemm2_weights": blocked(shuffled(weights.w2, False)),
    }


def _fp8_block(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    gated = binding.config.activation.gated
    prepared.tensors |= {
        "gemm1_weights": up_first(weights.w13, gated),
        "gemm1_weights_scale": _float(up_first(_need(weights.w13_scale), gated)),
        "gemm2_weights": weights.w2,
        "gemm2_weights_scale": _float(weights.w2_scale),
    }


def _mxfp8(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    gated = binding.config.activation.gated
    prepared.tensors |= {
        "gemm1_weights": shuffled(weights.w13, gated),
        "gemm1_weights_scale": swizzled(shuffled(_bytes(weights.w13_scale), gated)),
        "gemm2_weights": shuffled(weights.w2, False),
        "gemm2_weights_scale": swizzled(shuffled(_bytes(weights.w2_scale), False)),
    }


def _fp4(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """The launcher wants float8 as the dtype of both kinds of scales; it tells them apart by their number."""
    _mxfp8(prepared, weights, binding)
    for name in ("gemm1_weights_scale", "gemm2_weights_scale"):
        prepared.tensors[name] = prepared.tensors[name].view(torch.float8_e4m3fn)


def _fp8_tensor(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    gated, c = binding.config.activation.gated, calibration(weights, binding)
    prepared.input_scale = c.input13.amax()
    prepared.tensors |= {
        "gemm1_weights": shuffled(weights.w13, gated),
        "gemm2_weights": shuffled(weights.w2, False),
        **_outputs("output{}_scales_{}", c, prepared.input_scale, gated),
    }


def _nvfp4(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """Alpha is always given with a gate. Beta and limit meet raw sums, so they are divided by what those mean."""
    activation, c = binding.config.activation, calibration(weights, binding)
    if activation.limit is not None and not gate_equals_up(weights, binding):
        raise WeightError(
            "flashinfer_trtllm clamps raw sums of gate and up at one number, and these have scales of their own",
            hint="quantize gate and up with one scale, or choose another runner by name",
        )
    _fp4(prepared, weights, binding)
    shared = c.input13.amax()
    prepared.input_scale = (1 / shared).reshape(1)
    tensors = prepared.tensors
    tensors |= _outputs("output{}_scale_{}", c, shared, activation.gated)
    if activation.gated:
        tensors.setdefault("gemm1_alpha", torch.ones_like(c.gate))
    for name, scale in (("gemm1_beta", c.up), ("gemm1_clamp_limit", c.gate)):
        if name in tensors:
            tensors[name] = tensors[name] / (scale * shared)


def _outputs(names: str, c: Calibration, shared: Tensor, gated: bool) -> Tensors:
    """What sums of GEMM1 (gate; up, and on to GEMM2's codes) and of GEMM2 are multiplied by: float32 [E] each.

    Without a gate the first one alone says what a sum means, and the second only how the result is quantized.
    """
    up = c.up * shared / c.input2 if gated else 1 / c.input2
    return {
        names.format(1, "gate_scalar"): c.gate * shared,
        names.format(1, "scalar"): up,
        names.format(2, "scalar"): c.w2 * c.input2,
    }


def _int4(prepared: TrtllmWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """MxInt4: signed codes with bfloat16 scales of 32. Canonical codes are offset by 8; flipping a bit signs them."""
    if weights.w13_zero is not None or weights.w2_zero is not None:
        raise WeightError(
            "FlashInfer's int4 kernels have no zero points", hint="choose another runner by name, or symmetric weights"
        )
    gated = binding.config.activation.gated
    for name, matrix, scale, paired in (
        ("gemm1", weights.w13, weights.w13_scale, gated),
        ("gemm2", weights.w2, weights.w2_scale, False),
    ):
        prepared.tensors[f"{name}_weights"] = blocked(shuffled(matrix ^ 0x88, paired))
        prepared.tensors[f"{name}_weights_scale"] = swizzled(shuffled(_need(scale).to(torch.bfloat16), paired))


_SCHEMES: dict[str, Callable[[TrtllmWeights, CanonicalWeights, Binding], Any]] = {
    "bf16": _bf16,
    "fp8_block128": _fp8_block,
    "fp8_tensor": _fp8_tensor,
    "mxfp8": _mxfp8,
    "nvfp4": _nvfp4,
    "mxfp4_w4a16": _fp4,
    "int4_w4a16": _int4,
}


def _need(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise WeightError("the scheme needs scales (or the layer biases) that these weights do not have")
    return tensor


def _bytes(scale: Tensor | None) -> Tensor:
    return _need(scale).view(torch.uint8)


def _float(tensor: Tensor | None) -> Tensor:
    return _need(tensor).to(torch.float32).contiguous()
