"""Which product runs at how many rows an expert: plain data that a plan fixes and a pickle carries."""

from __future__ import annotations

from dataclasses import dataclass

REGIMES = (1, 4, 16, 64)
"""Rows an expert that calibration.py measures."""
_BOUNDS = (2, 8, 32)  # geometric means between them


@dataclass(frozen=True, slots=True)
class Products:
    """The table of one layer; the tuples have an entry a regime.

    onednn: an expert's product goes through oneDNN's linear (always for packed weights), else through
    `torch.nn.functional.linear`. grouped: all products of a phase are one `grouped_mm`. phased_rows: up to so
    many rows, an intermediate result fits in the L2 caches and phases save calls; above, they cost misses.
    """

    onednn: tuple[bool, ...]
    grouped: tuple[bool, ...]
    phased_rows: int

    def regime(self, rows: int, experts: int) -> int:
        """Index of the regime of `rows` rows that go to `experts` distinct experts."""
        return sum(rows > bound * experts for bound in _BOUNDS)

    def describe(self) -> list[str]:
        """A name a regime, for reports."""
        names = (
            "grouped_mm" if g else "oneDNN" if o else "linear" for o, g in zip(self.onednn, self.grouped, strict=True)
        )
        return [f"{rows} rows: {name}" for rows, name in zip(REGIMES, names, strict=True)]
