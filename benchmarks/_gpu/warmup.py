"""Compile everything before anything is timed: processes side by side that share Triton's cache on disk."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from shapes import find

from . import making
from .contestants import ours
from .floors import expert_bytes
from .points import brief

#: Device memory that stays free, for others' contexts.
RESERVE = 6 << 30


@dataclass(frozen=True, slots=True)
class Unit:
    """One shape in one scheme, at some token counts. All calls are made with max_tokens, as in the measurement."""

    shape: str
    scheme: str
    tokens: tuple[int, ...]
    max_tokens: int
    runners: tuple[str, ...]


def units(
    pairs: list[tuple[str, str]], tokens: tuple[int, ...], runners: tuple[str, ...], processes: int
) -> list[Unit]:
    """Work for about that many processes: token counts of a layer are split where there are fewer layers."""
    parts = max(1, min(len(tokens), processes // max(1, len(pairs))))
    return [
        Unit(shape, scheme, tokens[part::parts], max(tokens), runners)
        for part in range(parts)
        for shape, scheme in pairs
    ]


def warm(work: list[Unit], processes: int, seconds: float) -> str:
    """Run all units, at most `processes` at a time and for at most that long. Returns what happened, in words."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "_gpu.warmup"])
    start, waiting, failed = time.monotonic(), list(work), 0
    running: list[Any] = []
    lock = os.path.join(tempfile.gettempdir(), f"moe_core_warmup_{os.getpid()}.lock")
    while (waiting or running) and time.monotonic() - start < seconds:
        while waiting and len(running) < processes:
            process = context.Process(target=_compile, args=(waiting.pop(0), lock, start + seconds))
            process.start()
            running.append(process)
        failed += sum(1 for p in running if p.exitcode not in (None, 0))
        running = [p for p in running if p.exitcode is None]
        time.sleep(0.05)
    for process in running:
        process.terminate()
    for process in running:
        process.join()
    Path(lock).unlink(missing_ok=True)
    rest = f", {len(waiting) + len(running)} not finished" if waiting or running else ""
    return f"{len(work)} units in {time.monotonic() - start:.0f} s ({failed} failed{rest})"


def _compile(unit: Unit, lock: str, deadline: float) -> None:
    device = torch.device("cuda")
    shape = find(unit.shape)
    config = shape.config(unit.scheme)
    rows = unit.max_tokens * shape.top_k
    need = int(2.2 * shape.experts * expert_bytes(shape, unit.scheme)) + rows * (3 * shape.inner + shape.hidden) * 2
    failed = False
    with torch.no_grad():
        with _memory(lock, need + RESERVE, deadline):
            weights = making.random_weights(config, device, 0)
            bound = {name: ours(name).bind(config, weights, unit.max_tokens) for name in unit.runners}
        for tokens in unit.tokens:
            batch = making.random_inputs(shape, tokens, "uniform", device, tokens)
            for name, call in bound.items():
                try:
                    call(batch)
                    torch.cuda.synchronize()
                except Exception as error:
                    print(f"warm-up of {name}, {unit.shape} {unit.scheme} T={tokens}: {brief(error)}", flush=True)
                    failed = True
    raise SystemExit(int(failed))


@contextlib.contextmanager
def _memory(lock: str, need: int, deadline: float) -> Iterator[None]:
    """Wait until that much is free, and keep others from taking it meanwhile."""
    with open(lock, "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        while torch.cuda.mem_get_info()[0] < need and time.monotonic() < deadline:
            time.sleep(0.2)
        yield
