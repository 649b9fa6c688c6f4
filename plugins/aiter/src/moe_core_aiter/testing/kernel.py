"""What stands in for AITER's kernels: refuses what they would not survive, and computes from the shuffled bytes.

Where AITER would start no kernel, read beyond its memory or take bytes for something else, `DoubleError` is raised.
What it leaves undefined is NaN: rows at and above `num_local_tokens`, and columns that it skips as padding.

M = rows, K = top-k, E = experts of w1, G = ids (entries of the mask, or E), H and I = sizes with padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.quant import dequantize_activation
from moe_core.quant.packing import decode_e2m1, decode_e8m0, unpack_nibbles
from moe_core_aiter.testing import numbers, unshuffle

_FP4, _E8M0 = torch.float4_e2m1fn_x2, torch.float8_e8m0fnu
INT4: torch.dtype = torch.int4  # type: ignore[attr-defined]
_HALF = (torch.bfloat16, torch.float16)
_FP8 = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)


class DoubleError(AssertionError):
    """AITER would not survive this call, or would give wrong numbers without a word."""


@dataclass(frozen=True, slots=True)
class Device:
    """What a call runs on. fp8: the kind that the hardware has. flydsl: whether FlyDSL is installed.

    counts_masked_slot: whether this version takes one slot of every masked row for one that is never computed. mxfp8:
    whether it has kernels for mxfp8 weights.
    """

    arch: str
    fp8: torch.dtype
    flydsl: bool
    counts_masked_slot: bool
    mxfp8: bool


def make(signature: inspect.Signature, device: Device, log: Callable[[dict[str, Any]], None]) -> Callable[..., Tensor]:
    """A `fused_moe` with this signature; every call is also told to `log`."""

    def fused_moe(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        log(dict(bound.arguments))
        bound.apply_defaults()
        return Layer(bound.arguments, device).run()

    fused_moe.__signature__ = signature  # type: ignore[attr-defined]
    return fused_moe


def need(holds: bool, message: str) -> None:
    """Raise DoubleError unless it holds."""
    if not holds:
        raise DoubleError(message)


def tensor(name: str, given: Any, dtypes: tuple[torch.dtype, ...], shape: tuple[int | None, ...]) -> None:
    """An argument's dtype, shape (None: any) and contiguity."""
    found = getattr(given, "dtype", type(given).__name__)
    need(found in dtypes, f"{name} is {found}, not {' or '.join(map(str, dtypes))}")
    fits = len(given.shape) == len(shape) and all(b in (None, a) for a, b in zip(given.shape, shape, strict=True))
    need(fits, f"{name} is {tuple(given.shape)}, not {shape}")
    need(given.is_contiguous(), f"{name} is not contiguous")


