"""Tokens as they travel: quantized where the terms say so, and as bytes where a backend does not know the dtype."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.errors import BindError
from moe_core.quant import quantize_activation


def travelling(rows: Tensor, payload: str) -> list[Tensor]:
    """[rows, H] -> the tensors that travel, a row each: the tokens, and their scales where the payload has some."""
    if payload == "bf16":
        return [rows.contiguous()]
    data, scale = quantize_activation(rows, payload)
    if not isinstance(scale, Tensor):
        raise BindError(f"payload {payload!r} has no scale a row, so its rows cannot travel one by one")
    return [data.contiguous(), scale.contiguous()]


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; eight-bit floats as bytes, since no backend knows all of them."""
    return tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
