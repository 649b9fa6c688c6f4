"""The weights of a layer as AITER's kernels read them: copies, shuffled, each kind of layout by its name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_aiter import layouts
from moe_core_aiter.build import Build
from moe_core_aiter.layouts import raw
from moe_core_aiter.schemes import INT4, MXFP4, MXFP4_INTERLEAVED, MXFP8_INTERLEAVED, SCHEMES

_DYNAMIC = "leave the static scales out: tokens are then quantized by their own values"
_TENSORS = ("w1", "w2", "w1_scale", "w2_scale", "a1_scale", "a2_scale", "bias1", "bias2")


@dataclass(slots=True)
class AiterWeights:
    """What `fused_moe` is given beside the tokens. E experts of this rank, sizes H and I with their padding.

    layout: how w1 [E, 2I, H] and w2 [E, H, I] and their scales lie in memory; quant_type: the member of AITER's
    QuantType for both. Two four-bit values share an item. a1_scale, a2_scale: float32 [1], static scales of the tokens
    and of the intermediate rows. bias1, bias2: float32 [E, 2I] and [E, H]. hidden_pad: how much of H is padding.
    """

    scheme: str
    layout: str
    quant_type: str
    w1: Tensor
    w2: Tensor
    w1_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None
    bias1: Tensor | None = None
    bias2: Tensor | None = None
    hidden_pad: int = 0

    def __getstate__(self) -> dict[str, Any]:
        # torch cannot load most narrow dtypes from a pickle; bytes it can.
        state = {f.name: getattr(self, f.name) for f in fields(self)}
        for name in _TENSORS:
            tensor = state[name]
            state[name] = None if tensor is None else (str(tensor.dtype).removeprefix("torch."), raw(tensor))
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            given = value
            if name in _TENSORS and value is not None:
                given = value[1].view(getattr(torch, value[0]))
            setattr(self, name, given)


def prepare(weights: CanonicalWeights, binding: Binding) -> AiterWeights:
    """Canonical weights -> AITER's. Copies everything.

    Raises WeightError for what its kernels have no way to say: zero points, static scales that differ by expert.
    """
    scheme, build = SCHEMES[binding.config.scheme], _build(binding)
    makers = {MXFP4: _mxfp4, MXFP4_INTERLEAVED: _mxfp4_interleaved, MXFP8_INTERLEAVED: _mxfp8, INT4: _int4}
    made = makers.get(scheme.layout, _plain)(weights, binding, build)
    config, experts = binding.config, weights.w2.shape[0]
    hidden = weights.w2.shape[1]
    biases = {
        "bias1": _bias(weights.w13_bias),
        # With TP, only one rank brings this bias, and the kernels want both or none.
        "bias2": _bias(weights.w2_bias, like=(experts, hidden) if config.bias else None, device=weights.device),
    }
    return AiterWeights(
        **{"scheme": config.scheme, "layout": scheme.layout, "quant_type": scheme.quant_type, **biases, **made},
        hidden_pad=hidden - config.hidden_size,
    )


def update(quant_info: AiterWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """New values into the same memory. Raises WeightError where more than values would change."""
    fresh = prepare(weights, binding)
    given = [(name, getattr(quant_info, name), getattr(fresh, name)) for name in _TENSORS]
    changed = [name for name, old, new in given if (old is None) != (new is None)]
    if quant_info.quant_type != fresh.quant_type:
        changed.append(f"quant_type ({quant_info.quant_type}, now {fresh.quant_type})")
    if changed:
        raise WeightError(
            f"more than the values of these weights would change: {', '.join(changed)}",
            hint="make the plan anew: static scales came or went",
        )
    with torch.no_grad():
        for _, old, new in given:
            if old is not None:
                raw(old).copy_(raw(new))


def _build(binding: Binding) -> Build:
    build: Build = binding.runner.build
    return build


def _bias(bias: Tensor | None, like: tuple[int, int] | None = None, device: Any = None) -> Tensor | None:
    if bias is None:
        return None if like is None else torch.zeros(like, dtype=torch.float32, device=device)
    return bias.to(torch.float32, copy=True).contiguous()


def _plain(weights: CanonicalWeights, binding: Binding, build: Build) -> dict[str, Any]:
    """16 and 8 bits: tiles of 16 x 32, float32 scales in their logical order."""
    data, scales = [weights.w13, weights.w2], [weights.w13_scale, weights.w2_scale]
    scheme = binding.config.scheme
    fnuz = scheme.startswith("fp8") and build.fp8 is torch.float8_e4m3fnuz
    made: dict[str, Any] = {}
    if scheme == "fp8_tensor":
        scales, quant_type = _of_tensors(weights)
        made["quant_type"] = quant_type
        made["a1_scale"], made["a2_scale"] = _static(weights)
    if fnuz:
        data = [layouts.to_fnuz(one) for one in data]
        scales = [None if scale is None else scale * 2 for scale in scales]
        for name in ("a1_scale", "a2_scale"):
            made[name] = None if made.get(name) is None else made[name] * 2
    for i, name in enumerate(("w1", "w2")):
        made[name] = layouts.shuffled(data[i])
        scale = scales[i]
        made[f"{name}_scale"] = None if scale is None else scale.to(torch.float32, copy=True).contiguous()
    return made


def _of_tensors(weights: CanonicalWeights) -> tuple[list[Tensor | None], str]:
    """The scales of `fp8_tensor`, and AITER's name for the kernels.

    With static scales: its kernels for whole tensors. Without, those would put all intermediate rows under one scale,
    and rows of slots that are not computed here, which no kernel wrote. So each row of the weights gets the scale of
    its matrix then, and the row-wise kernels quantize each token by a scale of its own.
    """
    if weights.w13_scale is None or weights.w2_scale is None:
        raise WeightError("fp8_tensor weights need w13_scale and w2_scale")
    experts, rows, hidden = weights.w13.shape[0], weights.w13.shape[1], weights.w2.shape[1]
    up, down = weights.w13_scale.reshape(experts, -1), weights.w2_scale.reshape(experts, 1)
    if weights.w13_input_scale is None and weights.w2_input_scale is None:
        each = up.repeat_interleave(rows // up.shape[1], dim=1).unsqueeze(-1)
        return [each, down.expand(experts, hidden).unsqueeze(-1)], "per_Token"
    if not bool((up == up[:, :1]).all()):
        raise WeightError(
            "gate and up have scales of their own, and AITER's kernels for static scales take one for both",
            hint=_DYNAMIC,
        )
    return [up[:, 0], down[:, 0]], "per_Tensor"


def _static(weights: CanonicalWeights) -> tuple[Tensor | None, Tensor | None]:
    given = {"w13_input_scale": weights.w13_input_scale, "w2_input_scale": weights.w2_input_scale}
    flat = {name: scale.reshape(-1).float() for name, scale in given.items() if scale is not None}
    if not flat:
        return None, None
    if len(flat) < len(given):
        raise WeightError(f"{next(iter(flat))} was given alone, and AITER takes static scales for both", hint=_DYNAMIC)
    for name, scale in flat.items():
        if not bool((scale == scale[0]).all()):
            raise WeightError(f"{name} differs between experts, and AITER takes one for all of them", hint=_DYNAMIC)
    first, second = (scale[:1].clone() for scale in flat.values())
    return first, second


def _mxfp4(weights: CanonicalWeights, binding: Binding, build: Build) -> dict[str, Any]:
    """Tiles of 16 rows x 32 bytes; scales in tiles of 32 x 8."""
    made: dict[str, Any] = {}
    for name, source in (("w1", "w13"), ("w2", "w2")):
        data, scale = _blocks(weights, source)
        made[name] = layouts.shuffled(data).view(build.fp4x2)
        made[f"{name}_scale"] = layouts.shuffled_scales(scale.flatten(0, 1)).view(build.e8m0)
    return made


def _mxfp4_interleaved(weights: CanonicalWeights, binding: Binding, build: Build) -> dict[str, Any]:
    """Tiles of 16 rows x 64 bytes, those of gate and up by turns."""
    made: dict[str, Any] = {}
    for name, source, parts in (("w1", "w13", 2), ("w2", "w2", 1)):
        data, scale = _blocks(weights, source)
        made[name] = layouts.interleaved(data, parts=parts).view(build.fp4x2)
        made[f"{name}_scale"] = layouts.interleaved_scales(scale, parts=parts).view(build.e8m0)
    return made


def _mxfp8(weights: CanonicalWeights, binding: Binding, build: Build) -> dict[str, Any]:
    """Weights as for interleaved mxfp4, a byte an element; the scales of w2 as for plain mxfp4."""
    (up, up_scale), (down, down_scale) = _blocks(weights, "w13"), _blocks(weights, "w2")
    return {
        "w1": layouts.interleaved(up, parts=2).view(build.fp8),
        "w2": layouts.interleaved(down, parts=1).view(build.fp8),
        "w1_scale": layouts.interleaved_scales(up_scale, parts=2).view(build.e8m0),
        "w2_scale": layouts.shuffled_scales(down_scale.flatten(0, 1)).view(build.e8m0),
    }


def _int4(weights: CanonicalWeights, binding: Binding, build: Build) -> dict[str, Any]:
    """Signed values, shuffled as bytes and packed then; scales in bfloat16, which is all that its kernels read."""
    from moe_core.quant.packing import unpack_nibbles

    made: dict[str, Any] = {}
    for name, source in (("w1", "w13"), ("w2", "w2")):
        if getattr(weights, f"{source}_zero") is not None:
            raise WeightError(
                f"{source}_zero was given, and AITER's int4 kernels have no zero points", hint="take another runner"
            )
        data, scale = _blocks(weights, source)
        values = unpack_nibbles(data).view(torch.int8) - 8
        made[name] = layouts.packed_int4(layouts.shuffled(values)).view(build.i4x2)
        made[f"{name}_scale"] = layouts.int4_scales(scale).reshape(-1)
    return made


def _blocks(weights: CanonicalWeights, source: str) -> tuple[Tensor, Tensor]:
    """The bytes of a matrix, and its scales by blocks of K (their bytes, where they have one)."""
    data, scale = getattr(weights, source), getattr(weights, f"{source}_scale")
    if scale is None:
        raise WeightError(f"{source}_scale is missing")
    return data.view(torch.uint8), scale.view(torch.uint8) if scale.element_size() == 1 else scale
