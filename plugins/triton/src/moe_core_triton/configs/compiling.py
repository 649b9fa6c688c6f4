"""Compile variants in worker processes, before anything is timed: they share Triton's cache on disk with their parent.

A worker launches what a layer launches, through the same code, on tensors that are alike in all that a kernel is
specialised for (dtypes, sizes but for the numbers of tokens and experts, alignment) and small in the rest: one expert,
and tables whose tiles are all unused, so that the products do nothing.
"""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from types import TracebackType
from typing import Any, Final, Self

import torch  # noqa: TID253 - imported when something is tuned

from moe_core.protocols import Binding, RunnerHooks, RunningState
from moe_core_triton.calls import Call, ExpertRows
from moe_core_triton.configs.tuning import Variant
from moe_core_triton.row_table import RowTable, most_tiles
from moe_core_triton.sequence import LayerSequence
from moe_core_triton.weights import Projection, TritonWeights

MOST_WORKERS: Final = 15
#: Sizes that kernels are specialised for are divisible by this, or not.
DIVISOR: Final = 16


@dataclass(frozen=True, slots=True)
class Recipe:
    """A layer without its tensors. up, down: fields of `Projection`, tensors as (shape, dtype). ids: their dtype;
    mapped: length of the dispatcher's expert map, 0 without one."""

    binding: Binding
    scheme: str
    up: dict[str, Any]
    down: dict[str, Any]
    ids: torch.dtype
    mapped: int


def recipe(binding: Binding, weights: TritonWeights, rows: ExpertRows) -> bytes:
    """Pickled, so that it is made once and compared quickly."""
    # max_tokens: nothing has to be looked up for a layer whose configurations are given.
    bare = replace(binding, runner=None, quant_info=None, group=None, max_tokens=1)
    mapped = 0 if rows.expert_map is None else rows.expert_map.shape[0]
    assert rows.ids is not None  # noqa: S101 - the format `standard`
    return pickle.dumps(
        Recipe(bare, weights.scheme, _outline(weights.up), _outline(weights.down), rows.ids.dtype, mapped)
    )


def _outline(projection: Projection) -> dict[str, Any]:
    found = {}
    for name in (f.name for f in fields(Projection) if f.name != "descriptors"):
        value = getattr(projection, name)
        if isinstance(value, torch.Tensor):
            # What is one number an expert keeps its length, which strides depend on.
            shape = tuple(value.shape) if value.dim() == 1 else (1, *value.shape[1:])
            value = (shape, value.dtype)
        found[name] = value
    return found


def _made(outline: dict[str, Any], device: torch.device) -> Projection:
    values = {}
    for name, value in outline.items():
        if isinstance(value, tuple):
            shape, dtype = value
            if name == "data":
                value = torch.empty(shape, dtype=dtype, device=device)
            else:
                value = torch.ones(shape, dtype=dtype, device=device)
        values[name] = value
    return Projection(**values)


class Outlined:
    """A layer from its recipe, able to launch any variant."""

    def __init__(self, made_from: Recipe) -> None:
        self.recipe, self.device = made_from, made_from.binding.device
        self.layer = LayerSequence(made_from.binding)
        up, down = _made(made_from.up, self.device), _made(made_from.down, self.device)
        self.weights = TritonWeights(made_from.scheme, up, down)

    def rows(self, tokens: int) -> ExpertRows:
        """That many tokens for the one expert."""
        layer, device, mapped = self.layer, self.device, self.recipe.mapped
        return ExpertRows(
            torch.zeros(tokens, layer.config.hidden_size, dtype=layer.dtype, device=device),
            tokens=tokens,
            weights=torch.zeros(tokens, layer.top_k, device=device),
            ids=torch.zeros(tokens, layer.top_k, dtype=self.recipe.ids, device=device),
            expert_map=torch.zeros(mapped, dtype=torch.int32, device=device) if mapped else None,
        )

    def launch(self, tokens: int, variant: Variant) -> None:
        """Every kernel of the variant, as for a call of `tokens` tokens."""
        layer, config, state = self.layer, variant.config, RunningState()
        layer.planner.fix(config)
        rows = self.rows(small(tokens))
        call = layer.prepare(rows, self.weights, state)
        if call.table is None:
            layer.compute(call, self.weights, state)
            return
        if variant.part == "layer":
            ids = torch.zeros(tokens, layer.top_k, dtype=self.recipe.ids, device=self.device)
            layer._table(replace(rows, ids=ids), config.block_m)
        unused = replace(call, table=self._unused(call, tokens, variant))
        if variant.part != "down":
            layer._up(unused, self.weights, RunnerHooks())
        if variant.part != "up":
            hidden = layer._quantized(
                layer._rows(call.table.positions, self.weights.up.n, call), call, self.weights.down
            )
            layer._down(unused, hidden, self.weights.down, RunnerHooks(), state)
        if variant.part == "layer":
            layer.finish(unused, state)

    def _unused(self, call: Call, tokens: int, variant: Variant) -> RowTable:
        """The table without a used tile. Persistent kernels are specialised for the number of tiles."""
        config, tiles, table = variant.config, 1, call.table
        assert table is not None  # noqa: S101
        if config.up.persistent or config.down.persistent:
            tiles = most_tiles(tokens * self.layer.top_k, self.layer.experts, config.block_m)
        none = torch.full((tiles,), -1, dtype=torch.int32, device=self.device)
        return replace(table, tile_expert=none, tile_start=torch.zeros_like(none))


