"""Tune the Triton runner on the layers of `shapes.py`: makes the file that its package ships, or judges it.

    export PYTHONPATH=.:plugins/triton/src
    python benchmarks/tune_h200.py --budget 560 --out bench-out
    python benchmarks/tune_h200.py --holdout --shipped bench-out/nvidia_h200.json --out bench-out

The first writes OUT/nvidia_h200.json from the layers that may be tuned, the most important first, each with an equal
share of what is left of the budget; run again with the same OUT, it goes on from there. `--holdout` tunes the layers on
which nothing shipped was tuned, into OUT/holdout.json, to see what their defaults are worth. Rows of both go to
OUT/tune_rows.jsonl. Timing and search are `moe_core_triton.tune`, as in `moe-core tune`; the processes that compile
serve all layers.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import statistics
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from _gpu import making
from moe_core_triton.configs.compiling import Compilers
from moe_core_triton.configs.files import SHIPPED
from moe_core_triton.plugin import plugin
from moe_core_triton.tune import tune
from rich.console import Console
from rich.table import Table
from shapes import NEVER_TUNED, SHAPES, TINY, TOKENS, find
from torch import Tensor

import moe_core
from moe_core.config import MoeConfig
from moe_core.errors import MoeCoreError
from moe_core.protocols import TuningJob, TuningRow
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.topk import TopKOutput

#: What is shipped, the most important first.
PROBLEMS = (
    "qwen3-30b-a3b:bf16",
    "qwen3-30b-a3b:fp8_block128",
    "gpt-oss-120b:mxfp4_w4a16",
    "deepseek-v3-ep8:fp8_block128",
    "mixtral-8x7b:bf16",
    "qwen3-235b-a22b:fp8_block128",
    "olmoe:bf16",
    "glm-4.5-air:fp8_block128",
    "deepseek-v3-ep8:bf16",
    "mixtral-8x7b:fp8_block128",
    "qwen3-235b-a22b:bf16",
    "glm-4.5-air:bf16",
    "olmoe:fp8_block128",
    "gpt-oss-120b:bf16",
    "qwen3-30b-a3b:int4_w4a16",
    "qwen3-30b-a3b:int8_channel",
)
HOLDOUT = tuple(f"{name}:{scheme}" for name in NEVER_TUNED for scheme in ("bf16", "fp8_block128"))
#: The share of the tuned speed that a default should have.
GOAL = 0.85


@dataclass(frozen=True)
class Run:
    """All that the options say."""

    problems: tuple[str, ...]
    tokens: tuple[int, ...]
    store: Path
    shipped: Path | None
    deadline: float
    each: float
    device: torch.device
    dry: bool
    plain: bool


def config_of(run: Run, name: str, scheme: str) -> MoeConfig:
    """The layer. Raises MoeCoreError where it cannot be stored so."""
    shape = find(name)
    problems = shape.problems(scheme)
    if problems:
        raise MoeCoreError(f"{name} cannot be {scheme}: {problems[0]}")
    config = shape.config(scheme)
    return config.replace(dtype="float32") if run.dry else config  # the interpreter has no bfloat16


def tune_problem(run: Run, problem: str, budget_s: float, compilers: Compilers | None, say: Any) -> list[TuningRow]:
    """One layer with random weights."""
    name, scheme = problem.split(":")
    config = config_of(run, name, scheme)
    weights = making.random_weights(config, run.device, 0)
    # Plans without the specialized kernels have entries of their own.
    options = {"triton": {"specialized": False}} if run.plain else {}
    settings = Settings(runner="triton_interpreter" if run.dry else "triton", options=options)
    registry = Registry(plugins=[plugin], autoload=False, settings=settings)  # whether it is installed or not
    bound = moe_core.plan(config, weights, max_tokens=max(run.tokens), settings=settings, registry=registry)
    del weights

    def inputs(tokens: int, seed: int) -> tuple[Tensor, TopKOutput]:
        made = making.random_inputs(find(name), tokens, "uniform", run.device, 1000 * tokens + seed)
        return made.hidden.to(bound._binding.dtype), made.topk

    job = TuningJob(
        plan=bound,
        binding=bound._binding,
        quant_info=bound.quant_info,
        tokens=run.tokens,
        budget_s=budget_s,
        inputs=inputs,
        store=run.store,
        progress=say,
    )
    return tune(job, shipped=run.shipped, compilers=compilers)


def show(problem: str, rows: list[TuningRow], seconds: float) -> Table:
    """A line for each token count."""
    table = Table(title=f"{problem}, {seconds:.0f} s", title_justify="left")
    for header in ("tokens", "default us", "from", "tuned us", "default %", "tried"):
        table.add_column(header, justify="right")
    table.add_column("tuned", no_wrap=True)
    for row in rows:
        share = f"{100 * row.tuned_us / row.default_us:.0f}"
        cells = (row.tokens, f"{row.default_us:.1f}", row.source, f"{row.tuned_us:.1f}", share, row.tried, row.tuned)
        table.add_row(*map(str, cells))
    return table


def execute(run: Run, console: Console, *, verbose: bool) -> int:
    """Tune all of it. Exit code 1 where a layer failed or was not reached."""
    missed, ratios = [], list[tuple[float, str]]()

    def say(text: str) -> None:
        if verbose or text.startswith("failed"):
            console.print(f"  {text}", markup=False)

    with ExitStack() as stack:
        compilers = stack.enter_context(Compilers(run.device)) if run.device.type == "cuda" else None
        for i, problem in enumerate(run.problems):
            left, start = run.deadline - time.monotonic(), time.monotonic()
            if left < 3:
                missed += run.problems[i:]
                break
            try:
                rows = tune_problem(run, problem, min(run.each, left / (len(run.problems) - i)), compilers, say)
            except (MoeCoreError, torch.OutOfMemoryError) as error:
                console.print(f"{problem}: {str(error).splitlines()[0]}", markup=False)
                missed.append(problem)
                continue
            finally:
                gc.collect()
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
            console.print(show(problem, rows, time.monotonic() - start))
            missed += [f"{problem} T={t}" for t in run.tokens if t not in {row.tokens for row in rows}]
            ratios += [(row.tuned_us / row.default_us, f"{problem} T={row.tokens}") for row in rows]
            with open(run.store.parent / "tune_rows.jsonl", "a", encoding="utf-8") as file:
                for row in rows:
                    found = {name: getattr(row, name) for name in TuningRow.__dataclass_fields__}
                    file.write(json.dumps({"problem": problem, "store": run.store.name} | found) + "\n")
    if ratios:
        values, below = [ratio for ratio, _ in ratios], sorted(one for one in ratios if not one[0] >= GOAL)
        text = f"median {statistics.median(values):.2f}, least {min(values):.2f}, {len(below)} of {len(values)} below"
        console.print(f"tuned / default time: {text} {GOAL}")
        for ratio, where in below:
            console.print(f"  {ratio:.2f} {where}", markup=False)
    if missed:
        console.print(f"not reached: {', '.join(missed)}", markup=False)
    console.print(f"stored in {run.store}", markup=False)
    return int(bool(missed))


def _parts(value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


@click.command()
@click.option("--budget", default=560.0, show_default=True, help="Seconds for everything.")
@click.option("--each", default=60.0, show_default=True, help="The most seconds for one layer.")
@click.option("--problems", default="", help="shape:scheme,...; default: all that are shipped, in order of importance.")
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True)
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-out"), show_default=True)
@click.option("--store", default="", help="Name of the file in OUT; default: nvidia_h200.json or holdout.json.")
@click.option("--holdout", is_flag=True, help="Tune the never-tuned layers, and say what their defaults are worth.")
@click.option("--shipped", type=click.Path(exists=True, path_type=Path), help="The file that defaults come from.")
@click.option("--plain", is_flag=True, help="With ordinary kernels only: the runner's option `specialized` is false.")
@click.option("--verbose", is_flag=True, help="Every round.")
@click.option("--dry", is_flag=True, help="Tiny layers in the interpreter: every step, no meaning.")
def main(
    budget: float,
    each: float,
    problems: str,
    tokens: str,
    out: Path,
    store: str,
    holdout: bool,
    shipped: Path | None,
    plain: bool,
    verbose: bool,
    dry: bool,
) -> None:
    """Tune, or judge, the configurations that the Triton plugin ships."""
    deadline = time.monotonic() + budget
    wanted = _parts(problems) or (("tiny:bf16",) if dry else HOLDOUT if holdout else PROBLEMS)
    for problem in wanted:
        name = problem.partition(":")[0]
        if name not in SHAPES | TINY or ":" not in problem:
            raise click.ClickException(f"{problem!r} is no shape:scheme")
        if name in SHAPES and SHAPES[name].tuned is holdout:
            raise click.ClickException(f"{name} is {'' if holdout else 'never '}tuned: see --holdout")
    if dry and os.environ.get("TRITON_INTERPRET") != "1":
        raise click.ClickException("--dry needs TRITON_INTERPRET=1")
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        # What is shipped is tuned from the model alone; the holdout starts from what is shipped.
        folder = SHIPPED if holdout else None
        if shipped is not None:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            shutil.copy(shipped, folder / "shipped.json")
        stack.enter_context(torch.no_grad())
        run = Run(
            problems=wanted,
            tokens=tuple(sorted(int(part) for part in _parts(tokens))),
            store=out / (store or ("holdout.json" if holdout else "nvidia_h200.json")),
            shipped=folder,
            deadline=deadline,
            each=each,
            device=torch.device("cpu" if dry else "cuda"),
            dry=dry,
            plain=plain,
        )
        code = execute(run, Console(width=150, soft_wrap=True), verbose=verbose)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
