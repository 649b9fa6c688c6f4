"""Capabilities as data: what a component supports, what it requires, and every reason why it cannot serve.

Whatever is not declared is not supported. Never imports torch or a vendor package: requirements are probed through
the import system's finders only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from typing import TYPE_CHECKING, Final

from packaging.version import InvalidVersion, Version

from moe_core import _metadata
from moe_core._frozen import FrozenDict
from moe_core._lazy import find_child
from moe_core.errors import SpecError
from moe_core.vocabulary import TOPK_STANDARD, DeviceType, Phase, SchemeId

if TYPE_CHECKING:
    from moe_core.request import PlanRequest

#: Every reason code of the core, with what it means. Codes are API; messages are not. Plugins may add their own
#: under a prefix of their name ("acme.no_license").
REASON_CODES: Final[Mapping[str, str]] = {
    "device.type": "made for another kind of device",
    "device.arch": "not made for this architecture",
    "dep.missing": "a module that it needs is not installed",
    "dep.namespace": "only a bare folder of that name was found, not the package",
    "dep.impostor": "a package of that name is installed, but it is another one",
    "dep.version": "the installed version is too old",
    "target.missing": "the plugin declares this, but its code is not in the installed version",
    "quant.scheme": "does not run this quant scheme",
    "quant.unknown": "no plugin describes this quant scheme",
    "quant.shape": "the scheme cannot store matrices of this shape",
    "quant.group_size": "does not run this group size",
    "quant.input_scales": "needs static input scales with this quant scheme, and the weights have none",
    "dtype": "does not run this dtype",
    "activation": "does not have this activation function",
    "activation.gated": "does not run gated (or non-gated) layers",
    "activation.limit": "cannot clamp gate and up",
    "shape.hidden": "hidden size does not fit",
    "shape.intermediate": "intermediate size a rank does not fit",
    "shape.top_k": "top_k is too large",
    "shape.num_experts": "too many experts",
    "shape.max_tokens": "max_tokens is needed, or too large",
    "topk.format": "does not take the router's decision in this form",
    "parallel.ep": "this EP size is not supported",
    "parallel.tokens": "takes tokens laid out over the ranks in another way",
    "parallel.placement": "this expert placement is not supported",
    "feature": "a must-have feature is not declared",
    "feature.host_sync": "synchronizes with the host where that was excluded",
    "phase": "does not serve this phase",
    "contract.id_space": "no id space that both sides know",
    "contract.dropped": "no encoding of dropped slots that both sides know",
    "contract.payload": "no payload that both sides know",
    "contract.layout": "no weight layout serves every path of the plan",
    "contract.extras": "the dispatcher does not offer what the runner asks for",
    "contract.ids_dtype": "no dtype of the ids that both sides know",
    "step.never": "a step of the layer would be done by nobody",
    "step.twice": "a step of the layer would be done twice",
    "path.missing": "no adapter or fused func joins this format and runner",
    "path.excluded": "another path was asked for",
    "override.excluded": "another backend was asked for by name",
    "maturity": "never verified on this architecture, and the settings ask for more",
    "last_resort": "correct but slow, and the settings exclude it",
    "probe.failed": "the component's own check raised",
}


@dataclass(frozen=True, slots=True)
class Reason:
    """One reason why `subject` ("runner:acme", "dispatcher:deepep", "path:...") cannot serve a request."""

    subject: str
    code: str
    message: str
    needed: str | None = None
    found: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        return f"[{self.code}] {self.message}" + (f"  -> {self.hint}" if self.hint else "")

    def to_json(self) -> dict[str, str | None]:
        """A JSON-able form."""
        return {
            "subject": self.subject,
            "code": self.code,
            "message": self.message,
            "needed": self.needed,
            "found": self.found,
            "hint": self.hint,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Requires:
    """A module that must be installed, probed without importing it.

    `module` is the import name; `submodule` (dotted, below it) tells the wanted package from an unrelated one of the
    same name; `distribution` and `min_version` check the version where one distribution provides the module.
    """

    module: str
    submodule: str | None = None
    distribution: str | None = None
    min_version: str | None = None
    hint: str | None = None

    def __post_init__(self) -> None:
        if "." in self.module:
            raise SpecError(
                f"Requires.module is {self.module!r}: finding a submodule by its dotted name would import its parent",
                hint="name the top-level module, and the rest in submodule=",
            )

    def why_not(self, subject: str) -> list[Reason]:
        """Empty when it is there; the reason otherwise. Takes well under a millisecond."""
        code, message, found = _probe(self)
        if code is None:
            return []
        needed = self.module + (f">={self.min_version}" if self.min_version else "")
        return [Reason(subject, code, message, needed=needed, found=found, hint=self.hint)]


def _probe(req: Requires) -> tuple[str | None, str, str | None]:
    try:
        spec: ModuleSpec | None = find_spec(req.module)
    except (ImportError, ValueError, AttributeError) as error:
        return "dep.missing", f"{req.module!r} cannot be found ({error})", None
    if spec is None:
        return "dep.missing", f"{req.module!r} is not installed", None
    if spec.origin is None:
        # A folder without __init__.py on sys.path looks like a namespace package of that name.
        places = ", ".join(spec.submodule_search_locations or ())
        return (
            "dep.namespace",
            f"{req.module!r} is only a folder ({places}), not an installed package",
            places,
        )
    if req.submodule:
        name = req.module
        for part in req.submodule.split("."):
            name, spec = f"{name}.{part}", find_child(spec, part)
            if spec is None:
                message = f"{req.module!r} is installed but has no {name!r}: another package, or another version of it"
                return "dep.impostor", message, None
    if req.min_version:
        version = _metadata.version(req.distribution or req.module)
        if version is None:
            return None, "", None
        try:
            if Version(version) < Version(req.min_version):
                return "dep.version", f"{req.module!r} is {version}, older than {req.min_version}", version
        except InvalidVersion:
            return "dep.version", f"{req.module!r} has an unreadable version {version!r}", version
    return None, "", None


_ARCH = re.compile(r"^([a-z_]+?)_?(\d+[a-z]?\d*)$")


@lru_cache(maxsize=256)
def arch_number(arch: str) -> tuple[str, int] | None:
    """("sm", 90) for "sm_90", ("gfx", 0x942) for "gfx942"; None where an architecture has no order ("x86_64")."""
    match = _ARCH.match(arch)
    if match is None:
        return None
    family, digits = match.groups()
    try:
        # AMD numbers steppings in hexadecimal (gfx90a < gfx942); CUDA ones are decimal, with an optional suffix.
        return (family, int(digits, 16)) if family == "gfx" else (family, int(digits.rstrip("abf")))
    except ValueError:
        return None


def arch_matches(arch: str, window: str) -> bool:
    """Whether `arch` lies in `window`: "*", "sm_90", ">=sm_80" or "sm_90..sm_103" (both ends included)."""
    if window in ("*", arch):
        return True
    if window.startswith(">="):
        low, high = window[2:], None
    elif ".." in window:
        low, high = window.split("..", 1)
    else:
        return False
    have, first = arch_number(arch), arch_number(low)
    if have is None or first is None or have[0] != first[0] or have[1] < first[1]:
        return False
    last = arch_number(high) if high else None
    return high is None or (last is not None and have[1] <= last[1])


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """What a runner or dispatcher can do. A field that is left out means "not supported" (or "any" for limits).

    devices: device type -> architecture windows ("*", "sm_90", ">=sm_80", "sm_90..sm_103"); "*" -> any device.
    scheme_archs: narrower windows for single schemes (fp8 needs newer hardware than bf16).
    features: open strings; those the core derives from a layer are `bias`, `router_weight_on_input` and
    `no_combine`; callers may require `compile`, `deterministic`, `lora`, `inplace` and plugins' own.
    graph_capture, host_sync: the phases in which it can be captured in a device graph / synchronizes the host.
    needs_input_scales: schemes that it runs only with static input scales: its kernels quantize GEMM2's tokens by them.
    even_experts: every EP rank must hold the same number of experts. tokens: how a dispatcher or fused path takes them
    with EP: "replicated" (every rank brings all tokens) or "sharded" (each brings its own).
    Of a dispatcher, `dtypes` limit it only where they are given, and the feature `no_combine` means that it can
    return every slot of a token.
    hooks: hook points it calls, for LoRA: "after_gate_up", "after_down".
    """

    devices: Mapping[DeviceType, tuple[str, ...]]
    schemes: frozenset[SchemeId] = frozenset()
    scheme_archs: Mapping[SchemeId, tuple[str, ...]] = field(default_factory=FrozenDict)
    dtypes: frozenset[str] = frozenset()
    activations: frozenset[str] = frozenset()
    gated: frozenset[bool] = frozenset()
    activation_limit: bool = False
    features: frozenset[str] = frozenset()
    hooks: frozenset[str] = frozenset()
    topk_formats: frozenset[str] = frozenset({TOPK_STANDARD})
    phases: frozenset[Phase] = frozenset(Phase)
    graph_capture: frozenset[Phase] = frozenset()
    host_sync: frozenset[Phase] = frozenset()
    group_sizes: frozenset[int] = frozenset()
    needs_input_scales: frozenset[SchemeId] = frozenset()
    hidden_multiple: int = 1
    intermediate_multiple: int = 1
    hidden_sizes: frozenset[int] = frozenset()
    max_top_k: int | None = None
    max_experts: int | None = None
    max_tokens: int | None = None
    needs_max_tokens: bool = False
    ep_sizes: tuple[int, int | None] = (1, None)
    placements: frozenset[str] = frozenset({"linear", "round_robin", "map"})
    even_experts: bool = False
    tokens: frozenset[str] = frozenset()
    requires: tuple[Requires, ...] = field(default=())

    def __post_init__(self) -> None:
        if not self.devices:
            raise SpecError("Support.devices is empty: name at least one device type, or '*'")
        object.__setattr__(self, "devices", FrozenDict(self.devices))
        object.__setattr__(self, "scheme_archs", FrozenDict(self.scheme_archs))

    def why_not(self, request: PlanRequest, subject: str) -> list[Reason]:
        """All reasons why this cannot serve `request`; empty when it can. Pure."""
        from moe_core._checks import support_reasons

        return support_reasons(self, request, subject)

    def arch_supported(self, device_type: str, arch: str) -> bool:
        """Whether a window covers this device and architecture."""
        windows = (*self.devices.get(device_type, ()), *self.devices.get("*", ()))
        return any(arch_matches(arch, window) for window in windows)
