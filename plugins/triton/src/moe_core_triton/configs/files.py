"""Files of tuned configurations: versioned JSON by device, Triton version, problem and tokens, made to be compared."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from moe_core.errors import ConfigError, MoeCoreError
from moe_core_triton.configs.config import LayerConfig, Problem

FORMAT: Final = 1
RUNNER: Final = "triton"
#: The files that come with this package, one a device.
SHIPPED: Final = Path(__file__).parent / "shipped"


#: Token counts from here on are nobody's.
MOST: Final = 1 << 31


class Where(NamedTuple):
    """What was measured on: the product's name, its architecture, Triton's major.minor."""

    device: str
    arch: str
    triton: str


@dataclass(frozen=True, slots=True)
class Entry:
    """The best configuration found. us, default_us: microseconds of a call with it, and without tuning."""

    config: LayerConfig
    us: float
    default_us: float | None = None


#: Problem key -> tokens -> entry.
Table = Mapping[str, Mapping[int, Entry]]


@dataclass(frozen=True, slots=True)
class Store:
    """What one file holds."""

    sections: Mapping[Where, Table] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises ConfigError for a file that is missing, broken, another runner's or of another format version."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the tuning file {str(path)!r} cannot be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:  # bad JSON, or no text
            raise _bad(path, f"is not valid JSON: {error}") from error
        if not isinstance(document, dict) or document.get("runner") != RUNNER:
            found = document.get("runner") if isinstance(document, dict) else None
            raise ConfigError(
                f"the tuning file {str(path)!r} is for runner {found!r}, not for {RUNNER!r}",
                hint=f"MOE_CORE_TUNING may name a folder with {RUNNER}.json in it, for several runners",
            )
        if document.get("format") != FORMAT:
            raise _bad(path, f"has format version {document.get('format')!r}, this version reads {FORMAT}")
        try:
            return cls({_where(section): _table(section["entries"]) for section in document["sections"]})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise _bad(path, f"holds something else than expected: {type(error).__name__}: {error}") from error

    def with_entry(self, where: Where, problem: Problem, tokens: int, entry: Entry) -> Store:
        """A copy with one entry more, or another one in its place."""
        return self.merged(Store({where: {problem.key: {tokens: entry}}}))

    def merged(self, other: Store) -> Store:
        """A copy with the entries of `other`, which win."""
        sections = {where: {key: dict(row) for key, row in table.items()} for where, table in self.sections.items()}
        for where, table in other.sections.items():
            for key, row in table.items():
                sections.setdefault(where, {}).setdefault(key, {}).update(row)
        return Store(sections)

    def text(self) -> str:
        """The file's content: sorted, a line for each token count."""
        sections = ",".join(
            f'\n  {{"device": {json.dumps(where.device)}, "arch": {json.dumps(where.arch)}, '
            f'"triton": {json.dumps(where.triton)}, "entries": {{{_entries_text(table)}\n  }}}}'
            for where, table in sorted(self.sections.items())
        )
        return f'{{"format": {FORMAT}, "runner": "{RUNNER}", "sections": [{sections}\n]}}\n'

    def write(self, path: str | Path) -> None:
        """Replace the file, all or nothing. Raises MoeCoreError where that cannot be done."""
        path, made = Path(path), None
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, delete=False) as file:
                made = file.name
                file.write(self.text())
            mask = os.umask(0)
            os.umask(mask)
            os.chmod(made, 0o666 & ~mask)  # temporary files are private
            os.replace(made, path)
        except OSError as error:
            if made is not None:
                Path(made).unlink(missing_ok=True)
            raise MoeCoreError(f"the tuning file {str(path)!r} cannot be written: {error.strerror}") from error


def add(path: str | Path, where: Where, problem: Problem, tokens: int, entry: Entry) -> None:
    """Put one entry into a file that may not exist. Never overwrites a file that it cannot read (ConfigError)."""
    store = Store.read(path) if Path(path).exists() else Store()
    store.with_entry(where, problem, tokens, entry).write(path)


def triton_version() -> str:
    """Major and minor version of the installed Triton, "none" without one."""
    try:
        import triton  # type: ignore[import-untyped]
    except ImportError:
        return "none"
    return ".".join(triton.__version__.split(".")[:2])


def _bad(path: str | Path, what: str) -> ConfigError:
    return ConfigError(
        f"the tuning file {str(path)!r} {what}", hint="write it anew with `moe-core tune`, or move it away"
    )


def _where(section: Any) -> Where:
    where = Where(*(section[name] for name in Where._fields))
    if not all(isinstance(text, str) for text in where):
        raise ValueError(f"{where} is not made of text")
    return where


def _table(value: Any) -> Table:
    table: dict[str, dict[int, Entry]] = {}
    for key, row in value.items():
        Problem.parse(key)
        table[key] = {int(tokens): _entry(entry) for tokens, entry in row.items()}
        bad = [tokens for tokens in table[key] if not 1 <= tokens < MOST]
        if bad:
            raise ValueError(f"{key} with {bad[0]} tokens")
    return table


def _entry(value: Any) -> Entry:
    default = value.get("default_us")
    return Entry(
        LayerConfig.from_json(value["config"]), float(value["us"]), None if default is None else float(default)
    )


def _entries_text(table: Table) -> str:
    problems = []
    for key, row in sorted(table.items()):
        lines = []
        for tokens, entry in sorted(row.items()):
            value: dict[str, Any] = {"us": round(entry.us, 2)}
            if entry.default_us is not None:
                value["default_us"] = round(entry.default_us, 2)
            value["config"] = entry.config.to_json()
            lines.append(f'\n     "{tokens}": {json.dumps(value)}')
        problems.append(f"\n    {json.dumps(key)}: {{{','.join(lines)}\n    }}")
    return ",".join(problems)
