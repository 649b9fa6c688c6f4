"""`moe-core bench`: time every usable candidate of this machine on one layer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.console import RenderableType

from moe_core.api import detect_hardware, resolve
from moe_core.cli._layer import Sizes, layer_options, parallel_options, read_layer, read_parallel
from moe_core.cli._report import Report, facts, hanging, heading, progress, reports, table
from moe_core.cli._smoke import choices
from moe_core.config import MoeConfig
from moe_core.errors import MoeCoreError
from moe_core.explanation import describe_layer, describe_parallel
from moe_core.measurements import Measurements
from moe_core.registry import default_registry
from moe_core.request import PlanRequest
from moe_core.resolution import Candidate

if TYPE_CHECKING:
    import torch

    from moe_core.moe_plan import MoePlan
    from moe_core.weights import CanonicalWeights

#: Tokens of the comparison with the reference runner.
CHECK_TOKENS: Final = 3


@dataclasses.dataclass(slots=True)
class Row:
    """One candidate: its times in milliseconds, or what went wrong."""

    candidate: str
    ok: bool
    error: float | None = None
    ms: dict[int, float] = dataclasses.field(default_factory=dict)
    spread: dict[int, tuple[float, float]] = dataclasses.field(default_factory=dict)
    detail: str = ""


@click.command()
@layer_options
@click.option("--tokens", type=Sizes(), default="1,8,64", show_default=True, help="Numbers of tokens of a call.")
@click.option("--runner", "runners", multiple=True, metavar="NAME", help="Only this runner (repeatable).")
@parallel_options
@click.option("--save", type=click.Path(dir_okay=False, path_type=Path), help="Add the times to this file.")
@reports
def bench(
    model: str,
    quant: str | None,
    group_size: int | None,
    dtype: str | None,
    tokens: tuple[int, ...],
    runners: tuple[str, ...],
    ep: int,
    tp: int,
    placement: str,
    save: Path | None,
) -> Report:
    """Time every usable candidate of this machine on MODEL's layer, with random weights and routing.

    All take turns; the medians of their turns are shown. Each is first compared with the reference runner. With --ep or
    --tp, the share of rank 0 is timed, without communication. A file written by --save ranks candidates by time where
    MOE_CORE_MEASUREMENTS names it. Exit code 1 where a candidate fails or is wrong, 3 where there is none.
    """
    registry = default_registry()
    layer = read_layer(registry, model, quant, group_size, dtype)
    saved = Measurements.read(save) if save is not None and save.exists() else Measurements()
    for name in runners:
        registry.runner(name)  # an unknown name is an error with the closest ones
    # The ranks' sums are not part of what is timed: the caller says that it does them.
    parallel = read_parallel(ep, tp, placement, reduce="caller")
    hardware = detect_hardware(registry)
    asked: dict[str, Any] = {"max_tokens": max(*tokens, CHECK_TOKENS), "hardware": hardware, "registry": registry}
    free = {"runner": None, "dispatcher": None, "path": None, "measurements": None}
    resolution = resolve(layer.config, parallel, **asked, **free)
    candidates = [c for c in resolution.candidates if not runners or c.runner in runners]
    request = resolution.request
    if not candidates:
        hint = "moe-core explain --model ... says why"
        nothing = hanging(f"- nothing that is installed can run this layer here; {hint}")
        return Report({"model": layer.name, "candidates": [], "hint": hint}, [nothing], code=3)

    import torch

    from moe_core.cli._timing import random_weights, require_memory

    device = torch.device(hardware.torch_device_type)
    copies = sum(not registry.runners[candidate.runner].last_resort for candidate in candidates)
    stored = require_memory(layer.config, parallel, registry.schemes[layer.config.scheme], copies, device)
    with torch.no_grad(), progress("making random weights, binding every candidate, comparing with the reference"):
        weights = random_weights(layer.config, parallel, device)
        rows, plans = _bind_and_check(layer.config, request, candidates, weights, asked)
    with progress(f"timing {len(plans)} candidates at {', '.join(map(str, tokens))} tokens"):
        _time(rows, plans, layer.config, tokens, device)
    if save is not None:
        for row in rows:
            if row.ok:
                saved = saved.with_result(request, row.candidate, row.ms)
        _write(saved, save)
    show = _show(layer.name, request, rows, tokens, stored, save)
    data = {
        "model": layer.name,
        "hardware": str(hardware),
        "layer": describe_layer(request),
        "parallel": describe_parallel(request),
        "weight_bytes": stored,
        "candidates": [dataclasses.asdict(row) for row in rows],
        "saved": str(save) if save else None,
    }
    return Report(data, show, code=0 if all(row.ok for row in rows) else 1)


def _bind_and_check(
    config: MoeConfig,
    request: PlanRequest,
    candidates: list[Candidate],
    weights: CanonicalWeights,
    asked: dict[str, Any],
) -> tuple[list[Row], dict[str, MoePlan]]:
    """Bind every candidate, and compare a few tokens with the reference runner on the same weights."""
    from moe_core.api import plan
    from moe_core.cli._timing import random_inputs
    from moe_core.testing.tolerances import assert_close, relative_error

    few = random_inputs(config, CHECK_TOKENS, weights.device)
    free = {"path": None, "measurements": None}
    oracle = plan(config, weights, request.parallel, **asked, runner="reference", dispatcher="standard", **free)(*few)
    rows, plans = [], {}
    for candidate in candidates:
        row = Row(candidate.id, ok=True)
        rows.append(row)
        try:
            bound = plan(config, weights, request.parallel, **asked, **choices(candidate))
            result = bound(*few)
            row.error = relative_error(result, oracle)
            assert_close(result, oracle, config.dtype, config.scheme, arch=request.hardware.arch)
        except Exception as problem:  # a backend may raise anything; here that is an answer
            wrong = isinstance(problem, AssertionError)
            row.ok, row.detail = False, str(problem) if wrong else f"it raised {type(problem).__name__}: {problem}"
        else:
            plans[candidate.id] = bound
    return rows, plans


def _time(
    rows: list[Row], plans: dict[str, MoePlan], config: MoeConfig, tokens: tuple[int, ...], device: torch.device
) -> None:
    from moe_core.cli._timing import measure

    for name, timed in measure(plans, config, tokens, device).items():
        row = next(row for row in rows if row.candidate == name)
        row.ms, row.spread = timed.median, timed.spread


def _write(measurements: Measurements, path: Path) -> None:
    try:
        measurements.write(path)
    except OSError as error:
        raise MoeCoreError(f"{str(path)!r} cannot be written: {error.strerror}") from error


def _show(
    model: str, request: PlanRequest, rows: list[Row], tokens: tuple[int, ...], stored: int, save: Path | None
) -> list[RenderableType]:
    header: list[tuple[str, object]] = [
        ("hardware", request.hardware),
        ("model", model),
        ("layer", describe_layer(request)),
        ("parallel", describe_parallel(request)),
        ("weights", f"{stored:,} bytes"),
    ]
    checks = [
        ("PASS" if row.ok else "FAIL", row.candidate, "-" if row.error is None else f"{row.error:.1e}") for row in rows
    ]
    times = []
    for t in tokens:
        timed = sorted((row for row in rows if t in row.ms), key=lambda row: row.ms[t])
        for row in timed:
            low, high = row.spread[t]
            times.append(
                (t, row.candidate, f"{row.ms[t]:.3f}", f"{row.ms[t] / timed[0].ms[t]:.2f}", f"{low:.3f}-{high:.3f}")
            )
    show: list[RenderableType] = [
        facts(header),
        table(("check", "combination", "error"), checks, title="against the reference runner"),
        table(("tokens", "combination", "ms", "x best", "min-max"), times, title="one call, median of rounds"),
    ]
    failed = [row for row in rows if row.detail]
    if failed:
        show.append(heading("problems"))
        show += [hanging(f"- {row.candidate}: {row.detail}") for row in failed]
    if save is not None:
        show += [heading(f"saved to {save}"), hanging(f"-> MOE_CORE_MEASUREMENTS={save} ranks candidates by it")]
    return show
