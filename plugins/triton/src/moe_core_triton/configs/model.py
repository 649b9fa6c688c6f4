"""The performance model: seconds of a configuration, from sizes, routing and the device.

It ranks; it need not be right. A GEMM's time is that of its scarcest resource (bytes from memory, bytes from the L2
cache, instructions of the programs in waves over the processors), plus what nothing hides. Every number that is not a
size or a property of the device is in `Constants`, and `fit` finds better ones from measurements.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any, Final

from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import Device
from moe_core_triton.configs.routing import active_experts, expected_tiles


@dataclass(frozen=True, slots=True)
class Constants:
    """Seconds, where nothing else is said. Set by hand after measurements on an H200, unless fitted."""

    #: A kernel after another in a graph (1.0 us; 0.6 with programmatic dependent launch).
    launch: float = 0.8e-6
    #: Until memory streams at its full rate, and from there to the end (75 MB took 2.4 us more than their share).
    ramp: float = 2.5e-6
    #: Rate of a long read over `Device.bandwidth` (4.6 of 4.3 TB/s).
    stream: float = 1.065
    #: Rate of the L2 cache over `Device.bandwidth`.
    cache: float = 2.3
    #: One load under traffic; by pointers that many times it.
    latency: float = 0.8e-6
    pointers: float = 1.15
    #: Share of a stream's rate that pointer loads of weights reach.
    pointer_rate: float = 0.99
    #: What a step of K costs beside its instructions, with 4 warps and one program a processor.
    step: float = 40e-9
    #: Prologue and epilogue of a tile.
    tile: float = 0.7e-6
    #: Share of a tile's own time by which the last ones outlast the rest.
    tail: float = 0.6
    #: Tensor-core rate of a large tile over `Device.peak`.
    tensor: float = 0.92
    #: Vector operations/s of one processor.
    vector: float = 2.2e11
    #: Vector operations a product of a level-two accumulator and step.
    promote: float = 2.5
    #: The same with the weights on the rows' side, where the scales of the tokens lie across the accumulator.
    turned: float = 2.5
    #: Unpacking weights for the instruction of four warps over that for the one of a single warp.
    unpack: float = 1.6
    #: Rate of the instruction of a single warp over that of four warps, where a device has both.
    single: float = 0.55
    #: Vector operations a multiply-add of the tiny path.
    tiny: float = 2.0
    #: The tiny path with weights of one byte, which it converts one by one: over what it takes otherwise, and in stages
    #: (49 us where 18 were expected; 23 with tiles, or with one stage).
    tiny_bytes: float = 1.4
    tiny_staged: float = 1.8
    #: The warp-specialized kernels over the plain ones of their tile: with nothing for a second accumulation, and in 16
    #: bits (581 us instead of 658, 4020 instead of 4670), with two and with three consumers.
    specialized: float = 1.05
    half: float = 0.86
    three: float = 1.04
    #: Unpacking a step of 128 of K in 256 rows of weights: the packed ones of them do it beside nothing.
    packed_step: float = 0.6e-6
    #: Sorting by expert (one kernel), and what every further 1000 positions cost.
    sort: float = 3.0e-6
    sort_more: float = 0.25e-6


CONSTANTS: Final = Constants()
#: 32-bit registers and threads of a processor, the most programs on it, and lanes of its vector units.
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 16


def warp_groups(gemm: GemmConfig, device: Device) -> bool:
    """Whether the tensor-core instruction is the one of four warps (wgmma, tcgen05), with 64 rows or more."""
    return device.wide and gemm.num_warps >= 4


def lanes(problem: Problem, part: str) -> int:
    """Matrices that one program of the tiny path multiplies: GEMM2 takes all slots of a token at once."""
    return 1 << (problem.top_k - 1).bit_length() if part == "down" else 1


def accumulators(problem: Problem, part: str, gemm: GemmConfig, block_m: int, device: Device) -> float:
    """Accumulator registers of a thread."""
    threads = gemm.num_warps * (64 if device.amd else 32)
    if block_m == 1:  # the tiny path multiplies whole tiles of stored weights elementwise
        items = gemm.block_k / (2 if problem.traits.swap_only else 1)
        return gemm.block_n * lanes(problem, part) * items / threads
    return block_m * gemm.block_n / threads * (2 if problem.traits.two_level else 1)


def unpacked(problem: Problem, gemm: GemmConfig, device: Device) -> float:
    """Registers of a thread for half a step of packed weights as numbers of two bytes: one operand."""
    threads = gemm.num_warps * (64 if device.amd else 32)
    return gemm.block_n * gemm.block_k / 4 / threads if problem.traits.swap_only else 0.0


def shared_bytes(problem: Problem, gemm: GemmConfig, block_m: int, device: Device) -> float:
    """Shared memory of one program: the operands of all pipeline stages (AMD keeps one of them in registers)."""
    stages = max(1, gemm.num_stages - 1) if device.amd else gemm.num_stages
    if block_m == 1:
        return 0.0
    traits = problem.traits
    return stages * gemm.block_k * (block_m * traits.token_bytes + gemm.block_n * traits.weight_bytes)


def programs(problem: Problem, part: str, gemm: GemmConfig, block_m: int, device: Device) -> int:
    """How many programs fit on a processor at once, by shared memory, registers and threads."""
    threads = gemm.num_warps * (64 if device.amd else 32)
    registers = min(255.0, accumulators(problem, part, gemm, block_m, device) * 1.1 + 48)
    if block_m > 1 and not warp_groups(gemm, device):
        registers = min(255.0, registers + unpacked(problem, gemm, device))
    total = REGISTERS * (2 if device.amd else 1)
    needed = shared_bytes(problem, gemm, block_m, device) + 1024
    fit = min((device.shared_bytes + 1024) // needed, total // (threads * registers), THREADS // threads, PROGRAMS)
    return max(1, int(fit))


def _tensor_share(gemm: GemmConfig, block_m: int, device: Device, single: float) -> float:
    """Rate of the tensor cores with this tile over their own: short sides leave them waiting for operands."""
    rows, columns = (gemm.block_n, block_m) if gemm.swap else (block_m, gemm.block_n)
    if device.wide and not warp_groups(gemm, device):
        return single * min(1.0, (rows * columns / 64**2) ** 0.25)
    least = 64 if device.wide else 16
    # wgmma reads 64 rows and all columns from shared memory in each instruction, at 128 bytes a clock.
    share = min(1.0, 2 * columns / (64 + columns)) * min(1.0, rows / least)
    if not device.wide:
        share *= min(1.0, (rows * columns / 128**2) ** 0.25)
    # More warps than 64-row pieces split the columns, and read the rows twice.
    return share * (0.85 if gemm.num_warps * 16 > rows * max(1, columns // 128) else 1.0)


def gemm_seconds(
    problem: Problem,
    part: str,
    gemm: GemmConfig,
    block_m: int,
    tokens: int,
    device: Device,
    constants: Constants = CONSTANTS,
) -> float:
    """Estimated seconds of one GEMM ("up" or "down") of the layer; block_m = 1 is the tiny path."""
    if gemm.specialized and problem.traits.swap_only:
        return _packed_seconds(problem, part, gemm, block_m, tokens, device, constants)
    if gemm.specialized:
        # As the plain kernel of the same tile whose second accumulation costs nothing: consumers take turns.
        same = replace(gemm, specialized=False, num_warps=8, persistent=True)
        alike = replace(problem, scheme="fp8_tensor") if problem.traits.two_level else problem
        factor = constants.specialized if problem.traits.two_level else constants.half
        factor *= constants.three if block_m == 192 else 1.0
        return factor * gemm_seconds(alike, part, same, block_m, tokens, device, constants)
    c, traits = constants, problem.traits
    n, k = problem.matrix(part)
    positions = tokens * min(problem.top_k, problem.experts)
    active = active_experts(problem.experts, problem.top_k, tokens)
    tiny = block_m == 1
    tiles_m: float = positions if tiny else expected_tiles(problem.experts, problem.top_k, tokens, block_m)
    per_expert = tiles_m / active
    columns = math.ceil(n / gemm.block_n)
    tiles = tiles_m * columns
    steps = math.ceil(k / gemm.block_k)
    together = lanes(problem, part) if tiny else 1
    if tiny and part == "down":  # a program has all slots of a token
        tiles = tokens * columns
    resident = 1 if gemm.persistent else programs(problem, part, gemm, block_m, device)
    slots = device.processors * resident

    # Bytes from memory: weights again for tiles that do not find them in the L2 cache, tokens, results.
    weights = n * k * traits.weight_bytes
    shared = 1.0
    if tiny:
        again = per_expert if active * weights > device.l2_bytes / 2 else 1.0
    else:
        abreast = max(gemm.group_m, slots / columns)
        again = 1.0 if weights <= device.l2_bytes / 2 else max(1.0, per_expert / abreast)
        if gemm.group_m > 1 and per_expert < gemm.group_m:
            shared = 1.0 + 0.01 * math.log2(gemm.group_m)  # groups that are never full cost a little balance
    rows = positions if part == "down" else min(positions, tokens if tokens * k * 2 < device.l2_bytes else positions)
    results = positions * (n / (2 if part == "up" and problem.gated else 1)) * 2
    rate = device.bandwidth * c.stream * (1.0 if gemm.tma else c.pointer_rate)
    memory = active * weights * again / rate + (rows * k * traits.token_bytes + results) / device.bandwidth

    # Bytes from the L2 cache to the processors.
    per_step = together * gemm.block_k * (block_m * traits.token_bytes + gemm.block_n * traits.weight_bytes)
    cache = tiles * steps * per_step / (device.bandwidth * c.cache)

    # Instructions. Programs on one processor share it; one alone waits for its own loads.
    work = block_m * gemm.block_n * gemm.block_k * together
    if tiny:
        instructions, vector = 0.0, work * (c.tiny + traits.dequant) / c.vector
    else:
        speed = device.rate(traits.math) / device.processors * c.tensor * _tensor_share(gemm, block_m, device, c.single)
        instructions = 2 * work / speed
        unpacking = traits.dequant * (c.unpack if traits.swap_only and warp_groups(gemm, device) else 1.0)
        vector = gemm.block_n * gemm.block_k * unpacking / c.vector
        if traits.two_level:
            vector += block_m * gemm.block_n * c.promote * (c.turned if gemm.swap else 1.0) / c.vector
    step = c.step * (0.8 if gemm.tma else 1.0) * (gemm.num_warps / 4) ** 0.5
    ahead = max(1, gemm.num_stages - 1) if not tiny else 1 + (gemm.num_stages > 1)
    wait = c.latency * (1.0 if gemm.tma else c.pointers)
    issue = step + instructions + vector
    # wgmma is asynchronous: with two stages the next load has to wait until it has read its operands.
    pace = issue + wait if warp_groups(gemm, device) and not tiny and gemm.num_stages == 2 else max(issue, wait / ahead)
    alone = wait + steps * pace + c.tile * (0.6 if gemm.persistent else 1.0)
    # Tensor cores and vector units wait for each other in one program, and serve others meanwhile.
    mixed = max(instructions, vector) + min(1.0, 1.05 / resident) * min(instructions, vector)
    busy = steps * (mixed * (1 + 0.05 / ahead) + step / (1 + resident)) + c.tile / 2
    whole, waves = max(resident * busy, alone), tiles / slots
    if waves <= 1:
        compute = max(math.ceil(tiles / device.processors) * busy, alone)
    else:
        compute = whole * (waves + 0.5 * (math.ceil(waves) - waves))
    # A smooth maximum: what is nearly as scarce as the scarcest delays it a little, and decides between equals.
    scarce = max(memory, cache, compute)
    soft = scarce * sum((x / scarce) ** 6 for x in (memory, cache, compute)) ** (1 / 6)
    if tiny and traits.weight_bytes == 1:
        soft *= c.tiny_bytes * (c.tiny_staged if gemm.num_stages > 1 else 1.0)
    extra = 0.0
    if part == "up" and not tiny and traits.token_bytes == 1 and not _quantizes(problem, gemm):
        extra += c.launch + 3 * positions * problem.intermediate / device.bandwidth
    extra += c.tail * (steps * pace if waves > 1 else 0.0)
    return float(soft * shared + c.launch + c.ramp + extra)


def _packed_seconds(
    problem: Problem, part: str, gemm: GemmConfig, block_m: int, tokens: int, device: Device, c: Constants
) -> float:
    """Of a warp-specialized kernel for packed weights: unpacking a tile's weights, then its tokens' products."""
    n, k = problem.matrix(part)
    rows, steps = math.ceil(n / gemm.block_n) * gemm.block_n, math.ceil(k / 128)
    tiles = expected_tiles(problem.experts, problem.top_k, tokens, block_m)
    # A tile's tokens are multiplied in pieces, and those that it has not are left out.
    piece = 64 if block_m > 128 else block_m // 2
    pieces = expected_tiles(problem.experts, problem.top_k, tokens, piece)
    unpacking = tiles * rows / 256 * steps * c.packed_step / device.processors
    products = 2 * pieces * piece * rows * steps * 128 / device.rate(problem.dtype)
    active = active_experts(problem.experts, problem.top_k, tokens)
    memory = active * n * k * (problem.traits.weight_bytes + 1 / 32) / device.bandwidth
    one = steps * (c.packed_step * gemm.block_n / 256 + 256 * block_m * gemm.block_n / device.rate(problem.dtype))
    order = c.launch + 4 * tokens * problem.hidden / device.bandwidth if part == "up" else 0.0
    return float(max(memory, unpacking + products) + c.launch + c.ramp + c.tail * one + order)


def _quantizes(problem: Problem, gemm: GemmConfig) -> bool:
    """Whether GEMM1 quantizes its result for GEMM2: a tile holds the group of 128 that shares a scale."""
    return problem.scheme == "fp8_block128" and gemm.block_n // (2 if problem.gated else 1) == 128


def overhead_seconds(problem: Problem, path: str, tokens: int, device: Device, c: Constants = CONSTANTS) -> float:
    """What the layer does beside its GEMMs: sorting, quantizing the input, the sum over top_k."""
    positions = tokens * problem.top_k
    # The tiny path sums in GEMM2, and quantizes where it reads.
    seconds = 0.0
    if path != "tiny":
        seconds += c.launch + (positions + tokens) * problem.hidden * 2 / device.bandwidth
        seconds += c.launch + c.sort + c.sort_more * positions / 1000
        if problem.traits.token_bytes == 1:
            seconds += c.launch + 3 * tokens * problem.hidden / device.bandwidth
    return seconds


def seconds(
    problem: Problem, config: LayerConfig, tokens: int, device: Device, constants: Constants = CONSTANTS
) -> float:
    """Estimated seconds of one layer call of `tokens` tokens under uniform routing."""
    block_m = 1 if config.path == "tiny" else config.block_m
    parts = (("up", config.up), ("down", config.down))
    gemms = sum(gemm_seconds(problem, part, gemm, block_m, tokens, device, constants) for part, gemm in parts)
    return gemms + overhead_seconds(problem, config.path, tokens, device, constants)


@dataclass(frozen=True, slots=True)
class Measured:
    """One measurement. part: "layer", or "up" or "down" for that GEMM alone."""

    problem: Problem
    config: LayerConfig
    tokens: int
    us: float
    part: str = "layer"


def estimate(row: Measured, device: Device, constants: Constants = CONSTANTS) -> float:
    """What the model says for a measurement, in microseconds."""
    if row.part == "layer":
        return 1e6 * seconds(row.problem, row.config, row.tokens, device, constants)
    gemm, block_m = getattr(row.config, row.part), 1 if row.config.path == "tiny" else row.config.block_m
    return 1e6 * gemm_seconds(row.problem, row.part, gemm, block_m, row.tokens, device, constants)


def error(rows: Iterable[Measured], device: Device, constants: Constants = CONSTANTS) -> float:
    """Root mean square of log(estimate / measured): 0.1 is about 10 %."""
    squares = [math.log(estimate(row, device, constants) / row.us) ** 2 for row in rows]
    return math.sqrt(sum(squares) / len(squares))


def fit(
    rows: Iterable[Measured],
    device: Device,
    start: Constants = CONSTANTS,
    *,
    names: Iterable[str] | None = None,
    say: Callable[[str], Any] = lambda text: None,
) -> Constants:
    """Constants with a smaller `error` on `rows`: each in turn is tried larger and smaller, in ever finer steps.

    names: those to change (None: all). A constant on which no row depends stays as it is.
    """
    rows, best = list(rows), start
    least = error(rows, device, best)
    chosen = list(names) if names is not None else [f.name for f in fields(Constants)]
    for factor in (1.5, 1.2, 1.08, 1.03):
        improved = True
        while improved:
            improved = False
            for name in chosen:
                for change in (factor, 1 / factor):
                    trial = replace(best, **{name: getattr(best, name) * change})
                    found = error(rows, device, trial)
                    if found < least - 1e-5:
                        best, least, improved = trial, found, True
        say(f"steps of {factor}: error {least:.3f}")
    return best
