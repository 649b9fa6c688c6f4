"""What a point costs at least, what it is compared with, and how points are summed up. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from shapes import Shape

from moe_core.quant import builtin_scheme

#: The fixed rates that percentages refer to, so that runs and recorded numbers compare (one H200, measured).
BANDWIDTH: Final = 4.3e12
GEMM_RATE: Final = {"bfloat16": 790e12, "e4m3": 1400e12, "int8": 1400e12}
#: A point is behind where it is slower than the best peer by more than this.
BEHIND: Final = 1.03
OURS: Final = "moe_core"
RECORDED: Final = Path(__file__).parents[1] / "recorded_peers.json"

BUCKETS: Final[dict[str, tuple[int, int]]] = {
    "T=1": (1, 1),
    "8-64": (2, 64),
    "256-1024": (65, 1024),
    ">=4096": (1025, 1 << 40),
}
#: Issue 3: per cent of the floor, geometric mean over the shapes, and the best of all recorded peers there.
GOALS: Final[dict[str, dict[str, int]]] = {
    "bf16": {"T=1": 85, "8-64": 98, "256-1024": 90, ">=4096": 85},
    "fp8_block128": {"T=1": 70, "8-64": 92, "256-1024": 80, ">=4096": 65},
    "mxfp4_w4a16": {"T=1": 55, "8-64": 85, "256-1024": 70, ">=4096": 55},
}


def bucket(tokens: int) -> str:
    """The column of a number of tokens in the table of goals."""
    return next(name for name, (low, high) in BUCKETS.items() if low <= tokens <= high)


@dataclass(frozen=True, slots=True)
class Work:
    """What one layer call has to do."""

    flops: float
    bytes: float
    gemm_rate: float

    @property
    def floor_us(self) -> float:
        """Microseconds below which no kernel gets, at the fixed rates."""
        return 1e6 * max(self.flops / self.gemm_rate, self.bytes / BANDWIDTH)

    @property
    def by_operations(self) -> bool:
        """Whether operations are the floor, not bytes."""
        return self.flops / self.gemm_rate > self.bytes / BANDWIDTH


def gemm_rate(scheme: str) -> float:
    """Operations a second of the tensor-core instruction that a scheme's activations allow."""
    activation = builtin_scheme(scheme).activation or "bfloat16"
    return GEMM_RATE["int8" if "int8" in activation else "e4m3" if "fp8" in activation else "bfloat16"]


def expert_bytes(shape: Shape, scheme: str) -> int:
    """Stored bytes of one expert: weights, scales, and bf16 biases where the layer has them."""
    described = builtin_scheme(scheme)
    total = described.weight_bytes(2 * shape.inner, shape.hidden) + described.weight_bytes(shape.hidden, shape.inner)
    return total + (2 * (2 * shape.inner + shape.hidden) if shape.oai else 0)


def work(shape: Shape, scheme: str, tokens: int, activated: float) -> Work:
    """`activated`: how many experts have at least one token."""
    flops = 6.0 * tokens * shape.top_k * shape.hidden * shape.inner
    moved = activated * expert_bytes(shape, scheme) + 2 * tokens * shape.hidden * 2
    return Work(flops, moved, gemm_rate(scheme))


def geometric_mean(values: Iterable[float]) -> float | None:
    """None for no values."""
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs)) if logs else None


def recorded(path: Path = RECORDED) -> list[dict[str, Any]]:
    """Rows of peers measured in another run, in the form of a run's own rows."""
    rows: list[dict[str, Any]] = json.loads(path.read_text())["rows"]
    return [row | {"source": "recorded", "routing": "uniform"} for row in rows]


Point = tuple[str, str, int]


def percents(rows: Iterable[dict[str, Any]], routing: str = "uniform") -> dict[Point, dict[str, float]]:
    """(shape, scheme, tokens) -> contestant -> per cent of the floor, over the rows that are right."""
    found: dict[Point, dict[str, float]] = {}
    for row in rows:
        if row.get("us") and row.get("ok", True) and row["routing"] == routing:
            point = (row["shape"], row["scheme"], row["tokens"])
            found.setdefault(point, {})[row["contestant"]] = 100 * row["floor_us"] / row["us"]
    return found


def is_ours(contestant: str) -> bool:
    """ "moe_core triton" and the like."""
    return contestant.split()[0] == OURS


def best(of: dict[str, float], ours: bool) -> tuple[float, str] | None:
    """(per cent, contestant) of the best one of us, or of the peers."""
    return max(((p, name) for name, p in of.items() if is_ours(name) == ours), default=None)


@dataclass(slots=True)
class Cell:
    """One scheme and bucket: geometric means over the points that were measured, in per cent of the floor.

    peers and recorded: the best peer at each point, over those points that have one; `ours_there` is our mean over the
    points of `recorded`, to compare like with like.
    """

    scheme: str
    bucket: str
    points: int
    ours: float | None
    goal: int | None
    peers: float | None
    recorded: float | None
    ours_there: float | None


def summary(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], shapes: set[str]) -> list[Cell]:
    """Per scheme and bucket. `others`: recorded rows. Only `shapes` count."""
    here, there = percents(rows), percents(others)
    cells = []
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        for name in BUCKETS:
            points = [p for p in here if p[0] in shapes and p[1] == scheme and bucket(p[2]) == name]
            ours = {p: found[0] for p in points if (found := best(here[p], True))}
            same_run = [found[0] for p in points if (found := best(here[p], False))]
            other = {p: found[0] for p in points if (found := best(there.get(p, {}), False))}
            if not points:
                continue
            cells.append(
                Cell(
                    scheme=scheme,
                    bucket=name,
                    points=len(points),
                    ours=geometric_mean(ours.values()),
                    goal=GOALS.get(scheme, {}).get(name),
                    peers=geometric_mean(same_run),
                    recorded=geometric_mean(other.values()),
                    ours_there=geometric_mean(v for p, v in ours.items() if p in other),
                )
            )
    return cells


@dataclass(slots=True)
class Behind:
    """A point where a peer is faster by more than `BEHIND`. times: peer's per cent of the floor over ours."""

    shape: str
    scheme: str
    tokens: int
    ours: float
    peer: str
    theirs: float
    times: float


def behind(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> list[Behind]:
    """Worst first. Recorded peers are marked so; they ran with other random routings, so per cents are compared."""
    here, there = percents(rows), percents(others)
    found = []
    for point, contestants in here.items():
        ours = best(contestants, True)
        peers = {n: p for n, p in contestants.items() if not is_ours(n)}
        peers |= {f"{n} (recorded)": p for n, p in there.get(point, {}).items()}
        peer = best(peers, False)
        if ours and peer and peer[0] / ours[0] > BEHIND:
            found.append(Behind(*point, ours=ours[0], peer=peer[1], theirs=peer[0], times=peer[0] / ours[0]))
    return sorted(found, key=lambda b: -b.times)
