"""MXFP4 and MXFP8: e2m1 or e4m3 elements under one e8m0 scale per 32 of K, for weights and activations.

OCP Microscaling Formats (MX) v1.0. For every block of 32:

    scale = 2^(floor(log2(max(abs(x)))) - emax)     emax = 2 (e2m1) or 8 (e4m3)
    q = element(x / scale), round to nearest even, saturating     x ~= q * scale

Scales are stored as uint8, the e8m0 byte with bias 127: torch.float8_e8m0fnu is absent from torch 2.6, and
on CPU it has neither torch.equal nor arithmetic. Readers take either dtype, since the bytes agree.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.quant.codec import QuantizedTensor, QuantizeOptions, need
from moe_core.quant.packing import (
    decode_e2m1,
    decode_e8m0,
    divide_e8m0,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    shared_exponent,
    unpack_nibbles,
)
from moe_core.quant.payloads import ActivationPayload
from moe_core.quant.scaling import region_amax, spread
from moe_core.quant.schemes import QuantScheme, ScaleLayout

_EMAX = {"e2m1": 2, "e4m3": 8}


def _encode(x: Tensor, element: str, layout: ScaleLayout) -> tuple[Tensor, Tensor]:
    scale = shared_exponent(region_amax(x, layout), _EMAX[element])
    scaled = divide_e8m0(x, spread(scale, layout, *x.shape[-2:]))
    return (pack_nibbles(encode_e2m1(scaled)) if element == "e2m1" else encode_e4m3(scaled)), scale


def _decode(data: Tensor, scale: Tensor, element: str, layout: ScaleLayout) -> Tensor:
    values = decode_e2m1(unpack_nibbles(data)) if element == "e2m1" else data.to(torch.float32)
    return values * spread(decode_e8m0(scale), layout, *values.shape[-2:])


class _Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        return QuantizedTensor(*_encode(weight.to(torch.float32), scheme.weight_format, need(layout)))

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        return _decode(q.data, need(q.scale), scheme.weight_format, need(layout))


class _ActivationCodec:
    def quantize(
        self, x: Tensor, payload: ActivationPayload, static: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        return (*_encode(x, payload.element, payload.scale), None)

    def dequantize(
        self, data: Tensor, scale: Tensor, global_scale: Tensor | None, payload: ActivationPayload
    ) -> Tensor:
        return _decode(data, scale, payload.element, payload.scale)


CODEC = _Codec()
ACTIVATION_CODEC = _ActivationCodec()
