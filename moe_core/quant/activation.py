"""Reference quantize and dequantize of activations [rows, K]. Same formulas as for weights."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moe_core.errors import ConfigError
from moe_core.quant.codec import load_codec
from moe_core.quant.payloads import ActivationPayload, activation_payload


class TwoLevelScale(NamedTuple):
    """An nvfp4 activation's scale: `block` float8_e4m3fn [rows, K/16] times `global_scale` float32 [1]."""

    block: Tensor
    global_scale: Tensor


class ActivationCodec(Protocol):
    """What a payload's `codec` target names. Arguments are already checked against the payload."""

    def quantize(
        self, x: Tensor, payload: ActivationPayload, static: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """float32 [rows, K], static scale [1] or None -> data, scale, global scale or None."""
        ...

    def dequantize(
        self, data: Tensor, scale: Tensor, global_scale: Tensor | None, payload: ActivationPayload
    ) -> Tensor:
        """-> float32 [rows, K]."""
        ...


def quantize_activation(
    x: Tensor, payload: str | ActivationPayload, *, scale: Tensor | None = None
) -> tuple[Tensor, Tensor | TwoLevelScale]:
    """Quantize activations [rows, K] of any floating dtype; rows may be 0.

    payload  the id of a built-in payload, or a description
    scale    a calibrated float32 scale [1] (or a scalar tensor) for payloads with `static_scale`: the
             tensor scale of fp8_tensor, the global scale of nvfp4. It multiplies when dequantizing, so it is
             amax / 448 for the one, amax / (6 * 448) for the other. None computes it from x.

    Returns (data, scale). data is [rows, K / values_per_item] of the payload's storage dtype. scale is
    logical: float32 [1] (fp8_tensor), float32 [rows, 1] (fp8_token, int8_token), float32 [rows, ceil(K/128)]
    (fp8_group128), uint8 e8m0 [rows, K/32] (mxfp4, mxfp8), or a TwoLevelScale (nvfp4).

    Values that are not finite are not refused: everything under the scale they spoil dequantizes to NaN.

    Raises ConfigError for an unknown payload, a K that it cannot hold, or a static scale it does not take.
    """
    described = activation_payload(payload) if isinstance(payload, str) else payload
    if x.ndim != 2 or not x.is_floating_point():
        raise ConfigError(f"activations must be [rows, K] and floating, got {x.dtype} {list(x.shape)}")
    if problems := described.problems(x.shape[-1]):
        raise ConfigError(f"payload {described.id!r} cannot hold {list(x.shape)}: {'; '.join(problems)}")
    static = None if scale is None else _static_scale(scale, described)
    codec: ActivationCodec = load_codec(described.codec)
    data, block, global_scale = codec.quantize(x.detach().to(torch.float32), described, static)
    return data, block if global_scale is None else TwoLevelScale(block, global_scale)


def dequantize_activation(
    data: Tensor,
    scale: Tensor | TwoLevelScale,
    payload: str | ActivationPayload,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Activations [rows, K] from what `quantize_activation` returned, in float32 and rounded once to `dtype`.

    Raises ConfigError for an unknown payload, or data and scales that do not fit it or each other.
    """
    described = activation_payload(payload) if isinstance(payload, str) else payload
    if isinstance(scale, TwoLevelScale) is not described.global_scale:
        wanted = "a TwoLevelScale" if described.global_scale else "a tensor"
        raise ConfigError(f"the scale of payload {described.id!r} must be {wanted}, got {type(scale).__name__}")
    block, global_scale = scale if isinstance(scale, TwoLevelScale) else (scale, None)
    if str(block.dtype) == "torch.float8_e8m0fnu":
        block = block.view(torch.uint8)
    if data.ndim != 2 or str(data.dtype) != f"torch.{described.storage_dtype}":
        raise ConfigError(
            f"data of payload {described.id!r} must be {described.storage_dtype} [rows, K], got"
            f" {data.dtype} {list(data.shape)}"
        )
    expected = described.scale.shape(data.shape[0], data.shape[1] * described.values_per_item)
    if tuple(block.shape) != expected or str(block.dtype) != f"torch.{described.scale.storage_dtype}":
        raise ConfigError(
            f"the scale of payload {described.id!r} must be {described.scale.storage_dtype} {list(expected)},"
            f" got {block.dtype} {list(block.shape)}"
        )
    if global_scale is not None:
        if global_scale.numel() != 1 or global_scale.dtype != torch.float32:
            raise ConfigError(
                f"the global scale of payload {described.id!r} must be one float32,"
                f" got {global_scale.dtype} {list(global_scale.shape)}"
            )
        global_scale = global_scale.reshape(1)
    codec: ActivationCodec = load_codec(described.codec)
    return codec.dequantize(data, block, global_scale, described).to(dtype)


def roundtrip_activation(x: Tensor, payload: str | ActivationPayload, scale: Tensor | None = None) -> Tensor:
    """float32 [rows, K]: what is left of `x` after quantizing and dequantizing it. Raises as those two do."""
    data, used = quantize_activation(x, payload, scale=scale)
    return dequantize_activation(data, used, payload)


def _static_scale(scale: Tensor, payload: ActivationPayload) -> Tensor:
    if not payload.static_scale:
        raise ConfigError(f"payload {payload.id!r} takes no static scale", hint="leave scale out")
    if scale.numel() != 1 or not scale.is_floating_point():
        raise ConfigError(
            f"the static scale of payload {payload.id!r} must be one float32, got {scale.dtype} {list(scale.shape)}"
        )
    value = scale.detach().to(torch.float32).reshape(1)
    if not (bool(torch.isfinite(value).all()) and bool((value > 0).all())):
        raise ConfigError(f"the static scale of payload {payload.id!r} must be positive, got {value.item()}")
    return value
