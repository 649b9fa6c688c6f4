"""Strict doubles of FlashInfer's NVFP4 entry points for Blackwell, on CPU tensors; see double_sm90.

They decode the prepared weights and scales from the very bytes, with code of their own, so a wrong order of rows, a
wrong swizzle or a factor too many shows.
"""

from __future__ import annotations

from typing import Any

import torch
from double_sm90 import DEFAULT_LIMIT, ActivationType, DoubleError, need, tensor
from torch import Tensor

from moe_core.quant.packing import decode_e2m1, encode_e2m1, encode_e4m3, pack_nibbles, unpack_nibbles

UNSET: Any = object()
_U8, _I32, _F32, _E4M3, _BF16 = torch.uint8, torch.int32, torch.float32, torch.float8_e4m3fn, torch.bfloat16


def _quantize(x: Tensor, factor: Tensor) -> tuple[Tensor, Tensor]:
    """x [R, K], factor [1]: packed [R, K / 2] and e4m3 [R, K / 16]; a block's scale is max / 6 * factor."""
    blocks = x.float().unflatten(-1, (-1, 16))
    scale = encode_e4m3((blocks.abs().amax(-1) / 6 * factor).clamp(min=2.0**-9))
    codes = encode_e2m1((blocks * factor / scale.float()[..., None]).flatten(-2))
    return pack_nibbles(codes), scale


#: The two values of a byte.
_PAIRS = decode_e2m1(unpack_nibbles(torch.arange(256, dtype=torch.uint8)[:, None]))


def _decode(packed: Tensor, scale: Tensor) -> Tensor:
    """packed [R, K / 2], e4m3 scale [R, K / 16] -> float64 [R, K], without any global scale."""
    values = _PAIRS[packed.int()].unflatten(-2, (-1, 8))
    # Exact in float32: two and four bits of significand.
    return (values * scale.float()[..., None, None]).flatten(-3).double()


