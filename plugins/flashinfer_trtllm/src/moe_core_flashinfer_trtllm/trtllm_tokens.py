"""Tokens as the kernels take them: quantized here where a dispatcher has not done it, padded where sizes are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.protocols import Binding
from moe_core_flashinfer_trtllm.library import bind_call
from moe_core_flashinfer_trtllm.rules import trtllm_sizes
from moe_core_flashinfer_trtllm.trtllm_weights import TrtllmWeights

E4M3_MAX, GROUP = 448.0, 128
Tokens = dict[str, Tensor | None]
Reader = Callable[[Tensor, Tensor | None, TrtllmWeights], Tokens]


def tokens_reader(binding: Binding) -> Reader:
    """(hidden [T, H] or a payload's data, its scale or None, weights) -> `hidden_states` and, if asked, their scale."""
    scheme = binding.scheme.id
    payload = "bf16" if binding.terms is None else binding.terms.payload
    if payload == "fp8_group128":
        return lambda hidden, scale, q: _scaled(hidden, _given(scale).t())
    if payload == "mxfp8":
        return lambda hidden, scale, q: _scaled(hidden, _given(scale).view(torch.uint8))
    if scheme == "fp8_block128":
        return lambda hidden, scale, q: _scaled(*group_quantize(hidden))
    if scheme == "mxfp8":
        return _mxfp8()
    if scheme == "nvfp4":
        return _nvfp4()
    if scheme == "fp8_tensor":
        return lambda hidden, scale, q: {"hidden_states": tensor_quantize(hidden, q)}
    padding = trtllm_sizes(binding.request).hidden_size - binding.config.hidden_size
    if scheme == "mxfp4_w4a16":
        return lambda hidden, scale, q: {"hidden_states": _padded(hidden, padding), "hidden_states_scale": None}
    return lambda hidden, scale, q: {"hidden_states": hidden.contiguous()}


def group_quantize(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """[T, H] -> float8 [T, H] and the scales of 128 values each, float32 [H / 128, T]: amax / 448, at least 2^-100."""
    groups = hidden.float().view(hidden.shape[0], hidden.shape[1] // GROUP, GROUP)
    scale = groups.abs().amax(dim=2).div_(E4M3_MAX)
    scale = torch.where(scale == 0, 1.0, scale).clamp_(min=2.0**-100)
    codes = (groups / scale.unsqueeze(2)).clamp_(-E4M3_MAX, E4M3_MAX)
    return codes.flatten(1).to(torch.float8_e4m3fn), scale.t()


def tensor_quantize(hidden: Tensor, q: TrtllmWeights) -> Tensor:
    """[T, H] -> float8 [T, H] by the weights' static input scale."""
    if q.input_scale is None:
        raise ContractViolation("these weights have no input scale to quantize tokens by")
    codes = hidden.contiguous().float().div_(q.input_scale)
    return codes.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _mxfp8() -> Reader:
    quantize = bind_call("mxfp8_quantize", {"is_sf_swizzled_layout": False}, ("input",), "flashinfer")

    def read(hidden: Tensor, scale: Tensor | None, q: TrtllmWeights) -> Tokens:
        if hidden.shape[0] == 0:
            return _scaled(hidden, hidden)
        codes, bytes_ = quantize(input=hidden.contiguous())
        return _scaled(codes, bytes_.view(torch.uint8).reshape(hidden.shape[0], -1))

    return read


def _nvfp4() -> Reader:
    fixed = {"sf_vec_size": 16, "sf_use_ue8m0": False, "is_sf_swizzled_layout": False}
    quantize = bind_call("fp4_quantize", fixed, ("input", "global_scale"), "flashinfer")

    def read(hidden: Tensor, scale: Tensor | None, q: TrtllmWeights) -> Tokens:
        if hidden.shape[0] == 0:
            return _scaled(hidden, hidden)
        codes, blocks = quantize(input=hidden.contiguous(), global_scale=q.input_scale)
        return _scaled(codes.view(torch.uint8), blocks.view(torch.float8_e4m3fn).reshape(hidden.shape[0], -1))

    return read


def _scaled(codes: Tensor, scale: Tensor) -> Tokens:
    return {"hidden_states": codes.contiguous(), "hidden_states_scale": scale.contiguous()}


def _given(scale: Tensor | None) -> Tensor:
    if scale is None:
        raise ContractViolation("the tokens travelled quantized, and came without their scales")
    return scale


def _padded(hidden: Tensor, padding: int) -> Tensor:
    return torch.nn.functional.pad(hidden, (0, padding)) if padding else hidden.contiguous()