def small(tokens: int) -> int:
    """A number of tokens that kernels are specialised alike for."""
    return tokens if tokens <= DIVISOR else DIVISOR + tokens % DIVISOR


_outlined: dict[bytes, Outlined] = {}


def _begin(device: str) -> None:
    torch.set_num_threads(1)
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device))


def _compile(made_from: bytes, tokens: int, variant: Variant) -> str | None:
    """In a worker. Returns why the compiler refuses; other problems are left to the parent to meet again."""
    try:
        if made_from not in _outlined:
            _outlined.clear()
            _outlined[made_from] = Outlined(pickle.loads(made_from))
        with torch.no_grad():
            _outlined[made_from].launch(tokens, variant)
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
    except Exception as error:
        return brief(error) if is_compilers(error) else None
    return None


def is_compilers(error: BaseException) -> bool:
    """Whether Triton or the assembler refused: no other process will fare better."""
    return type(error).__module__.startswith("triton") or "PassManager" in str(error)


def brief(error: BaseException) -> str:
    """One line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else ''}"


class Compilers:
    """Worker processes, each with a context of its own on the device. They start with the first batch."""

    def __init__(self, device: torch.device, workers: int | None = None) -> None:
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        self._device = device.type if index is None else f"{device.type}:{index}"
        self.workers = workers or max(1, min(len(os.sched_getaffinity(0)), MOST_WORKERS))
        self._pool: ProcessPoolExecutor | None = None
        self._done: dict[tuple[Any, ...], str | None] = {}
        self.broken = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def compile(
        self,
        made_from: bytes,
        wanted: Sequence[tuple[int, Variant]],
        seconds: float,
        tiles: Callable[[int, Variant], int],
        failed: Callable[[Variant, str], Any],
    ) -> set[tuple[int, Variant]]:
        """Those that are compiled at the end of that time, or that this process may as well compile itself.

        tiles: of a call's table. failed: told once of each variant that the compiler refuses.
        """
        if self.broken:
            return set(wanted)
        keys = {item: self._key(made_from, *item, tiles) for item in wanted}
        deadline = time.monotonic() + seconds
        try:
            self._run(made_from, keys, deadline, failed)
        except BrokenProcessPool:
            self.broken = True
            return set(wanted)
        return {item for item, key in keys.items() if key in self._done and self._done[key] is None}

    def _run(
        self,
        made_from: bytes,
        keys: dict[tuple[int, Variant], tuple[Any, ...]],
        deadline: float,
        failed: Callable[[Variant, str], Any],
    ) -> None:
        pool = self._pool = self._pool or ProcessPoolExecutor(
            self.workers, mp_context=get_context("spawn"), initializer=_begin, initargs=(self._device,)
        )
        futures: dict[Future[str | None], tuple[tuple[Any, ...], Variant]] = {}
        given = set(self._done)
        for (tokens, variant), key in keys.items():
            if key not in given:
                given.add(key)
                futures[pool.submit(_compile, made_from, tokens, variant)] = key, variant
        finished, late = wait(futures, timeout=max(0.0, deadline - time.monotonic()))
        for future in late:
            future.cancel()
        for future in finished:
            key, variant = futures[future]
            self._done[key] = problem = future.result()
            if problem is not None:
                failed(variant, problem)

    def _key(
        self, made_from: bytes, tokens: int, variant: Variant, tiles: Callable[[int, Variant], int]
    ) -> tuple[Any, ...]:
        """Equal where the same kernels are compiled."""
        if variant.part == "layer":
            return made_from, variant, tokens
        table = (tiles(tokens, variant) - 1).bit_length() if variant.gemm.persistent else 0
        return made_from, variant, small(tokens), table
