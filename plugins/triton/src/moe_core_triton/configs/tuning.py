"""Bounded tuning: GEMM by GEMM from the model's short lists, then small steps from the best, then whole layers.

Given the height of a tile (block_m), GEMM1 and GEMM2 are independent: the best of each is found by itself, and only the
best pairs are timed as layers. All token counts advance together, so that what a round needs is compiled in one batch.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Final, Protocol

from moe_core.protocols import TuningRow
from moe_core_triton.configs import candidates as space
from moe_core_triton.configs import model
from moe_core_triton.configs.candidates import (
    blocks,
    gemm_candidates,
    gemm_moves,
    gemm_why_not,
    specialized,
    why_not,
)
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import Device
from moe_core_triton.configs.files import SHIPPED, Entry, Where, add, triton_version
from moe_core_triton.configs.specialized import HEIGHTS
from moe_core_triton.configs.store import Choice, Configs, of

#: A difference below this is noise.
NOISE: Final = 0.01
#: A step that the model expects to be that much slower than the best is not tried.
HOPELESS: Final = 1.6
#: What took that much longer than the best at its first reading is not read again.
SLOW: Final = 1.3
#: Tile heights of a first round, and how far the model may put them behind its favourite.
BLOCKS, BEHIND = 3, 1.25
#: Configurations of each GEMM in the first round and in a later one; rounds after the first.
FIRST, STEPS, ROUNDS = 10, 6, 3
#: Pairs that are timed as a layer: how many, and how far their GEMMs may be behind the best pair's.
PAIRS, CLOSE = 3, 1.08
#: How often the best, the second and the default are timed again at the end, and the share of the budget for that.
REPEATS, RESERVE = 2, 0.1
#: The largest share of what is left that compiling may take before a round.
COMPILING: Final = 0.6
#: The share of a token count's time that its GEMMs may take; the rest is for whole layers.
GEMMS: Final = 0.75

PARTS: Final = ("up", "down")


@dataclass(frozen=True, slots=True)
class Variant:
    """Something to time: a "layer", or its "up" or "down" alone in tiles of config.block_m (the other is ignored)."""

    part: str
    config: LayerConfig

    @property
    def gemm(self) -> GemmConfig:
        """The configuration of the one GEMM."""
        found: GemmConfig = getattr(self.config, self.part)
        return found

    @property
    def text(self) -> str:
        """For people."""
        return self.config.text if self.part == "layer" else f"{self.part} m{self.config.block_m} | {self.gemm.text}"


def single(part: str, block_m: int, gemm: GemmConfig) -> Variant:
    """One GEMM in tiles of that height."""
    return Variant(part, LayerConfig("tiles", block_m, gemm, gemm))


class Bench(Protocol):
    """What times. tokens: of a call."""

    def compile(self, wanted: Sequence[tuple[int, Variant]], seconds: float) -> Collection[tuple[int, Variant]]:
        """Make all of them ready in about that time, the first ones first; returns those that may be timed."""

    def time(self, tokens: int, variant: Variant, enough: float) -> float | None:
        """Microseconds; None where it fails to compile, to run, or to be right. One reading will do above `enough`."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tuning found for one token count of a call. us, default_us: microseconds; None where the default failed."""

    tokens: int
    config: LayerConfig
    us: float
    default: Choice
    default_us: float | None
    tried: int


