"""The codec of "bf16": weights as they are."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.quant.codec import QuantizedTensor, QuantizeOptions
from moe_core.quant.schemes import QuantScheme, ScaleLayout

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


class _Codec:
    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        self._check(weight)
        return QuantizedTensor(weight)

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        self._check(q.data)
        return q.data.to(torch.float32)

    def _check(self, data: Tensor) -> None:
        if data.dtype not in _DTYPES:
            raise WeightError(f"scheme 'bf16' holds bfloat16, float16 or float32 weights, got {data.dtype}")


CODEC = _Codec()