def _linear(name: str, scale: Any, dtype: torch.dtype, rows: int, k: int, groups: int) -> Tensor:
    """Swizzled scales, read byte by byte: e4m3 [groups, rows, k / 16]."""
    row_tiles, column_tiles = -(-rows // 128), -(-(k // 16) // 4)
    need(isinstance(scale, Tensor) and scale.dtype == dtype, f"{name} is {getattr(scale, 'dtype', type(scale))}")
    wanted = (32, 4, row_tiles, 4, column_tiles, groups)
    need(tuple(scale.shape) == wanted, f"{name} is {list(scale.shape)}, not {list(wanted)}")
    memory = scale.permute(5, 2, 4, 0, 1, 3)
    need(memory.is_contiguous(), f"{name} does not lie as the tensor cores read it")
    flat = memory.reshape(groups, -1).view(_U8)
    r, c = torch.arange(rows)[:, None], torch.arange(k // 16)[None, :]
    tile = (r // 128) * column_tiles + c // 4
    return flat[:, tile * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4].view(_E4M3)


def _swizzled(linear: Tensor) -> Tensor:
    """e4m3 [groups, rows, columns] into tiles, one byte after the other; NaN where no row is."""
    groups, rows, columns = linear.shape
    row_tiles, column_tiles = -(-rows // 128), -(-columns // 4)
    flat = torch.full((groups, row_tiles * column_tiles * 512), 0x7F, dtype=_U8)
    r, c = torch.arange(rows)[:, None], torch.arange(columns)[None, :]
    at = ((r // 128) * column_tiles + c // 4) * 512 + (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4
    flat[:, at] = linear.view(_U8)
    return flat.view(groups, row_tiles, column_tiles, 32, 4, 4).permute(3, 4, 1, 5, 2, 0).view(_E4M3)


def _grouped(x: Tensor, mask: Tensor, factors: Tensor) -> tuple[Tensor, Tensor]:
    groups, rows, k = x.shape
    packed = torch.full((groups, rows, k // 2), 0xAB, dtype=_U8)
    scale = torch.full((groups, rows, k // 16), 0x7F, dtype=_U8).view(_E4M3)
    for g in range(groups):
        live = int(mask[g])
        need(0 <= live <= rows, f"{live} rows of {rows}")
        packed[g, :live], scale.view(_U8)[g, :live] = (t.view(_U8) for t in _quantize(x[g, :live], factors[g]))
    return packed.permute(1, 2, 0), _swizzled(scale)


def _batch(a: Any, mask: Any, factors: Any, search: Any) -> None:
    groups = tensor("a", a, _BF16, (None, None, None)).shape[0]
    need(a.shape[2] % 64 == 0, f"{a.shape[2]} values a row")
    tensor("mask", mask, _I32, (groups,))
    tensor("a_global_sf", factors, _F32, (groups,))
    need(bool(factors.isfinite().all()) and bool((factors > 0).all()), "a global scale is not positive")
    need(search is None, "4over6 is left to environment variables")


def scaled_fp4_grouped_quantize(a: Any, mask: Any, a_global_sf: Any, nvfp4_4over6: Any = UNSET) -> Any:
    """a [B, M, K] -> [M, K / 2, B] and swizzled scales; garbage in rows from mask on."""
    _batch(a, mask, a_global_sf, nvfp4_4over6)
    return _grouped(a, mask, a_global_sf)


def silu_and_mul_scaled_nvfp4_experts_quantize(a: Any, mask: Any, a_global_sf: Any, nvfp4_4over6: Any = UNSET) -> Any:
    """a [B, M, 2K], gate then up -> silu(gate) * up [B, M, K], quantized."""
    _batch(a, mask, a_global_sf, nvfp4_4over6)
    gate, up = a.float().chunk(2, -1)
    return _grouped((torch.nn.functional.silu(gate) * up).to(_BF16), mask, a_global_sf)


#: Keywords of the masked GEMM's calls since the list was last cleared.
CALLS: list[dict[str, Any]] = []


def grouped_gemm_nt_masked(
    lhs: Any, rhs: Any, out: Any, masked_m: Any, *, ab_dtype: str, sf_dtype: str, c_dtype: str, sf_vec_size: int,
    topk_weights: Any = None, idx_src_info: Any = None, rank_src_info: Any = None, out_ptrs: Any = None,
    num_ranks: int = 0, dst_signals: Any = None, sm_count: int | None = None, barrier_flag_local: Any = None,
    barrier_flag_multicast: Any = None, is_combine_fusion: bool = False, is_swap_ab: bool = False, **kwargs: Any,
) -> Any:  # fmt: skip
    """out [M, N, L] = alpha * lhs @ rhs^T a group; garbage in rows from masked_m on."""
    kinds = (ab_dtype, sf_dtype, c_dtype, sf_vec_size)
    need(kinds == ("float4_e2m1fn", "float8_e4m3fn", "bfloat16", 16), f"kinds {kinds}")
    need(set(kwargs) == {"alpha", "alpha_dtype"} and kwargs["alpha_dtype"] == "float32", f"keywords {sorted(kwargs)}")
    (a, a_scale), (b, b_scale) = lhs, rhs
    groups, rows, packed = tensor("A, as it lies", a.permute(2, 0, 1), _U8, (None, None, None)).shape
    columns = tensor("B, as it lies", b.permute(2, 0, 1), _U8, (groups, None, packed)).shape[1]
    tensor("out, as it lies", out.permute(2, 0, 1), _BF16, (groups, rows, columns))
    tensor("masked_m", masked_m, _I32, (groups,))
    alpha = tensor("alpha", kwargs["alpha"], _F32, (1, 1, groups)).flatten()
    first = _linear("SFA", a_scale, _E4M3, rows, 2 * packed, groups)
    second = _linear("SFB", b_scale, _E4M3, columns, 2 * packed, groups)
    need(sm_count is None or (type(sm_count) is int and sm_count > 0), f"sm_count {sm_count}")
    out.fill_(float("nan"))
    for g in range(groups):
        live = int(masked_m[g])
        x = _decode(a[:live, :, g], first[g, :live])
        out[:live, :, g] = (x @ _decode(b[..., g], second[g]).t() * alpha[g]).to(_BF16)
    if dst_signals is not None:
        tensor("dst_signals", dst_signals, (torch.uint32, _I32), (groups,))
        dst_signals.add_(1)
    CALLS.append({"sm_count": sm_count, "dst_signals": dst_signals})
    return out


def fp4_quantize(
    input: Any, global_scale: Any = None, sf_vec_size: int = 16, sf_use_ue8m0: bool = False,
    is_sf_swizzled_layout: bool = True, is_sf_8x4_layout: bool = False, is_global_scale_inversed: bool = False,
    enable_pdl: Any = None, backend: str = "cuda", nvfp4_4over6: Any = UNSET,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """input [T, K] -> [T, K / 2] and linear scales, a byte each."""
    tensor("input", input, _BF16, (None, None))
    tensor("global_scale", global_scale, _F32, (1,))
    need(sf_vec_size == 16 and not sf_use_ue8m0 and not is_sf_swizzled_layout and nvfp4_4over6 is None, "kind")
    packed, scale = _quantize(input.nan_to_num(), global_scale)
    return packed, scale.view(_U8).flatten()


class CuteDslMoEWrapper:
    """The fused MoE."""

    def __init__(
        self, num_experts: int, top_k: int, hidden_size: int, intermediate_size: int, use_cuda_graph: bool = False,
        max_num_tokens: int | None = None, num_local_experts: int | None = None, local_expert_offset: int = 0,
        tile_size: int = 128, sf_vec_size: int = 16, output_dtype: torch.dtype = torch.bfloat16, device: str = "cuda",
        enable_pdl: bool = True, activation_type: int = 3, swiglu_alpha: float = 1.0, swiglu_beta: float = 0.0,
        swiglu_limit: float = DEFAULT_LIMIT, situ_beta: float | None = None, situ_linear_beta: float | None = None,
        use_fused_finalize: bool = True, quant_mode: str = "w4a4",
    ) -> None:  # fmt: skip
        need(quant_mode in ("w4a4", "w4a16"), f"quant_mode {quant_mode}")
        need(max_num_tokens is None, "max_num_tokens is deprecated")
        constants = (activation_type, swiglu_alpha, swiglu_beta, swiglu_limit)
        need(constants == (ActivationType.Swiglu, 1.0, 0.0, DEFAULT_LIMIT), f"activation {constants}")
        need(output_dtype is _BF16 and type(device) is str, "output_dtype or device")
        self.local = num_local_experts or num_experts
        need(local_expert_offset + self.local <= num_experts, "experts that are not there")
        self.offset, self.top_k, self.mode = local_expert_offset, top_k, quant_mode
        self.hidden, self.inner, self.fused = hidden_size, intermediate_size, use_fused_finalize

    def run(
        self, x: Any, x_sf: Any, token_selected_experts: Any, token_final_scales: Any, w1_weight: Any,
        w1_weight_sf: Any, w1_alpha: Any, fc2_input_scale: Any, w2_weight: Any, w2_weight_sf: Any, w2_alpha: Any,
        tactic: Any = None, *, per_token_scale: Any = None,
    ) -> Tensor:  # fmt: skip
        """[T, H]."""
        quantized, tokens = self.mode == "w4a4", x.shape[0]
        need(tokens > 0 and tactic is None and per_token_scale is None, "tokens, tactic or per_token_scale")
        ids = tensor("token_selected_experts", token_selected_experts, _I32, (tokens, self.top_k)).long() - self.offset
        weights = tensor("token_final_scales", token_final_scales, _F32, (tokens, self.top_k))
        need(bool(weights.isfinite().all()), "a router weight is not finite")
        tensor("w1_weight", w1_weight, _U8, (self.local, 2 * self.inner, self.hidden // 2))
        tensor("w2_weight", w2_weight, _U8, (self.local, self.hidden, self.inner // 2))
        tensor("w1_alpha", w1_alpha, _F32, (self.local,))
        tensor("w2_alpha", w2_alpha, _F32, (self.local,))
        first = _linear("w1_weight_sf", w1_weight_sf, _U8, 2 * self.inner, self.hidden, self.local)
        second = _linear("w2_weight_sf", w2_weight_sf, _U8, self.hidden, self.inner, self.local)
        if quantized:
            tensor("x", x, _U8, (tokens, self.hidden // 2))
            tensor("x_sf", x_sf, _U8, (tokens, self.hidden // 16))
            tensor("fc2_input_scale", fc2_input_scale, _F32, (1,))
            rows = _decode(x, x_sf.view(_E4M3))
        else:
            rows = tensor("x", x, _BF16, (tokens, self.hidden)).double()
            need(x_sf is None and fc2_input_scale is None, "scales of an input that is not quantized")
        out = torch.zeros(tokens, self.hidden, dtype=torch.float64)
        for e in range(self.local):
            token, slot = torch.where(ids == e)
            wide = rows[token] @ _decode(w1_weight[e], first[e]).t() * w1_alpha[e]
            up, gate = wide.unflatten(1, (-1, 2, 64)).unbind(2)  # columns come up, gate, up, gate, 64 at a time
            inner = torch.nn.functional.silu(gate.flatten(1)) * up.flatten(1)
            inner = _decode(*_quantize(inner, fc2_input_scale)) if quantized else inner.to(_BF16).double()
            result = (inner @ _decode(w2_weight[e], second[e]).t() * w2_alpha[e]).to(_BF16).double()
            out.index_add_(0, token, result * weights[token, slot, None].double())
        return out.to(_BF16)


__all__ = [
    "CALLS",
    "CuteDslMoEWrapper",
    "DoubleError",
    "fp4_quantize",
    "grouped_gemm_nt_masked",
    "scaled_fp4_grouped_quantize",
    "silu_and_mul_scaled_nvfp4_experts_quantize",
]
