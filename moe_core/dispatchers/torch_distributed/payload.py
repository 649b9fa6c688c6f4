"""Tokens as they travel: quantized where the terms say so, and as bytes where a backend does not know the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding
from moe_core.quant import quantize_activation


class Travelling:
    """[rows, H] -> the tensors that travel, a row each: the tokens, and their scales where the payload has some.

    Quantized by the runner's kernels where it brings some.
    """

    def __init__(self, binding: Binding) -> None:
        if binding.terms is None:
            raise BindError("what travels is agreed upon in terms, and this dispatcher was bound without")
        self._payload, self._quantize = binding.terms.payload, binding.quantizer or quantize_activation

    def __call__(self, rows: Tensor) -> list[Tensor]:
        """Raises ContractViolation for a payload whose rows do not carry their own scales."""
        if self._payload == "bf16":
            return [rows.contiguous()]
        data, scale = self._quantize(rows, self._payload)
        if not isinstance(scale, Tensor) or scale.shape[0] != rows.shape[0]:
            raise ContractViolation(
                f"payload {self._payload!r} has no scale a row, so its rows cannot travel one by one",
                hint="this is a bug of the dispatcher: its spec must not offer that payload",
            )
        return [data.contiguous(), scale.contiguous()]


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; eight-bit floats as bytes, since no backend knows all of them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
