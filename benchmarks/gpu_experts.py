"""The experts of one layer on one GPU, against their floor and against peers, checked in the same run.

    PYTHONPATH=.:plugins/triton/src python benchmarks/gpu_experts.py --budget 360 --out bench-out

One call is (tokens, ids, weights) to the summed output, through `moe_core.plan`. Every point is a CUDA graph over
several batches (and copies of the weights, where one layer's are small) that pass the L2 cache; contestants take
turns; medians. A sample of tokens is compared with float32. Floor: max(6 T k H I over 790 TFLOP/s (fp8: 1400), bytes of
the activated experts and of the activations over 4.3 TB/s), fixed numbers, so that runs compare; the ceilings of this
run are printed beside. Rows go to OUT/gpu_experts.jsonl as they are made, all to OUT/gpu_experts.json at the end.
"""

from __future__ import annotations

import contextlib
import datetime
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from _gpu import contestants, floors, points, report, timing, warmup
from rich.console import Console
from shapes import TOKENS, Shape, select

from moe_core.errors import ConfigError

SCHEMES = ("bf16", "fp8_block128", "mxfp4_w4a16")
#: Seconds that the tables and the JSON file take at the end.
TAIL_SECONDS = 5.0
#: Of the budget, at most this part goes into compiling beforehand.
WARM_PART = 0.4


@dataclass(slots=True)
class Run:
    """What was asked for."""

    shapes: list[Shape]
    schemes: tuple[str, ...]
    named: bool
    tokens: tuple[int, ...]
    routings: tuple[str, ...]
    runners: tuple[str, ...]
    peers: tuple[str, ...]
    device: torch.device
    out: Path
    seed: int
    seconds: float
    deadline: float
    processes: int
    resume: bool

    def pairs(self) -> list[tuple[Shape, str]]:
        """(shape, scheme): where nobody named shapes, in the schemes that a model comes in."""
        found = []
        for shape in self.shapes:
            mine = self.schemes if self.named else tuple(s for s in shape.schemes if s in self.schemes)
            found += [(shape, scheme) for scheme in mine if not shape.problems(scheme)]
        return found

    def left(self) -> float:
        """Seconds of the budget."""
        return self.deadline - time.time()


def environment(device: torch.device) -> dict[str, Any]:
    """Machine and versions."""
    found: dict[str, Any] = {
        "date": datetime.datetime.now().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for name in ("triton", "transformers", "quack-kernels", "flashinfer-python", "nvidia-cutlass-dsl"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        root = Path(__file__).parents[1]
        found["commit"] = subprocess.check_output(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], text=True, stderr=subprocess.DEVNULL
        ).strip()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "device": properties.name,
            "processors": properties.multi_processor_count,
            "l2_mb": round(getattr(properties, "L2_cache_size", 0) / 1e6, 1),
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version,power.limit", "--format=csv,noheader"]
            found["driver"] = subprocess.check_output(query, text=True).strip()
    return found


def measure(run: Run, rows: report.Rows, console: Console) -> list[str]:
    """All points, layer by layer. Returns those that the budget did not reach."""
    found, missing = contestants.load(run.runners, run.peers)
    for name, why in missing.items():
        console.print(f"peer {name} is not here: {why}", markup=False)
    skipped: list[str] = []
    for shape, scheme in run.pairs():
        if run.left() < TAIL_SECONDS:
            skipped.append(f"{shape.name} {scheme}")
            continue
        layer: points.Layer | None = None
        for routing in run.routings:
            for tokens in run.tokens:
                place = (shape.name, scheme, tokens, routing)
                who = [c for c in found if not (run.resume and rows.has(*place, c.name))]
                if not who:
                    continue
                if run.left() < TAIL_SECONDS:
                    skipped.append(f"{shape.name} {scheme} T={tokens} {routing}")
                    continue
                layer = layer or points.Layer(shape, scheme, run.device, max(run.tokens), run.seed)
                seed = (run.seed * 1_000_003 + tokens * 31) % 2**31
                start, line = time.perf_counter(), f"{shape.name} {scheme} T={tokens} {routing}:"
                for row in points.measure(layer, who, tokens, routing, seed, run.seconds):
                    rows.add(row)
                    result = f"{row['us']:.1f} us {row['percent']} %" if row["us"] else "failed"
                    line += f" {row['contestant']} {result}" + (f" [{row['problem']}]" if "problem" in row else "")
                console.print(f"{line} ({time.perf_counter() - start:.1f} s)", markup=False)
                gc.collect()
                if run.device.type == "cuda":
                    torch.cuda.empty_cache()
        del layer
    return skipped


def write(run: Run, about: dict[str, Any], rows: report.Rows, skipped: list[str]) -> Path:
    """The result file."""
    path = run.out / "gpu_experts.json"
    fixed = {"bandwidth": floors.BANDWIDTH, "gemm_rate": floors.GEMM_RATE}
    body = json.dumps({"environment": about, "floor": fixed, "not_reached": skipped})[:-1]
    lines = ",\n".join(json.dumps(row) for row in rows.rows)
    path.write_text(f'{body}, "rows": [\n{lines}\n]}}\n')
    return path


def execute(run: Run, console: Console) -> int:
    """The whole run. Exit code 1 where something failed or is wrong."""
    began = time.time()
    rows = report.Rows(run.out / "gpu_experts.jsonl", run.resume)
    about_path = run.out / "environment.json"
    if run.resume and about_path.exists():
        about = json.loads(about_path.read_text())
    else:
        about = {}
        if run.device.type == "cuda" and run.processes:
            pairs = [(shape.name, scheme) for shape, scheme in run.pairs()]
            work = warmup.units(pairs, run.tokens, run.runners, run.processes)
            about["warm_up"] = warmup.warm(work, run.processes, WARM_PART * run.left())
            console.print(f"compiled beforehand: {about['warm_up']}", markup=False)
        about |= environment(run.device) | {"seed": run.seed}
        if run.device.type == "cuda":
            about["ceilings"] = timing.ceilings(run.device)
        about_path.write_text(json.dumps(about) + "\n")
    console.print(about)
    try:
        with torch.no_grad():
            skipped = measure(run, rows, console)
    except points.BrokenDevice as error:
        console.print(f"the device is unusable after {error}; going on in a new process", markup=False)
        sys.stdout.flush()
        arguments = [a for a in sys.argv if a != "--resume"]
        os.environ["GPU_EXPERTS_DEADLINE"] = str(run.deadline)
        os.execv(sys.executable, [sys.executable, *arguments, "--resume", "--seed", str(run.seed)])
    report.show(rows.rows, floors.recorded(), console)
    path = write(run, about, rows, skipped)
    if skipped:
        console.print(f"not reached in the budget: {'; '.join(skipped[:20])} ({len(skipped)} in all)", markup=False)
    if "ceilings" in about:
        console.print(f"ceilings of this run: {about['ceilings']}", markup=False)
    console.print(f"{len(rows.rows)} rows in {time.time() - began:.0f} s: {path}", markup=False)
    return int(any(row.get("problem") for row in rows.rows) or not rows.rows)


def _split(context: click.Context, parameter: click.Parameter, value: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in value.split(",") if part.strip()))


