"""Bounded tuning: the model's short list, then small steps from the best, until the time is up or nothing helps."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Final

from moe_core.protocols import TuningRow
from moe_core_triton.configs import candidates as space
from moe_core_triton.configs import model
from moe_core_triton.configs.candidates import candidates, why_not
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import Device
from moe_core_triton.configs.files import SHIPPED, Entry, Where, add, triton_version
from moe_core_triton.configs.store import Choice, Configs, of

#: A difference below this is noise.
NOISE: Final = 0.01
#: A step that the model expects to be that much slower is not tried.
HOPELESS: Final = 1.6
#: How often the best, the second and the default are timed again at the end.
REPEATS: Final = 2
#: The share of the budget that is kept for that.
RESERVE: Final = 0.1

#: Microseconds of a call with a configuration; None where it fails to compile, to run, or to be right.
TimeConfig = Callable[[LayerConfig], "float | None"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tuning found for one token count of a call. us, default_us: microseconds; None where the default failed."""

    tokens: int
    config: LayerConfig
    us: float
    default: Choice
    default_us: float | None
    tried: int


class _Search:
    """Times configurations, each once unless asked again, and none after the deadline."""

    def __init__(self, time_config: TimeConfig, deadline: float, clock: Callable[[], float]) -> None:
        self._time, self.deadline, self._clock = time_config, deadline, clock
        self.times: dict[LayerConfig, list[float]] = {}

    @property
    def ended(self) -> bool:
        return self._clock() >= self.deadline

    def us(self, config: LayerConfig) -> float:
        """The median of its times; infinite where it failed or was not timed."""
        return statistics.median(self.times.get(config) or [math.inf])

    def try_(self, config: LayerConfig, *, again: bool = False) -> float:
        if (again or config not in self.times) and not self.ended:
            found = self._time(config)
            self.times.setdefault(config, []).extend([] if found is None else [found])
        return self.us(config)

    def ranked(self) -> list[LayerConfig]:
        """All that worked, the fastest first."""
        return sorted((c for c, found in self.times.items() if found), key=self.us)


def tune_one(
    problem: Problem,
    tokens: int,
    device: Device,
    time_config: TimeConfig,
    *,
    budget_s: float,
    default: Choice,
    also: Iterable[LayerConfig] = (),
    limit: int = 8,
    call_tokens: int | None = None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], Any] = lambda text: None,
) -> Outcome | None:
    """The best configuration for `tokens` (see `Problem`) that is found in `budget_s` seconds.

    default: what would run without tuning, timed first; also: more to start from, such as what was best for other
    token counts; call_tokens: of the call, where those are more. None where the time was over before anything worked.
    """
    call = max(tokens, call_tokens or 0)
    start = clock()
    search = _Search(time_config, start + (1 - RESERVE) * budget_s, clock)
    first = [default.config, *candidates(problem, tokens, device, limit, call_tokens=call), *also]
    for config in dict.fromkeys(first):
        if why_not(problem, config, device, call) is None:
            search.try_(config)
    for config in first:  # none of them works: something near them may
        if search.ranked() or search.ended:
            break
        any(search.try_(step) < math.inf for step in _promising(problem, config, tokens, call, device, search))
    while search.ranked() and not search.ended:
        best = search.ranked()[0]
        least = search.us(best)
        progress(f"{least:.1f} us after {len(search.times)} configurations: {best.text}")
        steps = _promising(problem, best, tokens, call, device, search)
        if not any(search.try_(step) < least * (1 - NOISE) for step in steps):
            break
    if not search.ranked():
        return None
    search.deadline = start + budget_s
    again = list(dict.fromkeys((*search.ranked()[:2], default.config)))
    for _ in range(REPEATS):
        for config in again:
            if search.times.get(config):
                search.try_(config, again=True)
    best, base = search.ranked()[0], search.us(default.config)
    if search.us(best) > base * (1 - NOISE):
        best = default.config  # no change for noise
    return Outcome(call, best, search.us(best), default, base if base < math.inf else None, len(search.times))


def _promising(
    problem: Problem, config: LayerConfig, tokens: int, call: int, device: Device, search: _Search
) -> Iterator[LayerConfig]:
    """Untried steps from `config`, in the order of the model's liking."""
    limit = HOPELESS * model.seconds(problem, config, tokens, device)
    steps = [s for s in dict.fromkeys(moves(config)) if why_not(problem, s, device, call) is None]
    timed = [(model.seconds(problem, step, tokens, device), i, step) for i, step in enumerate(steps)]
    for seconds, _, step in sorted(timed):
        if seconds <= limit and step not in search.times:
            yield step


