"""`moe-core tune` for this runner: how variants are timed and checked. What is tried is up to `configs.tuning`."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from moe_core.errors import MoeCoreError
from moe_core.protocols import RunnerHooks, RunningState, TuningJob, TuningRow
from moe_core.testing.tolerances import tolerance
from moe_core.vocabulary import STANDARD
from moe_core_triton import hopper
from moe_core_triton.adapters import standard_reader
from moe_core_triton.calls import Call, ExpertRows
from moe_core_triton.configs.candidates import candidates
from moe_core_triton.configs.checking import expected, sample
from moe_core_triton.configs.compiling import Compilers, brief, recipe
from moe_core_triton.configs.config import LayerConfig, Problem, local_tokens
from moe_core_triton.configs.device import this_device
from moe_core_triton.configs.tuning import Variant, run_job, shipped_for
from moe_core_triton.inputs import live_positions
from moe_core_triton.kernels.launching import interpreting
from moe_core_triton.products import Rows
from moe_core_triton.row_table import most_tiles
from moe_core_triton.sequence import LayerSequence

#: Weights that the input sets of a token count read together, so that no call finds those of the last one in L2.
ROTATION: Final = 240e6
#: The most input sets, and the token count above which one may do.
MOST_SETS, MANY_TOKENS = 16, 512
#: Calls in a graph of few tokens; microseconds of replays that are enough, and how many.
CALLS, ENOUGH_US, READINGS = 8, 15_000.0, 7
#: With many tokens the device rests before a replay, so many times as long as one takes, at most so many seconds. At
#: its power limit (an H200 that multiplies without a break: 683 TFLOP/s instead of 805) clocks are compared, not
#: kernels.
REST, MOST_REST = 3.0, 0.05
#: Clock cycles that the device spins before a replay, while the host enqueues it.
SPIN: Final = 150_000
#: Positions of one GEMM's result that are compared.
COMPARED: Final = 4096


def tune(job: TuningJob, *, shipped: Path | str | None = "auto", compilers: Compilers | None = None) -> list[TuningRow]:
    """Find and store the best configurations of a layer.

    shipped: the folder whose files the default comes from (None: the model's); "auto": this package's own, unless they
    are being written. compilers: workers that outlive the job.
    """
    with ExitStack() as stack, torch.no_grad():
        if compilers is None and job.binding.device.type == "cuda" and not interpreting():
            compilers = stack.enter_context(Compilers(job.binding.device))
        folder = shipped_for(job.store) if isinstance(shipped, str) else shipped
        return run_job(job, LayerBench(job, compilers), shipped=folder)


class _Layer(LayerSequence):
    """A layer whose tensors can be filled with NaN before a kernel writes them: what it forgets is seen."""

    poison = False

    def _rows(self, *arguments: Any) -> Tensor:
        return self._poisoned(super()._rows(*arguments))

    def output(self, rows: ExpertRows, state: RunningState) -> Tensor:
        return self._poisoned(super().output(rows, state))

    def _poisoned(self, tensor: Tensor) -> Tensor:
        if self.poison:
            tensor.view(torch.uint8).fill_(255)  # NaN in every floating-point format
        return tensor


class LayerBench:
    """Times and checks variants of one bound layer."""

    def __init__(self, job: TuningJob, compilers: Compilers | None = None) -> None:
        binding = job.binding
        if binding.format != STANDARD:
            raise MoeCoreError(f"only the format {STANDARD!r} can be tuned, this plan has {binding.format!r}")
        self._job, self._weights, self._compilers = job, job.quant_info, compilers
        self._layer, self._read = _Layer(binding), standard_reader(binding)
        self._device, self._cuda = binding.device, binding.device.type == "cuda"
        self._allowed = 2 * tolerance(binding.config.dtype, binding.scheme.id)
        self._sets: dict[int, list[tuple[ExpertRows, RunningState]]] = {}
        self._right: dict[int, tuple[Tensor, Tensor]] = {}
        self._recipe: bytes | None = None
        # Of the token count that was timed last.
        self._tokens = 0
        self._sound: LayerConfig | None = None
        self._whole: Tensor | None = None
        self._calls: dict[int, list[Call]] = {}
        self._hidden: dict[tuple[int, bool], list[Rows]] = {}
        self._plain: list[Tensor] = []
        self._parts: dict[str, Tensor] = {}

    def compile(self, wanted: Sequence[tuple[int, Variant]], seconds: float) -> Collection[tuple[int, Variant]]:
        """See `configs.tuning.Bench`."""
        if self._compilers is None or not wanted:
            return set(wanted)
        if self._recipe is None:
            self._recipe = recipe(self._job.binding, self._weights, self._inputs(wanted[0][0])[0][0])
        start = time.perf_counter()
        ready = self._compilers.compile(self._recipe, wanted, seconds, self._tiles, self._say_failed)
        text = f"{len(ready)} of {len(wanted)} variants are compiled, after {time.perf_counter() - start:.1f} s"
        self._job.progress(f"{text}{' (the workers broke down)' if self._compilers.broken else ''}")
        return ready

    def _tiles(self, tokens: int, variant: Variant) -> int:
        return most_tiles(tokens * self._layer.top_k, self._layer.experts, variant.config.block_m)

    def _say_failed(self, variant: Variant, problem: str) -> None:
        self._job.progress(f"failed: {variant.text}: {problem}")

    def time(self, tokens: int, variant: Variant, enough: float) -> float | None:
        """See `configs.tuning.Bench`."""
        self._enter(tokens)
        try:
            make = self._layer_calls if variant.part == "layer" else self._gemm_calls
            run = make(variant)
            problem = self._check(variant, run[0])
            if problem is None:
                return self._clocked(run, enough)
        except Exception as error:
            problem = brief(error)
            self._survive(variant, error)
        finally:
            self._layer.poison = False
        self._say_failed(variant, problem)
        return None

    def _survive(self, variant: Variant, error: Exception) -> None:
        """An error of the device that outlives its kernel ends everything."""
        if self._cuda:
            try:
                torch.cuda.synchronize(self._device)
            except RuntimeError as after:
                text = f"the device is unusable after {variant.text}: {brief(error)}"
                raise MoeCoreError(f"{text}; what was found before is stored") from after

    def _enter(self, tokens: int) -> None:
        """Forget what belongs to another token count."""
        if tokens != self._tokens:
            self._tokens, self._sound, self._whole = tokens, None, None
            for held in (self._calls, self._hidden, self._plain, self._parts):
                held.clear()

    def _inputs(self, tokens: int) -> list[tuple[ExpertRows, RunningState]]:
        """Sets of tokens with different experts, enough of them to keep weights out of the cache."""
        if tokens not in self._sets:
            found, used = list[tuple[ExpertRows, RunningState]](), set[int]()
            up, down, experts = self._weights.up.data, self._weights.down.data, max(self._layer.experts, 1)
            an_expert = (up.nbytes + down.nbytes) / experts
            least = 1 if tokens > MANY_TOKENS or not self._cuda else 2
            while len(found) < (MOST_SETS if self._cuda else least):
                state = RunningState()
                rows = self._read(self._job.plan.dispatch(*self._job.inputs(tokens, len(found)), state))
                found.append((rows, state))
                used.update(rows.ids.unique().tolist())  # type: ignore[union-attr]
                if len(found) >= least and (len(used) * an_expert >= ROTATION or tokens > MANY_TOKENS):
                    break
            self._sets[tokens] = found
        return self._sets[tokens]

    def _run(self, rows: ExpertRows, state: RunningState, config: LayerConfig) -> Tensor:
        """The layer, as `adapters.fused_standard` runs it."""
        self._layer.planner.fix(config)
        call = self._layer.prepare(rows, self._weights, state)
        if config.path == "tiny" and call.table is not None:
            raise MoeCoreError("the tiny path does not take this layer")
        if config.path == "tiles" and call.config != config:
            raise MoeCoreError("the specialized kernels do not take this layer")
        return self._layer.finish(self._layer.compute(call, self._weights, state), state)

    def _layer_calls(self, variant: Variant) -> list[Callable[[], Tensor]]:
        sets = self._inputs(self._tokens)
        return [partial(self._run, rows, state, variant.config) for rows, state in sets]

    def _prepared(self, block_m: int) -> list[Call]:
        """Calls of all input sets in tiles of that height, ready for GEMM1."""
        if block_m not in self._calls:
            assert self._sound is not None  # noqa: S101
            # Ordinary kernels, whose height no call changes.
            self._layer.planner.fix(replace(self._sound.plain, block_m=block_m))
            sets = self._inputs(self._tokens)
            self._calls[block_m] = [self._layer.prepare(rows, self._weights, state) for rows, state in sets]
        return self._calls[block_m]

    def _gemm_calls(self, variant: Variant) -> list[Callable[[], Any]]:
        self._need_base()
        layer, weights, block_m, hooks = self._layer, self._weights, variant.config.block_m, RunnerHooks()
        states = [state for _, state in self._inputs(self._tokens)]
        calls = [replace(call, config=variant.config) for call in self._prepared(block_m)]
        if variant.part == "up":
            return [partial(layer._up, call, weights, hooks) for call in calls]
        key = block_m, variant.gemm.specialized
        if key not in self._hidden:
            pairs = zip(self._plain, calls, strict=True)
            self._hidden[key] = [layer._quantized(plain, call, weights.down) for plain, call in pairs]

        def down(call: Call, hidden: Rows, state: RunningState) -> Tensor:
            layer._down(call, hidden, weights.down, hooks, state)
            return call.result  # type: ignore[return-value]

        given = zip(calls, self._hidden[key], states, strict=True)
        return [partial(down, *one) for one in given]

    def _need_base(self) -> None:
        """Results of both GEMMs by a configuration whose layer is right, to compare others with, and GEMM2's input."""
        if self._plain:
            return
        if self._sound is None:
            binding, layer = self._job.binding, self._layer
            problem, device = Problem.of(binding), this_device(self._device)
            tokens = local_tokens(self._tokens, binding.config.num_experts, binding.num_local_experts)
            layer.planner.fix(None)
            others = candidates(problem, tokens, device, 6, call_tokens=max(65, self._tokens))
            for config in (layer.planner.tiles(self._tokens), *others):
                variant = Variant("layer", config)
                if config.path == "tiles" and self._check(variant, self._layer_calls(variant)[0]) is None:
                    break
        if self._sound is None:
            raise MoeCoreError("no configuration gives the right result")
        calls = self._prepared(self._sound.block_m)
        for i, call in enumerate(calls):
            made = self._layer._up(replace(call, config=self._sound), self._weights, RunnerHooks())
            self._plain.append(_numbers(made).to(self._layer.dtype))
            if i == 0:
                done, state = replace(call, config=self._sound), self._inputs(self._tokens)[0][1]
                self._parts["up"] = self._compared(call, "up", self._plain[0])
                self._layer._down(done, made, self._weights.down, RunnerHooks(), state)
                self._parts["down"] = self._compared(call, "down", done.result)

    def _compared(self, call: Call, part: str, rows: Any) -> Tensor:
        """float32: some of a result's rows that count."""
        table: Any = call.table
        live = live_positions(call.rows, table) > 0 if part == "up" else table.local_ids.reshape(-1) >= 0
        step = max(1, table.positions // COMPARED)
        return rows.view(table.positions, -1)[::step][live[::step]].float()

    def _check(self, variant: Variant, run: Callable[[], Any]) -> str | None:
        """What is wrong with a result, or None. The first layer that is right is what others are compared with."""
        self._layer.poison = True
        result = run()
        self._layer.poison = False
        if variant.part != "layer":
            made = _numbers(result) if isinstance(result, Rows) else result
            return self._far(
                self._compared(self._prepared(variant.config.block_m)[0], variant.part, made), self._parts[variant.part]
            )
        if self._whole is None:
            which, wanted = self._wanted()
            problem = self._far(result[which].float(), wanted)
        else:
            problem = self._far(result.float(), self._whole)
        if problem is None:
            self._whole = result.float() if self._whole is None else self._whole
            if self._sound is None and variant.config.path == "tiles":
                self._sound = variant.config
        return problem

    def _wanted(self) -> tuple[Tensor, Tensor]:
        """A few tokens of the first input set, and their results in float32."""
        if self._tokens not in self._right:
            rows = self._inputs(self._tokens)[0][0]
            which = sample(rows.data.shape[0], self._device)
            wanted = expected(self._layer, self._job.binding, rows, self._weights, which)
            self._right[self._tokens] = which, wanted
        return self._right[self._tokens]

    def _far(self, found: Tensor, wanted: Tensor) -> str | None:
        error = float((found - wanted).norm() / wanted.norm().clamp_min(1e-30)) if wanted.numel() else 0.0
        return None if error <= self._allowed else f"wrong by {error:.2g} in relative RMS"  # NaN is wrong too

    def _clocked(self, run: Sequence[Callable[[], Any]], enough: float) -> float:
        """Microseconds of a call: the median of a few readings."""
        if not self._cuda:
            start = time.perf_counter()
            for call in run:
                call()
            return 1e6 * (time.perf_counter() - start) / len(run)
        free, total = torch.cuda.mem_get_info(self._device)
        if free < 0.4 * total:
            torch.cuda.empty_cache()  # memory of earlier graphs, which a capture cannot take back
        times = 1 if self._tokens > MANY_TOKENS else max(1, math.ceil(CALLS / len(run)))
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in [*run] * times:
                call()
        count, readings = len(run) * times, list[float]()
        once = _replay_us(graph)  # brings the graph to the device
        while len(readings) < READINGS and sum(readings) < ENOUGH_US:
            if self._tokens > MANY_TOKENS:
                time.sleep(min(MOST_REST, REST * 1e-6 * once))
            readings.append(_replay_us(graph))
            if readings[0] > enough * count:
                break
        return statistics.median(readings) / count


def _replay_us(graph: torch.cuda.CUDAGraph) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SPIN)
    start.record()
    graph.replay()
    end.record()
    end.synchronize()
    return 1e3 * start.elapsed_time(end)


def _numbers(rows: Rows) -> Tensor:
    """The numbers that quantized rows stand for."""
    if rows.kind == "wide":
        return hopper.natural(rows.data)
    if rows.scale is None or rows.kind == "expert":
        return rows.data if rows.scale is None else rows.data.float()
    data = rows.data.float()
    if rows.kind == "row":
        return data * rows.scale.view(-1, 1)
    return (data * rows.scale.repeat_interleave(128, dim=1)[:, : data.shape[1]]).to(torch.float32)
