"""Rows as they come, and the tables at the end. Short: a lent machine shows the last 12,000 characters only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import SHAPES, TINY

from . import floors

Row = dict[str, Any]


class Rows:
    """All rows of a run, appended to a JSONL file as they come, so that a killed run loses nothing."""

    def __init__(self, path: Path, resume: bool = False) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if not resume:
            path.unlink(missing_ok=True)
        lines = path.read_text().splitlines() if path.exists() else []
        self.rows: list[Row] = [json.loads(line) for line in lines]

    def add(self, row: Row) -> None:
        """Keep and write a row."""
        self.rows.append(row)
        with self._path.open("a") as lines:
            lines.write(json.dumps(row) + "\n")

    def has(self, shape: str, scheme: str, tokens: int, routing: str, contestant: str) -> bool:
        """Whether that point is already there."""
        keys = ("shape", "scheme", "tokens", "routing", "contestant")
        return any(tuple(row[k] for k in keys) == (shape, scheme, tokens, routing, contestant) for row in self.rows)


def show(rows: Sequence[Row], others: Sequence[Row], console: Console) -> None:
    """Everything, the most important last."""
    for routing in dict.fromkeys(row["routing"] for row in rows):
        _points(rows, others, routing, console)
    _problems(rows, console)
    _behind(rows, others, console)
    tuned = {name for name, shape in (SHAPES | TINY).items() if shape.tuned}
    _summary("tuned shapes", rows, others, tuned, console)
    if any(row["shape"] not in tuned for row in rows):
        _summary("never-tuned shapes", rows, others, {row["shape"] for row in rows} - tuned, console)


def _points(rows: Sequence[Row], others: Sequence[Row], routing: str, console: Console) -> None:
    here = floors.percents(rows, routing)
    there = floors.percents(others) if routing == "uniform" else {}
    us = {
        (row["shape"], row["scheme"], row["tokens"]): row["us"]
        for row in sorted((r for r in rows if r["us"] and r["routing"] == routing), key=lambda r: -r["us"])
        if floors.is_ours(row["contestant"]) and row["ok"]
    }
    tokens = sorted({row["tokens"] for row in rows})
    table = _table(f"{routing}: our us and per cent of the floor / best peer's per cent (same run; r: recorded)")
    for column in ("layer", *map(str, tokens)):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in dict.fromkeys((p[0], p[1]) for p in here):
        cells = []
        for count in tokens:
            found = here.get((*layer, count), {})
            mine = floors.best(found, True)
            peers = {n: p for n, p in found.items() if not floors.is_ours(n)}
            peers |= {f"{n} r": p for n, p in there.get((*layer, count), {}).items()}
            peer = floors.best(peers, False)
            cell = f"{us[(*layer, count)]:.4g} {mine[0]:.0f}" if mine else "-"
            cells.append(cell + (f"/{peer[0]:.0f}{'r' if peer[1].endswith(' r') else ''}" if peer else ""))
        table.add_row(f"{layer[0]} {layer[1].removesuffix('_w4a16')}", *cells)
    console.print(table)


def _summary(title: str, rows: Sequence[Row], others: Sequence[Row], shapes: set[str], console: Console) -> None:
    cells = floors.summary(rows, others, shapes)
    table = _table(f"{title}, uniform: geometric mean, per cent of the floor (`ours there`: at the recorded points)")
    for column in ("scheme", "T", "points", "ours", "goal", "peers here", "recorded best", "ours there"):
        table.add_column(column, justify="left" if column in ("scheme", "T") else "right")
    for cell in cells:
        numbers = (cell.ours, cell.goal, cell.peers, cell.recorded, cell.ours_there)
        mark = "" if cell.goal is None or cell.ours is None else " ok" if cell.ours >= cell.goal else " <"
        texts = ["-" if n is None else f"{n:.0f}" for n in numbers]
        table.add_row(cell.scheme, cell.bucket, str(cell.points), texts[0] + mark, *texts[1:])
    console.print(table)


def _problems(rows: Sequence[Row], console: Console, most: int = 12) -> None:
    bad = [row for row in rows if row.get("problem")]
    for row in bad[:most]:
        place = f"{row['contestant']} {row['shape']} {row['scheme']} T={row['tokens']} {row['routing']}"
        console.print(f"FAILED {place}: {row['problem'][:120]}", markup=False)
    if len(bad) > most:
        console.print(f"... and {len(bad) - most} more failures (see the JSON)", markup=False)
    worst: dict[tuple[str, str], float] = {}
    for row in rows:
        if row.get("ok") and row.get("error") is not None:
            key = (row["contestant"], row["scheme"])
            worst[key] = max(worst.get(key, 0.0), row["error"])
    for (name, scheme), error in worst.items():
        console.print(f"largest relative error of {name}, {scheme}: {error:.2g}", markup=False)


def _behind(rows: Sequence[Row], others: Sequence[Row], console: Console, most: int = 15) -> None:
    found = floors.behind(rows, others)
    if not found:
        console.print("no point is more than 3 % behind a peer", markup=False)
        return
    console.print(f"{len(found)} points more than 3 % behind the best peer, worst first:", markup=False)
    for b in found[:most]:
        text = f"  {b.shape} {b.scheme} T={b.tokens}: {b.ours:.0f} %, {b.peer} {b.theirs:.0f} % ({b.times:.2f} x)"
        console.print(text, markup=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=None, padding=(0, 1), pad_edge=False)
