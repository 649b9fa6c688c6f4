"""Overhead: how many Python frames a forward spends outside kernels, and which modules it must never call.

Counted are calls of Python functions of `moe_core` and of the plugin's own packages, each with a limit of its own. Not
counted are kernels, which are functions of a module with a part called `kernel` or `kernels` in its dotted name, the
kit's dispatchers, which stand in for somebody else's, and whatever either of them calls.
Frames are counted, not microseconds, so that the check means the same on every machine.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, Final

from moe_core import _lazy
from moe_core.testing.case import Case
from moe_core.testing.components import Lane
from moe_core.testing.registration import CheckFailed, CheckSkipped, check

#: Frames of `moe_core` in one forward, dispatch and combine included: what every layer pays, whatever computes it.
MAX_FRAMES: Final = 12
#: Frames of the plugin. One that launches its kernels itself makes their tensors and arguments in Python, as any caller
#: of these kernels would: that is no time of the framework, and must not grow unseen either.
MAX_OWN_FRAMES: Final = 40
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
_CORE: Final = "moe_core"
_KIT: Final = "moe_core.testing."


@dataclass(frozen=True, slots=True)
class Frames:
    """What one call entered: frames of `moe_core`, frames of the plugin, and forbidden modules with who called them."""

    core: list[str] = field(default_factory=list)
    own: list[str] = field(default_factory=list)
    forbidden: set[str] = field(default_factory=set)


def python_frames(call: Callable[[], Any], packages: set[str]) -> Frames:
    """The frames of one call. packages: top-level names of those whose frames count."""
    found = Frames()
    # For each frame on the stack, whether a counted one is above it, and whether what it calls is left out.
    stack = [(False, False)]

    def enter(frame: FrameType) -> tuple[bool, bool]:
        inside, hidden = stack[-1]
        name = _module(frame)
        # The kit drives the forward too: only what the forward itself calls stands in for somebody else.
        if hidden or _KERNEL.search(name) or (inside and name.startswith(_KIT)):
            return inside, True
        if any(name == f or name.startswith(f + ".") for f in FORBIDDEN):
            caller = _caller(frame)
            if caller is not None and _counts(_module(caller), packages):
                found.forbidden.add(f"{name} (by {_name(caller)})")
        if not _counts(name, packages):
            return inside, False
        (found.core if _top(name) == _CORE else found.own).append(_name(frame))
        return True, False

    def profile(frame: FrameType, event: str, argument: Any) -> None:
        if event == "call":
            stack.append(enter(frame))
        elif event == "return" and len(stack) > 1:
            stack.pop()

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        call()
    finally:
        sys.setprofile(before)
    return found


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


def _name(frame: FrameType) -> str:
    return f"{_module(frame)}.{frame.f_code.co_qualname}"


def _top(module: str) -> str:
    return module.partition(".")[0]


def _counts(module: str, packages: set[str]) -> bool:
    return _top(module) in packages and not module.startswith(_KIT)


def _caller(frame: FrameType) -> FrameType | None:
    """Who is to blame for a call: past the standard library, since `os.environ.get` enters `os` from collections.abc.

    A library, Triton's launcher for one, may do what it likes: the plugin cannot change it.
    """
    caller = frame.f_back
    while caller is not None and _top(_module(caller)) in sys.stdlib_module_names:
        caller = caller.f_back
    return caller


def _packages(lane: Lane) -> set[str]:
    """Top-level packages of the runner and of the lane."""
    found = {"moe_core"}
    for target in (*lane.runner.targets, *lane.spec.targets):
        value = _lazy.load(target, wanted_by=lane.runner.subject)
        found |= {target.partition(":")[0].partition(".")[0], str(getattr(value, "__module__", "")).partition(".")[0]}
    return found - {""}


def _measure(case: Case) -> Frames:
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
    """A forward takes at most 12 Python frames of moe_core, and 40 of the plugin, outside kernels."""
    found = _measure(case)
    if len(found.core) > MAX_FRAMES or len(found.own) > MAX_OWN_FRAMES:
        core = [f"{len(found.core)} frames of moe_core, at most {MAX_FRAMES}:", *found.core]
        own = [f"{len(found.own)} frames of the plugin, at most {MAX_OWN_FRAMES}:", *found.own]
        raise CheckFailed("\n".join("\n    ".join(lines) for lines in (core, own)))


@check("overhead.modules", each="lane", needs="run")
def modules(case: Case) -> None:
    """Outside kernels, a forward calls nothing of the registry, selection, settings, pluggy, logging, os or imports."""
    found = _measure(case)
    if found.forbidden:
        raise CheckFailed(f"a forward called functions of {', '.join(sorted(found.forbidden))}")
