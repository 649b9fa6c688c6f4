"""Which configurations the kernels have, and the few that the model likes best for a problem."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import product
from typing import Final

from moe_core.errors import ConfigError
from moe_core_triton.configs import model
from moe_core_triton.configs.config import PATHS, TINY_POSITIONS, GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import Device
from moe_core_triton.configs.routing import padding
from moe_core_triton.configs.specialized import HEIGHTS, TILES

#: What the kernels take. A value that is not here is refused wherever it comes from, stored files included.
BLOCK_M: Final = (8, 16, 32, 64, 128, 192, 256)
BLOCK_N: Final = (16, 32, 64, 128, 256)
BLOCK_K: Final = (32, 64, 128, 256)
WARPS: Final = (4, 8)
#: Packed weights too: with fewer than four warps Triton takes the instruction that reads operands from registers
#: (mma.sync), which is where such weights are unpacked.
PACKED_WARPS: Final = (1, 2, 4, 8)
STAGES: Final = (2, 3, 4, 5, 6)
GROUP_M: Final = (1, 4, 8, 16)
#: Rows of GEMM2 count once for each slot of a token: a program has all of them.
TINY_BLOCK_N: Final[dict[str, tuple[int, ...]]] = {"up": (2, 4, 8, 16, 32), "down": (1, 2, 4, 8)}
TINY_BLOCK_K: Final = (64, 128, 256, 512, 1024)
TINY_WARPS: Final = (2, 4, 8)
TINY_STAGES: Final = (1, 2, 3, 4)
#: The most accumulator registers, or weights of a tile of the tiny path, that a thread may hold; and registers of
#: unpacked weights, where the tensor cores read them from there.
MOST_ACCUMULATORS: Final = 200
MOST_TINY_WEIGHTS: Final = {"up": 64, "down": 32}
MOST_UNPACKED: Final = 64


#: Beyond, a tile with the weights on the rows' side was never the fastest; and with 128 tokens and 8-bit operands its
#: results were seen to change from run to run (Triton 3.6, sm_90).
MOST_SWAPPED: Final = 64


def words(problem: Problem, device: Device) -> bool:
    """Whether four-bit weights are kept as the words of `packing`: see `weights.prepare`."""
    return problem.scheme == "mxfp4_w4a16" and problem.dtype == "bfloat16" and device.arch.startswith("sm_")


def why_not(problem: Problem, config: LayerConfig, device: Device, tokens: int | None = None) -> str | None:
    """What speaks against running `problem` so (in a call of `tokens`, where they are given), or None."""
    if config.path not in PATHS:
        return f"no path is called {config.path!r}"
    if config.path == "tiny":
        if config.block_m != 1:
            return "the tiny path has one token a tile"
        if tokens is not None and tokens * problem.top_k > TINY_POSITIONS:
            return f"{tokens} tokens x {problem.top_k} are more than {TINY_POSITIONS} positions"
    elif config.block_m not in BLOCK_M:
        return f"block_m is one of {BLOCK_M}"
    if problem.traits.swap_only and config.up.specialized is not config.down.specialized:
        return "both GEMMs of packed weights or none are specialized: they agree on another order of K"
    for part, gemm in (("up", config.up), ("down", config.down)):
        reason = gemm_why_not(problem, part, gemm, config.block_m, device)
        if reason is not None:
            return f"{part}: {reason}"
    return None


def gemm_why_not(problem: Problem, part: str, gemm: GemmConfig, block_m: int, device: Device) -> str | None:
    """What speaks against one GEMM; block_m = 1 is the tiny path."""
    if gemm.specialized:
        return _specialized_why_not(problem, gemm, block_m, device)
    tiny, traits = block_m == 1, problem.traits
    if block_m & (block_m - 1):
        return "the ordinary kernels have tiles of a power of two"
    if tiny and words(problem, device):
        return "the tiny path does not read words of four-bit weights"
    n, k = problem.matrix(part)
    gated = part == "up" and problem.gated
    lists = {
        "block_n": TINY_BLOCK_N[part] if tiny else BLOCK_N,
        "block_k": TINY_BLOCK_K if tiny else BLOCK_K,
        "num_warps": TINY_WARPS if tiny else _warps(problem),
        "num_stages": TINY_STAGES if tiny else STAGES,
        "group_m": (1,) if tiny else GROUP_M,
    }
    for name, allowed in lists.items():
        if getattr(gemm, name) not in allowed:
            return f"{name} is one of {allowed}, not {getattr(gemm, name)}"
    rows = gemm.block_n // 2 if gated else gemm.block_n
    # A tile may be larger than a matrix only where the matrix is smaller than the smallest tile.
    if rows > (max(problem.intermediate, 32) if gated else max(n, 64)):
        return f"a tile of {rows} rows, and only {n} there"
    if gemm.block_k >= 2 * max(k, 16) and gemm.block_k not in (32, *traits.block_ks, TINY_BLOCK_K[0] if tiny else 32):
        return f"steps of {gemm.block_k}, and K is only {k}"
    if traits.block_ks and gemm.block_k not in traits.block_ks and not tiny:
        return f"scales want steps of {traits.block_ks}"
    if tiny and traits.block_ks and gemm.block_k % traits.block_ks[0]:
        return f"scales want steps of a multiple of {traits.block_ks[0]}"
    two_blocks = rows == 256 and not gated and n % 256 == 0
    if problem.scheme == "fp8_block128" and 128 % rows and not two_blocks:
        return "a tile of more than one scale block of rows"
    stored = 16 if traits.swap_only else k * traits.weight_bytes  # packed rows are padded to whole steps
    if gemm.tma and (not device.descriptors or tiny or stored % 16):
        return "no tensor descriptor for these weights here"
    held = model.accumulators(problem, part, gemm, block_m, device)
    if tiny:
        if gemm.swap or gemm.persistent:
            return "the tiny path has no tensor cores, and a program a tile"
        if held < 4:
            return "more threads than work"
        return None if held <= MOST_TINY_WEIGHTS[part] else f"{held:.0f} weights a thread"
    return _tiles_why_not(problem, gemm, block_m, device, held)


def specialized(problem: Problem, block_m: int, group_m: int = 8) -> GemmConfig:
    """The one shape of the warp-specialized kernels (see `hopper`) with tiles of that height."""
    rows, block_k, slots = TILES[problem.scheme][block_m]
    swap = problem.traits.swap_only
    return GemmConfig(rows, block_k, 4, slots, swap, True, group_m, specialized=True)


def _specialized_why_not(problem: Problem, gemm: GemmConfig, block_m: int, device: Device) -> str | None:
    if not problem.specialized:
        return "the warp-specialized kernels are turned off, or not for this layer or device (see configs.specialized)"
    if device.arch != "sm_90":
        return f"the warp-specialized kernels are for sm_90, this is {device.arch}"
    heights = HEIGHTS.get(problem.scheme, ())
    if block_m not in heights:
        return f"tiles of the warp-specialized kernels have {heights} rows"
    if gemm.group_m not in GROUP_M or gemm != specialized(problem, block_m, gemm.group_m):
        return "the warp-specialized kernels have one tile of each height"
    return None


def _warps(problem: Problem) -> tuple[int, ...]:
    return PACKED_WARPS if problem.traits.swap_only else WARPS


def _tiles_why_not(problem: Problem, gemm: GemmConfig, block_m: int, device: Device, held: float) -> str | None:
    least = 64 if model.warp_groups(gemm, device) else 16
    if gemm.swap and block_m > MOST_SWAPPED:
        return f"weights go on the rows' side up to {MOST_SWAPPED} tokens a tile"
    if words(problem, device):
        # Four neighboring bytes have to meet in a thread: so they do for mma.sync, and on the way to shared memory.
        if gemm.swap != (gemm.num_warps < 4):
            return "words of four bytes are read by one or two warps with swap, by more without"
    elif problem.traits.swap_only and not gemm.swap:
        return "the weights are decoded in registers, on the rows' side"
    if (gemm.block_n if gemm.swap else block_m) < least:
        return f"the tensor-core instruction has {least} rows"
    if min(block_m, gemm.block_n) < (8 if gemm.swap and device.wide else 16):
        return "the tensor-core instruction has more columns"
    if held > MOST_ACCUMULATORS:
        return f"{held:.0f} accumulators a thread"
    if held < 2:
        return "more threads than work"
    unpacked = model.unpacked(problem, gemm, device)
    if gemm.num_warps < 4 and unpacked > MOST_UNPACKED:
        return f"{unpacked:.0f} registers of unpacked weights a thread"
    shared = model.shared_bytes(problem, gemm, block_m, device)
    if shared > device.shared_bytes:
        return f"{shared:.0f} bytes of shared memory, {device.shared_bytes} are there"
    return None


def gemms(problem: Problem, part: str, block_m: int, device: Device) -> Iterator[GemmConfig]:
    """Every legal configuration of one GEMM; block_m = 1 is the tiny path."""
    tiny, traits = block_m == 1, problem.traits
    if tiny:
        for block_n, block_k, warps, stage in product(TINY_BLOCK_N[part], TINY_BLOCK_K, TINY_WARPS, (1, 3)):
            one = GemmConfig(block_n, block_k, warps, stage, False, False)
            if gemm_why_not(problem, part, one, block_m, device) is None:
                yield one
        return
    shapes = product(BLOCK_N, traits.block_ks or BLOCK_K)
    stages: tuple[int, ...] = STAGES[:1] if device.amd else STAGES[:-1]
    for block_n, block_k in shapes:
        if block_k * traits.token_bytes < 128 and block_k < problem.matrix(part)[1] and not traits.block_ks:
            continue  # legal, but half a line of shared memory a row: never the best
        switches = ((True, 1, False), (True, 8, False), (False, 1, False), (False, 8, False), (False, 8, True))
        for warps, stage, tma in product(_warps(problem), stages, (False, True)):
            for swap, group, persistent in switches:
                one = GemmConfig(block_n, block_k, warps, stage, swap, tma, group, persistent)
                if gemm_why_not(problem, part, one, block_m, device) is None:
                    yield one
    for group in (8, 16) if problem.specialized and block_m in HEIGHTS.get(problem.scheme, ()) else ():
        one = specialized(problem, block_m, group)
        if gemm_why_not(problem, part, one, block_m, device) is None:
            yield one


@lru_cache(maxsize=256)
def _legal(problem: Problem, part: str, block_m: int, device: Device) -> tuple[GemmConfig, ...]:
    return tuple(gemms(problem, part, block_m, device))


def _blocks(problem: Problem, tokens: int, call_tokens: int) -> list[int]:
    """Values of block_m worth a look: not those that are mostly padding, nor those far below an expert's tokens."""
    mean = tokens * problem.top_k / problem.experts
    waste = {m: padding(problem.experts, problem.top_k, tokens, m) for m in BLOCK_M}
    least = min(waste.values())
    kept = [m for m in BLOCK_M if (waste[m] <= 4 * least + 3 or m <= 16) and m * 16 >= min(mean, 512)]
    return [1, *kept] if call_tokens * problem.top_k <= TINY_POSITIONS else kept


