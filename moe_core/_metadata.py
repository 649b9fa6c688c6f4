"""Installed distributions and entry points: the one place that knows which metadata library is in use.

Below Python 3.12 the backport `importlib_metadata` is used, for uniform `EntryPoints` behavior, early errors on
malformed entry points and safe path caches under fork. Nobody else imports either.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING or sys.version_info >= (3, 12):
    import importlib.metadata as metadata
else:  # pragma: no cover - one branch a Python version
    import importlib_metadata as metadata


def version(distribution: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def entry_points(group: str) -> Iterable[Any]:
    """Entry points of `group` in all installed distributions (stale duplicates of one distribution removed)."""
    return metadata.entry_points(group=group)


def requirements(dist: Any) -> list[str]:
    """The Requires-Dist lines of a distribution."""
    return list(dist.requires or [])


def distributions() -> Iterable[Any]:
    """Every installed distribution, copies of one name included."""
    return metadata.distributions()
