"""All checks of the kit. Importing this registers them, in the order in which they are listed and made."""

from __future__ import annotations

import importlib
from typing import Final

MODULES: Final = (
    "hygiene",
    "specs",
    "capability",
    "coverage",
    "contract",
    "rows",
    "payloads",
    "state",
    "numerics",
    "options",
    "parallel",
    "hooks",
    "weights",
    "graph",
    "overhead",
    "dispatch",
    "dispatch_terms",
    "dispatch_state",
    "ranks",
)

for _name in MODULES:
    importlib.import_module(f"{__name__}.{_name}")