class Point:
    """The search for one token count. Each variant is timed once unless asked again."""

    def __init__(self, configs: Configs, call: int, bench: Bench, clock: Callable[[], float]) -> None:
        self.problem, self.device, self.call = configs.problem, configs.device, call
        self.tokens, self.default = configs.local(call), configs.default(call)
        self._bench, self._clock = bench, clock
        self._pivot: LayerConfig | None = None
        self.times: dict[Variant, list[float]] = {}

    def us(self, variant: Variant) -> float:
        """The median of its times; infinite where it failed or was not timed."""
        return statistics.median(self.times.get(variant) or [math.inf])

    def measure(self, variants: Iterable[Variant], deadline: float, *, again: bool = False) -> None:
        """Time them until then."""
        for variant in variants:
            if self._clock() >= deadline:
                return
            if again or variant not in self.times:
                rivals = (
                    self._layers() if variant.part == "layer" else self._ranked(variant.part, variant.config.block_m)
                )
                least = self.us(rivals[0]) if rivals else math.inf
                found = self._bench.time(self.call, variant, math.inf if again else SLOW * least)
                self.times.setdefault(variant, []).extend([] if found is None else [found])

    def _layers(self) -> list[Variant]:
        return sorted((v for v, found in self.times.items() if found and v.part == "layer"), key=self.us)

    def _ranked(self, part: str, block_m: int) -> list[Variant]:
        mine = (v for v, found in self.times.items() if found and (v.part, v.config.block_m) == (part, block_m))
        return sorted(mine, key=self.us)

    def _heights(self) -> list[tuple[float, int]]:
        """(seconds of the best pair's GEMMs, block_m), where both were timed."""
        found = []
        for block_m in space.BLOCK_M:
            best = [self._ranked(part, block_m)[:1] for part in PARTS]
            if all(best):
                found.append((sum(self.us(one[0]) for one in best), block_m))
        return sorted(found)

    def legal(self, config: LayerConfig) -> bool:
        """Whether a call of this size may run so."""
        return why_not(self.problem, config, self.device, self.call) is None

    def first(self, starts: Iterable[LayerConfig] = ()) -> list[Variant]:
        """The default, other configurations to start from, and the model's short lists, the best of each list first."""
        given = [c for c in dict.fromkeys((self.default.config, *starts)) if self.legal(c)]
        ranked = blocks(self.problem, self.tokens, self.device, self.call)
        tall = [(seconds, m) for seconds, m in ranked if m > 1]
        heights = [m for seconds, m in tall[:BLOCKS] if seconds <= BEHIND * tall[0][0]]
        heights += [c.block_m for c in given if c.path == "tiles"]
        lists: list[list[Variant]] = []
        if any(m == 1 for _, m in ranked):
            lists.append(self._tiny_lists(given))
        for block_m, part in ((m, part) for m in dict.fromkeys(heights) for part in PARTS):
            of_starts = [getattr(c, part) for c in given if c.path == "tiles"]
            model_s = gemm_candidates(self.problem, part, block_m, self.tokens, self.device, FIRST)
            lists.append(list(self._singles(part, block_m, (*of_starts, *model_s))))
        return list(dict.fromkeys((*(Variant("layer", c) for c in given), *_in_turn(lists))))

    def _tiny_lists(self, given: Sequence[LayerConfig]) -> list[Variant]:
        ups, downs = (gemm_candidates(self.problem, part, 1, self.tokens, self.device, FIRST) for part in PARTS)
        start = next((c for c in given if c.path == "tiny"), LayerConfig("tiny", 1, ups[0], downs[0]))
        self._pivot = start
        both = [[replace(start, up=up) for up in ups], [replace(start, down=down) for down in downs]]
        return [Variant("layer", start), *(Variant("layer", c) for c in _in_turn(both) if self.legal(c))]

    def _singles(self, part: str, block_m: int, gemms: Iterable[GemmConfig]) -> Iterator[Variant]:
        for gemm in dict.fromkeys(gemms):
            if gemm_why_not(self.problem, part, gemm, block_m, self.device) is None:
                yield single(part, block_m, gemm)

    def steps(self, near: Sequence[Point] = ()) -> list[Variant]:
        """What to try next: small steps from the best, other heights beside the best one, the best of `near`."""
        heights, lists = self._heights(), list[list[Variant]]()
        for rank, (us, block_m) in enumerate(heights[:2]):
            if us > BEHIND * heights[0][0]:
                break
            for part in PARTS:
                best = self._ranked(part, block_m)[0].gemm
                theirs = (p._ranked(part, m)[0].gemm for p in near for _, m in p._heights()[:1])
                lists.append([*self._promising(part, block_m, best), *self._singles(part, block_m, theirs)])
                for other in _beside(block_m) if rank == 0 else ():
                    if other in space.BLOCK_M and not self._ranked(part, other):
                        lists.append(list(self._singles(part, other, (self._at(best, other),))))
        layers = self._layers()
        tiny = next((v.config for v in layers if v.config.path == "tiny"), None)
        if tiny is not None and self.us(Variant("layer", tiny)) <= BEHIND * self.us(layers[0]):
            self._pivot = tiny
            for part in PARTS:
                moved = self._promising(part, 1, getattr(tiny, part))
                lists.append([Variant("layer", _with(tiny, part, v.gemm)) for v in moved])
        lists += [[p._layers()[0]] for p in near if p._layers() and p._layers()[0].config.path == "tiny"]
        found = (v for v in _in_turn(lists) if v.part != "layer" or self.legal(v.config))
        return [v for v in dict.fromkeys(found) if v not in self.times]

    def _at(self, gemm: GemmConfig, block_m: int) -> GemmConfig:
        """The same GEMM in tiles of another height; a specialized one has its own tile at each."""
        own = gemm.specialized and block_m in HEIGHTS.get(self.problem.scheme, ())
        return specialized(self.problem, block_m, gemm.group_m) if own else gemm

    def _promising(self, part: str, block_m: int, gemm: GemmConfig) -> list[Variant]:
        """Untried steps from one GEMM, in the order of the model's liking."""
        arguments = (block_m, self.tokens, self.device)
        limit = HOPELESS * model.gemm_seconds(self.problem, part, gemm, *arguments)
        steps = [v for v in self._singles(part, block_m, gemm_moves(gemm)) if v not in self.times]
        timed = [(model.gemm_seconds(self.problem, part, v.gemm, *arguments), i, v) for i, v in enumerate(steps)]
        return [v for seconds, _, v in sorted(timed)[:STEPS] if seconds <= limit]

    def pairs(self) -> list[Variant]:
        """Layers of the best GEMMs, the most promising first."""
        found = [] if self._pivot is None else [self._tiny_pair(self._pivot)]
        heights = self._heights()
        for us, block_m in heights[:PAIRS]:
            if us <= CLOSE * heights[0][0]:
                ranked = [[variant.gemm for variant in self._ranked(part, block_m)] for part in PARTS]
                # The best of each; where they may not be together, the best of either kind.
                for kinds in ((True, False), (True,), (False,)):
                    up, down = (next((g for g in gemms if g.specialized in kinds), None) for gemms in ranked)
                    if up is not None and down is not None:
                        found.append(LayerConfig("tiles", block_m, up, down))
                        if len(kinds) == 2 and self.legal(found[-1]):
                            break
        return [Variant("layer", config) for config in found if self.legal(config)]

    def _tiny_pair(self, pivot: LayerConfig) -> LayerConfig:
        """The best GEMM1 with the pivot's GEMM2, and the other way round, put together."""
        tiny = [v.config for v in self._layers() if v.config.path == "tiny"]
        up = next((c.up for c in tiny if c.down == pivot.down), pivot.up)
        down = next((c.down for c in tiny if c.up == pivot.up), pivot.down)
        return replace(pivot, up=up, down=down)

    def settle(self, deadline: float) -> None:
        """Time the best, the second and the default again."""
        default = Variant("layer", self.default.config)
        again = dict.fromkeys((*self._layers()[:2], default))
        for _ in range(REPEATS):
            self.measure([v for v in again if self.times.get(v)], deadline, again=True)

    def outcome(self) -> Outcome | None:
        """None where nothing worked yet."""
        layers = self._layers()
        if not layers:
            return None
        best, default = layers[0], Variant("layer", self.default.config)
        base = self.us(default)
        if self.us(best) > base * (1 - NOISE):
            best = default  # no change for noise
        known = base if base < math.inf else None
        return Outcome(self.call, best.config, self.us(best), self.default, known, len(self.times))


