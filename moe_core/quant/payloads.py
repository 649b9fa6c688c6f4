"""Descriptions of the activation payloads that quantized runners and dispatchers work in, free of torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from moe_core.errors import ConfigError, did_you_mean
from moe_core.quant.schemes import ScaleLayout


@dataclass(frozen=True, slots=True, kw_only=True)
class ActivationPayload:
    """Dtype and scale layout of quantized activations [rows, K].

    id               the open name, such as "fp8_group128"
    element          logical element: "e4m3", "int8", "e2m1"
    storage_dtype    torch dtype name of the data, [rows, K / values_per_item]
    values_per_item  elements in one storage item, along K
    scale            layout of the logical scales, which multiply when dequantizing
    global_scale     True where a float32 scale [1] multiplies as well
    static_scale     True where a calibrated scale may be given: the tensor scale, or the global scale
    codec            target "pkg.mod:attr" of a `moe_core.quant.activation.ActivationCodec`
    """

    id: str
    element: str
    storage_dtype: str
    values_per_item: int
    scale: ScaleLayout
    global_scale: bool = False
    static_scale: bool = False
    codec: str

    def problems(self, k: int) -> list[str]:
        """Every reason why rows of `k` elements cannot be held in this payload; empty when they can."""
        if k <= 0:
            return [f"K = {k} is not positive"]
        if self.scale.granularity == "group" and k % self.scale.columns:
            return [f"K = {k} is not a multiple of {self.scale.columns} (elements under one scale)"]
        if k % self.values_per_item:
            return [f"K = {k} is not a multiple of {self.values_per_item} (elements per stored item)"]
        return []


def _payload(
    id: str, element: str, granularity: str, columns: int, scale_dtype: str, module: str, static: bool = False
) -> ActivationPayload:
    rows = 0 if granularity == "tensor" else 1
    packed = element == "e2m1"
    return ActivationPayload(
        id=id,
        element=element,
        storage_dtype="uint8" if packed else {"e4m3": "float8_e4m3fn", "int8": "int8"}[element],
        values_per_item=2 if packed else 1,
        scale=ScaleLayout(granularity=granularity, rows=rows, columns=columns, dtype=scale_dtype),
        global_scale=id == "nvfp4",
        static_scale=static,
        codec=f"moe_core.quant.{module}:ACTIVATION_CODEC",
    )


ACTIVATION_PAYLOADS: Mapping[str, ActivationPayload] = MappingProxyType(
    {
        payload.id: payload
        for payload in (
            _payload("fp8_tensor", "e4m3", "tensor", 0, "float32", "fp8", static=True),
            _payload("fp8_token", "e4m3", "token", 0, "float32", "fp8"),
            _payload("fp8_group128", "e4m3", "block", 128, "float32", "fp8"),
            _payload("int8_token", "int8", "token", 0, "float32", "integer"),
            _payload("mxfp4", "e2m1", "group", 32, "float8_e8m0", "microscaling"),
            _payload("mxfp8", "e4m3", "group", 32, "float8_e8m0", "microscaling"),
            _payload("nvfp4", "e2m1", "group", 16, "float8_e4m3fn", "nvfp4", static=True),
        )
    }
)
"""Every built-in payload by id, in the order of the documentation."""


def activation_payload(id: str) -> ActivationPayload:
    """The core's own payload of that name. Raises ConfigError, with close names, where there is none."""
    try:
        return ACTIVATION_PAYLOADS[id]
    except KeyError:
        raise ConfigError(f"unknown activation payload {id!r}", hint=did_you_mean(id, ACTIVATION_PAYLOADS)) from None
