"""How commands answer: one `Report` that is printed as tables, or as pure JSON under --json."""

from __future__ import annotations

import functools
import json
import logging
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import click
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from moe_core.cli._app import debug_option
from moe_core.request import plain

STYLES: dict[str, str] = {
    "yes": "green",
    "PASS": "green",
    "passed": "green",
    "loaded": "green",
    "ok": "green",
    "no": "red",
    "FAIL": "bold red",
    "failed": "bold red",
    "xpassed": "bold red",
    "broken": "bold red",
    "duplicate": "red",
    "incompatible": "red",
    "missing": "yellow",
    "blocked": "yellow",
    "refused": "cyan",
    "xfailed": "yellow",
    "skipped": "dim",
}


@dataclass(slots=True)
class Report:
    """A command's answer. data: the JSON form; show: what people read; code: the exit code."""

    data: Mapping[str, Any]
    show: Sequence[RenderableType] = field(default=())
    code: int = 0


def reports(function: Callable[..., Report]) -> Callable[..., None]:
    """Make a click callback of a function that returns a `Report`: adds --json and --debug."""

    @functools.wraps(function)
    def callback(*args: Any, as_json: bool, **options: Any) -> None:
        if as_json:
            with _stdout_on_stderr():
                report = function(*args, **options)
            click.echo(json.dumps(_finite(plain(report.data)), indent=2, allow_nan=False))
        else:
            report = function(*args, **options)
            console = Console(highlight=False)
            for item in report.show:
                console.print(item)
        click.get_current_context().exit(report.code)

    option = click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
    return option(debug_option(callback))


@contextmanager
def _stdout_on_stderr() -> Iterator[None]:
    """Vendor packages print banners when they are imported; none of that may get into our JSON."""
    sys.stdout.flush()
    try:
        saved = os.dup(1)
        os.dup2(2, 1)
    except OSError:  # a process without these descriptors has nothing to protect
        saved = -1
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        if saved >= 0:
            os.dup2(saved, 1)
            os.close(saved)


def _finite(value: Any) -> Any:
    """NaN and infinities as text: JSON has none."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(k): _finite(v) for k, v in value.items()}
    return [_finite(v) for v in value] if isinstance(value, list) else value


@contextmanager
def quiet_discovery() -> Iterator[None]:
    """Without the log's warnings about plugins, in commands that show every state themselves."""
    logger = logging.getLogger("moe_core.plugins")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def progress(text: str) -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what goes on, where a person looks at it; nothing in a pipe."""
    with Console(stderr=True, highlight=False).status(Text(text)) as status:
        yield lambda now: status.update(Text(now))


def styled(value: object) -> Text:
    """A cell; the words of `STYLES` in their color."""
    text = str(value)
    return Text(text, style=STYLES.get(text, ""))


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> RenderableType:
    """A table whose cells wrap and are never cut."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    for header in headers:
        made.add_column(header, overflow="fold")
    for row in rows:
        made.add_row(*(styled(cell) for cell in row))
    return Group(heading(title), made) if title else made


def heading(text: str) -> Text:
    """The title of a section."""
    return Text(f"\n{text}", style="bold")


def facts(rows: Iterable[tuple[str, object]]) -> Table:
    """Aligned `name  value` lines."""
    made = Table.grid(padding=(0, 2))
    made.add_column(style="dim")
    made.add_column(overflow="fold")
    for name, value in rows:
        made.add_row(Text(name), styled(value))
    return made


def outline(headers: Sequence[str], rows: Sequence[tuple[Sequence[object], Sequence[str]]]) -> RenderableType:
    """Aligned rows, each with lines of detail below it over the full width: a table cell would be too narrow."""
    widths = [max(len(str(c)) for c in column) for column in zip(headers, *(cells for cells, _ in rows), strict=True)]

    def grid(cells: Iterable[Text]) -> Table:
        made = Table.grid(padding=(0, 2))
        for width in widths:
            made.add_column(min_width=width, overflow="fold")
        made.add_row(*cells)
        return made

    parts: list[RenderableType] = [grid(Text(h, style="bold dim") for h in headers)]
    for cells, details in rows:
        parts.append(grid(styled(cell) for cell in cells))
        parts += [Padding(hanging(line), (0, 0, 0, widths[0] + 4)) for line in details]
    return Group(*parts)


def hanging(line: str) -> RenderableType:
    """A line that wraps under its own text, not under its mark ("- ", "-> ")."""
    mark, _, rest = line.partition(" ")
    if mark not in ("-", "->"):
        return Text(line, overflow="fold")
    made = Table.grid(padding=(0, 1))
    made.add_column()
    made.add_column(overflow="fold")
    made.add_row(Text(mark, style="dim"), Text(rest, overflow="fold"))
    return made