def _with(config: LayerConfig, part: str, gemm: GemmConfig) -> LayerConfig:
    return replace(config, up=gemm) if part == "up" else replace(config, down=gemm)


def _in_turn(lists: Iterable[Iterable[Any]]) -> list[Any]:
    """The first of each, the second of each, ..."""
    return [one for one in chain.from_iterable(zip_longest(*lists)) if one is not None]


def tune_all(
    configs: Configs,
    tokens: Sequence[int],
    bench: Bench,
    *,
    budget_s: float,
    starts: Callable[[int], Iterable[LayerConfig]] = lambda tokens: (),
    found: Callable[[Outcome], Any] = lambda outcome: None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], Any] = lambda text: None,
) -> list[Outcome]:
    """Tune each token count of a call. Counts that the budget does not reach have no outcome.

    starts: more configurations to time for a count. found: called with what is known of a count so far, whenever that
    may have changed; the last word about each is returned too.
    """
    end = clock() + budget_s
    last = clock() + (1 - RESERVE) * budget_s
    points = [Point(configs, count, bench, clock) for count in tokens]
    active = list(points) if budget_s > 0 else []
    for number in range(1 + ROUNDS):
        if number == 0:
            wanted = {point: point.first(starts(point.call)) for point in active}
        else:
            wanted = {point: point.steps(_neighbors(points, point)) for point in active}
        wanted = {point: variants for point, variants in wanted.items() if variants}
        if not wanted or clock() >= last:
            break
        ready = bench.compile(
            _in_turn([(point.call, v) for v in variants] for point, variants in wanted.items()),
            COMPILING * (last - clock()),
        )
        before = {point: point.outcome() for point in wanted}
        for i, (point, variants) in enumerate(wanted.items()):
            now = clock()
            share = (last - now) / (len(wanted) - i)
            point.measure([v for v in variants if (point.call, v) in ready], now + GEMMS * share)
            point.measure(point.pairs(), now + share)
            outcome = point.outcome()
            if outcome is not None:
                found(outcome)
                text = f"{outcome.us:.1f} us after {outcome.tried} variants: {outcome.config.text}"
                progress(f"{point.call} tokens: {text}")
        # Where a round changed nothing, another one hardly will.
        active = [p for p in wanted if number == 0 or _better(before[p], p.outcome())]
    outcomes = []
    for i, point in enumerate(points):
        point.settle(clock() + (end - clock()) / (len(points) - i))
        outcome = point.outcome()
        if outcome is not None:
            outcomes.append(outcome)
            found(outcome)
    return outcomes


