"""Descriptions of the quant schemes, free of torch.

A scheme is data: its name is an open string, and a plugin describes its own scheme with its own `QuantScheme`
whose `codec` target points into the plugin. All shapes are those of one logical [N, K] weight matrix with K
the reduction dimension; experts and other batch dimensions go in front. Scales are logical (never swizzled),
row-major, and always multiply when dequantizing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from math import prod

from moe_core.errors import ConfigError, did_you_mean


def dtype_bytes(name: str) -> int:
    """Bytes of one item of a dtype, from the first number in its name ("bfloat16" -> 2).

    Raises ConfigError where the name holds no whole number of bytes.
    """
    found = re.search(r"\d+", name)
    if found is None or int(found[0]) == 0 or int(found[0]) % 8:
        raise ConfigError(
            f"cannot tell the size of dtype {name!r}",
            hint="name a dtype with its width in bits, such as 'uint8'",
        )
    return int(found[0]) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleLayout:
    """Which elements of a [N, K] matrix share one scale.

    granularity  "tensor" (the whole matrix), "channel" (one weight row), "token" (one activation row),
                 "block" (tiles; the last one may be ragged) or "group" (K must divide evenly)
    rows         rows under one scale, 0 = all
    columns      K columns under one scale, 0 = all
    dtype        logical dtype: "float32", "float8_e8m0", "float8_e4m3fn", ...
    """

    granularity: str
    rows: int
    columns: int
    dtype: str

    def __post_init__(self) -> None:
        if self.rows < 0 or self.columns < 0:
            raise ConfigError(f"a scale covers {self.rows} rows x {self.columns} columns", hint="use 0 for all")

    @property
    def storage_dtype(self) -> str:
        """The torch dtype that holds a scale: `dtype`, but "uint8" for float8_e8m0 (raw byte, bias 127)."""
        return "uint8" if self.dtype == "float8_e8m0" else self.dtype

    def shape(self, n: int, k: int, parts: int = 1) -> tuple[int, ...]:
        """Logical scale shape of one [n, k] matrix.

        (parts,) for "tensor", where `parts` is the number of equal stacks of rows with a scale each (2 for a
        w13 whose gate and up differ); else (ceil(n / rows), ceil(k / columns)), (n, 1) for a scale per row.
        """
        if self.granularity == "tensor":
            return (parts,)
        return (-(-n // self.rows) if self.rows else 1, -(-k // self.columns) if self.columns else 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantScheme:
    """What the weights are, and what a runner quantizes activations to.

    id                 the open name, such as "fp8_block128"
    summary            one line for people
    weight_format      logical element: "bfloat16", "e4m3", "int8", "int4", "e2m1"
    storage_dtype      torch dtype name of the stored weights
    values_per_item    elements in one storage item, along K (2 for 4-bit elements)
    scale              scale layout, None without scales
    global_scale       True where each expert also has a float32 scale [1] ([2] for a w13 with one per half)
    zero_points        True where per-group zero points are supported; they stay optional
    activation         activation payload id, None where activations stay as they are
    static_activation  True where a calibrated activation scale may be given
    group_sizes        allowed K group sizes where that is a parameter, the default first
    codec              target "pkg.mod:attr" of a `moe_core.quant.codec.Codec`
    """

    id: str
    summary: str
    weight_format: str
    storage_dtype: str
    values_per_item: int
    scale: ScaleLayout | None
    global_scale: bool = False
    zero_points: bool = False
    activation: str | None = None
    static_activation: bool = False
    group_sizes: tuple[int, ...] = ()
    codec: str

    def scale_layout(self, group_size: int | None = None) -> ScaleLayout | None:
        """The scale layout with `group_size` filled in (None: the default). Raises ConfigError for others."""
        if group_size is None:
            return self.scale
        if not self.group_sizes:
            raise ConfigError(f"scheme {self.id!r} has no group size, got {group_size}", hint="leave group_size out")
        if self.scale is None or group_size not in self.group_sizes:
            raise ConfigError(
                f"scheme {self.id!r} does not allow group size {group_size}",
                hint=f"use one of {', '.join(map(str, self.group_sizes))}",
            )
        return replace(self.scale, columns=group_size)

    def storage_shape(self, n: int, k: int) -> tuple[int, ...]:
        """Shape of the stored weights of one [n, k] matrix, in items of `storage_dtype`."""
        return (n, -(-k // self.values_per_item))

    def scale_shape(self, n: int, k: int, group_size: int | None = None, parts: int = 1) -> tuple[int, ...] | None:
        """Logical scale shape of one [n, k] matrix, None without scales. `parts`: see `ScaleLayout.shape`."""
        layout = self.scale_layout(group_size)
        return None if layout is None else layout.shape(n, k, parts)

    def weight_bytes(
        self, n: int, k: int, group_size: int | None = None, *, parts: int = 1, zero_points: bool = False
    ) -> int:
        """Bytes of one stored [n, k] matrix: elements, scales, global scales, zero points where asked for.

        For "bf16" this is the size at two bytes an element; a float32 layer takes twice that.
        """
        total = prod(self.storage_shape(n, k)) * dtype_bytes(self.storage_dtype)
        layout = self.scale_layout(group_size)
        if layout is not None:
            scales = prod(layout.shape(n, k, parts))
            total += scales * dtype_bytes(layout.storage_dtype)
            total += scales if zero_points else 0
        return total + (4 * parts if self.global_scale else 0)

    def matrix_problems(self, n: int, k: int, group_size: int | None = None) -> list[str]:
        """Every reason why an [n, k] matrix cannot be stored in this scheme; empty when it can."""
        problems = [f"{name} = {size} is not positive" for name, size in (("N", n), ("K", k)) if size <= 0]
        try:
            layout = self.scale_layout(group_size)
        except ConfigError as error:
            return [*problems, error.message]
        if k > 0 and k % self.values_per_item:
            problems.append(f"K = {k} is not a multiple of {self.values_per_item} (elements per stored item)")
        if k > 0 and layout is not None and layout.granularity == "group" and k % layout.columns:
            problems.append(f"K = {k} is not a multiple of {layout.columns} (elements under one scale)")
        return problems


_BLOCK128 = ScaleLayout(granularity="block", rows=128, columns=128, dtype="float32")
_TENSOR = ScaleLayout(granularity="tensor", rows=0, columns=0, dtype="float32")
_CHANNEL = ScaleLayout(granularity="channel", rows=1, columns=0, dtype="float32")
_GROUP128 = ScaleLayout(granularity="group", rows=1, columns=128, dtype="float32")
_MX32 = ScaleLayout(granularity="group", rows=1, columns=32, dtype="float8_e8m0")
_NV16 = ScaleLayout(granularity="group", rows=1, columns=16, dtype="float8_e4m3fn")


def _e4m3(id: str, summary: str, scale: ScaleLayout, activation: str, static: bool = False) -> QuantScheme:
    return QuantScheme(
        id=id,
        summary=summary,
        weight_format="e4m3",
        storage_dtype="float8_e4m3fn",
        values_per_item=1,
        scale=scale,
        activation=activation,
        static_activation=static,
        codec="moe_core.quant.microscaling:CODEC" if scale is _MX32 else "moe_core.quant.fp8:CODEC",
    )


def _int8(id: str, summary: str, activation: str | None) -> QuantScheme:
    return QuantScheme(
        id=id,
        summary=summary,
        weight_format="int8",
        storage_dtype="int8",
        values_per_item=1,
        scale=_CHANNEL,
        activation=activation,
        codec="moe_core.quant.integer:INT8_CODEC",
    )


def _mxfp4(id: str, summary: str, activation: str | None) -> QuantScheme:
    return QuantScheme(
        id=id,
        summary=summary,
        weight_format="e2m1",
        storage_dtype="uint8",
        values_per_item=2,
        scale=_MX32,
        activation=activation,
        codec="moe_core.quant.microscaling:CODEC",
    )


BUILTIN_SCHEMES: tuple[QuantScheme, ...] = (
    QuantScheme(
        id="bf16",
        summary="unquantized: the layer's own dtype (bfloat16, float16 or float32)",
        weight_format="bfloat16",
        storage_dtype="bfloat16",
        values_per_item=1,
        scale=None,
        codec="moe_core.quant.unquantized:CODEC",
    ),
    _e4m3("fp8_block128", "e4m3, float32 scale per 128 x 128 block", _BLOCK128, "fp8_group128"),
    _e4m3("fp8_tensor", "e4m3, float32 scale per expert and projection", _TENSOR, "fp8_tensor", True),
    _e4m3("fp8_channel", "e4m3, float32 scale per output row", _CHANNEL, "fp8_token"),
    _int8("int8_channel", "symmetric int8, float32 scale per output row, int8 activations", "int8_token"),
    _int8("int8_w8a16", "symmetric int8, float32 scale per output row, weight only", None),
    QuantScheme(
        id="int4_w4a16",
        summary="uint4 with float32 scale per K group, optional zero points, weight only",
        weight_format="int4",
        storage_dtype="uint8",
        values_per_item=2,
        scale=_GROUP128,
        zero_points=True,
        group_sizes=(128, 32, 64),
        codec="moe_core.quant.integer:INT4_CODEC",
    ),
    _mxfp4("mxfp4_w4a16", "e2m1, e8m0 scale per 32 of K, weight only", None),
    _mxfp4("mxfp4", "e2m1, e8m0 scale per 32 of K, mxfp4 activations", "mxfp4"),
    _e4m3("mxfp8", "e4m3, e8m0 scale per 32 of K, mxfp8 activations", _MX32, "mxfp8"),
    QuantScheme(
        id="nvfp4",
        summary="e2m1, e4m3 scale per 16 of K and a float32 scale per expert, nvfp4 activations",
        weight_format="e2m1",
        storage_dtype="uint8",
        values_per_item=2,
        scale=_NV16,
        global_scale=True,
        activation="nvfp4",
        static_activation=True,
        codec="moe_core.quant.nvfp4:CODEC",
    ),
)

_BY_ID = {scheme.id: scheme for scheme in BUILTIN_SCHEMES}


def builtin_scheme(id: str) -> QuantScheme:
    """The core's own scheme of that name. Raises ConfigError, with the closest names, where there is none."""
    try:
        return _BY_ID[id]
    except KeyError:
        raise ConfigError(f"unknown quant scheme {id!r}", hint=did_you_mean(id, _BY_ID)) from None
