"""From a problem and a number of tokens to a configuration: tuned, shipped, a neighbour's, or the model's."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, Final

from moe_core.errors import ConfigError
from moe_core.tuning import default_store, named_store
from moe_core.vocabulary import STANDARD
from moe_core_triton.configs import model
from moe_core_triton.configs.candidates import candidates, why_not
from moe_core_triton.configs.config import TINY_POSITIONS, LayerConfig, Problem, bucket, local_tokens
from moe_core_triton.configs.device import Device, this_device
from moe_core_triton.configs.files import RUNNER, SHIPPED, Entry, Store, Table, Where, triton_version

logger = logging.getLogger("moe_core.triton")

#: A tuned token count serves calls up to four times larger or smaller ...
REACH: Final = 2.0
#: ... and all larger ones where an expert has that many tokens: more of them change nothing.
MANY: Final = 256
#: The farthest neighbour: a factor of 4 in one size (experts and top_k count half).
FARTHEST: Final = 2.0
#: A neighbour's configuration is not taken where the model expects it to be that much slower than its own.
DOUBT: Final = 1.3
#: Nor is another token count's of the same problem: within a factor of 1.5 it is never doubted (in powers of two),
#: within 2 as a neighbour's, further away at once.
NEAR, SUBSTITUTE = 0.6, 1.05
#: Token counts to look up when nobody said how many there may be.
USUAL_TOKENS: Final = 16384


@dataclass(frozen=True, slots=True)
class Choice:
    """source: "tuned" (a person's file), "shipped", "neighbor" or "model"; where: the file or problem it came from."""

    config: LayerConfig
    source: str
    where: str = ""
    entry: Entry | None = None


class Configs:
    """The configurations of one problem on one device: `configs(tokens)` in a forward is a dict lookup.

    named: the file of the setting `tuning`, which must be in order (ConfigError). user: this person's own, which is
    left out with a warning where it is not. all_experts: of the whole layer, where this rank has a part of them; each
    method's `tokens` are those of a call.
    """

    def __init__(
        self,
        problem: Problem,
        device: Device,
        *,
        named: Path | None = None,
        user: Path | None = None,
        shipped: Path | None = SHIPPED,
        triton: str | None = None,
        all_experts: int | None = None,
    ) -> None:
        self.problem, self.device, self._all_experts = problem, device, all_experts or problem.experts
        self._triton = triton if triton is not None else triton_version()
        self._stores: list[tuple[str, str, Store]] = []
        if named is not None:
            self._stores.append(("tuned", str(named), Store.read(named)))
        if user is not None and user.exists():
            self._stores += [("tuned", str(user), store) for store in _lenient(user)]
        if shipped is not None:
            files = sorted(shipped.glob("*.json"))
            self._stores += [("shipped", file.name, store) for file in files for store in _lenient(file)]
        self._configs: dict[int, LayerConfig] = {}
        self._tiles: dict[int, LayerConfig] = {}
        self._choices: dict[tuple[int, bool], Choice] = {}

    def __call__(self, tokens: int) -> LayerConfig:
        """The configuration for a call."""
        found = self._configs.get(tokens)
        if found is None:
            found = self._configs[tokens] = self.choose(tokens).config
        return found

    def tiles(self, tokens: int) -> LayerConfig:
        """The configuration for a call that the tiny path cannot take, whatever its size."""
        found = self._tiles.get(tokens)
        if found is None:
            found = self._tiles[tokens] = self.choose(tokens, tiny=False).config
        return found

    def local(self, tokens: int) -> int:
        """The tokens of the problem for a call's."""
        return local_tokens(tokens, self._all_experts, self.problem.experts)

    def choose(self, tokens: int, *, tiny: bool = True) -> Choice:
        """A configuration with where it came from. Token counts of one `bucket` share a choice."""
        tokens = bucket(tokens)
        found = self._choices.get((tokens, tiny))
        if found is None:
            found = self._exact(tokens, "tuned", tiny) or self.default(tokens, tiny=tiny)
            self._choices[tokens, tiny] = found
        return found

    def default(self, tokens: int, *, tiny: bool = True) -> Choice:
        """What runs where nobody tuned this problem: shipped, a neighbour's, or the model's."""
        tokens = bucket(tokens)
        shipped = self._exact(tokens, "shipped", tiny)
        if shipped is not None:
            return shipped
        call = tokens if tiny else max(tokens, TINY_POSITIONS + 1)
        best = candidates(self.problem, self.local(tokens), self.device, limit=1, call_tokens=call)[0]
        return self._neighbor(tokens, best, tiny) or Choice(best, "model")

    def warm(self, max_tokens: int | None = None) -> None:
        """Look everything up that a forward may need, and say once where nothing measured was found."""
        tokens, sources = 1, dict[str, list[int]]()
        while True:
            sources.setdefault(self.choose(tokens).source, []).append(tokens)
            if tokens >= (max_tokens or USUAL_TOKENS):
                break
            tokens = bucket(tokens + 1)
        guessed = {name: sources[name] for name in ("neighbor", "model") if name in sources}
        if guessed:
            parts = [f"{name} (up to {max(found)} tokens)" for name, found in guessed.items()]
            _say_once(self.problem.key, self.device.name, ", ".join(parts))

    def _exact(self, tokens: int, wanted: str, tiny: bool) -> Choice | None:
        """From the files, for this problem and device; another Triton's numbers after this one's."""
        for key, same in product(self._keys, (True, False)):
            for source, label, where, table in self._tables():
                fits = where.device == self.device.name and (where.triton == self._triton) is same
                if source == wanted and fits and key in table:
                    entry = self._nearest(table[key], self.local(tokens), self.problem, tokens, tiny)
                    borrowed = key != self.problem.key
                    if entry is not None and not self._doubted(entry, table[key], tokens, tiny, source, borrowed):
                        return Choice(entry.config, source, f"{label} (Triton {where.triton})", entry)
        return None

    @property
    def _keys(self) -> tuple[str, ...]:
        """Whose entries are this problem's: its own, then those that need no specialized kernels."""
        return tuple(dict.fromkeys((self.problem.key, replace(self.problem, specialized=False).key)))

    def _doubted(
        self, entry: Entry, row: Mapping[int, Entry], tokens: int, tiny: bool, source: str, borrowed: bool
    ) -> bool:
        """Whether the model expects its own choice to be faster, and the entry was tuned for another number of tokens
        or, borrowed, without the specialized kernels that the model chooses. What a user tuned is doubted only then,
        and where much is expected."""
        local, tuned = self.local(tokens), source == "tuned"
        apart = _apart(row, entry, local)
        if not borrowed and (tuned or apart < NEAR):
            return False
        call = tokens if tiny else max(tokens, TINY_POSITIONS + 1)
        best = candidates(self.problem, local, self.device, limit=1, call_tokens=call)[0]
        mine = model.seconds(self.problem, entry.config, local, self.device)
        least = model.seconds(self.problem, best, local, self.device)
        if borrowed and (best.up.specialized or best.down.specialized):
            return mine > (DOUBT if tuned else 1.0) * least
        return not tuned and apart >= NEAR and mine > _limit(apart) * least

    def _neighbor(self, tokens: int, best: LayerConfig, tiny: bool) -> Choice | None:
        """The nearest measured problem whose configuration is legal here, and which the model does not doubt."""
        found = []
        for _, label, where, table in self._tables():
            if where.arch != self.device.arch:
                continue
            other_machine = 0.25 * (where.device != self.device.name) + 0.25 * (where.triton != self._triton)
            for key in table:
                if key in self._keys and where.device == self.device.name:
                    continue  # it has been asked already
                apart = other_machine + distance(self.problem, Problem.parse(key))
                if apart <= FARTHEST:
                    found.append((apart, key, label, table[key]))
        local = self.local(tokens)
        least = model.seconds(self.problem, best, local, self.device) if found else 0.0
        for _, key, label, row in sorted(found, key=lambda item: item[:3]):
            other = Problem.parse(key)
            # As many tokens as give an expert the same number.
            share = other.experts * self.problem.top_k / (other.top_k * self.problem.experts)
            wanted = max(1.0, local * share)
            entry = self._nearest(row, wanted, other, tokens, tiny)
            if entry is not None:
                limit = _limit(_apart(row, entry, wanted)) * least
                if model.seconds(self.problem, entry.config, local, self.device) <= limit:
                    return Choice(entry.config, "neighbor", f"{key} in {label}", entry)
        return None

    def _nearest(
        self, row: Mapping[int, Entry], wanted: float, other: Problem, tokens: int, tiny: bool
    ) -> Entry | None:
        """The entry with the token count nearest to `wanted` on a log scale that may run a call of `tokens`."""
        for count in sorted(row, key=lambda count: (abs(math.log2(wanted / count)), -count)):
            many = wanted >= count and count * other.top_k / other.experts >= MANY
            if abs(math.log2(wanted / count)) > REACH and not many:
                continue
            config = row[count].config
            if (tiny or config.path != "tiny") and why_not(self.problem, config, self.device, tokens) is None:
                return row[count]
        return None

    def _tables(self) -> Iterator[tuple[str, str, Where, Table]]:
        for source, label, store in self._stores:
            for where, table in store.sections.items():
                yield source, label, where, table


def _apart(row: Mapping[int, Entry], entry: Entry, tokens: float) -> float:
    """How far the token count of `entry` is from `tokens`, in powers of two."""
    return abs(math.log2(tokens / next(count for count, found in row.items() if found is entry)))


def _limit(apart: float) -> float:
    """How much slower than its own choice the model may expect what was tuned that far away."""
    return DOUBT if apart <= 1 else SUBSTITUTE


def distance(one: Problem, other: Problem) -> float:
    """How unlike two problems are, in powers of two; infinite where another kernel would run."""
    if one.gated != other.gated or _kind(one) != _kind(other):
        return math.inf
    sizes = (
        (one.hidden, other.hidden, 1.0),
        (one.intermediate, other.intermediate, 1.0),
        (one.experts, other.experts, 0.5),
        (one.top_k, other.top_k, 0.5),
    )
    return math.sqrt(sum((weight * math.log2(a / b)) ** 2 for a, b, weight in sizes))


def _kind(problem: Problem) -> object:
    math_ = "half" if problem.traits.math in ("bfloat16", "float16") else problem.traits.math
    return replace(problem.traits, math=math_, block_ks=())


def _lenient(path: Path) -> list[Store]:
    """A file that nobody named: where it is not in order, a warning and nothing."""
    try:
        return [Store.read(path)]
    except ConfigError as error:
        _warn_once(str(error))
        return []


@lru_cache(maxsize=256)
def _warn_once(message: str) -> None:
    logger.warning("kernel configurations are left out: %s", message)


@lru_cache(maxsize=1024)
def _say_once(key: str, device: str, sources: str) -> None:
    logger.info(
        "kernel configurations of %s on %s are not measured, from: %s; `moe-core tune --model ... --runner %s` does it",
        key,
        device,
        sources,
        RUNNER,
    )


def _stamp(path: Path | None) -> tuple[Path, int] | None:
    """A path with the time of its last change, so that a file written meanwhile is read again."""
    if path is None:
        return None
    try:
        return path, path.stat().st_mtime_ns
    except OSError:
        return path, 0


@lru_cache(maxsize=64)
def _shared(
    problem: Problem,
    device: Device,
    named: tuple[Path, int] | None,
    user: tuple[Path, int] | None,
    version: str,
    all_experts: int | None,
) -> Configs:
    paths = {"named": named[0] if named else None, "user": user[0] if user else None}
    return Configs(problem, device, **paths, triton=version, all_experts=all_experts)


def configs_for(problem: Problem, device: Device, named: Path | None = None, all_experts: int | None = None) -> Configs:
    """The `Configs` of a problem, shared by all layers that have it. named: as `moe_core.tuning.named_store` says."""
    return _shared(problem, device, _stamp(named), _stamp(default_store(RUNNER)), triton_version(), all_experts)


def bound(binding: Any) -> Configs:
    """The `Configs` for a `moe_core.protocols.Binding`, everything that it may need looked up."""
    named = named_store(binding.request.settings, RUNNER)
    device = this_device(binding.device)
    found = configs_for(Problem.of(binding), device, named, _all_experts(binding))
    found.warm(binding.max_tokens)
    return found


def of(binding: Any, shipped: Path | None = SHIPPED, user: Path | None = None) -> Configs:
    """The `Configs` of someone who never tuned, or only in that file."""
    problem, device = Problem.of(binding), this_device(binding.device)
    return Configs(problem, device, user=user, shipped=shipped, all_experts=_all_experts(binding))


def _all_experts(binding: Any) -> int | None:
    """All of the layer's, where a call's tokens are those of all ranks: the other formats count what arrived here."""
    replicated = binding.format == STANDARD and binding.parallel.tokens == "replicated"
    return int(binding.config.num_experts) if replicated else None
