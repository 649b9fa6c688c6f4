"""Small random layers and routings for tests: `make_layer` and `make_routing`."""

from __future__ import annotations

from typing import Final, NamedTuple

import torch
from torch import Tensor

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, did_you_mean
from moe_core.quant import QuantizedTensor, QuantScheme, builtin_scheme, quantize
from moe_core.quant.packing import E2M1_MAX, E4M3_MAX
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights, torch_dtype

PATTERNS: Final = ("uniform", "one_hot", "skewed", "dropped", "duplicate")


class Layer(NamedTuple):
    """One rank's weights, and one call's tokens and routing."""

    weights: CanonicalWeights
    hidden: Tensor
    topk: TopKOutput


def make_layer(
    config: MoeConfig,
    seed: int = 0,
    parallel: ParallelConfig | None = None,
    *,
    tokens: int = 16,
    pattern: str = "uniform",
    scheme: QuantScheme | None = None,
    input_scales: bool = False,
    device: torch.device | str = "cpu",
) -> Layer:
    """Random weights (the rank's share with `parallel`), hidden states and routing for `config`.

    The numbers come from `seed` on the CPU, so every device and every rank sees the same layer. scheme: the description
    of a scheme that is not the core's. input_scales: with static ones, where the scheme may have them.
    """
    described = scheme or builtin_scheme(config.scheme)
    random = torch.Generator().manual_seed(seed)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    rows = config.gate_up_factor * inner
    w13 = torch.randn(experts, rows, hidden, generator=random) / hidden**0.5
    w2 = torch.randn(experts, hidden, inner, generator=random) / inner**0.5
    biases = {}
    if config.bias:
        for name, width in (("w13_bias", rows), ("w2_bias", hidden)):
            biases[name] = (torch.randn(experts, width, generator=random) / 2).to(torch_dtype(config.dtype))
    if input_scales and described.static_activation:
        biases |= input_scales_of(experts, described)
    weights = _quantize(w13, w2, biases, config, described)
    if parallel is not None:
        weights = weights.shard(config, parallel, described)
    x = torch.randn(tokens, hidden, generator=random).to(torch_dtype(config.dtype))
    topk = make_routing(pattern, tokens, experts, config.top_k, seed + 1, device=device)
    return Layer(weights.to(device), x.to(device), topk)


#: Largest values that calibration is taken to have seen in the tokens of GEMM1 and of GEMM2: `make_layer`'s are normal.
_SEEN: Final = {"w13_input_scale": 6.0, "w2_input_scale": 12.0}


def input_scales_of(experts: int, scheme: QuantScheme) -> dict[str, Tensor]:
    """Static input scales as a calibration gives them: float32 [E] each.

    Those of GEMM1 are equal, since kernels may quantize a token once for all its experts; those of GEMM2 are not.
    """
    largest = E4M3_MAX * (E2M1_MAX if scheme.weight_format == "e2m1" else 1)
    spreads = {"w13_input_scale": torch.ones(experts), "w2_input_scale": torch.linspace(0.8, 1.0, experts)}
    return {name: seen * spreads[name] / largest for name, seen in _SEEN.items()}


def _quantize(
    w13: Tensor, w2: Tensor, biases: dict[str, Tensor], config: MoeConfig, scheme: QuantScheme
) -> CanonicalWeights:
    if scheme.scale is None:
        dtype = torch_dtype(config.dtype)
        return CanonicalWeights(w13=w13.to(dtype), w2=w2.to(dtype), **biases)
    tensors = dict(biases)
    for name, matrix in (("w13", w13), ("w2", w2)):
        q: QuantizedTensor = quantize(matrix, scheme, group_size=config.group_size)
        parts = {"": q.data, "_scale": q.scale, "_zero": q.zero, "_global_scale": q.global_scale}
        tensors |= {f"{name}{suffix}": tensor for suffix, tensor in parts.items() if tensor is not None}
    return CanonicalWeights(**tensors)


def make_routing(
    pattern: str,
    tokens: int,
    experts: int,
    top_k: int,
    seed: int = 0,
    *,
    device: torch.device | str = "cpu",
) -> TopKOutput:
    """A router's decision of a known shape.

    `uniform`: distinct experts, all alike. `one_hot`: every slot goes to one expert. `skewed`: distinct experts, the
    first ones far more often. `dropped`: a third of the slots is dropped (-1, with a NaN weight), a quarter of the
    tokens loses all. `duplicate`: a token may choose an expert several times.
    """
    if pattern not in PATTERNS:
        raise ConfigError(f"unknown routing pattern {pattern!r}", hint=did_you_mean(pattern, PATTERNS))
    random = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, experts, generator=random)
    if pattern == "skewed":
        scores = scores * torch.linspace(1.0, 0.1, experts)
    ids = scores.topk(top_k, dim=-1).indices
    if pattern == "one_hot":
        ids = torch.full_like(ids, seed % experts)
    elif pattern == "duplicate":
        ids = torch.randint(experts, (tokens, top_k), generator=random)
        ids[: tokens // 2] = ids[: tokens // 2, :1]
    weights = torch.rand(tokens, top_k, generator=random) + 0.1
    weights = weights / weights.sum(dim=-1, keepdim=True)
    if pattern == "dropped":
        dropped = torch.rand(tokens, top_k, generator=random) < 1 / 3
        dropped[: max(1, tokens // 4)] = True
        ids, weights = ids.masked_fill(dropped, -1), weights.masked_fill(dropped, float("nan"))
    return TopKOutput(ids.to(torch.int32).to(device), weights.to(device))
