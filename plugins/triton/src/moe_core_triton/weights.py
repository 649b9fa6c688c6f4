"""The weights of a layer as the kernels read them. Canonical tensors are used as they are, without a copy, wherever the
storage is a number an item; four-bit weights are packed anew, in another K order."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.protocols import Binding
from moe_core.weights import CanonicalWeights
from moe_core_triton.kernels.launching import is_nvidia
from moe_core_triton.packing import halves, pack_width, pad_groups

LAYOUT = "rows"

#: How the kernels apply the weight scales of a scheme: "row" and "part" after the sum over K, "block" inside it.
WEIGHT_SCALES = {
    "bf16": "",
    "fp8_block128": "block",
    "fp8_tensor": "part",
    "fp8_channel": "row",
    "int8_channel": "row",
    "int8_w8a16": "row",
    "int4_w4a16": "",
    "mxfp4_w4a16": "",
}
_PACKED = {"int4_w4a16": "int4", "mxfp4_w4a16": "mxfp4"}


@dataclass(slots=True)
class Projection:
    """One of the two matrices. data: [E, parts * n, k_stored] in the storage dtype; n rows a part (gate, up).

    scale: [E, ...] contiguous, as the scheme has it; zero: uint8 like it; bias: [E, parts * n]. input_scale: float32
    [E], static activation scales. one_input_scale: whether all of them are equal. pack: "", "int4", "mxfp4" or
    "mxfp4_words", group: K under one scale where packed, pack_width: K elements of a packed block.
    """

    data: Tensor
    parts: int
    n: int
    k: int
    scale: Tensor | None = None
    zero: Tensor | None = None
    bias: Tensor | None = None
    input_scale: Tensor | None = None
    one_input_scale: bool = False
    weight_scale: str = ""
    pack: str = ""
    group: int = 0
    pack_width: int = 0
    descriptors: dict[tuple[int, int], Any] = field(default_factory=dict, repr=False, compare=False)

    def __getstate__(self) -> tuple[Any, dict[str, Any]]:
        # Descriptors hold addresses; float8 tensors travel as bytes, which is what torch can load.
        state = {name: getattr(self, name) for name in self.__slots__ if name != "descriptors"}
        data = state["data"]
        if data.dtype == torch.float8_e4m3fn:
            state["data"] = data.view(torch.uint8)
        return data.dtype, state

    def __setstate__(self, given: tuple[Any, dict[str, Any]]) -> None:
        dtype, state = given
        for name, value in state.items():
            setattr(self, name, value)
        self.data = self.data.view(dtype)
        self.descriptors = {}

    @property
    def scale_stride(self) -> int:
        """Scales of one row of blocks (groups, parts); 0 without scales."""
        return 0 if self.scale is None else self.scale.shape[-1]

    def descriptor(self, rows: int, width: int) -> Any:
        """A tensor descriptor of boxes [1, parts, rows, width] over [E, parts, n, k_stored]; None where none can be.

        One box brings the same rows of gate and up. The hardware wants 16-byte strides and base.
        """
        key = (rows, width)
        if key not in self.descriptors:
            self.descriptors[key] = self._descriptor(rows, width)
        return self.descriptors[key]

    def _descriptor(self, rows: int, width: int) -> Any:
        stored, item = self.data.shape[2], self.data.element_size()
        if stored * item % 16 or self.data.data_ptr() % 16 or rows > 256:
            return None
        from triton.tools.tensor_descriptor import TensorDescriptor

        view = self.data.view(self.data.shape[0], self.parts, self.n, stored)
        return TensorDescriptor(view, list(view.shape), list(view.stride()), [1, self.parts, rows, width])


@dataclass(slots=True)
class TritonWeights:
    """Both projections of a layer."""

    scheme: str
    up: Projection
    down: Projection
    layout: str = LAYOUT


def prepare(weights: CanonicalWeights, binding: Binding) -> TritonWeights:
    """Canonical weights -> what the kernels read. Tensors are shared with `weights` except packed ones."""
    parts = 2 if binding.config.activation.gated else 1
    return TritonWeights(
        binding.config.scheme,
        _projection(weights, "w13", parts, binding),
        _projection(weights, "w2", 1, binding),
    )


def update(quant_info: TritonWeights, weights: CanonicalWeights, binding: Binding) -> None:
    """New values into the same memory."""
    fresh_pair = [
        _projection(weights, name, 1 if name == "w2" else quant_info.up.parts, binding) for name in ("w13", "w2")
    ]
    for held, fresh in zip((quant_info.up, quant_info.down), fresh_pair, strict=True):
        if held.one_input_scale and not fresh.one_input_scale:
            raise WeightError(
                "the static input scales were the same for all experts when the plan was made, and differ now",
                hint="make the plan anew: tokens quantized once, and graphs captured so, cannot serve them",
            )
        if held.pack != fresh.pack:
            raise WeightError(
                f"weights kept as {held.pack} would have to be {fresh.pack} now: scales over 2**65 came or went",
                hint="make the plan anew",
            )
    for held, fresh in zip((quant_info.up, quant_info.down), fresh_pair, strict=True):
        for part in ("data", "scale", "zero", "bias", "input_scale"):
            old, new = getattr(held, part), getattr(fresh, part)
            if old is not None and old.data_ptr() != new.data_ptr():
                _raw(old).copy_(_raw(new))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor


def _projection(weights: CanonicalWeights, name: str, parts: int, binding: Binding) -> Projection:
    scheme, data = binding.scheme, getattr(weights, name)
    pack, group, width = _PACKED.get(scheme.id, ""), 0, 0
    k = data.shape[2] * scheme.values_per_item
    scale, zero, bias, given = (getattr(weights, f"{name}_{part}") for part in ("scale", "zero", "bias", "input_scale"))
    if pack:
        layout = scheme.scale_layout(binding.config.group_size)
        group = layout.columns if layout is not None else 0
        # float16 has too few exponents for e8m0: there, and for int4, the scale multiplies the product of a half.
        width = pack_width(group, scale_in_loop=pack == "int4" or binding.dtype is torch.float16)
        scale = scale.view(torch.uint8) if scale.element_size() == 1 else scale
        # The words of `kernels.unpack.e2m1_words` need bfloat16, NVIDIA's instructions, and no scale over 2**65 or NaN.
        words = pack == "mxfp4" and binding.dtype is torch.bfloat16 and is_nvidia(data.device)
        words = words and not bool((scale > 192).any())
        data = halves(data, width, words=words)
        scale = pad_groups(scale, k, width, group)
        zero = None if zero is None else pad_groups(zero, k, width, group)
        pack = "mxfp4_words" if words else pack
    if scale is not None:
        scale = scale.view(torch.uint8) if scale.element_size() == 1 else scale.float()
        scale = scale.reshape(scale.shape[0], -1, 1 if scale.dim() == 1 else scale.shape[-1]).contiguous()
    if given is not None:
        given = given.reshape(-1).float().contiguous()
    return Projection(
        data=data,
        parts=parts,
        n=data.shape[1] // parts,
        k=k,
        scale=scale,
        zero=None if zero is None else zero.contiguous(),
        bias=None if bias is None else bias.contiguous(),
        input_scale=given,
        one_input_scale=given is not None and bool((given == given[0]).all()),
        weight_scale=WEIGHT_SCALES[scheme.id],
        pack=pack,
        group=group,
        pack_width=width,
    )
