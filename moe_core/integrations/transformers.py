"""Run the MoE layers of Hugging Face transformers through moe_core.

    import moe_core.integrations.transformers as bridge

    bridge.register()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_core")

transformers keeps two registries of experts implementations, for plain and for FP8 experts, and checks names against
their union: a name in only one of them passes the check and fails in the forward. `register` fills both.
Inference only.

Weights are converted at the first forward of a layer. Later forwards notice changes: weights that were written in place
(load_state_dict, an optimizer, `parameter.copy_`) are updated in place, so that addresses stay; weights that were
replaced (`parameter.data = ...`, `model.to(...)`) get a new plan. Nothing can notice a write through `parameter.data`
or into an inference tensor, nor, inside a compiled graph, any change at all: call `release(model)` after one of those.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_core.api import plan as make_plan
from moe_core.binding import MoePlan
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import BindError, ConfigError, ContractViolation, LayoutMismatch, WeightError
from moe_core.integrations._gates import read_gate
from moe_core.quant import builtin_scheme
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights, canonical_gate_up

NAME: Final = "moe_core"
_CACHE: Final = "_moe_core_plan"
_E4M3: Final = torch.float8_e4m3fn
_PLAIN: Final = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_SCHEME_BLOCK: Final = (128, 128)


def register(name: str = NAME, **plan_options: Any) -> None:
    """Make `experts_implementation=name` known to transformers (5.0 or newer), for plain and FP8 experts.

    plan_options: keywords of `moe_core.plan` for every layer (runner="reference", options={...}, settings=...). By
    default the CPU runner packs a second copy of the experts' weights: options={"cpu": {"pack_weights": False}}
    uses the model's own instead, unless they are interleaved or transposed, as GPT-OSS's are. Registering a name again
    replaces its options; a layer whose options changed gets a new plan.
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
    if torch.is_grad_enabled() and (
        hidden_states.requires_grad
        or top_k_weights.requires_grad
        or any(parameter.requires_grad for parameter in module.parameters())
    ):
        raise ContractViolation(
            "a forward with gradients was asked of experts_implementation='moe_core', which runs inference only",
            hint="call it in torch.no_grad() or inference_mode(); train with experts_implementation='grouped_mm'",
        )
    # Without gradients being recorded, a parameter-born tensor may still say that it wants them.
    hidden_states, top_k_weights = hidden_states.detach(), top_k_weights.detach()
    cached = _cached(module, hidden_states.dtype, top_k_index.shape[-1], plan_options)
    ids = torch.where((top_k_index >= 0) & (top_k_index < cached.num_experts), top_k_index, -1)
    # Under autocast a norm may hand over float32 where the weights are bfloat16.
    output = cached.plan(hidden_states.to(cached.dtype), TopKOutput(ids, top_k_weights))
    return output.to(hidden_states.dtype)


def plans(model: nn.Module) -> dict[str, MoePlan]:
    """Module name -> plan of every layer of `model` that has run through moe_core."""
    caches = {name: module.__dict__.get(_CACHE) for name, module in model.named_modules()}
    return {name: cached.plan for name, cached in caches.items() if cached is not None}


def release(model: nn.Module) -> None:
    """Drop all plans of `model` and the weights that they hold; the next forward makes new ones."""
    for module in model.modules():
        module.__dict__.pop(_CACHE, None)


@dataclass(frozen=True, slots=True, eq=False)
class _Origin:
    """One tensor that a plan was made from. The storage is known by a weak reference: an address can be used again."""

    storage: weakref.ref[torch.UntypedStorage]
    address: int
    version: int
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Origin:
        version = -1 if tensor.is_inference() else tensor._version
        return cls(weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), version, tensor.shape)

    def is_same_tensor(self, other: _Origin) -> bool:
        """The same memory, whatever was written into it."""
        return self.storage() is other.storage() and self.address == other.address and self.shape == other.shape


class _Cached:
    """The plan of one module, and all that it depends on.

    Part of the module, so it lives as long. A copy of the module has other weights, and a saved one should load
    where moe_core is not installed: copying and pickling leave None behind.
    """

    def __init__(
        self, plan: MoePlan, dtype: torch.dtype, num_experts: int, problem: tuple[Any, ...], origins: dict[str, _Origin]
    ) -> None:
        self.plan, self.dtype, self.num_experts = plan, dtype, num_experts
        self.problem, self.origins = problem, origins

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())


def _cached(module: nn.Module, dtype: torch.dtype, top_k: int, options: dict[str, Any]) -> _Cached:
    cached: _Cached | None = module.__dict__.get(_CACHE)
    if torch.compiler.is_compiling():
        if cached is None:
            # A compiler shows the message of a built-in exception only. Without fullgraph it runs this layer eagerly.
            raise RuntimeError(
                "a moe_core layer was compiled before it had a plan: run the model once before "
                "torch.compile(fullgraph=True), so that its weights are converted outside the graph"
            )
        return cached
    problem = (top_k, dtype, options)
    sources = _sources(module)
    origins = {role: _Origin.of(tensor) for role, tensor in sources.items()}
    if cached is not None and cached.problem == problem and cached.origins.keys() == origins.keys():
        pairs = [(origin, origins[role]) for role, origin in cached.origins.items()]
        if all(old.is_same_tensor(new) for old, new in pairs):
            if all(old.version == new.version for old, new in pairs):
                return cached
            if _update(cached.plan, module, sources):
                # Read again: a runner that keeps views of the weights has just written into them.
                cached.origins = {role: _Origin.of(tensor) for role, tensor in sources.items()}
                return cached
    # The old plan goes first: its weights and the new ones need not be in memory together.
    module.__dict__.pop(_CACHE, None)
    del cached
    # A plan made inside inference_mode() must still be usable, and updatable, outside.
    with torch.inference_mode(False), torch.no_grad():
        weights = _canonical(module, sources)
        # Plain weights say in which dtype the layer computes; quantized ones leave it to the tokens.
        dtype = weights.w13.dtype if _is_plain(weights.w13) else dtype
        config, parallel = _layer(module, weights, top_k, dtype)
        plan = make_plan(config, weights, parallel, **options)
    result = _Cached(plan, dtype, weights.w13.shape[0], problem, origins)
    module.__dict__[_CACHE] = result
    return result


def _update(plan: MoePlan, module: nn.Module, sources: dict[str, Tensor]) -> bool:
    """Bring new values into a plan; False if its runner cannot."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            plan.update_weights(_canonical(module, sources))
    except (LayoutMismatch, WeightError):
        raise
    except BindError:
        return False
    return True


def _sources(module: nn.Module) -> dict[str, Tensor]:
    """The tensors that a plan is made from, by their role in CanonicalWeights."""
    first = "gate_up_proj" if getattr(module, "has_gate", True) else "up_proj"
    names = {"w13": first, "w2": "down_proj"}
    if getattr(module, "has_bias", False):
        names |= {"w13_bias": f"{first}_bias", "w2_bias": "down_proj_bias"}
    weight = getattr(module, first, None)
    if isinstance(weight, Tensor) and not _is_plain(weight):
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


def _is_plain(weight: Tensor) -> bool:
    return weight.dtype in _PLAIN


def _layer(
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
    if _is_plain(weights.w13):
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