@lru_cache(maxsize=2048)
def _timed(
    problem: Problem, part: str, block_m: int, tokens: int, device: Device
) -> tuple[tuple[float, GemmConfig], ...]:
    """Legal configurations of one GEMM with the model's seconds, the fastest first."""
    timed = [
        (model.gemm_seconds(problem, part, gemm, block_m, tokens, device), i, gemm)
        for i, gemm in enumerate(_legal(problem, part, block_m, device))
    ]
    return tuple((seconds, gemm) for seconds, _, gemm in sorted(timed))


@lru_cache(maxsize=512)
def _ranked(
    problem: Problem, tokens: int, call_tokens: int, device: Device, keep: int
) -> tuple[tuple[float, LayerConfig], ...]:
    """The model's best pairs of GEMMs for each block_m, all in the order of their estimated seconds."""
    found = []
    for block_m in _blocks(problem, tokens, call_tokens):
        path = "tiny" if block_m == 1 else "tiles"
        extra = model.overhead_seconds(problem, path, tokens, device)
        best = (_timed(problem, part, block_m, tokens, device)[:keep] for part in ("up", "down"))
        for up, down in product(*best):
            if not problem.traits.swap_only or up[1].specialized is down[1].specialized:
                found.append((up[0] + down[0] + extra, LayerConfig(path, block_m, up[1], down[1])))
    return tuple(sorted(found, key=lambda pair: pair[0]))


