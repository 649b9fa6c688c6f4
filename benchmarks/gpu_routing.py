"""Routing and alignment alone: router logits to the table of tiles that drives the kernels.

Goal: 15 us together up to 1024 tokens.

    PYTHONPATH=.:plugins/triton/src python benchmarks/gpu_routing.py --out bench-out

Times are medians of CUDA-graph replays with different logits. Checked in the same run: the choice against
`moe_core.routing`, the table against a count of the ids.
"""

from __future__ import annotations

import importlib
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import torch
from _gpu import timing
from _gpu.points import brief
from rich.console import Console
from rich.table import Table
from torch import Tensor

from moe_core import routing as oracle
from moe_core.presets import PRESETS

GOAL_US: Final = 15.0
LAYERS: Final = ("mixtral-8x7b", "qwen3-30b-a3b", "deepseek-v3", "gpt-oss-120b", "glm-4.5-air", "olmoe", "minimax-m2")
TOKENS: Final = (1, 8, 64, 256, 1024)
BATCHES: Final = 8
CALLS: Final = 32


def block_m(tokens: int, top_k: int, experts: int) -> int:
    """A usual tile for that many tokens an expert."""
    return next((size for size in (16, 32, 64) if tokens * top_k <= size * experts), 128)


def wrong_choice(found: Any, logits: Tensor, top_k: int, routing: Any, bias: Tensor | None) -> str | None:
    """What differs from `moe_core.routing.route`. Give float32 logits: those of bf16 tie, and any choice will do."""
    wanted = oracle.route(logits, top_k, routing, bias)
    ids, order = found.topk_ids.long().sort(-1)
    expected, expected_order = wanted.topk_ids.long().sort(-1)
    weights = found.topk_weights.gather(1, order)
    error = float((weights - wanted.topk_weights.gather(1, expected_order)).abs().max())
    rows = float((ids != expected).any(-1).float().mean())
    if rows > 0.01:
        return f"{100 * rows:.1f} % of the tokens chose other experts"
    return None if error < 1e-3 or rows > 0 else f"weights differ by {error:.2g}"


def wrong_table(table: Any, ids: Tensor, experts: int) -> str | None:
    """What is wrong with a row table: its counts, or the expert of a slot."""
    counts = torch.bincount(ids.flatten().long(), minlength=experts)
    starts, ends = table.starts.long(), table.ends.long()
    if not torch.equal(ends - starts, counts):
        return "the rows an expert are not the ids' counts"
    flat = ids.flatten().long()
    seen = torch.zeros_like(flat)
    for expert in range(experts):
        slots = table.slots[int(starts[expert]) : int(ends[expert])].long()
        if bool((flat[slots] != expert).any()):
            return f"expert {expert} owns a slot of another"
        seen[slots] += 1
    return None if bool((seen == 1).all()) else "a slot is missing or there twice"


def measure(name: str, tokens: int, route: Callable[..., Any], align: Callable[..., Any]) -> dict[str, Any]:
    """One row: microseconds of routing, of alignment, and of both after one another."""
    device, config = torch.device("cuda"), PRESETS[name]
    experts, top_k, routing = config.num_experts, config.top_k, config.routing
    tile = block_m(tokens, top_k, experts)
    bias = torch.rand(experts, device=device) if routing.correction_bias else None
    logits = [torch.randn(tokens, experts, device=device).bfloat16() for _ in range(BATCHES)]
    chosen = [oracle.route(batch, top_k, routing, bias).topk_ids for batch in logits]

    def choose(batch: Tensor) -> Any:
        return route(batch, top_k, routing, correction_bias=bias)

    def tiles(ids: Tensor) -> Any:
        return align(ids, num_experts=experts, block_m=tile)

    exact = torch.randn(tokens, experts, device=device)
    problem = wrong_choice(choose(exact), exact, top_k, routing, bias)
    problem = problem or wrong_table(tiles(chosen[0]), chosen[0], experts)
    parts: dict[str, list[Callable[[], Any]]] = {
        "route_us": [lambda i=i: choose(logits[i % BATCHES]).topk_ids for i in range(CALLS)],
        "align_us": [lambda i=i: tiles(chosen[i % BATCHES]).starts for i in range(CALLS)],
        "both_us": [lambda i=i: tiles(choose(logits[i % BATCHES]).topk_ids).starts for i in range(CALLS)],
    }
    replays = {part: timing.Replay(calls, device) for part, calls in parts.items()}
    times = timing.take_turns(replays, device, seconds=0.05)
    row = {"layer": name, "experts": experts, "top_k": top_k, "tokens": tokens, "block_m": tile}
    row |= {part: round(statistics.median(values), 2) for part, values in times.items()}
    return row | ({"problem": problem} if problem else {})


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-out"), show_default=True)
def main(out: Path) -> None:
    """Time routing and alignment on this GPU."""
    if not torch.cuda.is_available():
        raise click.ClickException("there is no GPU here")
    route = importlib.import_module("moe_core_triton.kernels.router").route
    align = importlib.import_module("moe_core_triton.kernels.align").align
    out.mkdir(parents=True, exist_ok=True)
    console, rows = Console(width=132, soft_wrap=True), []
    with torch.no_grad(), (out / "gpu_routing.jsonl").open("w") as lines:
        for name in LAYERS:
            for tokens in TOKENS:
                try:
                    row = measure(name, tokens, route, align)
                except Exception as error:  # a kernel may fail in any way; the others go on
                    row = {"layer": name, "tokens": tokens, "problem": brief(error)}
                rows.append(row)
                lines.write(json.dumps(row) + "\n")
                lines.flush()
    show(rows, console)
    raise SystemExit(int(any("problem" in row for row in rows)))


def show(rows: list[dict[str, Any]], console: Console) -> None:
    """us of routing + alignment = both in one graph, a row a layer."""
    table = Table(title=f"us: routing, alignment, both (goal: {GOAL_US:.0f})", title_justify="left", box=None)
    tokens = sorted({row["tokens"] for row in rows})
    for column in ("layer", *map(str, tokens)):
        table.add_column(column)
    cells: dict[str, dict[int, str]] = {}
    for row in rows:
        good = "both_us" in row
        text = f"{row['route_us']:.1f} {row['align_us']:.1f} {row['both_us']:.1f}" if good else "failed"
        late = " <" if good and row["both_us"] > GOAL_US else ""
        cells.setdefault(row["layer"], {})[row["tokens"]] = (
            text + late + (" WRONG" if good and "problem" in row else "")
        )
    for layer, by_tokens in cells.items():
        table.add_row(layer, *(by_tokens.get(t, "-") for t in tokens))
    console.print(table)
    for row in rows:
        if "problem" in row:
            console.print(f"{row['layer']} T={row['tokens']}: {row['problem']}", markup=False)


if __name__ == "__main__":
    main()
