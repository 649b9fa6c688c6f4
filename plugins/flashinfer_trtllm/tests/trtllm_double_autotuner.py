"""FlashInfer's tuner as far as the plugin knows it: a context that writes a file, and an object that reads one."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from trtllm_double_formats import need
from trtllm_double_recorded import recorded

#: Files that were given to the tuner.
LOADED: list[str] = []
#: Whether calls are timed now.
TUNING: list[bool] = []


@contextlib.contextmanager
def _autotune(given: dict[str, Any]) -> Iterator[None]:
    need(given["tune_mode"] is True and isinstance(given["cache"], str), "a tuning without a file")
    TUNING.append(True)
    try:
        yield
    finally:
        TUNING.pop()
    path = Path(given["cache"])
    found = json.loads(path.read_text()) if path.exists() else {"double": 0}
    path.write_text(json.dumps({"double": found["double"] + 1}))


autotune = recorded("flashinfer.autotuner", "autotune", _autotune)


class AutoTuner:
    """Of the process."""

    @classmethod
    def get(cls) -> AutoTuner:
        """The one."""
        return cls()

    def load_configs(self, path: str) -> bool:
        """False for a file of another FlashInfer."""
        content = json.loads(Path(path).read_text())
        LOADED.append(path)
        return "double" in content