def blocks(problem: Problem, tokens: int, device: Device, call_tokens: int | None = None) -> list[tuple[float, int]]:
    """(estimated seconds, block_m) of the best layer with each block_m worth a look; 1 is the tiny path."""
    tokens, found = max(tokens, 1), dict[int, float]()
    for seconds, config in _ranked(problem, tokens, max(tokens, call_tokens or 0), device, 8):
        found.setdefault(config.block_m, seconds)
    return sorted((seconds, block_m) for block_m, seconds in found.items())


def gemm_candidates(
    problem: Problem, part: str, block_m: int, tokens: int, device: Device, limit: int
) -> list[GemmConfig]:
    """At most `limit` legal configurations of one GEMM, the model's favourite first, then good and different ones.

    Of packed weights, both tensor-core instructions are among them where the device has two.
    """
    remaining, chosen = list(_timed(problem, part, block_m, max(tokens, 1), device)), list[GemmConfig]()
    both = problem.traits.swap_only and device.wide and block_m > 1
    while remaining and len(chosen) < limit:
        pool = list(range(len(remaining)))
        if both and chosen:
            wanted = [i for i in pool if remaining[i][1].num_warps < 4] if len(chosen) % 2 else []
            pool = wanted or pool
        least = min(pool, key=lambda i: (remaining[i][0] * 1.03 ** sum(_like(remaining[i][1], c) for c in chosen), i))
        chosen.append(remaining.pop(least)[1])
    return chosen


