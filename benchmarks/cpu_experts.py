"""The CPU runner against the experts implementations of transformers, on real layer shapes.

    python benchmarks/cpu_experts.py --shape olmoe qwen3-30b-a3b --dtype bfloat16 float32 --tokens 1 8 64 512

All variants run the same random layer and the same routing. They are timed in turn (one call each, round
after round, fresh routing every round, a read of 128 MiB before each call so that no variant finds weights
in cache that another one left), and the medians are reported, with ratios within the run. In the first
round each variant's output is compared with a float32 reference. Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers.integrations.moe import grouped_mm_experts_forward
from transformers.models.olmoe.modeling_olmoe import OlmoeConfig, OlmoeExperts
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeConfig, Qwen3MoeExperts

import moe_core
from moe_core.config import Activation
from moe_core.runners.cpu.kernel import experts_forward
from moe_core.runners.cpu.weights import prepare

Call = Callable[[Tensor, Tensor, Tensor], Tensor]  # (hidden [T, H], ids [T, K], weights [T, K] float32) -> [T, H]

SHAPES = {  # experts, top-k, hidden size, intermediate size
    "olmoe": (64, 8, 2048, 1024),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
}
BASELINES = ("transformers eager", "transformers grouped_mm")
OURS = {"moe_core auto": "auto", "moe_core packed": True, "moe_core rows": False}  # option pack_weights


def experts_module(shape: str, dtype: torch.dtype) -> torch.nn.Module:
    """The experts of one layer of transformers, with random weights of scale 1 / sqrt(fan-in)."""
    experts, top_k, hidden, inner = SHAPES[shape]
    sizes: dict[str, Any] = {"num_experts": experts, "num_experts_per_tok": top_k, "hidden_size": hidden}
    torch.set_default_dtype(dtype)
    if shape == "olmoe":
        module: torch.nn.Module = OlmoeExperts(OlmoeConfig(intermediate_size=inner, **sizes))
    else:
        module = Qwen3MoeExperts(Qwen3MoeConfig(moe_intermediate_size=inner, **sizes))
    torch.set_default_dtype(torch.float32)
    module.gate_up_proj.normal_().mul_(hidden**-0.5)
    module.down_proj.normal_().mul_(inner**-0.5)
    return module


def baseline_calls(module: torch.nn.Module) -> dict[str, Call]:
    def eager(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        module.config._experts_implementation = "eager"
        return module(hidden, ids, weights)

    def grouped_mm(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return grouped_mm_experts_forward(module, hidden, ids, weights)

    return dict(zip(BASELINES, (eager, grouped_mm), strict=True))


def our_call(module: torch.nn.Module, pack: bool | str, choices: dict[str, Any]) -> Call:
    """A plan of moe_core: what a server calls, framework time included."""
    experts, inner_rows, hidden_size = module.gate_up_proj.shape
    config = moe_core.MoeConfig(
        num_experts=experts,
        top_k=module.config.num_experts_per_tok,
        hidden_size=hidden_size,
        intermediate_size=inner_rows // 2,
        dtype=str(module.gate_up_proj.dtype).removeprefix("torch."),
    )
    weights = moe_core.CanonicalWeights(w13=module.gate_up_proj.data, w2=module.down_proj.data)
    start = time.perf_counter()
    plan = moe_core.plan(config, weights, runner="cpu", options={"cpu": {"pack_weights": pack}})
    seconds, prepared = time.perf_counter() - start, plan.quant_info
    choices |= {"layout": prepared.layout, "products": prepared.products.describe(), "plan_seconds": seconds}

    def call(hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return plan(hidden, moe_core.TopKOutput(ids, weights))

    return call


def routing(tokens: int, shape: str, dtype: torch.dtype, seed: int, skewed: bool) -> tuple[Tensor, ...]:
    """Random tokens and a softmax top-k choice. Skewed: a quarter of the experts is far more likely."""
    experts, top_k, hidden, _ = SHAPES[shape]
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(tokens, experts, generator=random)
    if skewed:
        logits[:, torch.randperm(experts, generator=random)[: experts // 4]] += 1.5
    weights, ids = logits.softmax(-1).topk(top_k)
    x = torch.randn(tokens, hidden, generator=random).to(dtype)
    return x, ids, weights / weights.sum(-1, keepdim=True)


def reference(module: torch.nn.Module, hidden: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """The layer in float32 from the same weights."""
    out = torch.zeros(hidden.shape)
    for e in ids.unique().tolist():
        token, slot = torch.where(ids == e)
        gate, up = F.linear(hidden[token].float(), module.gate_up_proj[e].float()).chunk(2, -1)
        down = F.linear(F.silu(gate) * up, module.down_proj[e].float())
        out.index_add_(0, token, down * weights[token, slot, None])
    return out


def measure(
    shape: str, dtype: torch.dtype, tokens: list[int], rounds: int, skewed: bool, seed: int
) -> list[dict[str, Any]]:
    module = experts_module(shape, dtype)
    choices: dict[str, dict[str, Any]] = {name: {} for name in OURS}
    calls = baseline_calls(module) | {n: our_call(module, pack, choices[n]) for n, pack in OURS.items()}
    names = list(calls)
    flush = torch.zeros(2**25)
    _, _, hidden_size, inner = SHAPES[shape]
    results = []
    for count in tokens:
        times: dict[str, list[float]] = {n: [] for n in names}
        errors: dict[str, float] = {}
        touched = []
        args = routing(count, shape, dtype, seed, skewed)
        wanted = reference(module, *args)
        for name, call in calls.items():  # also the warm-up
            errors[name] = float((call(*args).float() - wanted).abs().max() / wanted.abs().max())
        number = rounds * (10 if count == 1 else 3 if count <= 16 else 1)
        for r in range(number):
            args = routing(count, shape, dtype, seed + 1 + r, skewed)
            touched.append(args[1].unique().numel())
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                flush.sum()
                start = time.perf_counter()
                calls[name](*args)
                times[name].append(time.perf_counter() - start)
        medians = {n: statistics.median(t) for n, t in times.items()}
        best = min(medians[n] for n in BASELINES)
        minima = {n: min(t) for n, t in times.items()}
        best_minimum = min(minima[n] for n in BASELINES)
        used = statistics.mean(touched)
        for name in names:
            results.append(
                {
                    "shape": shape,
                    "dtype": str(dtype).removeprefix("torch."),
                    "tokens": count,
                    "skewed": skewed,
                    "variant": name,
                    "median_ms": medians[name] * 1e3,
                    "min_ms": minima[name] * 1e3,
                    "speedup_over_best_baseline": best / medians[name],
                    "speedup_of_minima": best_minimum / minima[name],
                    "max_relative_error": errors[name],
                    "experts_touched": used,
                    "gb_per_s": used * 3 * hidden_size * inner * dtype.itemsize / medians[name] / 1e9,
                    "gflop_per_s": args[1].numel() * 6 * hidden_size * inner / medians[name] / 1e9,
                    "rounds": number,
                }
                | choices.get(name, {})
            )
    del calls, module
    gc.collect()
    return results


def ceilings() -> dict[str, float]:
    """What this machine reaches now: a read of 1 GiB, and square products of each dtype."""

    def fastest(call: Callable[[], object]) -> float:
        times = []
        for _ in range(5):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times)

    big = torch.zeros(2**28)
    found = {"read_gb_per_s": big.nbytes / fastest(big.sum) / 1e9}
    for dtype in (torch.bfloat16, torch.float32):
        a = torch.randn(2048, 2048).to(dtype)
        packed = prepare(a.view(1, 2048, 2048), a.view(1, 2048, 2048), gated=False)
        ids, plain = torch.zeros(2048, 1, dtype=torch.int64), Activation(name="identity", gated=False)
        seconds = fastest(lambda: experts_forward(a, ids, None, packed, plain))  # noqa: B023
        found[f"{str(dtype).removeprefix('torch.')}_gflop_per_s"] = 4 * 2048**3 / seconds / 1e9
    return found


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": cpu_model(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "ceilings": ceilings(),
    }


def show(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="experts of one layer: median ms (speedup over the faster baseline: medians, minima)")
    for column in ("shape", "dtype", "T"):
        table.add_column(column)
    for name in (*BASELINES, *OURS):
        table.add_column(name, justify="right")
    table.add_column("auto GB/s", justify="right")
    table.add_column("auto GFLOP/s", justify="right")
    table.add_column("max rel. error: baselines / ours", justify="right")
    groups: dict[tuple[str, str, int], dict[str, dict[str, Any]]] = {}
    for row in results:
        groups.setdefault((row["shape"], row["dtype"], row["tokens"]), {})[row["variant"]] = row
    for (shape, dtype, count), rows in groups.items():
        cells = [f"{rows[n]['median_ms']:.2f}" for n in BASELINES]
        for name in OURS:
            ratios = [rows[name][key] for key in ("speedup_over_best_baseline", "speedup_of_minima")]
            cells.append("{:.2f} ({:.2f}x, {:.2f}x)".format(rows[name]["median_ms"], *ratios))
        ours = rows["moe_core auto"]
        errors = [max(rows[n]["max_relative_error"] for n in group) for group in (BASELINES, OURS)]
        cells += [f"{ours['gb_per_s']:.0f}", f"{ours['gflop_per_s']:.0f}", "{:.1e} / {:.1e}".format(*errors)]
        table.add_row(shape, dtype, str(count), *cells)
    console.print(table)
    for row in results:
        if row["variant"] == "moe_core auto" and row["tokens"] == results[0]["tokens"]:
            console.print(f"auto, {row['shape']} {row['dtype']}: {row['layout']}, {row['products']}")


def plot(results: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = sorted({(r["shape"], r["dtype"]) for r in results})
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4.5 * len(panels), 4), squeeze=False)
    for axis, panel in zip(axes[0], panels, strict=True):
        for name in (*BASELINES, *OURS):
            rows = [r for r in results if (r["shape"], r["dtype"]) == panel and r["variant"] == name]
            axis.loglog([r["tokens"] for r in rows], [r["median_ms"] for r in rows], marker="o", label=name)
        axis.set(title=" ".join(panel), xlabel="tokens", ylabel="milliseconds")
        axis.grid(True, which="both", alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--shape", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtype", nargs="+", choices=("bfloat16", "float32"), default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--rounds", type=int, default=11, help="timed rounds (3 to 10 times as many for few tokens)")
    parser.add_argument("--skewed", action="store_true", help="a quarter of the experts gets most tokens")
    parser.add_argument("--seed", type=int, default=None, help="default: a fresh one")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--plot", type=Path, help="write a PNG of latency over tokens (needs matplotlib)")
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    seed = args.seed if args.seed is not None else int.from_bytes(os.urandom(3), "big")
    about = environment() | {"seed": seed}
    console = Console(width=200)
    console.print(about)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for dtype in args.dtype:
            for shape in args.shape:
                results += measure(shape, getattr(torch, dtype), args.tokens, args.rounds, args.skewed, seed)
                console.print(f"{shape} {dtype}: done")
    show(results, console)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps({"environment": about, "results": results}, indent=1) + "\n")
    if args.plot:
        plot(results, args.plot)


if __name__ == "__main__":
    main()
