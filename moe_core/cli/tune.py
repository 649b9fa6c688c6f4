"""`moe-core tune`: a runner measures its kernels on one layer, and keeps the best."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import RenderableType

from moe_core import _lazy
from moe_core.api import detect_hardware, resolve
from moe_core.cli._layer import Sizes, layer_options, parallel_options, read_layer, read_parallel
from moe_core.cli._report import Report, facts, hanging, heading, progress, reports, table
from moe_core.cli._smoke import choices
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, MoeCoreError
from moe_core.explanation import describe_layer, describe_parallel
from moe_core.protocols import TuningJob, TuningRow
from moe_core.registry import Registry, default_registry
from moe_core.request import PlanRequest
from moe_core.resolution import Candidate
from moe_core.settings import ENVIRONMENT
from moe_core.tuning import default_store


@click.command()
@layer_options
@click.option(
    "--tokens",
    type=Sizes(),
    default="1,8,64,256,1024,4096",
    show_default=True,
    help="Numbers of tokens of a call; those between them use the nearest.",
)
@click.option("--runner", metavar="NAME", help="The runner to tune; else the best one here that can be tuned.")
@click.option(
    "--budget",
    default=300.0,
    show_default=True,
    type=click.FloatRange(min=0, min_open=True),
    help="Seconds for all token counts together.",
)
@parallel_options
@click.option(
    "--store",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Add the results to this file; else to the one of this user, which every plan reads.",
)
@reports
def tune(
    model: str,
    quant: str | None,
    group_size: int | None,
    dtype: str | None,
    tokens: tuple[int, ...],
    runner: str | None,
    budget: float,
    ep: int,
    tp: int,
    placement: str,
    store: Path | None,
) -> Report:
    """Let a runner find its best kernels for MODEL's layer on this machine, with random weights and routing.

    What it finds goes to a file that plans read when they are bound. With --ep or --tp, rank 0's share is tuned. Exit
    code 1 where the budget ended before every token count was reached, 3 where nothing that can be tuned is usable.
    """
    registry = default_registry()
    tunable = sorted(name for name, spec in registry.runners.items() if spec.tune is not None)
    if runner is not None and registry.runner(runner).tune is None:  # an unknown name is an error of the registry
        known = f"these can: {', '.join(tunable)}" if tunable else "no installed runner can"
        raise ConfigError(f"runner {runner!r} has nothing to tune", hint=known)
    layer, tokens = read_layer(registry, model, quant, group_size, dtype), tuple(sorted(tokens))
    parallel = read_parallel(ep, tp, placement, reduce="caller")
    hardware = detect_hardware(registry)
    asked: dict[str, Any] = {"max_tokens": max(tokens), "hardware": hardware, "registry": registry}
    free = {"runner": None, "dispatcher": None, "path": None, "measurements": None}
    resolution = resolve(layer.config, parallel, **asked, **free)
    wanted = tunable if runner is None else [runner]
    candidate = next((c for c in resolution.candidates if c.runner in wanted), None)
    if candidate is None:
        hint = f"nothing that can be tuned ({', '.join(wanted) or 'no runner here can'}) is usable for this layer here"
        says = hanging(f"- {hint}; moe-core explain --model ... says why")
        return Report({"model": layer.name, "rows": [], "hint": hint}, [says], code=3)
    path = store if store is not None else default_store(candidate.runner)
    start = time.perf_counter()
    with progress(f"tuning {candidate.runner} at {', '.join(map(str, tokens))} tokens") as say:
        stored, rows = _tune(layer.config, parallel, candidate, registry, asked, (tokens, budget, path, say))
    missed = [t for t in tokens if t not in {row.tokens for row in rows}]
    request = resolution.request
    data = {
        "model": layer.name,
        "hardware": str(hardware),
        "layer": describe_layer(request),
        "parallel": describe_parallel(request),
        "runner": candidate.runner,
        "weight_bytes": stored,
        "budget_s": budget,
        "seconds": time.perf_counter() - start,
        "rows": [dataclasses.asdict(row) for row in rows],
        "not_reached": missed,
        "store": str(path),
    }
    show = _show(layer.name, request, candidate, rows, missed, path, named=store is not None)
    return Report(data, show, code=1 if missed else 0)


def _tune(
    config: MoeConfig,
    parallel: ParallelConfig,
    candidate: Candidate,
    registry: Registry,
    asked: dict[str, Any],
    how: tuple[tuple[int, ...], float, Path, Any],
) -> tuple[int, list[TuningRow]]:
    """Bytes of the weights, and the runner's rows by tokens. What the runner raises names it."""
    import torch

    from moe_core.api import plan
    from moe_core.cli._timing import random_inputs, random_weights, require_memory

    tokens, budget, path, say = how
    spec = registry.runners[candidate.runner]
    device = torch.device(asked["hardware"].torch_device_type)
    stored = require_memory(config, parallel, registry.schemes[config.scheme], 1, device)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise MoeCoreError(f"{str(path.parent)!r} cannot be made: {error.strerror}") from error
    with torch.no_grad():
        weights = random_weights(config, parallel, device)
        bound = plan(config, weights, parallel, **asked, **choices(candidate))
        del weights  # the plan keeps what it needs
        job = TuningJob(
            plan=bound,
            binding=bound._binding,
            quant_info=bound.quant_info,
            tokens=tokens,
            budget_s=budget,
            inputs=lambda count, seed: random_inputs(config, count, device, seed),
            store=path,
            progress=say,
        )
        rows = _lazy.call(str(spec.tune), spec.subject, job)
    return stored, sorted(rows, key=lambda row: row.tokens)


def _show(
    model: str,
    request: PlanRequest,
    candidate: Candidate,
    rows: Sequence[TuningRow],
    missed: list[int],
    path: Path,
    *,
    named: bool,
) -> list[RenderableType]:
    header: list[tuple[str, object]] = [
        ("hardware", request.hardware),
        ("model", model),
        ("layer", describe_layer(request)),
        ("parallel", describe_parallel(request)),
        ("runner", candidate.runner),
    ]
    times = [
        (row.tokens, f"{row.default_us:.1f}", row.source, f"{row.tuned_us:.1f}", _share(row), row.tried) for row in rows
    ]
    show: list[RenderableType] = [
        facts(header),
        table(("tokens", "default us", "from", "tuned us", "default %", "tried"), times, title="one call"),
        heading("chosen"),
        *(hanging(f"- {row.tokens}: {row.tuned}") for row in rows),
    ]
    if missed:
        show += [heading("problems"), hanging(f"- the budget ended before {', '.join(map(str, missed))} tokens")]
        show.append(hanging("-> give --budget more seconds, or fewer --tokens; what was reached is stored"))
    if rows:
        show.append(heading(f"stored in {path}"))
        variable = ENVIRONMENT["tuning"]
        show.append(hanging(f"-> {variable}={path} uses it" if named else "-> every plan of this user reads it"))
    return show


def _share(row: TuningRow) -> str:
    """How much of the tuned speed the default has, in per cent."""
    return f"{100 * row.tuned_us / row.default_us:.0f}" if row.default_us > 0 else "-"
