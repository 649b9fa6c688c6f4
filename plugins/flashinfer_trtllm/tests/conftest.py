"""FlashInfer's double in place of FlashInfer, and plans over it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

HERE = Path(__file__).parent
# The doubles import each other by name.
sys.path.insert(0, str(HERE))


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def double(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`flashinfer` is the double in this test, and nobody's tuned kernels are read."""
    import trtllm_double

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trtllm_double.install(monkeypatch)
    return trtllm_double
