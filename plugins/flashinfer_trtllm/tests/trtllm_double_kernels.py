"""A strict double of FlashInfer's `trtllm_*_moe` functions and their preparation, on CPU tensors.

It takes prepared weights only: it undoes shuffle, block layout and swizzle, and computes in the kernels' own terms, raw
sums times their scalars. What the kernels would misread or refuse raises `DoubleError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from trtllm_double_enums import ActivationType, Fp8QuantizationType, SfLayout, WeightLayout
from trtllm_double_formats import e2m1, e8m0, need, shuffled_rows, spread, tensor, unblock, unshuffle, unswizzle
from trtllm_double_layer import Experts, layer, through_groups, through_mxfp8, through_nvfp4
from trtllm_double_recorded import recorded
from trtllm_double_routing import choice

_BF16, _F32, _U8, _FP8 = torch.bfloat16, torch.float32, torch.uint8, torch.float8_e4m3fn
#: Every call of a layer, for tests: its keywords, absent ones left out.
CALLS: list[dict[str, Any]] = []
Given = dict[str, Any]


class _Layer:
    """What all functions check, and the sizes that follow."""

    def __init__(self, given: Given, width: int) -> None:
        """width: items of hidden_states in a row for one of H."""
        self.given = given
        x = given["hidden_states"]
        self.tokens, self.hidden = x.shape[0], x.shape[1] * width
        need(self.tokens > 0, "a launch without tokens")
        self.inner, self.experts = given["intermediate_size"], given["local_num_experts"]
        kind = ActivationType(given.get("activation_type", ActivationType.Swiglu))
        need(kind in (ActivationType.Swiglu, ActivationType.Relu2), f"activation {kind!r}")
        self.gated = kind is ActivationType.Swiglu
        self.rows = self.inner * (2 if self.gated else 1)
        self.ids, self.weights = choice(given, self.tokens)

    def per_expert(self, *names: str) -> list[Tensor | None]:
        """Optional float32 [E_local] arguments."""
        values = [self.given.get(name) for name in names]
        for name, value in zip(names, values, strict=True):
            if value is not None:
                tensor(name, value, _F32, (self.experts,))
        return values

    def out(self, name: str) -> Tensor:
        """A required one."""
        tensor(name, self.given[name], _F32, (self.experts,))
        return self.given[name]

    def finish(self, x: Tensor, w13: Tensor, w2: Tensor, **more: Any) -> list[Tensor]:
        """Into `output`."""
        alpha, beta, limit = self.per_expert("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
        need(self.gated or (alpha is None and beta is None and limit is None), "gate parameters without a gate")
        for name in ("b13", "b2"):
            more.setdefault(name, None)
        b13, b2 = more.pop("b13"), more.pop("b2")
        raw_limit = more.pop("raw_limit", False)
        experts = Experts(w13, w2, self.gated, alpha, beta, None if raw_limit else limit, b13, b2)
        output = self.given["output"]
        width = self.given.get("valid_hidden_size") or w2.shape[1]
        tensor("output", output, _BF16, (self.tokens, width))
        first = self.given["local_expert_offset"]
        result = layer(x.float(), self.ids, self.weights, experts, first=first, **more)
        output.copy_(result[:, :width])
        return [output]

    def scalars(self, names: str) -> tuple[Callable[[Tensor, int], Tensor], Tensor, Tensor]:
        """Raw sums to what the activation sees, and what its result and GEMM2's are multiplied by."""
        gate, scale, down = (
            self.out(names.format(*which)) for which in ((1, "gate_scalar"), (1, "scalar"), (2, "scalar"))
        )
        limit = self.given.get("gemm1_clamp_limit")

        def gemm1(rows: Tensor, expert: int) -> Tensor:
            if not self.gated:
                return rows * gate[expert]
            up, other = rows.chunk(2, dim=1)
            if limit is not None:  # of raw sums
                up, other = up.clamp(-limit[expert], limit[expert]), other.clamp(max=limit[expert])
            return torch.cat([up, other * gate[expert]], dim=1)

        return gemm1, scale, down


def _round(rows: Tensor, expert: int) -> Tensor:
    return rows.to(_BF16).float()


