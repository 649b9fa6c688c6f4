"""The weights of `cutedsl_sm90`: rows of up and gate alternate, 32 at a time, so that both halves of a gated product
are in one thread's registers when GEMM1's epilogue multiplies them. w2, and w13 of a non-gated layer, are as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_cutedsl.layouts import alternate

LAYOUT = "up_gate32"
#: Rows of up, then as many of gate.
ROWS = 32


@dataclass(slots=True)
class Sm90Weights:
    """w1: [E_local, 2I, H], rows as the module says ([E_local, I, H] without gate); w2: [E_local, H, I]."""

    scheme: str
    w1: Tensor
    w2: Tensor
    gated: bool
    layout: str = LAYOUT


def prepare(weights: CanonicalWeights, binding: Binding) -> Sm90Weights:
    """Canonical weights -> what the kernels read. w2 is shared with `weights`, and w13 of a non-gated layer."""
    gated = binding.config.activation.gated
    w1 = alternate(weights.w13, weights.w13.new_empty(weights.w13.shape), ROWS) if gated else weights.w13
    return Sm90Weights(binding.config.scheme, w1, weights.w2, gated)


def update(quant_info: Sm90Weights, weights: CanonicalWeights, binding: Binding) -> None:
    """New values into the same memory."""
    if quant_info.gated:
        alternate(weights.w13, quant_info.w1, ROWS)
    elif quant_info.w1.data_ptr() != weights.w13.data_ptr():
        quant_info.w1.copy_(weights.w13)
    if quant_info.w2.data_ptr() != weights.w2.data_ptr():
        quant_info.w2.copy_(weights.w2)
