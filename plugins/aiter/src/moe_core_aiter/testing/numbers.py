"""Quantization and activation functions as AITER computes them, in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.quant import dequantize_activation, quantize_activation


def by_scale(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x rounded to `dtype` under a scale that multiplies, as floats again."""
    if dtype is torch.int8:
        return torch.round(x / scale).clamp(-127, 127) * scale
    top = torch.finfo(dtype).max
    return (x / scale).clamp(-top, top).to(dtype).float() * scale


def rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale a row."""
    top = 127.0 if dtype is torch.int8 else torch.finfo(dtype).max
    return by_scale(x, x.abs().amax(-1, keepdim=True).clamp(min=1e-12) / top, dtype)


def groups(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A scale for 128 values of a row."""
    parts = x.reshape(*x.shape[:-1], -1, 128)
    return rows(parts, dtype).reshape(x.shape)


def whole(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One scale for everything: a NaN anywhere is everywhere."""
    return by_scale(x, (x.abs().amax() / torch.finfo(dtype).max if scale is None else scale.float()), dtype)


def blocks32(x: Tensor, payload: str) -> Tensor:
    """mxfp4 or mxfp8."""
    flat = x.reshape(-1, x.shape[-1])
    data, scale = quantize_activation(flat, payload)
    return dequantize_activation(data, scale, payload).reshape(x.shape)


def activate(name: str, gate: Tensor, up: Tensor) -> Tensor:
    """Silu, Gelu (by erf) or Swiglu, GPT-OSS's with its constants."""
    if name == "Silu":
        return gate * torch.sigmoid(gate) * up
    if name == "Gelu":
        return torch.nn.functional.gelu(gate) * up
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)
