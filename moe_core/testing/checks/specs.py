"""Hygiene of single specs: frozen data, targets that exist, documented options, honest maturity."""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Iterable, Iterator
from typing import Any

from moe_core import _lazy
from moe_core.capability import arch_number
from moe_core.specs import DispatcherSpec, FormatSpec, RunnerSpec
from moe_core.testing.case import Case
from moe_core.testing.registration import COMPUTING, DECLARING, CheckFailed, CheckSkipped, check
from moe_core.vocabulary import Maturity

_SPECS = (*COMPUTING, "dispatcher", "format")


@check("hygiene.frozen", kind=_SPECS)
def frozen(case: Case) -> None:
    """A spec is frozen, hashable and picklable data: it can be shared, compared and sent to workers."""
    spec = case.component.spec
    parameters = getattr(type(spec), "__dataclass_params__", None)
    if parameters is None or not parameters.frozen:
        raise CheckFailed(f"{type(spec).__name__} is not a frozen dataclass")
    hash(spec)
    copy = pickle.loads(pickle.dumps(spec))
    if copy != spec or hash(copy) != hash(spec):
        raise CheckFailed("it does not survive pickling unchanged")


@check("hygiene.targets", kind=_SPECS)
def targets(case: Case) -> None:
    """Every target names a module that is there and, where the component can run, a callable in it."""
    spec = case.component.spec
    # Rules and size requirements are asked while planning, on machines where nothing else can be imported.
    light = [t for t in (getattr(spec, "why_not", None), getattr(spec, "requirements", None)) if t is not None]
    for target in light:
        if not callable(_lazy.load(target, wanted_by=case.component.id)):
            raise CheckFailed(f"{target} is not callable")
    heavy = (spec.dispatch_output, spec.combine_input) if isinstance(spec, FormatSpec) else spec.targets
    missing = [t for t in heavy if not _lazy.module_exists(t)]
    if missing:
        if any(level is not Maturity.UNTESTED for level in getattr(spec, "maturity", {}).values()):
            raise CheckFailed(f"declared as {dict(spec.maturity)}, without code: {', '.join(missing)}")
        raise CheckSkipped(f"this version announces it without its code ({', '.join(missing)})")
    if not isinstance(spec, FormatSpec) and (case.component.runner or isinstance(spec, DispatcherSpec)):
        case.stage.site(case.component)
    for target in heavy:
        if not callable(_lazy.load(target, wanted_by=case.component.id)):
            raise CheckFailed(f"{target} is not callable")


@check("hygiene.documented", kind=(*DECLARING, "format"))
def documented(case: Case) -> None:
    """The summary, every option and every requirement say something a person can use."""
    spec = case.component.spec
    if not spec.summary.strip():
        raise CheckFailed("the summary is empty")
    silent = [name for name, text in getattr(spec, "options", {}).items() if not str(text).strip()]
    if silent:
        raise CheckFailed(f"options without a description: {', '.join(silent)}")
    if not isinstance(spec, FormatSpec):
        mute = [requirement.module for requirement in spec.support.requires if not requirement.hint]
        if mute:
            raise CheckFailed(f"requirements without a hint how to get them: {', '.join(mute)}")


@check("hygiene.maturity", kind=DECLARING)
def maturity(case: Case) -> None:
    """A maturity is claimed only for architectures that the component supports."""
    spec = case.component.spec
    support = spec.support
    for window, level in spec.maturity.items():
        if not isinstance(level, Maturity):
            raise CheckFailed(f"the maturity on {window} is {level!r}, not one of {', '.join(Maturity)}")
        for arch in _ends(window):
            if not any(support.arch_supported(device, arch) for device in _devices(arch, support.devices)):
                raise CheckFailed(f"claims to be {level} on {window}, and does not support {arch}")


def _devices(arch: str, declared: Iterable[str]) -> list[str]:
    """Those of the declared devices that can have this architecture."""
    of = {"sm": "cuda", "gfx": "rocm"}.get((arch_number(arch) or ("", 0))[0])
    return [device for device in declared if device == "*" or of in (None, device)]


def _ends(window: str) -> Iterator[str]:
    if window != "*":
        yield from re.split(r"\.\.", window.removeprefix(">="))


@check("hygiene.format", kind="format")
def format_classes(case: Case) -> None:
    """Both classes of a format are dataclasses with hidden_states and handle, and carry the format's id."""
    spec: FormatSpec = case.component.spec
    for target in (spec.dispatch_output, spec.combine_input):
        cls: Any = _lazy.load(target, wanted_by=case.component.id)
        if not dataclasses.is_dataclass(cls):
            raise CheckFailed(f"{target} is not a dataclass")
        fields = {f.name for f in dataclasses.fields(cls)}
        if not {"hidden_states", "handle"} <= fields:
            raise CheckFailed(f"{target} lacks {sorted({'hidden_states', 'handle'} - fields)}")
        if getattr(cls, "format", None) != spec.id:
            raise CheckFailed(f"{target}.format is {getattr(cls, 'format', None)!r}, the format is {spec.id!r}")


@check("hygiene.support", kind=("runner", "dispatcher"))
def support_is_usable(case: Case) -> None:
    """A runner has a way into it, activations and dtypes; a dispatcher gives formats that somebody registered."""
    spec, registry = case.component.spec, case.stage.source
    if isinstance(spec, RunnerSpec):
        ways = {f for f, r in (*registry.adapters, *registry.fused) if r == spec.name}
        ways |= {p.name for p in registry.fused_paths.values() if p.runner == spec.name}
        empty = [n for n in ("dtypes", "activations", "gated") if not getattr(spec.support, n)]
        if not ways or empty:
            raise CheckFailed(f"nothing can use it: {'no adapter or fused func leads into it' if not ways else empty}")
    else:
        unknown = sorted(set(spec.formats.values()) - set(registry.formats))
        if unknown:
            raise CheckFailed(f"it gives formats that nobody registered: {', '.join(unknown)}")
