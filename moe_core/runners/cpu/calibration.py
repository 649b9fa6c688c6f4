"""Which layout and which products are fastest for a size of layer on this machine: measured, not assumed.

It depends on the CPU, its libraries and the threads: on a 2-core AMD, packed oneDNN weights win everywhere; on a
16-core Intel, a loop of `grouped_mm` in C++ beats hundreds of calls from Python in the middle, and MKL is good.
So `prepare` times the real phases (products.py) on a few experts of the layer's size, once a process and size.
Two processes may choose differently, and so differ in the last bits; within a plan nothing changes any more.
"""

from __future__ import annotations

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.runners.cpu import weights as cpu_weights
from moe_core.runners.cpu.products import Slots, by_expert, choose_linear, grouped, phased
from moe_core.runners.cpu.table import REGIMES, Products

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

PACKED, ONEDNN, LINEAR, GROUPED = "packed oneDNN", "rows oneDNN", "rows linear", "rows grouped_mm"

_SMALL = 4 * 2**20
_EXPERT_BYTES, _POOL_BYTES = 32 * 2**20, 48 * 2**20
_SECONDS = (0.2, 1.0)
"""A measurement ends after the first, or, while cases lack undisturbed times, after the second."""
_CLEAN = 2
_GAIN, _LOSS = 1.07, 0.85
"""The packed layout costs a second copy of the weights: it must be so much faster in the geometric mean, and not
clearly slower in any regime."""


class Calibration(NamedTuple):
    """pack: whether the packed layout pays. rows, packed: the table of each layout. seconds: product ->
    its times, one a regime; empty if nothing was measured."""

    pack: bool
    rows: Products
    packed: Products
    seconds: dict[str, tuple[float, ...]]


def calibrate(dtype: torch.dtype, gated: bool, hidden: int, inner: int, total_bytes: int) -> Calibration:
    """The choice for layers of this size, on as many threads as torch uses now."""
    threads = torch.get_num_threads()
    # A layer of less is a test's, and its time is not in products: pack, without a measurement, so that tests are
    # fast and the same everywhere.
    if total_bytes < _SMALL:
        return _choose({}, dtype, threads)
    return _measured(dtype, gated, hidden, inner, threads)


@functools.cache
def _measured(dtype: torch.dtype, gated: bool, hidden: int, inner: int, threads: int) -> Calibration:
    with torch.inference_mode():
        return _choose(_measure(dtype, gated, hidden, inner), dtype, threads)


def _choose(seconds: dict[str, tuple[float, ...]], dtype: torch.dtype, threads: int) -> Calibration:
    all_of, none_of = (True,) * len(REGIMES), (False,) * len(REGIMES)
    # An intermediate result is spread over the L2 caches of all cores.
    phased_rows = max(256, 128 * threads)
    packed = Products(all_of, none_of, phased_rows)
    candidates = [name for name in (ONEDNN, LINEAR, GROUPED) if name in seconds]
    if not candidates:
        plain = all_of if cpu_weights.can_use_onednn(dtype) else none_of
        return Calibration(True, Products(plain, none_of, phased_rows), packed, seconds)
    onednn: list[bool] = []
    group: list[bool] = []
    gains: list[float] = []
    for i in range(len(REGIMES)):
        times = {name: seconds[name][i] for name in candidates}
        best = min(times, key=times.__getitem__)
        group.append(best == GROUPED)
        # Where rows cannot be grouped, the better loop runs.
        onednn.append(times.get(ONEDNN, math.inf) <= times.get(LINEAR, math.inf))
        if PACKED in seconds:
            gains.append(times[best] / seconds[PACKED][i])
    pack = bool(gains) and math.prod(gains) ** (1 / len(gains)) >= _GAIN and min(gains) >= _LOSS
    return Calibration(pack, Products(tuple(onednn), tuple(group), phased_rows), packed, seconds)


def _measure(dtype: torch.dtype, gated: bool, hidden: int, inner: int) -> dict[str, tuple[float, ...]]:
    """Product -> its fastest time a regime. All run in turn, so that a busy neighbor slows down each."""
    start = time.perf_counter()
    row_bytes = (3 if gated else 2) * hidden * dtype.itemsize
    inner = min(inner, max(64, _EXPERT_BYTES // row_bytes // 64 * 64))  # products of huge experts rank like this
    experts = max(2, min(8, _POOL_BYTES // (row_bytes * inner)))
    block = torch.randn(2**16, generator=torch.Generator().manual_seed(0)).mul_(hidden**-0.5)
    w13 = _fill(block.to(dtype), experts, inner * (2 if gated else 1), hidden)
    w2 = _fill(block.to(dtype), experts, hidden, inner)
    flush = torch.zeros(2**23).fill_(1.0)  # else the next product finds in cache what the last one has read

    ones, none_of = (True,) * len(REGIMES), (False,) * len(REGIMES)
    activation = Activation(gated=gated)

    def held(layout: str) -> cpu_weights.CpuWeights:
        result = cpu_weights.CpuWeights(
            layout=layout,
            dtype=dtype,
            gated=gated,
            num_experts=experts,
            hidden_size=hidden,
            intermediate_size=inner,
            products=Products(none_of, ones, 0),
        )
        result._hold(w13, w2, None, None)
        return result

    rows = held(cpu_weights.ROWS)
    stacks = rows.stacks
    packed = held(cpu_weights.BLOCKED) if cpu_weights.can_pack(dtype) else None
    cases: dict[tuple[str, int], Callable[[], Tensor]] = {}
    for i, count in enumerate(REGIMES):
        x = _fill(block.to(dtype), count * experts, hidden)
        slots = Slots(list(range(experts)), [count] * experts, torch.arange(count * experts), None)
        # Many rows an expert run expert by expert in the kernel.
        loop = functools.partial(phased if count < REGIMES[-1] else by_expert, x, slots, slots.order, None)
        if packed is not None:
            cases[PACKED, i] = functools.partial(loop, packed, activation, choose_linear(True))
        if cpu_weights.can_use_onednn(dtype):
            cases[ONEDNN, i] = functools.partial(loop, rows, activation, choose_linear(True))
        cases[LINEAR, i] = functools.partial(loop, rows, activation, choose_linear(False))
        if stacks is not None:
            cases[GROUPED, i] = functools.partial(
                grouped, x, slots, slots.order, None, stacks, activation, count * experts
            )
    for call in cases.values():  # warm-up
        call()
    times: dict[tuple[str, int], list[float]] = {case: [] for case in cases}
    while True:
        clean, passed = min(map(len, times.values())), time.perf_counter() - start
        if passed > _SECONDS[1] or (passed > _SECONDS[0] and clean >= _CLEAN):
            break
        for case, call in cases.items():
            flush.sum()
            before, begin = _preemptions(), time.perf_counter()
            call()
            passed = time.perf_counter() - begin
            # OpenMP waits for the thread that another process has pushed aside: such a time says nothing.
            if _preemptions() == before:
                times[case].append(passed)
    if clean < _CLEAN:
        logger.warning("too busy to measure products of %s, %d x %d: packing, unmeasured", dtype, hidden, inner)
        return {}
    names = dict.fromkeys(name for name, _ in cases)
    return {name: tuple(min(times[name, i]) for i in range(len(REGIMES))) for name in names}


def _preemptions() -> int:
    return 0 if resource is None else resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _fill(block: Tensor, *shape: int) -> Tensor:
    """Random numbers at the rate of a copy."""
    wanted = math.prod(shape)
    rows = -(-wanted // block.numel())
    return torch.empty(rows, block.numel(), dtype=block.dtype).copy_(block).view(-1)[:wanted].view(shape)
