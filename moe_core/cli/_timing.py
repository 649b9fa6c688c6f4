"""Interleaved timing of bound plans on one layer. Imports torch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch  # noqa: TID253 - this module is imported when something is measured
from torch import Tensor  # noqa: TID253

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError
from moe_core.hardware import GIB
from moe_core.quant import QuantScheme, builtin_scheme
from moe_core.testing.layers import input_scales_of
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights, torch_dtype

if TYPE_CHECKING:
    from moe_core.moe_plan import MoePlan

#: Different tokens and routings of one size, so that no call finds the rows of the last one in a cache.
VARIANTS: Final = 4
#: Different experts; more are copies, with addresses of their own. Time does not depend on values.
UNIQUE_EXPERTS: Final = 4
ROUNDS: Final = 7
#: One timed batch of calls, and all that one size may take.
BATCH_SECONDS, SIZE_SECONDS = 0.02, 8.0
#: A call that takes longer is timed once.
SLOW_SECONDS: Final = 2.0


@dataclass(slots=True)
class Timed:
    """Milliseconds of one call by number of tokens: the median, and the fastest and slowest batch."""

    median: dict[int, float] = field(default_factory=dict)
    spread: dict[int, tuple[float, float]] = field(default_factory=dict)


def layer_bytes(config: MoeConfig, parallel: ParallelConfig, scheme: QuantScheme) -> int:
    """Bytes of one rank's weights, as they are stored."""
    inner = config.intermediate_size // parallel.tp_size
    experts = len(parallel.local_experts(config.num_experts))
    matrices = ((config.gate_up_factor * inner, config.hidden_size), (config.hidden_size, inner))
    total = sum(scheme.weight_bytes(n, k, config.group_size) for n, k in matrices)
    if scheme.scale is None:
        total = total * torch_dtype(config.dtype).itemsize // 2
    return total * experts


def free_bytes(device: torch.device) -> int | None:
    """Memory that can still be taken, or None where nobody knows."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    limits = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        limits += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    except (OSError, ValueError, IndexError):
        pass  # not Linux
    group = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((group / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        limits.append(limit - used)
    except (OSError, ValueError):
        pass  # no limit ("max"), or no control groups
    return min(limits) if limits else None


def require_memory(
    config: MoeConfig, parallel: ParallelConfig, scheme: QuantScheme, copies: int, device: torch.device
) -> int:
    """Bytes of the stored weights. Raises ConfigError where they, and each candidate's own copy, cannot fit."""
    stored = layer_bytes(config, parallel, scheme)
    needed, free = stored * (1 + copies), free_bytes(device)
    if free is not None and needed > free:
        raise ConfigError(
            f"this layer does not fit: {needed:,} bytes ({needed / GIB:.1f} GiB) are needed, {free:,} bytes "
            f"({free / GIB:.1f} GiB) are free on {device}; the weights take {stored:,} bytes, and each of "
            f"{copies} candidates may keep a copy in its own layout",
            hint="time a rank's share (--ep 8), fewer candidates (--runner NAME), or a smaller model",
        )
    return stored


def random_weights(config: MoeConfig, parallel: ParallelConfig, device: torch.device) -> CanonicalWeights:
    """One rank's weights with random values. Only `UNIQUE_EXPERTS` of them are quantized: the codec is slow."""
    random = torch.Generator().manual_seed(0)
    inner = config.intermediate_size // parallel.tp_size
    experts = len(parallel.local_experts(config.num_experts))
    unique = min(UNIQUE_EXPERTS, experts)
    rows = config.gate_up_factor * inner
    w13 = torch.randn(unique, rows, config.hidden_size, generator=random) * config.hidden_size**-0.5
    w2 = torch.randn(unique, config.hidden_size, inner, generator=random) * inner**-0.5
    few = CanonicalWeights.quantize(w13, w2, config)
    if config.bias:
        dtype = torch_dtype(config.dtype)
        few.w13_bias = torch.randn(unique, rows, generator=random).to(dtype)
        few.w2_bias = torch.randn(unique, config.hidden_size, generator=random).to(dtype)
    scheme = builtin_scheme(config.scheme)
    if scheme.static_activation:  # checkpoints of these schemes have them, and some runners need them
        for name, scale in input_scales_of(unique, scheme).items():
            setattr(few, name, scale)
    which = torch.arange(experts) % unique
    return CanonicalWeights(**{name: tensor[which].to(device) for name, tensor in few.tensors().items()})


def random_inputs(config: MoeConfig, tokens: int, device: torch.device, seed: int = 0) -> tuple[Tensor, TopKOutput]:
    """Tokens and a uniformly random routing."""
    random = torch.Generator().manual_seed(1000 * tokens + seed)
    hidden = torch.randn(tokens, config.hidden_size, generator=random).to(torch_dtype(config.dtype))
    scores = torch.rand(tokens, config.num_experts, generator=random)
    weights, ids = scores.topk(config.top_k, dim=-1)
    weights = weights / weights.sum(dim=-1, keepdim=True)
    return hidden.to(device), TopKOutput(ids.to(torch.int32).to(device), weights.to(device))


def measure(
    plans: dict[str, MoePlan], config: MoeConfig, sizes: Sequence[int], device: torch.device
) -> dict[str, Timed]:
    """Time every plan at every size. All take turns in each round, so that a slow minute hits all of them."""
    result = {name: Timed() for name in plans}
    with torch.no_grad():
        for tokens in sizes:
            inputs = [random_inputs(config, tokens, device, seed) for seed in range(VARIANTS)]
            warm = {name: _batch(plan, inputs, 1, device) for name, plan in plans.items()}
            # What needs seconds needs no second look; it would only take the time of the others.
            times = {name: [1e3 * seconds] for name, seconds in warm.items() if seconds > SLOW_SECONDS}
            names = [name for name in plans if name not in times]
            times |= _rounds({name: plans[name] for name in names}, inputs, device)
            for name, values in times.items():
                result[name].median[tokens] = statistics.median(values)
                result[name].spread[tokens] = (min(values), max(values))
    return result


def _rounds(
    plans: dict[str, MoePlan], inputs: list[tuple[Tensor, TopKOutput]], device: torch.device
) -> dict[str, list[float]]:
    """Milliseconds of a call in each round. Who comes first changes, so that nobody always follows the same one."""
    once = {name: _batch(plan, inputs, 1, device) for name, plan in plans.items()}
    counts = {name: max(1, min(200, int(BATCH_SECONDS / max(s, 1e-6)))) for name, s in once.items()}
    a_round = sum(once[name] * counts[name] for name in plans)
    rounds = max(2, min(ROUNDS, int(SIZE_SECONDS / max(a_round, 1e-6))))
    times: dict[str, list[float]] = {name: [] for name in plans}
    order = list(plans)
    for _ in range(rounds):
        order = order[1:] + order[:1]
        for name in order:
            times[name].append(1e3 * _batch(plans[name], inputs, counts[name], device))
    return times


def _batch(
    plan: Callable[..., Tensor], inputs: list[tuple[Tensor, TopKOutput]], calls: int, device: torch.device
) -> float:
    """Seconds of one call, over `calls` of them."""
    _wait(device)
    start = time.perf_counter()
    for i in range(calls):
        plan(*inputs[i % len(inputs)])
    _wait(device)
    return (time.perf_counter() - start) / calls


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