def gemm_moves(gemm: GemmConfig) -> Iterator[GemmConfig]:
    """Configurations that differ in one thing, legal or not: a size doubled or halved, a switch turned."""
    for name in ("block_n", "block_k", "num_warps"):
        for value in (getattr(gemm, name) // 2, getattr(gemm, name) * 2):
            yield replace(gemm, **{name: value})
    # The same bytes in flight, in other pieces; the same work of a thread.
    yield replace(gemm, block_k=gemm.block_k // 2, num_stages=min(2 * gemm.num_stages, max(STAGES)))
    yield replace(gemm, block_n=gemm.block_n * 2, num_warps=gemm.num_warps * 2)
    yield replace(gemm, block_n=gemm.block_n // 2, num_warps=gemm.num_warps // 2)
    for stages in (gemm.num_stages - 1, gemm.num_stages + 1):
        yield replace(gemm, num_stages=stages)
    for group in GROUP_M:
        yield replace(gemm, group_m=group)
    yield replace(gemm, tma=not gemm.tma)
    yield replace(gemm, persistent=not gemm.persistent)
    yield replace(gemm, swap=not gemm.swap, persistent=False, group_m=1)


def _like(one: GemmConfig, other: GemmConfig) -> int:
    shape = (one.block_n, one.block_k, one.swap) == (other.block_n, other.block_k, other.swap)
    return shape + (shape and one.num_warps == other.num_warps) + (shape and one.tma == other.tma)


def candidates(
    problem: Problem, tokens: int, device: Device, limit: int = 8, *, call_tokens: int | None = None
) -> list[LayerConfig]:
    """At most `limit` legal configurations for `tokens` tokens (see `Problem`), the model's favourite first.

    Those after it are good and also different: each one like a chosen one counts as 4 % slower for that. call_tokens:
    tokens of the call where that has more (expert parallelism). Raises ConfigError where no configuration is legal.
    """
    tokens = max(tokens, 1)
    remaining = list(_ranked(problem, tokens, max(tokens, call_tokens or 0), device, max(8, limit)))
    if not remaining:
        raise ConfigError(f"no kernel configuration can run {problem.key} on {device.name}")
    chosen: list[LayerConfig] = []
    while remaining and len(chosen) < limit:
        scored = (
            (time * 1.04 ** sum(_alike(config, c) for c in chosen), i) for i, (time, config) in enumerate(remaining)
        )
        chosen.append(remaining.pop(min(scored)[1])[1])
    return chosen


def _alike(one: LayerConfig, other: LayerConfig) -> int:
    """How much two configurations have in common, in large things."""
    same = (one.path, one.block_m) == (other.path, other.block_m)
    up = (one.up.block_n, one.up.block_k, one.up.swap) == (other.up.block_n, other.up.block_k, other.up.swap)
    down = (one.down.block_n, one.down.block_k) == (other.down.block_n, other.down.block_k)
    return same + (same and up) + (same and down)
