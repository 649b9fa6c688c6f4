"""Measured times of candidates, written by `moe-core bench --save` and used to rank them.

A file holds one entry for each (hardware, problem, candidate): milliseconds of one call by number of tokens.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from moe_core.errors import ConfigError
from moe_core.hardware import HardwareInfo
from moe_core.request import PlanRequest

VERSION = 1


def problem_key(request: PlanRequest) -> str:
    """What a measured time depends on, beside the hardware: sizes, dtype, scheme, activation and parallel sizes."""
    c, p = request.config, request.parallel
    gate = "gated" if c.activation.gated else "plain"
    group = f"g{c.group_size}" if c.group_size else ""
    return (
        f"E{c.num_experts}k{c.top_k}H{c.hidden_size}I{c.intermediate_size}-{c.dtype}-{c.scheme}{group}"
        f"-{c.activation.name}-{gate}-{'bias' if c.bias else 'nobias'}-tp{p.tp_size}ep{p.ep_size}"
    )


def hardware_key(hardware: HardwareInfo) -> str:
    """The product and architecture; other machines with the same device share the numbers."""
    return f"{hardware.product}|{hardware.arch}"


@dataclass(frozen=True, slots=True)
class Measurements:
    """Read once when planning. `entries`: (hardware, problem) -> candidate id -> tokens -> milliseconds."""

    entries: Mapping[tuple[str, str], Mapping[str, Mapping[int, float]]] = field(default_factory=dict)

    @classmethod
    def read(cls, path: str | Path) -> Measurements:
        """Raises ConfigError for a file that is missing, unreadable or of another version."""
        try:
            document = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise ConfigError(f"the measurements file {str(path)!r} cannot be read: {error.strerror}") from error
        except json.JSONDecodeError as error:
            raise ConfigError(f"the measurements file {str(path)!r} is not valid JSON: {error}") from error
        if not isinstance(document, dict) or document.get("version") != VERSION:
            found = document.get("version") if isinstance(document, dict) else None
            raise ConfigError(
                f"the measurements file {str(path)!r} has version {found!r}, expected {VERSION}",
                hint="measure again with `moe-core bench --save`",
            )
        entries: dict[tuple[str, str], dict[str, dict[int, float]]] = {}
        for row in document.get("entries", []):
            table = entries.setdefault((row["hardware"], row["problem"]), {})
            table[row["candidate"]] = {int(tokens): float(ms) for tokens, ms in row["ms"].items()}
        return cls(entries)

    def write(self, path: str | Path) -> None:
        """Write all entries, sorted, so that the file can be compared and reviewed."""
        rows = [
            {"hardware": hw, "problem": problem, "candidate": name, "ms": {str(t): ms[t] for t in sorted(ms)}}
            for (hw, problem), table in sorted(self.entries.items())
            for name, ms in sorted(table.items())
        ]
        text = json.dumps({"version": VERSION, "entries": rows}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    def with_result(self, request: PlanRequest, candidate: str, milliseconds: Mapping[int, float]) -> Measurements:
        """A copy in which one candidate's times are replaced."""
        key = (hardware_key(request.hardware), problem_key(request))
        table = {**self.entries.get(key, {}), candidate: dict(milliseconds)}
        return Measurements({**self.entries, key: table})

    def score(self, request: PlanRequest, candidate: str) -> float | None:
        """Geometric mean over the token counts that all measured candidates of this problem share; None if unknown."""
        table = self.entries.get((hardware_key(request.hardware), problem_key(request)), {})
        if candidate not in table:
            return None
        shared = set.intersection(*(set(ms) for ms in table.values()))
        times = [table[candidate][tokens] for tokens in sorted(shared)]
        return math.exp(sum(map(math.log, times)) / len(times)) if times else None
