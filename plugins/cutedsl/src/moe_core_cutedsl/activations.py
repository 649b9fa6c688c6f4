"""An activation of the core in FlashInfer's words."""

from __future__ import annotations

from typing import Any

from moe_core.config import Activation
from moe_core_cutedsl.vendor import find

_NAMES = {"silu": "Swiglu", "swiglu_oai": "Swiglu", "gelu_tanh": "GegluTanh", "relu2": "Relu2"}
_NO_LIMIT = 3.4028234663852886e38  # FlashInfer's: the largest float32
#: The keywords that `keywords` gives.
PASSED = ("activation_type", "swiglu_alpha", "swiglu_beta", "swiglu_limit")


def keywords(activation: Activation) -> dict[str, Any]:
    """activation_type (the installed enum's number) and the constants of gated silu.

    With alpha 1, beta 0 and no limit FlashInfer's Swiglu is silu(gate) * up; its clamp is the core's.
    """
    kinds = find("flashinfer.fused_moe", "ActivationType")
    oai = activation.name == "swiglu_oai"
    return {
        "activation_type": int(getattr(kinds, _NAMES[activation.name])),
        "swiglu_alpha": float(activation.alpha) if oai else 1.0,
        "swiglu_beta": float(activation.beta) if oai else 0.0,
        "swiglu_limit": _NO_LIMIT if activation.limit is None else float(activation.limit),
    }
