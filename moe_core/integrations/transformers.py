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

import inspect
import weakref
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from moe_core import _metadata
from moe_core.api import plan as make_plan
from moe_core.errors import BindError, ConfigError, ContractViolation, LayoutMismatch, WeightError
from moe_core.integrations._modules import is_plain, read_layer, read_sources, read_weights
from moe_core.moe_plan import MoePlan
from moe_core.topk import TopKOutput

NAME: Final = "moe_core"
_CACHE: Final = "_moe_core_plan"


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
        found = _metadata.version("transformers")
        what = f"transformers {found} has no experts interface for plain and FP8 experts"
        raise ConfigError(
            f"{what if found else 'transformers is not installed'}: {error}",
            hint="pip install 'moe-core[transformers]' (transformers 5 or newer)",
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
        return cls(weakref.ref(tensor.untyped_storage()), tensor.data_ptr(), _version(tensor), tensor.shape)

    def is_memory_of(self, tensor: Tensor) -> bool:
        """Whether `tensor` lies where it lay, whatever was written into it."""
        return (
            self.storage() is tensor.untyped_storage()
            and self.address == tensor.data_ptr()
            and self.shape == tensor.shape
        )


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


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
    if cached is not None:
        if torch.compiler.is_compiling():
            return cached
        sources, origins = read_sources(module), cached.origins
        if (
            cached.problem == (top_k, dtype, options)
            and sources.keys() == origins.keys()
            and all(origins[role].is_memory_of(tensor) for role, tensor in sources.items())
            and (
                all(origins[role].version == _version(tensor) for role, tensor in sources.items())
                or _update(cached, module, sources)
            )
        ):
            return cached
    return _make(module, dtype, top_k, options)  # type: ignore[no-any-return]


# What a person reads who compiles a model that has not run yet; torch 2.6 knows no reasons.
_WHY_NOT_TRACED: Final = "run the model once before torch.compile(fullgraph=True): moe_core converts its weights then"
_outside_graphs: Final = (
    torch.compiler.disable(reason=_WHY_NOT_TRACED)  # type: ignore[no-untyped-call]
    if "reason" in inspect.signature(torch.compiler.disable).parameters
    else torch.compiler.disable
)


@_outside_graphs  # type: ignore[untyped-decorator]
def _make(module: nn.Module, dtype: torch.dtype, top_k: int, options: dict[str, Any]) -> _Cached:
    # The old plan goes first: its weights and the new ones need not be in memory together.
    module.__dict__.pop(_CACHE, None)
    sources, problem = read_sources(module), (top_k, dtype, options)
    origins = {role: _Origin.of(tensor) for role, tensor in sources.items()}
    # A plan made inside inference_mode() must still be usable, and updatable, outside.
    with torch.inference_mode(False), torch.no_grad():
        weights = read_weights(module, sources)
        # Plain weights say in which dtype the layer computes; quantized ones leave it to the tokens.
        dtype = weights.w13.dtype if is_plain(weights.w13) else dtype
        config, parallel = read_layer(module, weights, top_k, dtype)
        plan = make_plan(config, weights, parallel, **options)
    result = _Cached(plan, dtype, weights.w13.shape[0], problem, origins)
    module.__dict__[_CACHE] = result
    return result


def _update(cached: _Cached, module: nn.Module, sources: dict[str, Tensor]) -> bool:
    """Bring new values into a plan; False if its runner cannot."""
    try:
        with torch.inference_mode(False), torch.no_grad():
            cached.plan.update_weights(read_weights(module, sources))
    except (LayoutMismatch, WeightError):
        raise
    except BindError:
        return False
    # Read after the update: a runner that keeps views of the weights has just written into them.
    cached.origins = {role: _Origin.of(tensor) for role, tensor in sources.items()}
    return True
