"""A strict double of `cutlass_fused_moe` and what belongs to it, on CPU tensors, with FlashInfer 0.7.2's signatures.

It takes prepared weights only and undoes what its preparation functions do. What the kernels would misread, assert on
or compute differently raises `DoubleError`. `tests/test_trtllm_signatures.py` compares the signatures with the
installed FlashInfer.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from trtllm_double_enums import ActivationType
from trtllm_double_formats import e2m1, e8m0, fold_scales, interleave_e2m1, need, spread, swizzle, tensor, unswizzle
from trtllm_double_layer import Experts, layer, refuse_duplicates, round_e4m3, through_groups, through_nvfp4

_BF16, _F16, _F32, _I32, _U8 = torch.bfloat16, torch.float16, torch.float32, torch.int32, torch.uint8
_FP8 = torch.float8_e4m3fn
#: Kernels of GEMM1, then of GEMM2, by their number: how many microseconds slower than the best they pretend to be.
KERNELS = (3, 4)
#: Every call, for tests: the keywords.
CALLS: list[dict[str, Any]] = []
#: Set to a scheme to be a build without it.
ABSENT: set[str] = set()


def interleave_moe_weights_for_sm90_mixed_gemm(weight: Tensor, quant_type: str = "fp4") -> Tensor:
    """uint8 [E, n, k / 2]."""
    need(quant_type == "fp4", f"the double has no {quant_type}")
    tensor("weight", weight, _U8, (None, None, None))
    need(weight.shape[1] % 16 == 0 and weight.shape[2] % 32 == 0, f"{list(weight.shape)}: n % 16 or k % 64")
    return interleave_e2m1(weight)


def interleave_moe_scales_for_sm90_mixed_gemm(scales: Tensor, group_size: int = 32) -> Tensor:
    """uint8 [E, rows, K / 32]."""
    need(group_size == 32, f"the double has no group of {group_size}")
    tensor("scales", scales, _U8, (None, None, None))
    need(scales.shape[1] % 64 == 0 and scales.shape[2] % 4 == 0, f"{list(scales.shape)}: rows % 64 or K % 128")
    return fold_scales(scales)


def block_scale_interleave(unswizzled_sf: Tensor, *, out: Tensor | None = None) -> Tensor:
    """uint8 or bfloat16 [M, K] or [E, M, K] -> flat tiles of 128 x 4."""
    need(out is None and unswizzled_sf.dim() in (2, 3), "out, or a wrong number of dimensions")
    shape = (None,) * unswizzled_sf.dim()
    tensor("unswizzled_sf", unswizzled_sf, (_U8, _BF16), shape)
    return swizzle(unswizzled_sf if unswizzled_sf.dim() == 3 else unswizzled_sf.unsqueeze(0))


def cutlass_fused_moe_workspace_size(
    max_num_tokens: int, hidden_size: int, intermediate_size: int, num_experts_total: int, top_k: int, *,
    x_dtype: torch.dtype, weight_dtype: torch.dtype, output_dtype: torch.dtype = torch.bfloat16,
    activation_type: ActivationType = ActivationType.Swiglu, tp_size: int = 1, tp_rank: int = 0, ep_size: int = 1,
    ep_rank: int = 0, min_latency_mode: bool = False, use_deepseek_fp8_block_scale: bool = False,
    use_w4_group_scaling: bool = False, use_mxfp8_act_scaling: bool = False, use_fused_finalize: bool = True,
    use_packed_weights: bool = False, use_wfp4afp8_humming: bool = False, device: torch.device | None = None,
    backend: str = "cutlass",
) -> int:  # fmt: skip
    """Bytes; it makes the runner, so the module must have its kernels."""
    scheme = _scheme(x_dtype, weight_dtype, use_deepseek_fp8_block_scale, use_w4_group_scaling)
    if scheme in ABSENT:
        raise RuntimeError(f"this kernel is not in this build: {scheme}")
    need(max_num_tokens > 0 and num_experts_total % ep_size == 0 and 0 <= ep_rank < ep_size, "sizes or ranks")
    return _workspace(max_num_tokens, hidden_size, intermediate_size, top_k)


def _workspace(tokens: int, hidden: int, inner: int, top_k: int) -> int:
    return tokens * top_k * (hidden + 3 * inner) * 2 + 4096


def _scheme(x: torch.dtype, weight: torch.dtype, block: bool, group: bool) -> str:
    found = {
        (_BF16, _BF16, False, False): "bf16",
        (_F16, _F16, False, False): "bf16",
        (_FP8, _FP8, False, False): "fp8_tensor",
        (_BF16, _FP8, True, False): "fp8_block128",
        (_BF16, _U8, False, True): "mxfp4_w4a16",
        (_BF16, torch.int64, False, False): "nvfp4",
        (_F16, torch.int64, False, False): "nvfp4",
    }.get((x, weight, block, group))
    need(found is not None, f"no kernels for {x} tokens, {weight} weights, block {block}, group {group}")
    return str(found)


def cutlass_fused_moe(
    input: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor, fc1_expert_weights: Tensor,
    fc2_expert_weights: Tensor, output_dtype: torch.dtype, quant_scales: list[Tensor],
    fc1_expert_biases: Tensor | None = None, fc2_expert_biases: Tensor | None = None, input_sf: Tensor | None = None,
    swiglu_alpha: Tensor | None = None, swiglu_beta: Tensor | None = None, swiglu_limit: Tensor | None = None,
    tp_size: int = 1, tp_rank: int = 0, ep_size: int = 1, ep_rank: int = 0, cluster_size: int = 1,
    cluster_rank: int = 0, output: Tensor | None = None, enable_alltoall: bool = False,
    use_deepseek_fp8_block_scale: bool = False, use_w4_group_scaling: bool = False,
    use_mxfp8_act_scaling: bool = False, min_latency_mode: bool = False, use_packed_weights: bool = False,
    use_wfp4afp8_humming: bool = False, tune_max_num_tokens: int = 8192, enable_pdl: bool | None = None,
    activation_type: ActivationType = ActivationType.Swiglu, swizzled_input_sf: bool = True,
    use_fused_finalize: bool = True, profile_ids: list[int] | None = None, workspace_buffer: Tensor | None = None, *,
    clamped_relu2_limit: Tensor | None = None, situ_beta: Tensor | None = None,
    situ_linear_beta: Tensor | None = None, backend: str = "cutlass",
) -> list[Tensor]:  # fmt: skip
    """The whole layer, into `output`."""
    CALLS.append(dict(locals()))
    unused = (input_sf, clamped_relu2_limit, situ_beta, situ_linear_beta)
    flags = (enable_alltoall, use_mxfp8_act_scaling, min_latency_mode, use_packed_weights, use_wfp4afp8_humming)
    need(all(x is None for x in unused) and not any(flags), "an argument that the double does not know")
    need(tp_size == 1 and cluster_size == 1 and backend == "cutlass", "tp, clusters or another backend")
    scheme = _scheme(input.dtype, fc1_expert_weights.dtype, use_deepseek_fp8_block_scale, use_w4_group_scaling)
    need(activation_type in (ActivationType.Swiglu, ActivationType.Relu2), f"activation {activation_type}")
    gated = activation_type is ActivationType.Swiglu
    tokens, top_k = token_selected_experts.shape
    need(tokens > 0, "a launch without tokens")
    experts, hidden, packed = fc2_expert_weights.shape
    inner = packed * {"mxfp4_w4a16": 2, "nvfp4": 16}.get(scheme, 1)
    tensor("input", input, input.dtype, (tokens, hidden))
    tensor("token_selected_experts", token_selected_experts, _I32, (tokens, top_k))
    tensor("token_final_scales", token_final_scales, _F32, (tokens, top_k))
    need(bool((token_selected_experts < experts * ep_size).all()), "an id outside of the experts")
    need(refuse_duplicates(token_selected_experts), "an expert twice in a row: its rows would be undefined")
    rows, k = inner * (2 if gated else 1), fc1_expert_weights.shape[2] * inner // packed
    tensor(
        "fc1_expert_weights", fc1_expert_weights, fc1_expert_weights.dtype, (experts, rows, hidden * packed // inner)
    )
    tensor("fc2_expert_weights", fc2_expert_weights, fc1_expert_weights.dtype, (experts, hidden, packed))
    aligned = {"bf16": 8, "fp8_tensor": 16, "fp8_block128": 128, "mxfp4_w4a16": 128, "nvfp4": 64}[scheme]
    need(hidden % aligned == 0 == inner % aligned and k == hidden, f"{scheme} with sizes {hidden} and {inner}")
    need((fc1_expert_biases is None) == (fc2_expert_biases is None), "one bias without the other")
    if fc1_expert_biases is not None:
        tensor("fc1_expert_biases", fc1_expert_biases, output_dtype, (experts, rows))
        tensor("fc2_expert_biases", fc2_expert_biases, output_dtype, (experts, hidden))
    for name, value in (("alpha", swiglu_alpha), ("beta", swiglu_beta), ("limit", swiglu_limit)):
        if value is not None:
            tensor(f"swiglu_{name}", value, _F32, (experts,))
            need(gated, f"swiglu_{name} without a gate")
    need(output is not None and workspace_buffer is not None, "an output or workspace of its own in each call")
    assert output is not None
    assert workspace_buffer is not None
    tensor("output", output, output_dtype, (tokens, hidden))
    tensor("workspace_buffer", workspace_buffer, _U8, (None,))
    room = workspace_buffer.numel()
    need(room >= _workspace(tokens, hidden, inner, top_k), f"a workspace of {room} bytes for {tokens} tokens")
    _check_kernels(profile_ids)
    result = _Schemes(input, quant_scales, experts, hidden, inner, gated, output_dtype).run(
        scheme, fc1_expert_weights, fc2_expert_weights, token_selected_experts, token_final_scales, ep_rank * experts,
        dict(alpha=swiglu_alpha, beta=swiglu_beta, limit=swiglu_limit, b13=fc1_expert_biases, b2=fc2_expert_biases),
    )  # fmt: skip
    output.copy_(result)
    return [output, output, output, output]


def _check_kernels(profile_ids: list[int] | None) -> None:
    if profile_ids is None:
        return
    need(len(profile_ids) == 2, "two profile ids")
    first, second = profile_ids
    if not (first == -1 or 0 <= first < KERNELS[0]):
        raise RuntimeError(f"Invalid gemm1 profile id: {first}")
    if not (second == -1 or KERNELS[0] <= second < sum(KERNELS)):
        raise RuntimeError(f"Invalid gemm2 profile id: {second}")


class _Schemes:
    """Decoding and arithmetic by scheme."""

    def __init__(
        self, x: Tensor, scales: list[Tensor], experts: int, hidden: int, inner: int, gated: bool, dtype: torch.dtype
    ) -> None:
        self.x, self.scales, self.dtype = x, scales, dtype
        self.experts, self.hidden, self.inner = experts, hidden, inner
        self.rows, self.gated = inner * (2 if gated else 1), gated

    def run(
        self, scheme: str, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]
    ) -> Tensor:
        return getattr(self, f"_{scheme}")(w13, w2, ids, weights, first, more)

    def _need_scales(self, count: int) -> None:
        need(isinstance(self.scales, list) and len(self.scales) == count, f"{len(self.scales)} scales, not {count}")

    def _layer(self, x: Tensor, w13: Tensor, w2: Tensor, more: dict[str, Any], **kwargs: Any) -> Tensor:
        experts = Experts(w13.float(), w2.float(), self.gated, **more)
        return layer(x.float(), e=experts, **kwargs)

    def _bf16(self, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]) -> Tensor:
        self._need_scales(0)
        rounded = {"middle": lambda rows, _: rows.to(self.dtype).float()}
        return self._layer(self.x, w13, w2, more, ids=ids, weights=weights, first=first, **rounded)

    def _fp8_tensor(
        self, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]
    ) -> Tensor:
        self._need_scales(4)
        fc1, quant, fc2, given = self.scales
        for name, value, shape in (
            ("fc1_dequant", fc1, (self.experts,)),
            ("fc2_quant", quant, (self.experts,)),
            ("fc2_dequant", fc2, (self.experts,)),
            ("fc1_input_dequant", given, ()),
        ):
            tensor(name, value, _F32, shape)
        need(more["b13"] is None, "biases with fp8")
        return self._layer(
            self.x, w13, w2, more, ids=ids, weights=weights, first=first,
            gemm1=lambda rows, e: rows * fc1[e],
            middle=lambda rows, e: round_e4m3(rows * quant[e]),
            gemm2=lambda rows, e: rows * fc2[e],
        )  # fmt: skip

    def _fp8_block128(
        self, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]
    ) -> Tensor:
        self._need_scales(2)
        decoded = []
        for name, codes, scale in (("w1", w13, self.scales[0]), ("w2", w2, self.scales[1])):
            rows, columns = codes.shape[1] // 128, codes.shape[2] // 128
            tensor(f"{name}_scale", scale, _F32, (self.experts, rows, columns))
            decoded.append(codes.float() * spread(scale, 128).repeat_interleave(128, dim=1))
        middle = lambda rows, _: through_groups(rows.to(_BF16))  # noqa: E731
        x = through_groups(self.x)
        return self._layer(x, *decoded, more, ids=ids, weights=weights, first=first, middle=middle)

    def _mxfp4_w4a16(
        self, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]
    ) -> Tensor:
        self._need_scales(2)
        decoded = []
        for name, codes, scale in (("w1", w13, self.scales[0]), ("w2", w2, self.scales[1])):
            rows, columns = codes.shape[1], codes.shape[2] * 2
            tensor(f"{name}_scale", scale, _I32, (self.experts, rows // 64, columns // 128, 16, 4))
            plain = fold_scales(scale.view(_U8), back=(rows, columns // 32))
            decoded.append(e2m1(interleave_e2m1(codes, back=True)) * spread(e8m0(plain), 32))
        rounded = {"middle": lambda rows, _: rows.to(_BF16).float()}
        return self._layer(self.x, *decoded, more, ids=ids, weights=weights, first=first, **rounded)

    def _nvfp4(self, w13: Tensor, w2: Tensor, ids: Tensor, weights: Tensor, first: int, more: dict[str, Any]) -> Tensor:
        self._need_scales(6)
        act1, block1, out1, act2, block2, out2 = self.scales
        for value in (act1, out1, act2, out2):
            tensor("a global scale", value, _F32, (self.experts,))
        decoded = []
        for codes, block in ((w13, block1), (w2, block2)):
            bytes_ = codes.view(_U8)
            rows, columns = bytes_.shape[1], bytes_.shape[2] * 2 // 16
            tensor("block scales", block, _I32, (self.experts, -(-rows // 128) * 128, -(-columns // 4)))
            plain = unswizzle(block.view(_U8).flatten(), self.experts, rows, columns).view(_FP8).float()
            decoded.append(e2m1(bytes_) * spread(plain, 16))
        need(more["b13"] is None, "biases with nvfp4")
        return self._layer(
            self.x, *decoded, more, ids=ids, weights=weights, first=first,
            enter=lambda rows, e: through_nvfp4(rows, float(act1[e])) * act1[e],
            gemm1=lambda rows, e: rows * out1[e],
            middle=lambda rows, e: through_nvfp4(rows, float(act2[e])) * act2[e],
            gemm2=lambda rows, e: rows * out2[e],
        )  # fmt: skip
