"""One point: everyone who can run it is captured, checked and timed in turn."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import Shape
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.weights import CanonicalWeights

from . import floors, making, timing
from .checking import limit, sample
from .contestants import Bound, Contestant

Row = dict[str, Any]


class BrokenDevice(RuntimeError):
    """The device answers every call with an error: this process can measure nothing more."""


@dataclass(slots=True)
class Layer:
    """One shape in one scheme: copies of its weights, and who is bound to them. Made when they are needed."""

    shape: Shape
    scheme: str
    device: torch.device
    max_tokens: int
    seed: int
    config: MoeConfig = field(init=False)
    weights: list[CanonicalWeights] = field(init=False)
    _bound: dict[tuple[str, int], Bound] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.config = self.shape.config(self.scheme)
        self.weights = [making.random_weights(self.config, self.device, self.seed)]

    def bound(self, contestant: Contestant, copy: int) -> Bound:
        """A contestant, bound to that copy of the weights."""
        while len(self.weights) <= copy:
            self.weights.append(making.copy_of(self.weights[0]))
        key = (contestant.name, copy)
        if key not in self._bound:
            self._bound[key] = contestant.bind(self.config, self.weights[copy], self.max_tokens)
        return self._bound[key]

    def forget(self, contestant: Contestant) -> None:
        """Free what a contestant holds."""
        self._bound = {key: call for key, call in self._bound.items() if key[0] != contestant.name}


def measure(
    layer: Layer, contestants: list[Contestant], tokens: int, routing: str, seed: int, seconds: float
) -> Iterator[Row]:
    """A row for each contestant that can run the layer, with `problem` where it failed or is wrong.

    Raises BrokenDevice after the row of the contestant that broke it.
    """
    shape, device = layer.shape, layer.device
    number = making.number_of_sets(tokens) if device.type == "cuda" else 2
    sets = [making.random_inputs(shape, tokens, routing, device, seed + i) for i in range(number)]
    each = floors.expert_bytes(shape, layer.scheme)
    copies = making.copies_needed(sets, each) if device.type == "cuda" else 1
    activated = statistics.mean(batch.activated for batch in sets)
    work = floors.work(shape, layer.scheme, tokens, activated)
    count = timing.calls_per_replay(work.floor_us, len(sets)) if device.type == "cuda" else len(sets)
    checked = seed % len(sets)
    wanted = sample(layer.config, layer.weights[0], sets[checked], seed)
    common: Row = {
        "shape": shape.name,
        "scheme": layer.scheme,
        "tokens": tokens,
        "routing": routing,
        "activated": round(activated, 2),
        "floor_us": round(work.floor_us, 3),
        "rested": work.by_operations,
        "sets": len(sets),
        "copies": copies,
        "calls": count,
        "error_limit": limit(layer.scheme),
    }
    replays: dict[str, timing.Replay] = {}
    errors: dict[str, float] = {}
    began: dict[str, float] = {}
    for contestant in contestants:
        if contestant.fits(layer.config) is not None:
            continue
        start = time.perf_counter()
        try:
            calls = [_call(layer.bound(contestant, i % copies), sets[i % len(sets)]) for i in range(max(count, copies))]
            replay = timing.Replay(calls, device)
            replay.poison()
            replay.run()
            errors[contestant.name] = worst(replay.outs, len(sets), checked, wanted.error)
            replays[contestant.name] = replay
        except Exception as error:  # a kernel may fail in any way; the others go on
            yield common | {"contestant": contestant.name, "ok": False, "us": None, "problem": brief(error)}
            layer.forget(contestant)
            check_alive(device, error)
        began[contestant.name] = time.perf_counter() - start
    try:
        times = timing.take_turns(replays, device, seconds, rest=work.by_operations and device.type == "cuda")
    except Exception as error:  # a kernel that failed only now: nobody can tell whose
        for name in replays:
            yield common | {"contestant": name, "ok": False, "us": None, "problem": brief(error)}
        check_alive(device, error)
        return
    for name, values in times.items():
        us = statistics.median(values)
        right = errors[name] <= limit(layer.scheme)
        row = common | {
            "contestant": name,
            "ok": right,
            "us": round(us, 3),
            "us_min": round(min(values), 3),
            "us_max": round(max(values), 3),
            "rounds": len(values),
            "percent": round(100 * work.floor_us / us, 1),
            "gb_per_s": round(work.bytes / us / 1e3, 1),
            "tflop_per_s": round(work.flops / us / 1e6, 2),
            "error": float(f"{errors[name]:.3g}"),
            "start_seconds": round(began[name], 2),
        }
        yield row if right else row | {"problem": f"wrong: relative error {errors[name]:.3g}"}


def _call(bound: Bound, batch: making.Inputs) -> Callable[[], Tensor]:
    return lambda: bound(batch)


def worst(outs: list[Tensor], sets: int, checked: int, error: Callable[[Tensor], float]) -> float:
    """The largest error of the calls on the checked batch; NaN where any output of any call is not finite."""
    found = [error(out) for out in outs[checked::sets]]
    if not all(bool(torch.isfinite(out).all()) for out in outs) or any(e != e for e in found):
        return float("nan")
    return max(found)


def brief(error: BaseException) -> str:
    """One line of an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def check_alive(device: torch.device, error: BaseException) -> None:
    """Raise BrokenDevice where the device cannot go on after `error`."""
    gc.collect()
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception as broken:
        raise BrokenDevice(brief(error)) from broken
