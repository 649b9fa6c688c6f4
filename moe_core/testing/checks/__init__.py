"""All checks of the kit. Importing this registers them, in the order in which they are listed and made."""

from moe_core.testing.checks import (
    capability,
    contract,
    coverage,
    dispatch,
    dispatch_state,
    graph,
    hooks,
    hygiene,
    numerics,
    options,
    overhead,
    parallel,
    rows,
    specs,
    state,
    weights,
)  # isort: skip

__all__ = [
    "capability",
    "contract",
    "coverage",
    "dispatch",
    "dispatch_state",
    "graph",
    "hooks",
    "hygiene",
    "numerics",
    "options",
    "overhead",
    "parallel",
    "rows",
    "specs",
    "state",
    "weights",
]