@click.command()
@click.option("--budget", type=float, default=360.0, show_default=True, help="Seconds for everything.")
@click.option("--shapes", callback=_split, default="tuned", show_default=True, help="Names; tuned, never-tuned, all.")
@click.option("--schemes", callback=_split, default=",".join(SCHEMES), show_default=True)
@click.option("--tokens", callback=_split, default=",".join(map(str, TOKENS)), show_default=True)
@click.option("--routing", callback=_split, default="uniform", show_default=True, help="uniform,skewed")
@click.option("--runner", callback=_split, default="triton", show_default=True, help="Of moe_core, or triton-plain.")
@click.option("--peers", callback=_split, default="torch_gmm,quack,flashinfer", show_default=True, help="'' for none.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-out"), show_default=True)
@click.option("--seed", type=int, help="Default: a fresh one.")
@click.option("--warm", "processes", type=int, help="Processes that compile first; 0: none. Default: cores - 1.")
@click.option("--quick", is_flag=True, help="Qwen3-30B-A3B, GPT-OSS and LFM2-like, four token counts, short timings.")
@click.option("--dry", is_flag=True, help="Tiny layers on the CPU: every step, no meaning.")
@click.option("--resume", is_flag=True, help="Go on where OUT's JSONL file ends.")
@click.pass_context
def main(context: click.Context, **given: Any) -> None:
    """Measure moe_core's experts and those of peers on this GPU."""
    default = {name for name in given if context.get_parameter_source(name).name == "DEFAULT"}  # type: ignore[union-attr]
    if given["quick"]:
        quick = {"shapes": ("qwen3-30b-a3b", "gpt-oss-120b", "lfm2-like"), "tokens": ("1", "64", "1024", "4096")}
        given |= {name: value for name, value in quick.items() if name in default}
    if given["dry"]:
        dry = {"shapes": ("dry",), "tokens": ("1", "8", "32"), "runner": ("reference",), "peers": ("torch_gmm",)}
        given |= {name: value for name, value in dry.items() if name in default}
    elif not torch.cuda.device_count():  # answers without a CUDA context, which would spoil the compiling processes
        raise click.ClickException("there is no GPU here; --dry runs every step on the CPU")
    unknown = [p for p in given["peers"] if p not in contestants.PEERS]
    if unknown:
        raise click.ClickException(f"unknown peers {unknown}; known: {', '.join(contestants.PEERS)}")
    try:
        shapes = select(given["shapes"])
        tokens = tuple(int(t) for t in given["tokens"])
    except (ConfigError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    seed = given["seed"] if given["seed"] is not None else int.from_bytes(os.urandom(3), "big")
    processes = given["processes"] if given["processes"] is not None else max(1, (os.cpu_count() or 2) - 1)
    given["out"].mkdir(parents=True, exist_ok=True)
    run = Run(
        shapes=shapes,
        schemes=given["schemes"],
        named="schemes" not in default and "shapes" not in default,
        tokens=tokens,
        routings=given["routing"],
        runners=given["runner"],
        peers=given["peers"],
        device=torch.device("cpu" if given["dry"] else "cuda"),
        out=given["out"],
        seed=seed,
        seconds=0.02 if given["dry"] else 0.1 if given["quick"] else timing.SECONDS,
        deadline=float(os.environ.get("GPU_EXPERTS_DEADLINE") or time.time() + given["budget"]),
        processes=processes,
        resume=given["resume"],
    )
    raise SystemExit(execute(run, Console(width=132, soft_wrap=True)))


if __name__ == "__main__":
    main()
