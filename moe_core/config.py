"""What a layer is, and how it is spread over ranks: frozen, hashable, torch-free."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, Self

from moe_core.errors import ConfigError, did_you_mean

DTYPES: Final = ("bfloat16", "float16", "float32", "float64")
#: The activation functions that the core's own runners compute; plugins may have others.
ACTIVATIONS: Final = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu2", "identity", "swiglu_oai"})
ROUTING_METHODS: Final = ("softmax", "topk_softmax", "sigmoid", "topk_sigmoid")


@dataclass(frozen=True, slots=True, kw_only=True)
class Activation:
    """The function between the two GEMMs.

    With `gated`, gate and up are the two halves of GEMM1's output, and the result is:

    * `silu`, `gelu`, `gelu_tanh`, `relu`, `relu2` (squared relu): `f(gate) * up`. Where `limit` is set, first
      `gate = min(gate, limit)` and `up = clamp(up, -limit, limit)` (DeepSeek's clamp).
    * `swiglu_oai` (GPT-OSS): the same clamp, then `gate * sigmoid(alpha * gate) * (up + beta)`.
    * `identity`: `gate * up`.

    Without, it is `f(x)` (with `x = min(x, limit)` first). The name is an open string: a runner declares those it has.
    """

    name: str = "silu"
    gated: bool = True
    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        if self.name == "swiglu_oai" and not self.gated:
            raise ConfigError("activation 'swiglu_oai' was asked for with gated=False, but it is a gated function")
        if self.limit is not None and not self.limit > 0:
            raise ConfigError(f"activation limit must be positive or None, got {self.limit!r}")

    @classmethod
    def swiglu_oai(cls, alpha: float = 1.702, beta: float = 1.0, limit: float | None = 7.0) -> Self:
        """The activation of GPT-OSS with its published constants."""
        return cls(name="swiglu_oai", alpha=alpha, beta=beta, limit=limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingConfig:
    """How router logits become a top-k choice (`moe_core.routing` computes it).

    Methods: `softmax` (softmax over all experts, then top-k), `topk_softmax` (top-k of the logits, softmax over
    those), `sigmoid` (sigmoid scores, then top-k), `topk_sigmoid` (top-k of the logits, sigmoid of those).
    `correction_bias` adds a learned bias to the scores for the choice only. With `num_groups` > 1 only experts
    of the best `topk_groups` groups are eligible; a group's score is its `max` or the sum of its best two
    (`top2_sum`). `renormalize` divides the chosen weights by their sum.
    """

    method: str = "softmax"
    renormalize: bool = False
    correction_bias: bool = False
    num_groups: int = 1
    topk_groups: int = 1
    group_score: str = "max"

    def __post_init__(self) -> None:
        if self.method not in ROUTING_METHODS:
            raise ConfigError(
                f"unknown routing method {self.method!r}", hint=did_you_mean(self.method, ROUTING_METHODS)
            )
        if self.group_score not in ("max", "top2_sum"):
            raise ConfigError(
                f"unknown group_score {self.group_score!r}",
                hint=did_you_mean(self.group_score, ("max", "top2_sum")),
            )
        if not 1 <= self.topk_groups <= self.num_groups:
            raise ConfigError(
                f"topk_groups must be between 1 and num_groups ({self.num_groups}), got {self.topk_groups}"
            )
        if self.num_groups > 1 and self.method.startswith("topk_"):
            raise ConfigError(f"routing method {self.method!r} has no groups, got num_groups={self.num_groups}")


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeConfig:
    """One MoE layer of a model. Sizes are the whole model's; `ParallelConfig` divides them.

    `scheme` names a quant scheme (`moe_core.quant`), `group_size` its K group where the scheme has one.
    `routed_scaling_factor` is a step of the layer that the plan gives to exactly one owner: set it to 1.0 where the
    weights handed to the plan already carry it. `router_weight_on_input` multiplies the tokens before GEMM1
    instead of the result (Llama-4). `no_combine` returns [T, K, H], one row a slot, not summed.
    """

    num_experts: int
    top_k: int
    hidden_size: int
    intermediate_size: int
    dtype: str = "bfloat16"
    scheme: str = "bf16"
    group_size: int | None = None
    activation: Activation = field(default_factory=Activation)
    bias: bool = False
    routing: RoutingConfig = field(default_factory=RoutingConfig)
    routed_scaling_factor: float = 1.0
    router_weight_on_input: bool = False
    no_combine: bool = False

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k", "hidden_size", "intermediate_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"MoeConfig.{name} must be a positive integer, got {value!r}")
        if isinstance(self.activation, str) or isinstance(self.routing, str):
            raise ConfigError(
                f"MoeConfig takes activation=Activation(...) and routing=RoutingConfig(...), "
                f"got {self.activation!r} and {self.routing!r}",
                hint="activation=moe_core.Activation(name='silu'), routing=moe_core.RoutingConfig(method='softmax')",
            )
        # A torch.dtype is taken by its name, without importing torch.
        object.__setattr__(self, "dtype", str(self.dtype).removeprefix("torch."))
        factor = float(self.routed_scaling_factor)
        if not math.isfinite(factor):
            raise ConfigError(f"routed_scaling_factor must be finite, got {self.routed_scaling_factor!r}")
        object.__setattr__(self, "routed_scaling_factor", factor)
        if self.top_k > self.num_experts:
            raise ConfigError(f"MoeConfig.top_k is {self.top_k}, but there are only {self.num_experts} experts")
        if self.dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {self.dtype!r}", hint=did_you_mean(self.dtype, DTYPES))
        if self.num_experts % self.routing.num_groups:
            raise ConfigError(
                f"{self.num_experts} experts cannot be divided into {self.routing.num_groups} routing groups"
            )
        if self.no_combine and self.router_weight_on_input and self.routed_scaling_factor != 1.0:
            raise ConfigError("no_combine with router_weight_on_input leaves no step to carry routed_scaling_factor")

    @property
    def gate_up_factor(self) -> int:
        """Rows of w13 a unit of intermediate size: 2 for gated layers, else 1."""
        return 2 if self.activation.gated else 1

    def replace(self, **changes: Any) -> MoeConfig:
        """A copy with `changes`, validated again."""
        return replace(self, **changes)

    @classmethod
    def from_hf(cls, source: str | os.PathLike[str] | Mapping[str, Any] | object, **overrides: Any) -> MoeConfig:
        """Read a Hugging Face model configuration.

        `source`: a checkpoint folder, a config.json, its content as a mapping, or a transformers config object.
        `overrides` replace fields of the result. Raises ConfigError, listing the known model types, for others.
        """
        from moe_core.hf import read_config

        config = read_config(source)
        return config.replace(**overrides) if overrides else config


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How the layer is spread over ranks.

    TP divides `intermediate_size`; EP divides the experts. `placement` says which EP rank owns which expert:
    `linear` (contiguous blocks; the first ranks take the remainder), `round_robin` (expert e on rank e % ep_size), or
    a tuple with the owning rank of every global expert. The local id of an expert is its position among the experts of
    its rank in ascending global id. `tokens` says what a rank brings with EP: `replicated`, all tokens (then results
    are summed), or `sharded`, its own (as with DP attention; then tokens travel). `reduce` says who sums over EP and
    TP ranks: the `dispatcher` (then the plan needs a process group) or the `caller`.
    """

    tp_size: int = 1
    tp_rank: int = 0
    ep_size: int = 1
    ep_rank: int = 0
    placement: str | tuple[int, ...] = "linear"
    tokens: str = "replicated"
    reduce: str = "dispatcher"

    def __post_init__(self) -> None:
        for kind in ("tp", "ep"):
            size, rank = getattr(self, f"{kind}_size"), getattr(self, f"{kind}_rank")
            if not isinstance(size, int) or not isinstance(rank, int):
                raise ConfigError(f"{kind}_size and {kind}_rank must be integers, got {size!r} and {rank!r}")
            if size < 1 or not 0 <= rank < size:
                raise ConfigError(f"{kind}_rank must be in [0, {kind}_size), got rank {rank} of {size}")
        if isinstance(self.placement, str):
            if self.placement not in ("linear", "round_robin"):
                raise ConfigError(
                    f"unknown placement {self.placement!r}",
                    hint=did_you_mean(self.placement, ("linear", "round_robin"))
                    + " (or a tuple: the rank of each expert)",
                )
        else:
            object.__setattr__(self, "placement", tuple(int(r) for r in self.placement))
            bad = sorted({r for r in self.placement if not 0 <= int(r) < self.ep_size})
            if bad:
                raise ConfigError(f"placement names ranks {bad}, but ep_size is {self.ep_size}")
        if self.tokens not in ("replicated", "sharded"):
            raise ConfigError(
                f"tokens must be 'replicated' or 'sharded', got {self.tokens!r}",
                hint=did_you_mean(str(self.tokens), ("replicated", "sharded")),
            )
        if self.reduce not in ("dispatcher", "caller"):
            raise ConfigError(
                f"reduce must be 'dispatcher' or 'caller', got {self.reduce!r}",
                hint=did_you_mean(self.reduce, ("dispatcher", "caller")),
            )

    def owners(self, num_experts: int) -> tuple[int, ...]:
        """The EP rank of every global expert."""
        if isinstance(self.placement, tuple):
            if len(self.placement) != num_experts:
                raise ConfigError(f"placement has {len(self.placement)} entries for {num_experts} experts")
            return self.placement
        if self.placement == "round_robin":
            return tuple(e % self.ep_size for e in range(num_experts))
        base, extra = divmod(num_experts, self.ep_size)
        return tuple(r for r in range(self.ep_size) for _ in range(base + (r < extra)))

    def local_experts(self, num_experts: int, rank: int | None = None) -> tuple[int, ...]:
        """Global ids of the experts of `rank` (default: this rank), in local order."""
        wanted = self.ep_rank if rank is None else rank
        return tuple(e for e, owner in enumerate(self.owners(num_experts)) if owner == wanted)
