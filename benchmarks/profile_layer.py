"""Where a layer's time goes: its kernels by themselves, by torch.profiler, on one GPU.

    python benchmarks/profile_layer.py qwen3-30b-a3b:bf16:16384 gpt-oss-120b:mxfp4_w4a16:256

Shapes are those of shapes.py. A kernel's time is the mean over four routings, without graphs.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import making
from moe_core_triton.plugin import plugin
from rich.console import Console
from rich.table import Table
from shapes import find

import moe_core
from moe_core.registry import Registry
from moe_core.settings import Settings

ROUTINGS = 4


def profiled(name: str, scheme: str, tokens: int, rows: int) -> Table:
    """The longest kernels of a layer, the longest first."""
    config, device = find(name).config(scheme), torch.device("cuda")
    weights = making.random_weights(config, device, 0)
    settings = Settings(runner="triton")
    registry = Registry(plugins=[plugin], autoload=False, settings=settings)
    plan = moe_core.plan(config, weights, max_tokens=tokens, settings=settings, registry=registry)
    dtype = getattr(torch, config.dtype)
    calls = [making.random_inputs(find(name), tokens, "uniform", device, seed) for seed in range(ROUTINGS)]
    for call in calls:
        plan(call.hidden.to(dtype), call.topk)
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for call in calls:
            plan(call.hidden.to(dtype), call.topk)
        torch.cuda.synchronize()
    table = Table(title=f"{name} {scheme}, {tokens} tokens", title_justify="left")
    for header in ("kernel", "launches a call", "us a launch"):
        table.add_column(header, justify="left" if header == "kernel" else "right")
    for one in sorted(seen.key_averages(), key=lambda one: -one.device_time_total)[:rows]:
        each = one.device_time_total / one.count
        table.add_row(one.key[:70], f"{one.count / ROUTINGS:.2f}", f"{each:.1f}")
    return table


@click.command()
@click.argument("layers", nargs=-1, required=True, metavar="SHAPE:SCHEME:TOKENS...")
@click.option("--rows", default=10, show_default=True, help="Kernels that are shown.")
def main(layers: tuple[str, ...], rows: int) -> None:
    """Profile these layers, one after the other."""
    if not torch.cuda.is_available():
        raise click.ClickException("this needs a GPU, and torch sees none")
    with torch.no_grad():
        for layer in layers:
            name, _, rest = layer.partition(":")
            scheme, _, tokens = rest.partition(":")
            if not tokens.isdecimal():
                raise click.BadParameter(f"{layer!r} is not SHAPE:SCHEME:TOKENS")
            Console(width=120).print(profiled(name, scheme, int(tokens), rows))
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
