"""Scales of whole tensors: what static calibration and the weights' own scales mean for kernels with one an expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights


class Calibration(NamedTuple):
    """float32 [E] each, and all of them multiply: code times scale is the value.

    gate, w2: of the weights. up_over_gate: the scale of w13's up rows over that of its gate rows. input13, input2: of
    the tokens of GEMM1 and GEMM2.
    """

    gate: Tensor
    up_over_gate: Tensor
    w2: Tensor
    input13: Tensor
    input2: Tensor

    @property
    def up(self) -> Tensor:
        """Of w13's up rows."""
        return self.gate * self.up_over_gate


def calibration(weights: CanonicalWeights, binding: Binding) -> Calibration:
    """The scales of `fp8_tensor` (its tensor scales) or `nvfp4` (its global ones).

    The kernels quantize GEMM2's tokens themselves, by a scale that must be known. Raises WeightError without static
    input scales, which the selection has asked for already.
    """
    scheme = binding.scheme.id
    suffix = "scale" if scheme == "fp8_tensor" else "global_scale"
    w13, w2 = (_rows(getattr(weights, f"{name}_{suffix}"), weights) for name in ("w13", "w2"))
    inputs = []
    for name in ("w13_input_scale", "w2_input_scale"):
        given = getattr(weights, name)
        if given is None:
            raise WeightError(
                f"FlashInfer's {scheme} kernels need calibrated scales of their inputs, and {name} was not given",
                hint="give CanonicalWeights w13_input_scale and w2_input_scale, or choose a runner that computes them",
            )
        inputs.append(_rows(given, weights)[:, 0].contiguous())
    gate, ratio = w13[:, 0], w13[:, -1] / w13[:, 0]
    return Calibration(gate.contiguous(), ratio.contiguous(), w2[:, 0].contiguous(), *inputs)


def gate_equals_up(weights: CanonicalWeights, binding: Binding) -> bool:
    """Whether gate and up of every expert have one scale of the whole tensor."""
    scale = getattr(weights, "w13_scale" if binding.scheme.id == "fp8_tensor" else "w13_global_scale")
    two = scale is not None and scale.dim() > 1 and scale.shape[-1] > 1
    return not two or not bool((scale[:, 0] != scale[:, 1]).any())


def require_linear_up(weights: CanonicalWeights, binding: Binding, runner: str) -> None:
    """Refuse different scales of gate and up where the kernels have one for both and cannot move the difference.

    GEMM1 is scaled by the gate's; the rest of the up rows' scale may be applied after the activation only where that is
    proportional to up. Raises WeightError.
    """
    activation = binding.config.activation
    linear = activation.name != "swiglu_oai" and activation.limit is None
    if not linear and not gate_equals_up(weights, binding):
        raise WeightError(
            f"{runner} has one scale for gate and up of an expert, and {activation.name} with "
            f"{'a limit' if activation.limit is not None else 'beta'} does not let them differ",
            hint="quantize gate and up with one scale, or choose another runner by name",
        )


def _rows(scale: Tensor | None, weights: CanonicalWeights) -> Tensor:
    """float32 [E, parts]."""
    if scale is None:
        raise WeightError("the scheme needs scales of whole tensors, and these weights have none")
    return scale.reshape(weights.w13.shape[0], -1).to(torch.float32)