def moves(config: LayerConfig) -> Iterator[LayerConfig]:
    """Configurations that differ in one thing, legal or not: a size doubled or halved, a switch turned."""
    for part in ("up", "down"):
        gemm: GemmConfig = getattr(config, part)
        for changed in _gemm_moves(gemm):
            yield replace(config, up=changed) if part == "up" else replace(config, down=changed)
    for turned in (not config.up.swap, not config.down.swap):
        yield replace(config, up=_turned(config.up, turned), down=_turned(config.down, turned))
    if config.path == "tiles":
        tma = not config.up.tma
        yield replace(config, up=replace(config.up, tma=tma), down=replace(config.down, tma=tma))
        for block_m in (config.block_m // 2, config.block_m * 2):
            yield replace(config, block_m=block_m)


def _turned(gemm: GemmConfig, swap: bool) -> GemmConfig:
    return replace(gemm, swap=swap, persistent=False, group_m=1)


def _gemm_moves(gemm: GemmConfig) -> Iterator[GemmConfig]:
    for name in ("block_n", "block_k", "num_warps", "split_k"):
        for value in (getattr(gemm, name) // 2, getattr(gemm, name) * 2):
            yield replace(gemm, **{name: value})
    # The same bytes in flight, in other pieces.
    yield replace(gemm, block_k=gemm.block_k // 2, num_stages=min(2 * gemm.num_stages, max(space.STAGES)))
    for stages in (gemm.num_stages - 1, gemm.num_stages + 1):
        yield replace(gemm, num_stages=stages)
    for group in space.GROUP_M:
        yield replace(gemm, group_m=group)
    yield replace(gemm, tma=not gemm.tma)
    yield replace(gemm, persistent=not gemm.persistent)
    yield _turned(gemm, not gemm.swap)


def tune_all(
    configs: Configs,
    tokens: Sequence[int],
    time_layer: Callable[[int, LayerConfig], float | None],
    *,
    budget_s: float,
    found: Callable[[Outcome], Any] = lambda outcome: None,
    clock: Callable[[], float] = time.monotonic,
    progress: Callable[[str], Any] = lambda text: None,
) -> list[Outcome]:
    """Tune each token count with an equal share of what is left of the budget. found: called after each one.

    What was best for one count is a start for the next. Counts that the budget does not reach have no outcome.
    """
    end, outcomes = clock() + budget_s, list[Outcome]()
    for i, count in enumerate(tokens):
        share = (end - clock()) / (len(tokens) - i)
        if share <= 0:
            break
        outcome = tune_one(
            configs.problem,
            configs.local(count),
            configs.device,
            partial(time_layer, count),
            call_tokens=count,
            budget_s=share,
            default=configs.default(count),
            also=[earlier.config for earlier in outcomes[-2:]],
            clock=clock,
            progress=partial(_with_tokens, progress, count),
        )
        if outcome is not None:
            outcomes.append(outcome)
            found(outcome)
    return outcomes


def _with_tokens(progress: Callable[[str], Any], tokens: int, text: str) -> None:
    progress(f"{tokens} tokens: {text}")


def run_job(job: Any, time_layer: Callable[[int, LayerConfig], float | None]) -> list[TuningRow]:
    """All of a runner's `tune` but the timing: job is a `moe_core.protocols.TuningJob`.

    time_layer(tokens, config) -> microseconds of a call of `tokens` tokens, or None where it failed.
    """
    # The defaults of someone who never tuned; where the shipped files are being written, those of the model alone.
    shipped = None if job.store.parent.resolve() == SHIPPED.resolve() else SHIPPED
    configs = of(job.binding, shipped)
    device = configs.device
    where = Where(device.name, device.arch, triton_version())

    def keep(outcome: Outcome) -> None:
        entry = Entry(outcome.config, outcome.us, outcome.default_us)
        add(job.store, where, configs.problem, configs.local(outcome.tokens), entry)

    outcomes = tune_all(configs, job.tokens, time_layer, budget_s=job.budget_s, found=keep, progress=job.progress)
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
