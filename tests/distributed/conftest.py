"""`ranks(count, source)`: real processes over gloo, see `moe_core.testing.processes`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from moe_core.testing import run_ranks


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """patience: seconds that the group waits for a rank."""

    def run(count: int, source: str, patience: float | None = None) -> list[dict[str, Any]]:
        return run_ranks(count, source, tmp_path_factory.mktemp("gloo"), patience_s=patience)

    return run