class Layer:
    """One call."""

    def __init__(self, arguments: dict[str, Any], device: Device) -> None:
        self._given, self.device = arguments, device
        self.x, self.w1, self.w2 = (arguments[name] for name in ("hidden_states", "w1", "w2"))
        self.ids, self.weights = arguments["topk_ids"], arguments["topk_weight"]
        self.quant, self.activation = arguments["quant_type"].name, arguments["activation"].name
        self.modern = "gate_mode" in arguments
        self.counts_masked_slot = device.counts_masked_slot
        self.interleaved = arguments.get("gate_mode") == "interleave"

    def get(self, name: str) -> Any:
        """An argument; None where this version has none of that name."""
        return self._given.get(name)

    def run(self) -> Tensor:
        """Check everything, then compute."""
        self._check_routing()
        self._check_weights()
        self._check_tokens()
        self._check_options()
        result = self._finish(self._compute())
        output = self.get("output")
        return result if output is None else output.copy_(result)

    # Preconditions.

    def _check_routing(self) -> None:
        ids, mask = self.ids, self.get("expert_mask")
        tensor("topk_ids", ids, (torch.int32,), (self.x.shape[0], None))
        tensor("topk_weight", self.weights, (torch.float32,), tuple(ids.shape))
        rows, top_k = ids.shape
        need(0 < top_k <= 255, f"{top_k} slots a row: one takes 8 bits of a sorted id, and none divides by zero")
        counted = self.get("expert_mask") is not None and self.counts_masked_slot
        need(top_k > counted, "the masked slot that each row must have is missing: top-1 calls divide by zero")
        need(0 < rows < 2**24, f"{rows} rows: one takes 24 bits of a sorted id, and an empty call is the caller's")
        experts = self.w1.shape[0]
        if mask is not None:
            tensor("expert_mask", mask, (torch.int32,), (None,))
            need(bool(((mask == 0) | (mask == 1)).all()), f"expert_mask is {mask.tolist()}: experts are counted by it")
            need(int(mask.sum()) == experts, f"expert_mask has {int(mask.sum())} ones, and w1 has {experts} experts")
        count = experts if mask is None else mask.numel()
        bad = (ids < 0) | (ids >= count)
        need(not bool(bad.any()), f"ids such as {ids[bad][:3].tolist()} are outside of [0, {count})")
        self.live = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask[ids] > 0
        place = torch.arange(experts) if mask is None else mask.cumsum(0) - 1
        self.local = place[ids]
        valid = self.get("num_local_tokens")
        self.valid = rows
        if valid is not None:
            need(isinstance(valid, Tensor) and valid.numel() == 1, f"num_local_tokens is {valid}, not one item")
            need(valid.dtype is torch.int32, f"num_local_tokens is {valid.dtype}")
            self.valid = int(valid)
            need(0 <= self.valid <= rows, f"num_local_tokens is {self.valid} of {rows}")
            need(self.quant != "per_Tensor", "num_rows is not supported for quantization of whole tensors")
        self.live = self.live & (torch.arange(rows)[:, None] < self.valid)

    def _check_weights(self) -> None:
        kinds = {
            "No": _HALF,
            "per_Tensor": (self.device.fp8,),
            "per_Token": (self.device.fp8, torch.int8),
            "per_128x128": (self.device.fp8,),
            "per_1x32": (_FP4, INT4, torch.float8_e4m3fn),
        }
        need(self.quant in kinds, f"no kernel for {self.quant}")
        tensor("w1", self.w1, kinds[self.quant], (None, None, None))
        tensor("w2", self.w2, (self.w1.dtype,), (self.w1.shape[0], None, None))
        self.packed = 2 if self.w1.dtype in (_FP4, INT4) else 1
        (self.experts, rows, hidden), inner = self.w1.shape, self.w2.shape[2] * self.packed
        self.hidden, self.inner = hidden * self.packed, inner
        need(self.w2.shape[1] == self.hidden, f"w1 is {tuple(self.w1.shape)}, and w2 {tuple(self.w2.shape)}")
        need(rows == 2 * inner, f"w1 has {rows} rows for an intermediate size of {inner}: layers without gate go wrong")
        need(inner % 128 == 0, f"an intermediate size of {inner} is no multiple of 128")
        self.mx = self.quant == "per_1x32" and self.w1.dtype is not INT4
        tile = 256 if self.mx else {"No": 64}.get(self.quant, 128)
        need(self.hidden % tile == 0, f"a hidden size of {self.hidden} is no multiple of {tile}")
        if self.mx:
            need(inner % 256 == 0, f"an intermediate size of {inner} is no multiple of 256")
            tagged = all(getattr(w, "is_shuffled", False) for w in (self.w1, self.w2))
            need(tagged, "weights without is_shuffled=True go to kernels for plain ones")
            need(self.device.arch == "gfx950", f"these kernels are built for gfx950, not {self.device.arch}")
        if self.mx and self.w1.dtype is not _FP4:
            here = self.device.mxfp8 and self.device.flydsl and self.interleaved
            need(here, "mxfp8 weights need FlyDSL's kernels, of v0.1.17 or newer, and gate_mode='interleave'")
        if self.w1.dtype is INT4:
            need(self.modern and self.device.flydsl, "int4 weights need FlyDSL's kernels")
        for name, n, k in (("w1", 2 * inner, self.hidden), ("w2", self.hidden, inner)):
            self._check_scale(f"{name}_scale", n, k)

    def _check_scale(self, name: str, n: int, k: int) -> None:
        scale, experts, f32 = self.get(name), self.experts, (torch.float32,)
        if self.quant == "No":
            need(scale is None, f"{name} was given, and there is nothing to scale")
        elif self.quant == "per_Tensor":
            tensor(name, scale.reshape(-1), f32, (experts,))
        elif self.quant == "per_Token":
            tensor(name, scale, f32, (experts, n, 1))
        elif self.quant == "per_128x128":
            tensor(name, scale, f32, (experts, n // 128, k // 128))
        elif self.w1.dtype is INT4:
            tensor(name, scale.reshape(-1), (torch.bfloat16,), (experts * n * (k // 32),))
        else:
            padded = (-(-experts * n // 256) * 256, -(-k // 256) * 8)
            tensor(name, scale, (_E8M0, torch.uint8), padded)

    def _check_tokens(self) -> None:
        x, scale, dtype = self.x, self.get("a1_scale"), self.get("dtype")
        rows = self.ids.shape[0]
        if x.dtype in _HALF:
            tensor("hidden_states", x, _HALF, (rows, self.hidden))
            static = scale is None or self.quant == "per_Tensor"
            need(static, f"{self.quant} with static scales, or with scales of rows that are not quantized")
            need(self.quant != "No" or x.dtype is self.w1.dtype, f"tokens {x.dtype} and weights {self.w1.dtype}")
        else:
            need(dtype is not None, f"tokens of {x.dtype} need dtype: the result would be of theirs")
            need(scale is not None, f"tokens of {x.dtype} came without a1_scale")
            self._check_quantized(x, scale, rows)
        self.dtype = x.dtype if dtype is None else dtype
        need(self.dtype in _HALF, f"a result of {self.dtype}")

    def _check_quantized(self, x: Tensor, scale: Tensor, rows: int) -> None:
        if self.quant in ("per_Token", "per_128x128") and self.w1.dtype is self.device.fp8:
            tensor("hidden_states", x, (self.device.fp8,), (rows, self.hidden))
            columns = 1 if self.quant == "per_Token" else self.hidden // 128
            tensor("a1_scale", scale, (torch.float32,), (rows, columns))
            return
        fits = self.quant == "per_1x32" and self._token_kind() == "mxfp4" and self.modern and self.device.flydsl
        need(fits, f"tokens of {x.dtype} for {self.quant}: they are quantized again, bytes and all")
        tensor("hidden_states", x, (_FP4,), (rows, self.hidden // 2))
        tensor("a1_scale", scale, (_E8M0,), (rows, self.hidden // 32))

    def _check_options(self) -> None:
        for name, width in (("bias1", 2 * self.inner), ("bias2", self.hidden)):
            bias = self.get(name)
            if bias is not None:
                need(self.quant == "per_1x32" and self.activation == "Swiglu", f"{name} is ignored by these kernels")
                tensor(name, bias, (torch.float32,), (self.experts, width))
        limit = self.get("swiglu_limit")
        swiglu = self.activation == "Swiglu"
        need(limit in (None, 0.0) or (swiglu and limit == 7.0), f"swiglu_limit={limit} is ignored by most kernels")
        if self.quant == "per_1x32" and not self._token_kind():
            need(self.dtype is torch.bfloat16, f"these kernels take bfloat16 for {self.dtype}")
        if self.w1.dtype is torch.int8:
            need(self.dtype is torch.bfloat16, f"the int8 kernels write bfloat16, not {self.dtype}")
        output = self.get("output")
        if output is not None:
            tensor("output", output, (self.dtype,), (self.ids.shape[0], self.hidden))
            need(output.data_ptr() != self.x.data_ptr(), "output overlaps hidden_states")

    # Numbers.

    def _token_kind(self) -> str:
        """How `per_1x32` kernels of this version hold tokens: "mxfp4", "mxfp8" or "" for 16 bits."""
        if self.w1.dtype is INT4:
            return ""
        if self.w1.dtype is not _FP4:
            return "mxfp8"
        if not self.modern:
            return "mxfp4"
        few = self.ids.shape[0] < 256
        if self.activation == "Swiglu" and not self.interleaved:
            return "" if few else "mxfp4"
        if self.activation == "Swiglu" or self.interleaved:
            return "" if few or self.device.arch != "gfx950" else "mxfp8"
        return "mxfp4"

    def _tokens(self) -> Tensor:
        scale = self.get("a1_scale")
        if self.x.dtype is _FP4:
            return dequantize_activation(self.x.view(torch.uint8), scale.view(torch.uint8), "mxfp4")
        if self.x.dtype in _FP8:
            wide = self.x.float().reshape(self.x.shape[0], scale.shape[1], -1)
            values: Tensor = wide * scale.unsqueeze(-1)
            return values.reshape(self.x.shape)
        return self._rounded(self.x.float(), scale)

    def _rounded(self, x: Tensor, static: Tensor | None) -> Tensor:
        """[..., K] as the GEMM sees it."""
        if self.quant == "per_Tensor":
            return numbers.whole(x, static, self.device.fp8)
        if self.quant == "per_Token":
            return numbers.rows(x, self.w1.dtype)
        if self.quant == "per_128x128":
            return numbers.groups(x, self.device.fp8)
        kind = self._token_kind() if self.quant == "per_1x32" else ""
        return numbers.blocks32(x, kind) if kind else x

    def _matrix(self, name: str) -> Tensor:
        """float32 [E, N, K]: the weights that the kernels find at their places."""
        data, scale, parts = self._given[name], self.get(f"{name}_scale"), 2 if name == "w1" else 1
        n, k = data.shape[1], data.shape[2] * self.packed
        if data.dtype is INT4:
            values = unshuffle.int4(data.view(torch.int8)).float()
            return values * unshuffle.int4_scales(scale, self.experts, n, k // 32).repeat_interleave(32, dim=2)
        if self.mx:
            raw, given = data.view(torch.uint8), scale.view(torch.uint8)
            raw = unshuffle.guinterleaved(raw, parts) if self.interleaved else unshuffle.weights(raw)
            if self.interleaved and (data.dtype is _FP4 or parts == 2):
                exponents = unshuffle.guinterleaved_scales(given, self.experts, parts)
            else:
                exponents = unshuffle.scales(given, self.experts * n, k // 32).view(self.experts, n, k // 32)
            values = decode_e2m1(unpack_nibbles(raw)) if data.dtype is _FP4 else raw.view(data.dtype).float()
            return values * decode_e8m0(exponents).repeat_interleave(32, dim=2)
        raw = data.view(torch.uint8) if data.element_size() == 1 else data
        values = unshuffle.weights(raw).view(data.dtype).float()
        if scale is None:
            return values
        if self.quant == "per_Tensor":
            scale = scale.reshape(-1, 1, 1)
        elif self.quant == "per_128x128":
            scale = scale.repeat_interleave(128, 1).repeat_interleave(128, 2)
        scaled: Tensor = values * scale
        return scaled

    def _compute(self) -> Tensor:
        """float32 [M, H], weighted and summed over the experts of this call."""
        x, w1, w2 = self._tokens(), self._matrix("w1"), self._matrix("w2")
        early = bool(self.get("doweight_stage1"))
        token, slot = self.live.nonzero(as_tuple=True)
        if self.quant == "per_Tensor" and self.get("a2_scale") is None:
            need(bool(self.live.all()), "one dynamic scale over intermediate rows that no kernel wrote")
        experts, weight = self.local[token, slot].long(), self.weights[token, slot, None]
        middle = x.new_zeros(len(token), self.inner)
        # FlyDSL's kernels for 1x32 know silu, swiglu and no gelu.
        name = "Silu" if self.activation == "Gelu" and self.quant == "per_1x32" else self.activation
        for expert in experts.unique().tolist():
            here = experts == expert
            up = x[token[here]] @ w1[expert].T
            up = up if self.get("bias1") is None else up + self.get("bias1")[expert]
            up = up * weight[here] if early else up
            middle[here] = numbers.activate(name, up[:, : self.inner], up[:, self.inner :])
        middle = self._rounded(middle.to(self.dtype).float(), self.get("a2_scale")) if len(token) else middle
        total = x.new_zeros(x.shape[0], self.hidden)
        for expert in experts.unique().tolist():
            here = experts == expert
            down = middle[here] @ w2[expert].T
            down = down if self.get("bias2") is None else down + self.get("bias2")[expert]
            total.index_add_(0, token[here], down if early else down * weight[here])
        return total

    def _finish(self, total: Tensor) -> Tensor:
        result = total.to(self.dtype)
        result[self.valid :] = float("nan")
        skipped = (self.get("hidden_pad") or 0) // 64 * 64
        if skipped and self.quant == "per_1x32":
            result[:, self.hidden - skipped :] = float("nan")
        return result