def _neighbors(points: Sequence[Point], point: Point) -> list[Point]:
    at = points.index(point)
    return [p for p in points[max(at - 1, 0) : at + 2] if p is not point]


def _better(before: Outcome | None, after: Outcome | None) -> bool:
    return after is not None and (before is None or after.us < before.us * (1 - NOISE))


def shipped_for(store: Path) -> Path | None:
    """The defaults of someone who never tuned; where the shipped files are being written, those of the model alone."""
    return None if store.parent.resolve() == SHIPPED.resolve() else SHIPPED


def run_job(job: Any, bench: Bench, *, shipped: Path | None) -> list[TuningRow]:
    """All of a runner's `tune` but the timing: job is a `moe_core.protocols.TuningJob`.

    shipped: the folder with the files that the default comes from. What the store and this package's own files say is
    timed too.
    """
    configs, known = of(job.binding, shipped), of(job.binding, SHIPPED, job.store)
    device: Device = configs.device
    problem: Problem = configs.problem
    where = Where(device.name, device.arch, triton_version())

    def keep(outcome: Outcome) -> None:
        entry = Entry(outcome.config, outcome.us, outcome.default_us)
        add(job.store, where, problem, configs.local(outcome.tokens), entry)

    outcomes = tune_all(
        configs,
        job.tokens,
        bench,
        budget_s=job.budget_s,
        starts=lambda count: [known.choose(count).config],
        found=keep,
        progress=job.progress,
    )
    return [
        TuningRow(
            tokens=outcome.tokens,
            default=outcome.default.config.text,
            default_us=math.nan if outcome.default_us is None else outcome.default_us,
            tuned=outcome.config.text,
            tuned_us=outcome.us,
            source=outcome.default.source,
            tried=outcome.tried,
        )
        for outcome in outcomes
    ]


def _beside(block_m: int) -> tuple[int, ...]:
    """Heights of tiles next to one."""
    return {64: (32, 128, 192), 128: (64, 192, 256), 192: (64, 128, 256), 256: (128, 192)}.get(
        block_m, (block_m // 2, block_m * 2)
    )
