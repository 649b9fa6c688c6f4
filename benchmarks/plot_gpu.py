"""Figures from result files of gpu_experts.py.

    python benchmarks/plot_gpu.py benchmarks/results/h200/FILE.json --out docs/images

Several files are taken together; a later one wins where both have a point. One figure a scheme (gpu_SCHEME.png):
latency against tokens, a panel a layer; and gpu_floor.png: per cent of the floor against the goals. Needs matplotlib.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import click
from _gpu import floors
from shapes import SHAPES, TINY

Row = dict[str, Any]
COLUMNS: Final = 3
OURS_COLOR: Final = "#c8102e"
COLORS: Final = {
    "torch_gmm": "#7f7f7f",
    "torch_gmm_lean": "#b0a080",
    "quack": "#8c564b",
    "quack_torch_glue": "#c49c94",
    "flashinfer_cutedsl": "#bcbd22",
    "vllm": "#1f77b4",
    "sglang": "#17a2b8",
    "triton_kernels": "#2ca02c",
    "deepgemm_bf16": "#9467bd",
    "deepgemm_fp8": "#9467bd",
    "hpc_fp8": "#ff7f0e",
}


def load(paths: list[Path]) -> list[Row]:
    """The rows of all files; of equal points the last."""
    found: dict[tuple[Any, ...], Row] = {}
    for path in paths:
        for row in json.loads(path.read_text())["rows"]:
            keys = ("shape", "scheme", "tokens", "routing", "contestant")
            found[tuple(row[k] for k in keys)] = row
    return list(found.values())


def style(contestant: str, is_recorded: bool) -> dict[str, Any]:
    """Ours thick, peers of the run solid, recorded ones dashed; one colour a peer everywhere."""
    ours = floors.is_ours(contestant)
    color = OURS_COLOR if ours else COLORS.get(contestant, "#444444")
    if ours and contestant != f"{floors.OURS} triton":
        color = "#e377c2"
    width = 2.4 if ours else 1.2
    line = "--" if is_recorded else "-"
    return {"color": color, "linewidth": width, "linestyle": line, "marker": "o", "markersize": 4 if ours else 2.5}


def latency(rows: list[Row], others: list[Row], scheme: str, path: Path) -> None:
    """Small multiples of microseconds against tokens, with the floor as the edge of a grey area."""
    from matplotlib import pyplot

    mine = [r for r in rows if r["scheme"] == scheme and r["routing"] == "uniform" and r["us"] and r.get("ok", True)]
    known = SHAPES | TINY
    shapes = [name for name in known if any(row["shape"] == name for row in mine)]
    # One more panel for the legend.
    lines = math.ceil((len(shapes) + 1) / COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(11, 3.1 * lines), squeeze=False, layout="constrained")
    handles: dict[str, Any] = {}
    for axis, shape in zip(axes.flat, shapes, strict=False):
        here = [row for row in mine if row["shape"] == shape]
        there = [r for r in others if r["shape"] == shape and r["scheme"] == scheme]
        for group, is_recorded in ((there, True), (here, False)):
            for name in dict.fromkeys(row["contestant"] for row in group):
                points = sorted((r["tokens"], r["us"]) for r in group if r["contestant"] == name)
                label = f"{name} (recorded)" if is_recorded else name
                order = 4 if floors.is_ours(name) else 3
                (handle,) = axis.loglog(*zip(*points, strict=True), zorder=order, **style(name, is_recorded))
                handles.setdefault(label, handle)
        edge = sorted({r["tokens"]: r["floor_us"] for r in here}.items())
        (handle,) = axis.loglog(*zip(*edge, strict=True), color="black", linewidth=1.4, linestyle=":", zorder=5)
        handles.setdefault("floor (roofline)", handle)
        bottom = axis.get_ylim()[0]
        axis.fill_between(*zip(*edge, strict=True), bottom, color="#dddddd", zorder=1)
        axis.set_ylim(bottom=bottom)
        tokens = [t for t, _ in edge]
        axis.set_xticks(tokens, [str(t) for t in tokens], fontsize=8)
        axis.minorticks_off()
        axis.tick_params(axis="y", labelsize=8)
        axis.set_title(f"{known[shape].title} ({known[shape].sizes})", fontsize=9)
        axis.grid(True, alpha=0.3)
    for axis in axes[:, 0]:
        axis.set_ylabel("microseconds", fontsize=9)
    for axis in axes[-1]:
        axis.set_xlabel("tokens", fontsize=9)
    rest = list(axes.flat)[len(shapes) :]
    for axis in rest:
        axis.axis("off")
    labels = sorted(handles, key=lambda label: (not floors.is_ours(label), "recorded" in label, label))
    rest[0].legend([handles[label] for label in labels], labels, loc="center", fontsize=9, frameon=False)
    figure.suptitle(f"{scheme}: one layer call, uniform routing", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def floor_figure(rows: list[Row], others: list[Row], path: Path) -> None:
    """Bars a scheme: per cent of the floor by number of tokens, the best recorded peer, and the goal as a line."""
    from matplotlib import pyplot

    tuned = {name for name, shape in (SHAPES | TINY).items() if shape.tuned}
    cells = floors.summary(rows, others, tuned)
    schemes = list(dict.fromkeys(cell.scheme for cell in cells))
    figure, axes = pyplot.subplots(1, len(schemes), figsize=(11, 3.6), sharey=True, squeeze=False, layout="constrained")
    for axis, scheme in zip(axes[0], schemes, strict=True):
        mine = [cell for cell in cells if cell.scheme == scheme]
        for x, cell in enumerate(mine):
            bars = ((cell.ours, -0.22, OURS_COLOR, "moe_core"), (cell.recorded, 0.22, "#8aa5bf", "best recorded peer"))
            for value, shift, color, label in bars:
                if value is not None:
                    axis.bar(x + shift, value, width=0.4, color=color, label=label if x == 0 else None)
                    axis.text(x + shift, value + 1, f"{value:.0f}", ha="center", fontsize=8)
            if cell.goal is not None:
                axis.plot([x - 0.45, x + 0.05], [cell.goal] * 2, color="black", label="goal" if x == 0 else None)
        axis.set_xticks(range(len(mine)), [cell.bucket for cell in mine], fontsize=9)
        axis.set_title(scheme, fontsize=10)
        axis.set_ylim(0, 125)
        axis.grid(True, axis="y", alpha=0.3)
    axes[0][0].set_ylabel("per cent of the floor\n(geometric mean over layers)", fontsize=9)
    axes[0][0].legend(fontsize=8, loc="upper center", ncols=3)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def draw(rows: list[Row], others: list[Row], out: Path) -> list[Path]:
    """All figures."""
    import matplotlib

    matplotlib.use("Agg")
    out.mkdir(parents=True, exist_ok=True)
    right = [row for row in rows if row["us"] and row.get("ok", True) and row["routing"] == "uniform"]
    paths = []
    for scheme in dict.fromkeys(row["scheme"] for row in right):
        paths.append(out / f"gpu_{scheme}.png")
        latency(rows, others, scheme, paths[-1])
    paths.append(out / "gpu_floor.png")
    floor_figure(right, others, paths[-1])
    return paths


@click.command()
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), default=Path("docs/images"), show_default=True)
def main(results: tuple[Path, ...], out: Path) -> None:
    """Draw the figures of one or several result files."""
    for path in draw(load(list(results)), floors.recorded(), out):
        click.echo(path)


if __name__ == "__main__":
    main()
