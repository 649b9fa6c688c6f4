"""What the suites of this plugin share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = str(Path(__file__).parent)
if HERE not in sys.path:  # the suites import their helpers by name
    sys.path.insert(0, HERE)
#: The kernels of this plugin are Triton's.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    """The markers, where moe-core is on the path without being installed."""
    from moe_core.testing import pytest_plugin

    if not config.pluginmanager.is_registered(pytest_plugin):
        config.pluginmanager.register(pytest_plugin, "moe_core")


@pytest.fixture
def patch() -> Iterator[pytest.MonkeyPatch]:
    """FlashInfer is the double here; what else should be patched."""
    from doubling import doubled

    with doubled() as context:
        yield context
