"""NVFP4: e2m1 elements, an e4m3 scale per 16 of K, and a float32 global scale, for weights and activations.

The two-level format of NVIDIA's Blackwell tensor cores, as NVIDIA documents it for Transformer Engine; e2m1
and e4m3 are those of the OCP specifications. In float32:

    global = max(abs(x)) / (6 * 448)                     over one expert's matrix, or one activation tensor
    scale  = e4m3((max(abs(block)) / 6) / global)        saturated to 2^-9 .. 448
    q      = e2m1(x / (scale * global))                  x ~= (q * scale) * global

The block scale is never zero: a block too small for it gets 2^-9, the least e4m3 value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.quant.codec import QuantizedTensor, QuantizeOptions, need
from moe_core.quant.packing import (
    E2M1_MAX,
    E4M3_MAX,
    decode_e2m1,
    encode_e2m1,
    encode_e4m3,
    pack_nibbles,
    unpack_nibbles,
)
from moe_core.quant.payloads import ActivationPayload
from moe_core.quant.scaling import divide_exact, float_scale, region_amax, spread
from moe_core.quant.schemes import QuantScheme, ScaleLayout

_SMALLEST_BLOCK_SCALE = 2.0**-9
_WHOLE = ScaleLayout(granularity="tensor", rows=0, columns=0, dtype="float32")


def _encode(x: Tensor, global_scale: Tensor, layout: ScaleLayout) -> tuple[Tensor, Tensor]:
    n, k = x.shape[-2:]
    per_row = spread(global_scale, _WHOLE, n, k)
    raw = divide_exact(region_amax(x, layout), E2M1_MAX) / per_row
    scale = encode_e4m3(raw.clamp(min=_SMALLEST_BLOCK_SCALE))
    step = spread(scale.to(torch.float32) * per_row, layout, n, k)
    return pack_nibbles(encode_e2m1(x / step)), scale


def _decode(data: Tensor, scale: Tensor, global_scale: Tensor, layout: ScaleLayout) -> Tensor:
    values = decode_e2m1(unpack_nibbles(data))
    n, k = values.shape[-2:]
    # q * scale is exact in float32, so this order rounds once.
    return (values * spread(scale.to(torch.float32), layout, n, k)) * spread(global_scale, _WHOLE, n, k)


class _Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        weight = weight.to(torch.float32)
        global_scale = float_scale(region_amax(weight, _WHOLE, options.parts), E2M1_MAX * E4M3_MAX)
        data, scale = _encode(weight, global_scale, need(layout))
        return QuantizedTensor(data, scale, global_scale=global_scale)

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        return _decode(q.data, need(q.scale), need(q.global_scale), need(layout))


class _ActivationCodec:
    def quantize(
        self, x: Tensor, payload: ActivationPayload, static: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        global_scale = float_scale(region_amax(x, _WHOLE), E2M1_MAX * E4M3_MAX) if static is None else static
        return (*_encode(x, global_scale, payload.scale), global_scale)

    def dequantize(
        self, data: Tensor, scale: Tensor, global_scale: Tensor | None, payload: ActivationPayload
    ) -> Tensor:
        return _decode(data, scale, need(global_scale), payload.scale)


CODEC = _Codec()
ACTIVATION_CODEC = _ActivationCodec()
