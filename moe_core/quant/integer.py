"""int8 and int4 with float32 scales: int8_channel, int8_w8a16 and int4_w4a16 weights, int8_token activations.

Plain affine quantization, rounding half to even, in float32 over each region:

    int8            scale = max(abs(x)) / 127  q = round(x / scale), in -127..127      x ~= q * scale
    int4            scale = max(abs(x)) / 7    q = round(x / scale) + 8, in 1..15      x ~= (q - 8) * scale
    int4 with zero  scale = (hi - lo) / 15     q = round(x / scale) + zero, in 0..15   x ~= (q - zero) * scale
                    zero = round(-lo / scale)  with hi = max(x, 0) and lo = min(x, 0)

Without zero points the decoder also takes the code 0, as -8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.quant.codec import QuantizedTensor, QuantizeOptions, need
from moe_core.quant.packing import pack_nibbles, unpack_nibbles
from moe_core.quant.payloads import ActivationPayload
from moe_core.quant.scaling import float_scale, region_amax, spread
from moe_core.quant.schemes import QuantScheme, ScaleLayout

INT8_MAX = 127.0
INT4_ZERO = 8
"""The implied zero point of symmetric int4 (offset binary)."""


def _encode_int8(x: Tensor, scale: Tensor, layout: ScaleLayout) -> Tensor:
    scaled = torch.round(x / spread(scale, layout, *x.shape[-2:])).clamp(-INT8_MAX, INT8_MAX)
    # The cast of a NaN is undefined; such a row has a NaN scale, so its codes do not matter.
    return torch.nan_to_num(scaled).to(torch.int8)


def _decode_int8(data: Tensor, scale: Tensor, layout: ScaleLayout) -> Tensor:
    return data.to(torch.float32) * spread(scale, layout, *data.shape[-2:])


class _Int8Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        layout, weight = need(layout), weight.to(torch.float32)
        scale = float_scale(region_amax(weight, layout, options.parts), INT8_MAX)
        return QuantizedTensor(_encode_int8(weight, scale, layout), scale)

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        return _decode_int8(q.data, need(q.scale), need(layout))


class _Int4Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        layout, weight = need(layout), weight.to(torch.float32)
        n, k = weight.shape[-2:]
        if not options.zero_points:
            scale = float_scale(region_amax(weight, layout), 7.0)
            scaled = torch.round(weight / spread(scale, layout, n, k)).clamp(-7, 7) + INT4_ZERO
            return QuantizedTensor(pack_nibbles(scaled.to(torch.uint8)), scale)
        high = region_amax(weight.clamp(min=0), layout)
        low = region_amax(weight.clamp(max=0), layout)
        scale = float_scale(high + low, 15.0)
        # `low` is max(-x, 0), that is minus the lowest value.
        zero = torch.round(low / scale).clamp(0, 15)
        scaled = torch.round(weight / spread(scale, layout, n, k)) + spread(zero, layout, n, k)
        return QuantizedTensor(pack_nibbles(scaled.clamp(0, 15).to(torch.uint8)), scale, zero=zero.to(torch.uint8))

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        layout = need(layout)
        codes = unpack_nibbles(q.data).to(torch.float32)
        n, k = codes.shape[-2:]
        zero = INT4_ZERO if q.zero is None else spread(q.zero.to(torch.float32), layout, n, k)
        return (codes - zero) * spread(need(q.scale), layout, n, k)


class _ActivationCodec:
    def quantize(
        self, x: Tensor, payload: ActivationPayload, static: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = float_scale(region_amax(x, payload.scale), INT8_MAX) if static is None else static
        return _encode_int8(x, scale, payload.scale), scale, None

    def dequantize(
        self, data: Tensor, scale: Tensor, global_scale: Tensor | None, payload: ActivationPayload
    ) -> Tensor:
        return _decode_int8(data, scale, payload.scale)


INT8_CODEC = _Int8Codec()
INT4_CODEC = _Int4Codec()
ACTIVATION_CODEC = _ActivationCodec()