def _bf16(given: Given) -> list[Tensor]:
    it = _Layer(given, 1)
    tensor("hidden_states", given["hidden_states"], _BF16, (it.tokens, it.hidden))
    need(given["use_shuffled_weight"] is True, "bfloat16 weights that are not shuffled")
    need(given["weight_layout"] == WeightLayout.BlockMajorK, "bfloat16 weights that are not in blocks along K")
    tensor("gemm1_weights", given["gemm1_weights"], _BF16, (it.experts, it.hidden // 64, it.rows, 64))
    tensor("gemm2_weights", given["gemm2_weights"], _BF16, (it.experts, it.inner // 64, it.hidden, 64))
    need(it.inner % 128 == 0, f"intermediate size {it.inner}")
    w13 = unshuffle(unblock(given["gemm1_weights"]), gated=it.gated)
    w2 = unshuffle(unblock(given["gemm2_weights"]), gated=False)
    return it.finish(given["hidden_states"], w13.float(), w2.float(), middle=_round)


def _fp8_block(given: Given) -> list[Tensor]:
    it = _Layer(given, 1)
    deep = Fp8QuantizationType(given["fp8_quantization_type"]) is Fp8QuantizationType.DeepSeekFp8
    need(given["num_experts"] % 4 == 0 and given["num_experts"] > given["top_k"], "experts in fours, more than top_k")
    need(given["weight_layout"] == WeightLayout.MajorK, "weights in another layout")
    x, scale = given["hidden_states"], given["hidden_states_scale"]
    tensor("hidden_states", x, _FP8, (it.tokens, it.hidden))
    need(given.get("routing_bias") is None or "routing_logits" in given, "a bias for a choice that was made")
    shapes = ((it.rows, it.hidden), (it.hidden, it.inner))
    decoded = []
    for name, (rows, columns) in zip(("gemm1_weights", "gemm2_weights"), shapes, strict=True):
        codes, blocks = given[name], given[f"{name}_scale"]
        tensor(name, codes, _FP8, (it.experts, rows, columns))
        if deep:
            tensor(f"{name}_scale", blocks, _F32, (it.experts, rows // 128, columns // 128))
            decoded.append(codes.float() * spread(blocks, 128).repeat_interleave(128, dim=1))
        else:
            tensor(f"{name}_scale", blocks, _U8, (it.experts, rows, columns // 32))
            decoded.append(_mx(codes.float(), blocks, (rows, columns), 32, it, name))
    need(given["use_shuffled_weight"] is not deep, "shuffled DeepSeek weights, or MxFp8 that are not")
    if deep:
        tensor("hidden_states_scale", scale, _F32, (it.hidden // 128, it.tokens))
        return it.finish(x.float() * spread(scale.t(), 128), *decoded, middle=lambda rows, _: through_groups(rows))
    tensor("hidden_states_scale", scale, _U8, (it.tokens, it.hidden // 32))
    return it.finish(x.float() * spread(e8m0(scale), 32), *decoded, middle=lambda rows, _: through_mxfp8(rows))


def _mx(values: Tensor, blocks: Tensor, shape: tuple[int, int], group: int, it: _Layer, name: str) -> Tensor:
    """Shuffled values [E, rows, K] times their shuffled and swizzled scales -> rows [up; gate]."""
    rows, columns = shape
    plain = unswizzle(blocks.view(_U8).flatten(), it.experts, rows, columns // group)
    scale = e8m0(plain) if group == 32 else plain.view(_FP8).float()
    return unshuffle(values * spread(scale, group), gated=it.gated and name == "gemm1_weights")


def _fp8_tensor(given: Given) -> list[Tensor]:
    it = _Layer(given, 1)
    tensor("hidden_states", given["hidden_states"], _FP8, (it.tokens, it.hidden))
    tensor("gemm1_weights", given["gemm1_weights"], _FP8, (it.experts, it.rows, it.hidden))
    tensor("gemm2_weights", given["gemm2_weights"], _FP8, (it.experts, it.hidden, it.inner))
    on_input = given["use_routing_scales_on_input"]
    need(
        not on_input or given["routing_method_type"] == 3,
        "weights on the input without Llama4: nobody would apply them",
    )
    gemm1, scale, down = it.scalars("output{}_scales_{}")
    w13 = unshuffle(given["gemm1_weights"], gated=it.gated).float()
    w2 = unshuffle(given["gemm2_weights"], gated=False).float()
    return it.finish(
        given["hidden_states"], w13, w2, gemm1=gemm1, weigh_input=on_input,
        middle=lambda rows, e: (rows * scale[e]).clamp(-448, 448).to(_FP8).float(),
        gemm2=lambda rows, e: rows * down[e],
    )  # fmt: skip


def _fp4(given: Given) -> list[Tensor]:
    x = given["hidden_states"]
    nv = x.dtype == _U8
    it = _Layer(given, 2 if nv else 1)
    need(given["hidden_states_scale_layout"] == SfLayout.layout_linear, "scales of tokens that are not linear")
    group, shapes, decoded = 16 if nv else 32, ((it.rows, it.hidden), (it.hidden, it.inner)), []
    for name, (rows, columns) in zip(("gemm1_weights", "gemm2_weights"), shapes, strict=True):
        need(rows % 128 == 0 and columns % 64 == 0, f"{name} of {rows} x {columns}")
        tensor(name, given[name], _U8, (it.experts, rows, columns // 2))
        tensor(f"{name}_scale", given[f"{name}_scale"], _FP8, (it.experts, rows, columns // group))
        decoded.append(_mx(e2m1(given[name]), given[f"{name}_scale"], (rows, columns), group, it, name))
    if nv:
        tensor("hidden_states", x, _U8, (it.tokens, it.hidden // 2))
        tensor("hidden_states_scale", given["hidden_states_scale"], _FP8, (it.tokens, it.hidden // 16))
        need(it.given["gemm1_alpha"] is not None or not it.gated, "nvfp4 with a gate takes alpha")
        need(given["gemm1_bias"] is None, "a bias with nvfp4")
        gemm1, scale, down = it.scalars("output{}_scale_{}")
        return it.finish(
            e2m1(x) * spread(given["hidden_states_scale"].float(), 16), *decoded, gemm1=gemm1, raw_limit=True,
            middle=lambda rows, e: through_nvfp4(rows * scale[e], 1.0), gemm2=lambda rows, e: rows * down[e],
        )  # fmt: skip
    tensor("hidden_states", x, _BF16, (it.tokens, it.hidden))
    need(given["hidden_states_scale"] is None, "scales of bfloat16 tokens")
    need(
        all(given[f"output{n}"] is None for n in ("1_scale_scalar", "1_scale_gate_scalar", "2_scale_scalar")), "scalars"
    )
    biases = {}
    for key, name, width, gated in (("b13", "gemm1_bias", it.rows, it.gated), ("b2", "gemm2_bias", it.hidden, False)):
        if given[name] is not None:
            tensor(name, given[name], _F32, (it.experts, width))
            biases[key] = torch.empty_like(given[name])
            biases[key][:, shuffled_rows(width, gated=gated)] = given[name]
    for name, padded in (("valid_hidden_size", it.hidden), ("valid_intermediate_size", it.inner)):
        valid = given.get(name) or padded
        need(-(-valid // 128) * 128 == padded, f"{name} {valid} of {padded}")
        if name == "valid_hidden_size":
            need(not bool(x[:, valid:].any()), "padding of tokens that is not zero")
    return it.finish(x, *decoded, middle=_round, **biases)


def _mxint4(given: Given) -> list[Tensor]:
    it = _Layer(given, 1)
    tensor("hidden_states", given["hidden_states"], _BF16, (it.tokens, it.hidden))
    need(it.hidden % 256 == 0 == it.inner % 256, f"sizes {it.hidden} and {it.inner}")
    decoded = []
    for name, rows, columns in (("gemm1", it.rows, it.hidden), ("gemm2", it.hidden, it.inner)):
        codes, scale = given[f"{name}_weights"], given[f"{name}_weights_scale"]
        tensor(f"{name}_weights", codes, _U8, (it.experts, columns // 256, rows, 128))
        tensor(f"{name}_weights_scale", scale, _BF16, (it.experts, rows, columns // 32))
        packed = unblock(codes)
        signed = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
        signed = torch.where(signed > 7, signed - 16, signed).float()
        plain = unswizzle(scale.flatten(), it.experts, rows, columns // 32).float()
        decoded.append(unshuffle(signed * spread(plain, 32), gated=it.gated and name == "gemm1"))
    return it.finish(given["hidden_states"], *decoded, middle=_round)


def fp4_quantize(given: Given) -> tuple[Tensor, Tensor]:
    """nvfp4 alone: uint8 [T, K / 2] and, linear, the e4m3 bytes of scales [T, K / 16]."""
    x, multiplier = given["input"], given["global_scale"]
    tensor("input", x, (_BF16, torch.float16), (None, None))
    tensor("global_scale", multiplier, _F32, (1,))
    need(given["sf_vec_size"] == 16 and given["sf_use_ue8m0"] is False, "another format than nvfp4")
    need(given["is_sf_swizzled_layout"] is False, "swizzled scales of tokens")
    groups = (x.float() * multiplier).unflatten(1, (-1, 16))
    scale = (groups.abs().amax(-1, keepdim=True) / 6).clamp(2.0**-9, 448).to(_FP8)
    table = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    code = (groups / scale.float()).abs().unsqueeze(-1).sub(table).abs().argmin(-1).to(_U8)
    code = (code | (torch.signbit(groups).to(_U8) << 3)).flatten(1)
    return code[:, 0::2] | (code[:, 1::2] << 4), scale.squeeze(-1).view(_U8)


def mxfp8_quantize(given: Given) -> tuple[Tensor, Tensor]:
    """float8 [T, K] and, linear and flat, the bytes of its scales."""
    x = given["input"]
    tensor("input", x, (_BF16, torch.float16), (None, None))
    need(given["is_sf_swizzled_layout"] is False, "swizzled scales of tokens")
    groups = x.float().unflatten(1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True).clamp(min=2.0**-100)
    exponent = torch.floor(torch.log2(amax)) - 8
    codes = (groups / torch.exp2(exponent)).clamp(-448, 448).to(_FP8).flatten(1)
    return codes, (exponent.flatten() + 127).to(_U8)


def shuffle_matrix_a(given: Given) -> Tensor:
    """[M, K] with its rows shuffled."""
    need(given["epilogue_tile_m"] == 128 and given["input_tensor"].dim() == 2, "another tile, or no matrix")
    return given["input_tensor"][shuffled_rows(given["input_tensor"].shape[0], gated=False)]


def reorder_rows(given: Given) -> Tensor:
    """[M, K]: 0, M / 2, 1, M / 2 + 1, ..."""
    rows = given["x"].shape[0]
    return given["x"][torch.arange(rows).view(2, -1).t().flatten()]


def block_layout(given: Given) -> Tensor:
    """[M, K] -> [K / b, M, b]."""
    matrix, block = given["input_tensor"], given["blockK"]
    need(matrix.dim() == 2 and matrix.dtype == _U8 and matrix.shape[1] % block == 0, "no bytes [M, K]")
    return matrix.view(matrix.shape[0], -1, block).transpose(0, 1).contiguous()


def _called(work: Callable[[Given], list[Tensor]]) -> Callable[[Given], list[Tensor]]:
    def call(given: Given) -> list[Tensor]:
        given = {name: value for name, value in given.items() if value is not ...}
        CALLS.append(given)
        return work(given)

    return call


_KINDS = {
    "bf16": _bf16,
    "fp8_block_scale": _fp8_block,
    "fp8_per_tensor_scale": _fp8_tensor,
    "fp4_block_scale": _fp4,
    "mxint4_block_scale": _mxint4,
}
_MOE = "flashinfer.fused_moe"
FUSED_MOE = {
    f"trtllm_{kind}{routed}_moe": recorded(_MOE, f"trtllm_{kind}{routed}_moe", _called(work))
    for kind, work in _KINDS.items()
    for routed in ("", "_routed")
} | {
    "reorder_rows_for_gated_act_gemm": recorded(
        "flashinfer.fused_moe", "reorder_rows_for_gated_act_gemm", reorder_rows
    ),
    "convert_to_block_layout": recorded(_MOE, "convert_to_block_layout", block_layout),
}
TOP = {
    "shuffle_matrix_a": recorded("flashinfer", "shuffle_matrix_a", shuffle_matrix_a),
    "fp4_quantize": recorded("flashinfer", "fp4_quantize", fp4_quantize),
    "mxfp8_quantize": recorded("flashinfer", "mxfp8_quantize", mxfp8_quantize),
}
