"""The pytest plugin of moe-core (entry point `moe_core`): markers that become skips, and one line in the header.

It is loaded in every pytest run where moe-core is installed, so it imports nothing heavy, discovers only for the
header, and never lets a broken plugin stop a run.
"""

from __future__ import annotations

import logging
from collections import Counter

import pytest

_MARKERS = (
    "gpu: needs a GPU that torch sees",
    "nvidia: needs an NVIDIA GPU",
    "amd: needs an AMD GPU",
    "multigpu(n): needs n GPUs in one machine",
    "slow: takes long; left out with --moe-core-skip-slow",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """The name is long so that it cannot collide with another project's option."""
    group = parser.getgroup("moe-core")
    group.addoption("--moe-core-skip-slow", action="store_true", help="skip tests marked as slow")


def pytest_configure(config: pytest.Config) -> None:
    """Make the markers known, for --strict-markers."""
    for line in _MARKERS:
        config.addinivalue_line("markers", line)


def pytest_report_header(config: pytest.Config) -> str:
    """Version and plugin states."""
    from moe_core._version import __version__

    logger = logging.getLogger("moe_core.plugins")
    disabled, logger.disabled = logger.disabled, True  # the line below says it
    try:
        from moe_core.plugins import discover
        from moe_core.settings import Settings

        records = discover(Settings.load()).records
    except Exception as error:  # the header must never stop a run
        return f"moe-core: {__version__}, plugins cannot be listed ({type(error).__name__}: {error})"
    finally:
        logger.disabled = disabled
    counts = Counter(record.state.value for record in records)
    states = ", ".join(f"{count} {state}" for state, count in counts.items()) or "none installed"
    trouble = ", ".join(r.name for r in records if r.state.value in ("broken", "duplicate", "incompatible"))
    return f"moe-core: {__version__}, plugins: {states}" + (f" ({trouble})" if trouble else "")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine cannot run."""
    if item.get_closest_marker("slow") is not None and item.config.getoption("--moe-core-skip-slow", False):
        pytest.skip("marked as slow, and --moe-core-skip-slow was given")
    wanted = {name: item.get_closest_marker(name) for name in ("gpu", "nvidia", "amd", "multigpu")}
    if not any(wanted.values()):
        return
    import torch

    have, hip = torch.cuda.device_count(), torch.version.hip is not None
    many = wanted["multigpu"]
    needed = int(many.args[0] if many.args else 2) if many is not None else 1
    if have < needed:
        pytest.skip(f"needs {needed} GPU{'s' if needed > 1 else ''}, torch sees {have}")
    if (wanted["nvidia"] is not None and hip) or (wanted["amd"] is not None and not hip):
        pytest.skip(
            f"needs an {'AMD' if hip is False else 'NVIDIA'} GPU, this torch is built for {'ROCm' if hip else 'CUDA'}"
        )
