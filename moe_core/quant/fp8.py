"""e4m3 with float32 scales: fp8_block128, fp8_tensor and fp8_channel weights, and the fp8 activations.

Element: OCP 8-bit Floating Point Specification v1.0 (E4M3, saturating). Tiling of 128 x 128 for weights and
1 x 128 for activations: the DeepSeek-V3 technical report. For every region, in float32:

    scale = max(abs(x)) / 448        q = e4m3(x / scale)        x ~= q * scale
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.quant.codec import QuantizedTensor, QuantizeOptions, need
from moe_core.quant.packing import E4M3_MAX, encode_e4m3
from moe_core.quant.payloads import ActivationPayload
from moe_core.quant.scaling import float_scale, region_amax, spread
from moe_core.quant.schemes import QuantScheme, ScaleLayout


def _encode(x: Tensor, scale: Tensor, layout: ScaleLayout) -> Tensor:
    return encode_e4m3(x / spread(scale, layout, *x.shape[-2:]))


def _decode(data: Tensor, scale: Tensor, layout: ScaleLayout) -> Tensor:
    return data.to(torch.float32) * spread(scale, layout, *data.shape[-2:])


class _Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        layout, weight = need(layout), weight.to(torch.float32)
        scale = float_scale(region_amax(weight, layout, options.parts), E4M3_MAX)
        return QuantizedTensor(_encode(weight, scale, layout), scale)

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        return _decode(q.data, need(q.scale), need(layout))


class _ActivationCodec:
    def quantize(
        self, x: Tensor, payload: ActivationPayload, static: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        scale = float_scale(region_amax(x, payload.scale), E4M3_MAX) if static is None else static
        return _encode(x, scale, payload.scale), scale, None

    def dequantize(
        self, data: Tensor, scale: Tensor, global_scale: Tensor | None, payload: ActivationPayload
    ) -> Tensor:
        return _decode(data, scale, payload.scale)


CODEC = _Codec()
ACTIVATION_CODEC = _ActivationCodec()
