"""Replays and their times: CUDA graphs with events on a GPU, plain calls with a wall clock on a CPU (dry runs)."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import torch
from torch import Tensor

#: Seconds that one contestant may take at one point.
SECONDS: Final = 0.25
ROUNDS: Final = 25
#: Calls a replay: enough for this many microseconds, so that starting a graph does not count.
REPLAY_US: Final = 1500.0
#: Where operations are the floor, the GPU rests before a replay: that many times as long as the last one took, at most
#: so many seconds. An H200 that multiplies without a break is at its power limit (8192^3: 683 TFLOP/s, not 805),
#: and then clocks are compared, not kernels. The floor's rates are a rested GPU's too.
REST: Final = 3.0
MOST_REST: Final = 0.1
#: Clock cycles that the device spins before a replay, while the host enqueues it.
SPIN_CYCLES: Final = 400_000

Calls = Sequence[Callable[[], Tensor]]


class Replay:
    """Some calls one after another. `outs` are the outputs of the last replay."""

    def __init__(self, calls: Calls, device: torch.device) -> None:
        self._calls, self._graph, self.count = calls, None, len(calls)
        self.outs: list[Tensor] = []
        if device.type != "cuda":
            self.run()
            return
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:  # compiles, and allocates what a capture may not
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self.outs = [call() for call in calls]

    def run(self) -> None:
        """Once through all calls."""
        if self._graph is None:
            self.outs = [call() for call in self._calls]
        else:
            self._graph.replay()

    def poison(self) -> None:
        """NaN over every output: what a replay does not write is seen."""
        for out in self.outs:
            out.fill_(float("nan"))


def calls_per_replay(floor_us: float, sets: int) -> int:
    """A multiple of the number of sets."""
    return sets * max(1, min(64, round(REPLAY_US / max(floor_us, 1.0))) // sets)


def take_turns(
    replays: dict[str, Replay], device: torch.device, seconds: float = SECONDS, *, rest: bool = False
) -> dict[str, list[float]]:
    """Microseconds of one call, a round each. Who comes first changes, so that nobody always follows the same one.

    rest: let the GPU cool down before each replay.
    """
    once = {name: _microseconds(replay, device) for name, replay in replays.items()}
    rounds = {name: max(3, min(ROUNDS, int(seconds * 1e6 / (us * replays[name].count)))) for name, us in once.items()}
    times: dict[str, list[float]] = {name: [] for name in replays}
    order = list(replays)
    for number in range(max(rounds.values(), default=0)):
        order = order[1:] + order[:1]
        for name in order:
            if number < rounds[name]:
                if rest:
                    time.sleep(min(MOST_REST, REST * 1e-6 * once[name] * replays[name].count))
                times[name].append(_microseconds(replays[name], device))
    return times


def _microseconds(replay: Replay, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        replay.run()
        return 1e6 * (time.perf_counter() - start) / replay.count
    return 1e3 * _milliseconds(replay.run) / replay.count


def _milliseconds(run: Callable[[], Any]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN_CYCLES)
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def ceilings(device: torch.device) -> dict[str, float]:
    """What this device reaches now: copy and read of 4 GiB, products of 8192^3 on random data."""

    def seconds(run: Callable[[], Any]) -> float:
        for _ in range(3):
            run()
        return statistics.median(_milliseconds(run) for _ in range(11)) / 1e3

    source = torch.ones(2**30, device=device)
    target = torch.empty_like(source)
    found = {"copy_tb_s": 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e12}
    found["read_tb_s"] = source.nbytes / seconds(source.sum) / 1e12
    a, b = (torch.randn(8192, 8192, device=device, dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3
    found["bf16_tflop_s"] = flops / seconds(lambda: a @ b.t()) / 1e12
    try:
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=device)

        def fp8() -> Tensor:
            return torch._scaled_mm(a8, b8.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

        found["fp8_tflop_s"] = flops / seconds(fp8) / 1e12
    except (RuntimeError, AttributeError) as error:
        print(f"no fp8 product here: {str(error).splitlines()[0]}")
    return {name: round(value, 3) for name, value in found.items()}
