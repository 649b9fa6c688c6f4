"""Where a runner's tuned kernels are kept. What is in such a file is the runner's own; the core knows its place."""

from __future__ import annotations

import os
from pathlib import Path

from moe_core.settings import Settings


def default_store(runner: str) -> Path:
    """This person's file for a runner: $XDG_CACHE_HOME/moe_core/tuning/<runner>.json, or the same under ~/.cache.

    `moe-core tune` writes it where no --store is given. Runners read it when they are bound; it can be deleted.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    # The specification of these variables: a relative path is to be ignored.
    base = Path(given) if os.path.isabs(given) else Path.home() / ".cache"
    return base / "moe_core" / "tuning" / f"{runner}.json"


def named_store(settings: Settings, runner: str) -> Path | None:
    """The file that the setting `tuning` names for a runner; in a folder, <runner>.json where there is one."""
    if settings.tuning is None:
        return None
    path = Path(settings.tuning)
    if not path.is_dir():
        return path
    inside = path / f"{runner}.json"
    return inside if inside.exists() else None
