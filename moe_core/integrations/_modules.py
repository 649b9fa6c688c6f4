"""What an experts module of transformers says about itself: its weights, and the layer that they make."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError
from moe_core.integrations._gates import read_gate
from moe_core.quant import builtin_scheme
from moe_core.weights import CanonicalWeights, canonical_gate_up

_E4M3: Final = torch.float8_e4m3fn
_PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCHEME_BLOCK: Final = (128, 128)


def read_sources(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a plan is made from, by their role in CanonicalWeights."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = {"w13": first, "w2": "down_proj"}
    if getattr(module, "has_bias", False):
        names |= {"w13_bias": f"{first}_bias", "w2_bias": "down_proj_bias"}
    weight = getattr(module, first, None)
    if isinstance(weight, Tensor) and not is_plain(weight):
        names |= {
            "w13_scale": f"{first}_scale_inv",
            "w2_scale": "down_proj_scale_inv",
            "w13_input_scale": f"{first}_activation_scale",
            "w2_input_scale": "down_proj_activation_scale",
        }
    found = {role: getattr(module, name, None) for role, name in names.items()}
    tensors = {role: tensor.detach() for role, tensor in found.items() if isinstance(tensor, Tensor)}
    missing = [names[role] for role in ("w13", "w2") if role not in tensors]
    if missing:
        raise ConfigError(
            f"{type(module).__name__} has no {' and no '.join(missing)}, where experts classes keep their weights",
            hint="use another experts_implementation for this model",
        )
    return tensors


def read_weights(module: nn.Module, sources: dict[str, Tensor]) -> CanonicalWeights:
    """The canonical weights; tensors that need no conversion are the module's own memory."""
    transposed = bool(getattr(module, "is_transposed", False))
    gated = getattr(module, "has_gate", True)
    interleaved = gated and not getattr(module, "is_concatenated", True)
    result = dict(sources)
    result["w13"] = canonical_gate_up(sources["w13"], interleaved=interleaved, transposed=transposed)
    result["w2"] = canonical_gate_up(sources["w2"], transposed=transposed)
    if "w13_bias" in sources:
        result["w13_bias"] = canonical_gate_up(sources["w13_bias"], interleaved=interleaved)
    for name in ("w13_scale", "w2_scale"):
        if name in sources:
            scale = sources[name].float()
            result[name] = scale.contiguous() if _is_blockwise(module) else scale.flatten(1).contiguous()
    return CanonicalWeights(**result)


def _is_blockwise(module: nn.Module) -> bool:
    return getattr(module, "block_size", None) is not None


def is_plain(weight: Tensor) -> bool:
    """Whether a weight is stored as it is computed with."""
    return weight.dtype in _PLAIN


def read_layer(
    module: nn.Module, weights: CanonicalWeights, top_k: int, dtype: torch.dtype
) -> tuple[MoeConfig, ParallelConfig]:
    """What the module computes on its own experts."""
    if getattr(module, "has_post_expert_norm", False):
        raise ConfigError(
            f"{type(module).__name__} normalizes the experts' outputs (post_expert_norm), "
            "which no moe_core layer expresses",
            hint="use another experts_implementation for this model",
        )
    scheme, experts = _scheme(module, weights), weights.w13.shape[0]
    # Under expert parallelism a token may choose more experts than live here. Their ids arrive as dropped slots, so any
    # number of ranks that makes room for them describes the layer; this is the first one.
    ranks = -(-top_k // experts)
    config = MoeConfig(
        num_experts=experts * ranks,
        top_k=top_k,
        hidden_size=weights.w2.shape[1],
        intermediate_size=weights.w2.shape[2] * builtin_scheme(scheme).values_per_item,
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
        activation=read_gate(module),
        bias=weights.w13_bias is not None,
    )
    return config, ParallelConfig(ep_size=ranks, reduce="caller")


def _scheme(module: nn.Module, weights: CanonicalWeights) -> str:
    if is_plain(weights.w13):
        return "bf16"
    dtype, block = weights.w13.dtype, getattr(module, "block_size", None)
    if dtype is _E4M3 and weights.w13_scale is not None:
        if block is None:
            return "fp8_tensor"
        if tuple(block) == _SCHEME_BLOCK:
            return "fp8_block128"
    raise ConfigError(
        f"{type(module).__name__} stores its experts as {dtype} with blocks {block}, "
        "which no quant scheme of moe_core describes",
        hint="plain experts, and FP8 experts with one scale a tensor or a 128x128 block, are supported",
    )
