"""NVFP4 weights in the two layouts of `cutedsl`, and the scales that go with them.

`masked_gate_up`, for the masked grouped GEMMs: rows as they are, block scales swizzled. `mma_up_gate64`, for the fused
MoE: rows of up and gate alternate by 64, their block scales with them, swizzled then.

A GEMM's result is alpha times what the tensor cores give, alpha being the global scale of the weights times that of
their input. Input scales are the checkpoint's calibrated ones; the fused MoE quantizes a token once for all experts,
and so takes the largest of theirs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_cutedsl.layouts import alternate, swizzled

MASKED, MMA = "masked_gate_up", "mma_up_gate64"
#: Rows of up, then as many of gate, in `mma_up_gate64`.
ROWS = 64
#: How tokens are multiplied: in NVFP4, or in the layer's dtype.
QUANTIZED, PLAIN = "nvfp4", "bf16"


@dataclass(slots=True)
class NvFp4Weights:
    """w1 uint8 [E, 2I, H / 2], w2 uint8 [E, H, I / 2]: two e2m1 values a byte, the first one low.

    Rows are as the layout says.

    w1_scale, w2_scale: uint8 (e4m3 bits), views as `layouts.swizzled` gives them. w1_global, w2_global: float32 [E].
    input_scale, inner_scale: float32 [E] (all equal in `mma_up_gate64`), what a quantized input of GEMM1 and of GEMM2
    is multiplied by to get it back; None without calibration. *_inverse: their reciprocals, which the quantizing
    kernels take. w1_alpha, w2_alpha: float32 [E], the factor of each GEMM; without calibration the weights' alone.
    """

    scheme: str
    layout: str
    w1: Tensor
    w1_scale: Tensor
    w1_global: Tensor
    w1_alpha: Tensor
    w2: Tensor
    w2_scale: Tensor
    w2_global: Tensor
    w2_alpha: Tensor
    input_scale: Tensor | None = None
    input_inverse: Tensor | None = None
    inner_scale: Tensor | None = None
    inner_inverse: Tensor | None = None


def prepare(weights: CanonicalWeights, binding: Binding) -> NvFp4Weights:
    """Canonical weights -> the layout of the plan's paths. w2 is shared with `weights`, w13 too in `masked_gate_up`.

    Raises WeightError where gate and up have global scales of their own, and for the fused MoE in NVFP4 where the input
    of GEMM2 was not calibrated.
    """
    masked = MASKED in binding.layouts
    plain = not masked and binding.options.get("activations") == PLAIN
    w13, w13_scale = weights.w13, _bytes(weights.w13_scale)
    if not masked:
        w13 = alternate(w13, w13.new_empty(w13.shape), ROWS)
        w13_scale = alternate(w13_scale, w13_scale.new_empty(w13_scale.shape), ROWS)
    given, inner = (None, None) if plain else (weights.w13_input_scale, weights.w2_input_scale)
    if not masked and not plain and inner is None:
        raise WeightError(
            "these NVFP4 weights have no calibrated w2_input_scale: the fused MoE quantizes the input of GEMM2 as it "
            "leaves GEMM1, before its largest value is known",
            hint="calibrate the layer, or multiply in bfloat16: options={'cutedsl': {'activations': 'bf16'}}",
        )
    first, second = _global(weights.w13_global_scale, "w13"), _global(weights.w2_global_scale, "w2")
    input_scale, inner_scale = _input(given, masked), _input(inner, masked)
    return NvFp4Weights(
        scheme=binding.config.scheme,
        layout=MASKED if masked else MMA,
        w1=w13,
        w1_scale=swizzled(w13_scale),
        w1_global=first,
        w1_alpha=first.clone() if input_scale is None else first * input_scale,
        w2=weights.w2,
        w2_scale=swizzled(_bytes(weights.w2_scale)),
        w2_global=second,
        w2_alpha=second.clone() if inner_scale is None else second * inner_scale,
        input_scale=input_scale,
        input_inverse=None if input_scale is None else 1.0 / input_scale,
        inner_scale=inner_scale,
        inner_inverse=None if inner_scale is None else 1.0 / inner_scale,
    )


def _bytes(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise WeightError("NVFP4 weights without block scales")
    return scale.view(torch.uint8)


def _global(scale: Tensor | None, name: str) -> Tensor:
    if scale is None:
        raise WeightError(f"NVFP4 weights without {name}_global_scale")
    wide = scale.float().reshape(scale.shape[0], -1)
    if wide.shape[1] == 2 and not torch.equal(wide[:, 0], wide[:, 1]):
        raise WeightError(
            f"{name}_global_scale differs between gate and up, and the kernels have one factor an expert",
            hint="quantize gate and up with one global scale",
        )
    return wide[:, 0].clone()


def _input(scale: Tensor | None, each: bool) -> Tensor | None:
    """float32 [E]; one for all experts unless `each` may have its own."""
    if scale is None:
        return None
    own = scale.reshape(-1).float()
    return own.clone() if each or own.numel() == 0 else own.max().expand(own.shape).clone()
