"""Overhead: how many Python frames the framework spends on a forward, and which ones it must never spend.

A framework frame is a call of a Python function of `moe_core` or of the plugin's own packages. Kernels are not counted:
neither a function of a module with a part called `kernel` or `kernels` in its dotted name, nor anything that it calls.
Frames are counted, not microseconds, so that the check means the same on every machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from moe_core import _lazy
from moe_core.testing.case import Case
from moe_core.testing.components import Lane
from moe_core.testing.registration import CheckFailed, CheckSkipped, check

#: Framework frames of one forward, dispatch and combine included.
MAX_FRAMES: Final = 12
#: Modules that have no place in a forward.
FORBIDDEN: Final = (
    "moe_core.registry",
    "moe_core.plugins",
    "moe_core.selection",
    "moe_core.explanation",
    "moe_core.settings",
    "pluggy",
    "logging",
    "os",
    "importlib",
    "_frozen_importlib",
    "importlib_metadata",
)
_KERNEL: Final = re.compile(r"(^|\.)_?kernels?(\.|$)")
# The kit's dispatchers stand in for somebody else's.
_KIT: Final = "moe_core.testing."


def python_frames(call: Callable[[], Any], packages: set[str]) -> tuple[list[str], list[str]]:
    """(framework frames, modules of all frames) of one call."""
    counted: list[str] = []
    modules: list[str] = []
    inside = 0

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal inside
        if event == "call":
            name = str(frame.f_globals.get("__name__", ""))
            modules.append(name)
            if inside or _KERNEL.search(name):
                inside += 1
            elif name.partition(".")[0] in packages and not name.startswith(_KIT):
                counted.append(f"{name}.{frame.f_code.co_qualname}")
        elif event == "return" and inside:
            inside -= 1

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return counted, modules


def _packages(lane: Lane) -> set[str]:
    """Top-level packages of the runner and of the lane."""
    found = {"moe_core"}
    for target in (*lane.runner.targets, *lane.spec.targets):
        value = _lazy.load(target, wanted_by=lane.runner.subject)
        found |= {target.partition(":")[0].partition(".")[0], str(getattr(value, "__module__", "")).partition(".")[0]}
    return found - {""}


def _measure(case: Case) -> tuple[list[str], list[str]]:
    setup = case.setup()
    if setup.lane.runner.last_resort:
        raise CheckSkipped("a last-resort runner is slow by declaration")
    layer = setup.layer()
    plan = setup.plan(layer.weights)
    for _ in range(3):
        plan(layer.hidden, layer.topk)
    return python_frames(lambda: plan(layer.hidden, layer.topk), _packages(setup.lane))


@check("overhead.frames", each="lane", needs="run")
def frames(case: Case) -> None:
    """A forward takes at most 12 Python frames of the framework and the plugin, outside kernels."""
    counted, _ = _measure(case)
    if len(counted) > MAX_FRAMES:
        raise CheckFailed(f"{len(counted)} frames, at most {MAX_FRAMES}:\n    " + "\n    ".join(counted))


@check("overhead.modules", each="lane", needs="run")
def modules(case: Case) -> None:
    """A forward calls nothing of the registry, the selection, settings, pluggy, logging, os or the import system."""
    _, called = _measure(case)
    bad = sorted({m for m in called if any(m == f or m.startswith(f + ".") for f in FORBIDDEN)})
    if bad:
        raise CheckFailed(f"a forward called functions of {', '.join(bad)}")
