"""A tiny real forward of every candidate of this machine, against the reference runner."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moe_core.config import MoeConfig
from moe_core.hardware import HardwareInfo
from moe_core.quant import BUILTIN_SCHEMES
from moe_core.registry import Registry
from moe_core.selection import Candidate, Resolution
from moe_core.settings import ENVIRONMENT

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.topk import TopKOutput
    from moe_core.weights import CanonicalWeights

#: Largest error as a part of the largest value. A smoke test: the conformance kit is the one that judges rounding.
TOLERANCES: Final = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 3e-2}
QUANTIZED_TOLERANCE: Final = 8e-2
TOKENS: Final = 5
#: Multiples of what kernels ask for, and still small.
LAYER: Final = MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256)


@dataclass(frozen=True, slots=True)
class Forward:
    """Outcome of one candidate on one layer. error: the largest difference as a part of the largest value."""

    candidate: str
    layer: str
    ok: bool
    error: float | None
    tolerance: float
    seconds: float
    force: str
    detail: str = ""


def tolerance(config: MoeConfig) -> float:
    """What rounding in this layer's dtype and scheme explains."""
    return TOLERANCES.get(config.dtype, 1e-4) if config.scheme == "bf16" else QUANTIZED_TOLERANCE


def force(candidate: Candidate) -> str:
    """The environment that makes everybody on this machine get this candidate."""
    parts = [f"{ENVIRONMENT['runner']}={candidate.runner}", f"{ENVIRONMENT['dispatcher']}={candidate.dispatcher}"]
    if candidate.kind in ("fused", "split", "whole"):
        parts.append(f"{ENVIRONMENT['path']}={candidate.kind}")
    return " ".join(parts)


def choices(candidate: Candidate) -> dict[str, Any]:
    """The same as keywords of `make_request`; the path of a mixed candidate cannot be forced."""
    path = candidate.kind if candidate.kind in ("fused", "split", "whole") else None
    return {"runner": candidate.runner, "dispatcher": candidate.dispatcher, "path": path, "measurements": None}


def ask(config: MoeConfig, hardware: HardwareInfo, registry: Registry, runner: str | None = None) -> Resolution:
    """All candidates, whatever the environment forces."""
    from moe_core.api import resolve

    return resolve(
        config,
        hardware=hardware,
        registry=registry,
        max_tokens=64,
        runner=runner,
        dispatcher=None,
        path=None,
        measurements=None,
    )


def layers(hardware: HardwareInfo, registry: Registry) -> Iterator[tuple[MoeConfig, list[Candidate]]]:
    """Layers and candidates to try: bfloat16, float32, then one scheme of each runner that those two left out."""
    seen: set[str] = set()
    for dtype in ("bfloat16", "float32"):
        config = LAYER.replace(dtype=dtype)
        candidates = list(ask(config, hardware, registry).candidates)
        seen |= {candidate.runner for candidate in candidates}
        yield config, candidates
    for name, spec in sorted(registry.runners.items()):
        if name in seen:
            continue
        for scheme in sorted(spec.support.schemes & {scheme.id for scheme in BUILTIN_SCHEMES}):
            config = LAYER.replace(scheme=scheme)
            found = list(ask(config, hardware, registry, runner=name).candidates)
            if found:
                yield config, found
                break


def forwards(hardware: HardwareInfo, registry: Registry) -> list[Forward]:
    """Run everything. Never raises for a backend that fails: that is its result."""
    results = []
    for config, candidates in layers(hardware, registry):
        if not candidates:
            continue
        weights, hidden, topk = make_inputs(config, hardware)
        oracle = _reference(config, weights, hidden, topk, hardware, registry)
        for candidate in candidates:
            results.append(_forward(candidate, config, weights, hidden, topk, oracle, hardware, registry))
    return results


def make_inputs(config: MoeConfig, hardware: HardwareInfo) -> tuple[CanonicalWeights, Tensor, TopKOutput]:
    """Random weights and tokens from a fixed seed, with one dropped slot."""
    import torch

    from moe_core.topk import TopKOutput
    from moe_core.weights import CanonicalWeights, torch_dtype

    generator = torch.Generator().manual_seed(0)
    device = torch.device(hardware.torch_device_type)
    experts, hidden_size, inner = config.num_experts, config.hidden_size, config.intermediate_size
    w13 = torch.randn(experts, config.gate_up_factor * inner, hidden_size, generator=generator) * hidden_size**-0.5
    w2 = torch.randn(experts, hidden_size, inner, generator=generator) * inner**-0.5
    hidden = torch.randn(TOKENS, hidden_size, generator=generator).to(torch_dtype(config.dtype))
    scores = torch.rand(TOKENS, experts, generator=generator)
    weights, ids = scores.topk(config.top_k, dim=-1)
    ids = ids.to(torch.int32)
    ids[0, 0] = -1
    topk = TopKOutput(ids.to(device), weights.to(device))
    return CanonicalWeights.quantize(w13, w2, config).to(device), hidden.to(device), topk


def _reference(
    config: MoeConfig,
    weights: CanonicalWeights,
    hidden: Tensor,
    topk: TopKOutput,
    hardware: HardwareInfo,
    registry: Registry,
) -> Tensor:
    from moe_core.api import plan

    oracle = plan(config, weights, hardware=hardware, registry=registry, runner="reference", dispatcher="standard",
                  path=None, measurements=None)  # fmt: skip
    return oracle(hidden, topk).float()


def _forward(
    candidate: Candidate,
    config: MoeConfig,
    weights: CanonicalWeights,
    hidden: Tensor,
    topk: TopKOutput,
    oracle: Tensor,
    hardware: HardwareInfo,
    registry: Registry,
) -> Forward:
    from moe_core.api import plan

    start, allowed = time.perf_counter(), tolerance(config)
    error, detail = None, ""
    try:
        bound = plan(config, weights, hardware=hardware, registry=registry, max_tokens=64, **choices(candidate))
        result = bound(hidden.clone(), topk).float()
        error = relative_error(result, oracle)
        ok = error <= allowed
        if not ok:
            detail = "the result differs from the reference runner's"
    except Exception as problem:  # a backend may raise anything; here that is an answer
        ok, detail = False, f"{type(problem).__name__}: {problem}"
    layer = config.dtype if config.scheme == "bf16" else config.scheme
    return Forward(candidate.id, layer, ok, error, allowed, time.perf_counter() - start, force(candidate), detail)


def relative_error(result: Tensor, oracle: Tensor) -> float:
    """Largest difference as a part of the largest value; infinite where the result is not finite or misshapen."""
    if result.shape != oracle.shape or not bool(result.isfinite().all()):
        return float("inf")
    return float((result - oracle).abs().max() / oracle.abs().max().clamp(min=1e-6))
