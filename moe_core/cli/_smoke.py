"""A tiny real forward of every candidate of this machine, against the layer's formula in float64."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from moe_core.config import MoeConfig
from moe_core.hardware import HardwareInfo
from moe_core.quant import BUILTIN_SCHEMES
from moe_core.registry import Registry
from moe_core.resolution import Candidate, Resolution
from moe_core.settings import ENVIRONMENT

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.testing.layers import Layer

TOKENS: Final = 5
#: Multiples of what kernels ask for, and still small.
LAYER: Final = MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256)


@dataclass(frozen=True, slots=True)
class Forward:
    """Outcome of one candidate on one layer. error: relative RMS, None where nothing came back."""

    candidate: str
    layer: str
    ok: bool
    error: float | None
    tolerance: float
    seconds: float
    force: str
    detail: str = ""


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


def forwards(hardware: HardwareInfo, registry: Registry) -> list[Forward]:
    """Run everything. A backend that fails is a result, and never raises."""
    from moe_core.testing.layers import make_layer
    from moe_core.testing.oracle import dense

    results = []
    for config, candidates in _layers(hardware, registry):
        if candidates:
            on_cpu = make_layer(config, tokens=TOKENS, pattern="dropped")
            expected = dense(config, *on_cpu)
            layer = make_layer(config, tokens=TOKENS, pattern="dropped", device=hardware.torch_device_type)
            results += [_forward(c, config, layer, expected, hardware, registry) for c in candidates]
    return results


def _layers(hardware: HardwareInfo, registry: Registry) -> Iterator[tuple[MoeConfig, list[Candidate]]]:
    """Layers and candidates to try: bfloat16, float32, then one scheme of each runner that those two left out."""
    seen: set[str] = set()
    for dtype in ("bfloat16", "float32"):
        config = LAYER.replace(dtype=dtype)
        candidates = list(_ask(config, hardware, registry).candidates)
        seen |= {candidate.runner for candidate in candidates}
        yield config, candidates
    for name, spec in sorted(registry.runners.items()):
        if name in seen:
            continue
        for scheme in sorted(spec.support.schemes & {scheme.id for scheme in BUILTIN_SCHEMES}):
            config = LAYER.replace(scheme=scheme)
            found = list(_ask(config, hardware, registry, runner=name).candidates)
            if found:
                yield config, found
                break


def _ask(config: MoeConfig, hardware: HardwareInfo, registry: Registry, runner: str | None = None) -> Resolution:
    """All candidates, whatever the environment forces."""
    from moe_core.api import resolve

    return resolve(
        config,
        hardware=hardware,
        registry=registry,
        max_tokens=TOKENS,
        runner=runner,
        dispatcher=None,
        path=None,
        measurements=None,
    )


def _forward(
    candidate: Candidate,
    config: MoeConfig,
    layer: Layer,
    expected: Tensor,
    hardware: HardwareInfo,
    registry: Registry,
) -> Forward:
    from moe_core.api import plan
    from moe_core.testing.tolerances import assert_close, relative_error, tolerance

    start, error, detail = time.perf_counter(), None, ""
    try:
        bound = plan(
            config, layer.weights, hardware=hardware, registry=registry, max_tokens=TOKENS, **choices(candidate)
        )
        result = bound(layer.hidden.clone(), layer.topk).cpu()
        if result.shape == expected.shape:
            error = relative_error(result, expected)
        assert_close(result, expected, config.dtype, config.scheme, arch=hardware.arch)
    except Exception as problem:  # a backend may raise anything; here that is an answer
        wrong = isinstance(problem, AssertionError)
        detail = str(problem) if wrong else f"it raised {type(problem).__name__}: {problem}"
    return Forward(
        candidate.id,
        config.dtype if config.scheme == "bf16" else config.scheme,
        not detail,
        error,
        tolerance(config.dtype, config.scheme, arch=hardware.arch),
        time.perf_counter() - start,
        force(candidate),
        detail,
    )
