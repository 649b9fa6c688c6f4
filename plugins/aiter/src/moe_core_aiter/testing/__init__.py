"""A strict double of AITER for tests without an AMD GPU: for this plugin's own, and for third parties.

    from moe_core_aiter.testing import OnCpu, double

    with double(arch="gfx942"):                   # `import aiter` finds it inside the block
        registry = Registry([OnCpu()])            # the same runner, declared for this CPU
        plan = moe_core.plan(config, weights, registry=registry, runner="aiter", ...)

`moe_core.testing.double("aiter", ...)` gives the same. The code lies in the plugin: it takes AITER's interface from
the facts recorded beside it, and the core knows no backend by name. Importing this module imports no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_core_aiter.testing.on_cpu import OnCpu

if TYPE_CHECKING:
    from moe_core_aiter.testing.fake_modules import AiterDouble, double
    from moe_core_aiter.testing.kernel import DoubleError

__all__ = ["AiterDouble", "DoubleError", "OnCpu", "double"]

_LAZY = {"AiterDouble": "fake_modules", "DoubleError": "kernel", "double": "fake_modules"}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
