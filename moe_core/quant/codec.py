"""Reference quantize and dequantize of weights: exact, slow, on any device torch knows.

`quantize` and `dequantize` check their arguments and hand over to the codec that the scheme's target names.
Only float32 operations that are correctly rounded everywhere are used, so that devices agree on every bit.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from moe_core.errors import ConfigError, DependencyError, WeightError
from moe_core.quant.schemes import QuantScheme, ScaleLayout, builtin_scheme

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class QuantizedTensor:
    """A batch of quantized [N, K] matrices. Batch dimensions ("...", usually experts) come first everywhere.

    data          [..., *scheme.storage_shape(N, K)] of scheme.storage_dtype
    scale         [..., *scheme.scale_shape(N, K)] of scheme.scale.storage_dtype, None without scales
    zero          uint8 zero points 0..15, unpacked, shaped like `scale`; None without zero points
    global_scale  float32 [..., parts], 2 parts for a w13 with one per half, else 1; None without them
    """

    data: Tensor
    scale: Tensor | None = None
    zero: Tensor | None = None
    global_scale: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """The options of `quantize` that a codec reads."""

    zero_points: bool = False
    parts: int = 1


class Codec(Protocol):
    """What a scheme's `codec` target names. Arguments are already checked against the scheme.

    `layout` is the scheme's scale layout with the group size filled in.
    """

    def quantize(
        self, weight: Tensor, scheme: QuantScheme, layout: ScaleLayout | None, options: QuantizeOptions
    ) -> QuantizedTensor:
        """[..., N, K] of any floating dtype, finite -> quantized."""
        ...

    def dequantize(self, q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None) -> Tensor:
        """Quantized -> float32 [..., N, K], K as far as storage goes."""
        ...


def need(value: T | None) -> T:
    """`value`, for codecs: `quantize` and `dequantize` have checked that it is there."""
    if value is None:
        raise WeightError("a codec was called without the layout or scale that its scheme needs")
    return value


def load_codec(target: str) -> Any:
    """The object that a target "pkg.mod:attr" names. Raises DependencyError where it cannot be imported."""
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise DependencyError(f"cannot load the codec {target!r}: {error}") from error


def quantize(
    weight: Tensor,
    scheme: str | QuantScheme,
    *,
    group_size: int | None = None,
    zero_points: bool = False,
    parts: int = 1,
) -> QuantizedTensor:
    """Quantize weights [..., N, K] of any floating dtype.

    scheme       the id of a built-in scheme, or a description
    group_size   K elements under one scale, for schemes with `group_sizes`; None takes the default
    zero_points  also compute zero points, for schemes that have them
    parts        equal stacks of rows with a per-tensor or global scale each (2: gate and up of a w13)

    The codec module of each scheme states its formula and where that comes from. With "bf16" the result
    shares memory with `weight`.

    Raises ConfigError for an unknown scheme or an option that the scheme does not have, WeightError for a
    shape or dtype that it cannot hold and for weights that are not finite.
    """
    described = builtin_scheme(scheme) if isinstance(scheme, str) else scheme
    layout = described.scale_layout(group_size)
    if zero_points and not described.zero_points:
        raise ConfigError(f"scheme {described.id!r} has no zero points", hint="leave zero_points out")
    if weight.ndim < 2 or not weight.is_floating_point():
        raise WeightError(f"weights must be [..., N, K] and floating, got {_describe(weight)}")
    n, k = weight.shape[-2:]
    if problems := described.matrix_problems(n, k, group_size):
        raise WeightError(f"scheme {described.id!r} cannot hold a [{n}, {k}] matrix: {'; '.join(problems)}")
    if parts != 1:
        _check_parts(parts, n, described)
    weight = weight.detach()
    if not bool(torch.isfinite(weight.to(torch.float32)).all()):
        raise WeightError(f"weights to quantize must be finite, got NaN or infinity in {_describe(weight)}")
    codec: Codec = load_codec(described.codec)
    return codec.quantize(weight, described, layout, QuantizeOptions(zero_points=zero_points, parts=parts))


def dequantize(
    q: QuantizedTensor,
    scheme: str | QuantScheme,
    *,
    group_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    k: int | None = None,
) -> Tensor:
    """Weights [..., N, K] from their quantized form, computed in float32 and rounded once to `dtype`.

    group_size  K elements under one scale; None reads it off the shape of `q.scale`
    k           return the first k columns only, for storage that is padded along K; None returns all

    e8m0 scales may be uint8 or torch.float8_e8m0fnu. A per-tensor or global scale may leave out its last
    dimension.

    Raises ConfigError for an unknown scheme or group size, WeightError for data or scales of a wrong shape or
    dtype.
    """
    described = builtin_scheme(scheme) if isinstance(scheme, str) else scheme
    if q.data.ndim < 2:
        raise WeightError(f"quantized weights must be [..., N, K], got {_describe(q.data)}")
    columns = q.data.shape[-1] * described.values_per_item
    if group_size is None and described.group_sizes and q.scale is not None and q.scale.ndim and q.scale.shape[-1]:
        found = columns // q.scale.shape[-1]
        group_size = found if found in described.group_sizes else None
    layout = described.scale_layout(group_size)
    checked = _check_quantized(q, described, layout, columns)
    if k is not None and not 0 < k <= columns:
        raise WeightError(f"k = {k} is outside 1..{columns}, the columns that are stored")
    codec: Codec = load_codec(described.codec)
    return codec.dequantize(checked, described, layout)[..., :k].to(dtype)


def _check_quantized(
    q: QuantizedTensor, scheme: QuantScheme, layout: ScaleLayout | None, columns: int
) -> QuantizedTensor:
    """`q` with its shapes and dtypes checked, and the shorthand forms of its scales spelled out."""
    data, zero = q.data, q.zero
    if scheme.scale is not None and _dtype_name(data) != scheme.storage_dtype:
        raise WeightError(f"{scheme.id!r} data must be {scheme.storage_dtype}, got {_describe(data)}")
    batch, n = tuple(data.shape[:-2]), data.shape[-2]
    scale = _check_scale("scale", q.scale, layout, scheme, batch, n, columns)
    whole = ScaleLayout(granularity="tensor", rows=0, columns=0, dtype="float32") if scheme.global_scale else None
    global_scale = _check_scale("global_scale", q.global_scale, whole, scheme, batch, n, columns)
    if zero is not None:
        if not scheme.zero_points:
            raise WeightError(f"{scheme.id!r} has no zero points, got {_describe(zero)}")
        if zero.dtype != torch.uint8 or scale is None or zero.shape != scale.shape:
            raise WeightError(f"{scheme.id!r} zero points must be uint8 and shaped like scale, got {_describe(zero)}")
    return QuantizedTensor(data, scale, zero, global_scale)


def _check_scale(
    name: str,
    scale: Tensor | None,
    layout: ScaleLayout | None,
    scheme: QuantScheme,
    batch: tuple[int, ...],
    n: int,
    columns: int,
) -> Tensor | None:
    if layout is None or scale is None:
        if layout is None and scale is None:
            return None
        wrong = "is missing" if scale is None else f"must be None, got {_describe(scale)}"
        raise WeightError(f"{scheme.id!r} {name} {wrong}")
    if layout.dtype == "float8_e8m0" and _dtype_name(scale) == "float8_e8m0fnu":
        scale = scale.view(torch.uint8)
    parts = 1
    if layout.granularity == "tensor":
        if scale.ndim == len(batch):
            scale = scale.unsqueeze(-1)
        if scale.ndim == len(batch) + 1 and scale.shape[-1] > 0 and n % scale.shape[-1] == 0:
            parts = scale.shape[-1]
    expected = (*batch, *layout.shape(n, columns, parts))
    if tuple(scale.shape) != expected or _dtype_name(scale) != layout.storage_dtype:
        raise WeightError(
            f"{scheme.id!r} {name} must be {layout.storage_dtype} {list(expected)} for data with N = {n} and"
            f" K = {columns}, got {_describe(scale)}"
        )
    return scale


def _check_parts(parts: int, n: int, scheme: QuantScheme) -> None:
    per_tensor = scheme.scale is not None and scheme.scale.granularity == "tensor"
    if not (per_tensor or scheme.global_scale):
        raise ConfigError(f"scheme {scheme.id!r} has no per-tensor scale to split", hint="leave parts out")
    if parts < 1 or n % parts:
        raise WeightError(f"N = {n} does not divide into {parts} parts")


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _describe(tensor: Tensor) -> str:
    return f"{_dtype_name(tensor)} {list(tensor.shape)}"
