"""Quant schemes: what a checkpoint's weights and a runner's activations are, and exact reference codecs.

Importing this package never imports torch: descriptions are plain data. The codec functions (`quantize`,
`dequantize`, ...) load torch when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from moe_core.quant.payloads import ACTIVATION_PAYLOADS, ActivationPayload, activation_payload
from moe_core.quant.schemes import BUILTIN_SCHEMES, QuantScheme, ScaleLayout, builtin_scheme

if TYPE_CHECKING:
    from moe_core.quant.activation import (
        TwoLevelScale,
        dequantize_activation,
        quantize_activation,
        roundtrip_activation,
    )
    from moe_core.quant.codec import QuantizedTensor, dequantize, quantize

__all__ = [
    "ACTIVATION_PAYLOADS",
    "BUILTIN_SCHEMES",
    "ActivationPayload",
    "QuantScheme",
    "QuantizedTensor",
    "ScaleLayout",
    "TwoLevelScale",
    "activation_payload",
    "builtin_scheme",
    "dequantize",
    "dequantize_activation",
    "quantize",
    "quantize_activation",
    "roundtrip_activation",
]

_LAZY = {
    "QuantizedTensor": "moe_core.quant.codec",
    "quantize": "moe_core.quant.codec",
    "dequantize": "moe_core.quant.codec",
    "TwoLevelScale": "moe_core.quant.activation",
    "quantize_activation": "moe_core.quant.activation",
    "dequantize_activation": "moe_core.quant.activation",
    "roundtrip_activation": "moe_core.quant.activation",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(_LAZY))
