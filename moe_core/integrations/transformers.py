"""Run the MoE layers of Hugging Face transformers through moe_core.

    import moe_core.integrations.transformers as bridge

    bridge.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_core")

transformers keeps two registries of experts implementations, for plain and for FP8 experts, and checks names against their
union: a name in only one of them passes the check and fails in the forward. `register` fills both. Weights are
converted at the first forward of a layer and refreshed when they change. Inference only.
"""

from __future__ import annotations

from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_core.api import plan as make_plan
from moe_core.binding import MoePlan
from moe_core.config import MoeConfig
from moe_core.errors import ConfigError, ContractViolation
from moe_core.integrations._gates import read_gate
from moe_core.quant import builtin_scheme
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights, canonical_gate_up

NAME: Final = "moe_core"
_CACHE: Final = "_moe_core_plan"
_E4M3: Final = torch.float8_e4m3fn
_SCHEME_BLOCK: Final = (128, 128)


def register(name: str = NAME, **plan_options: Any) -> None:
    """Make `experts_implementation=name` known to transformers (5.0 or newer), for plain and FP8 experts.

    plan_options: keywords of `moe_core.plan` for every layer (runner="reference", options={...}, settings=...). By
    default the CPU runner packs a second copy of the experts' weights: options={"cpu": {"pack_weights": False}}
    uses the model's own instead. Registering a name again replaces its options.
    """
    try:
        from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
        from transformers.integrations.moe import ExpertsInterface
    except ImportError as error:
        import importlib.metadata

        found = importlib.metadata.version("transformers")
        raise ConfigError(
            f"transformers {found} has no experts interface for plain and FP8 experts: {error}",
            hint="install transformers>=5",
        ) from error

    def forward(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return experts_forward(module, hidden_states, top_k_index, top_k_weights, plan_options)

    ExpertsInterface.register(name, forward)
    FP8ExpertsInterface.register(name, forward)


def experts_forward(
    module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor, plan_options: dict[str, Any]
) -> Tensor:
    """The experts interface of transformers: [T, H], ids [T, K], weights [T, K] -> weighted and summed [T, H].

    Ids below 0 and at or above the module's number of experts are dropped slots: expert-parallel transformers marks
    other ranks' experts with the latter, padding with the former.
    """
    if torch.is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
        raise ContractViolation(
            "a forward with gradients was asked of experts_implementation='moe_core', which runs inference only",
            hint="call the model in torch.no_grad() or inference_mode(), or train with experts_implementation='grouped_mm'",
        )
    # Without gradients being recorded, a parameter-born tensor may still say that it wants them.
    hidden_states, top_k_weights = hidden_states.detach(), top_k_weights.detach()
    plan = _plan_of(module, hidden_states, top_k_index.shape[-1], plan_options)
    experts: int = module.num_experts  # type: ignore[assignment]
    ids = torch.where((top_k_index >= 0) & (top_k_index < experts), top_k_index, -1)
    return plan(hidden_states, TopKOutput(ids, top_k_weights))


def plans(model: nn.Module) -> dict[str, MoePlan]:
    """Module name -> plan of every layer of `model` that has run through moe_core."""
    found = {}
    for name, module in model.named_modules():
        cached = module.__dict__.get(_CACHE)
        if cached is not None:
            found[name] = cached[1]
    return found


def release(model: nn.Module) -> None:
    """Drop all plans of `model` and the weights that they hold; the next forward makes new ones."""
    for module in model.modules():
        module.__dict__.pop(_CACHE, None)


def _plan_of(module: nn.Module, hidden_states: Tensor, top_k: int, options: dict[str, Any]) -> MoePlan:
    cached = module.__dict__.get(_CACHE)
    if torch.compiler.is_compiling():
        if cached is None:
            raise ContractViolation(
                "a layer was compiled before it had a plan",
                hint="run the model once before torch.compile, so that its weights are converted outside the graph",
            )
        return cached[1]  # type: ignore[no-any-return]
    sources = _sources(module)
    problem = (top_k, hidden_states.dtype, id(options), tuple((t.shape, t.dtype, t.device) for t in sources.values()))
    values = tuple((t.data_ptr(), -1 if t.is_inference() else t._version) for t in sources.values())
    if cached is not None and cached[0] == (problem, values):
        return cached[1]  # type: ignore[no-any-return]
    with torch.no_grad():
        if cached is not None and cached[0][0] == problem:
            plan: MoePlan = cached[1]
            plan.update_weights(_canonical(module, sources))
        else:
            weights = _canonical(module, sources)
            config = _config(module, weights, top_k, hidden_states.dtype)
            plan = make_plan(config, weights, **options)
    module.__dict__[_CACHE] = ((problem, values), plan)
    return plan


def _sources(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a plan is made from, by their role in CanonicalWeights."""
    if getattr(module, "has_post_expert_norm", False):
        raise ConfigError(
            f"{type(module).__name__} normalizes the experts' outputs (post_expert_norm), which no moe_core layer expresses",
            hint="use another experts_implementation for this model",
        )
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = {
        "w13": first,
        "w2": "down_proj",
        "w13_bias": f"{first}_bias" if getattr(module, "has_bias", False) else None,
        "w2_bias": "down_proj_bias" if getattr(module, "has_bias", False) else None,
        "w13_scale": f"{first}_scale_inv",
        "w2_scale": "down_proj_scale_inv",
        "w13_input_scale": f"{first}_activation_scale",
        "w2_input_scale": "down_proj_activation_scale",
    }
    found = {role: getattr(module, name, None) for role, name in names.items() if name is not None}
    return {role: tensor.data for role, tensor in found.items() if isinstance(tensor, Tensor)}


def _canonical(module: nn.Module, sources: dict[str, Tensor]) -> CanonicalWeights:
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


def _config(module: nn.Module, weights: CanonicalWeights, top_k: int, dtype: torch.dtype) -> MoeConfig:
    scheme = _scheme(module, weights)
    packing = builtin_scheme(scheme).values_per_item
    return MoeConfig(
        num_experts=weights.w13.shape[0],
        top_k=top_k,
        hidden_size=weights.w2.shape[1],
        intermediate_size=weights.w2.shape[2] * packing,
        dtype=str(dtype).removeprefix("torch."),
        scheme=scheme,
        activation=read_gate(module),
        bias=weights.w13_bias is not None,
    )


def _scheme(module: nn.Module, weights: CanonicalWeights) -> str:
    dtype = weights.w13.dtype
    if dtype in (torch.bfloat16, torch.float16, torch.float32):
        return "bf16"
    block = getattr(module, "block_size", None)
    if dtype is _E4M3 and weights.w13_scale is not None:
        if block is None:
            return "fp8_tensor"
        if tuple(block) == _SCHEME_BLOCK:
            return "fp8_block128"
    raise ConfigError(
        f"{type(module).__name__} stores its experts as {dtype} with blocks {block}, which no quant scheme of moe_core describes",
        hint="plain experts, and FP8 experts with one scale a tensor or a 128x128 block, are supported",
    )
