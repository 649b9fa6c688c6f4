"""A strict double of MoRI, for tests without AMD GPUs: this plugin's own, and those of whoever writes a runner for it.

    from moe_core_mori import testing

    testing.install(arch="gfx942")       # `import mori` finds the double from now on, in this process
    registry = Registry([testing.OnCpu()])

CPU tensors move between real processes over gloo, so that a layer over MoRI can be held against the same layer on one
rank. What MoRI documents, or is known to need without checking, is enforced: see `world`, `first` and `second`. It is
part of the distribution, and not of the tests alone, because other plugins' tests need it too. Importing this module
imports no torch; `install` does.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from moe_core import hookimpl
from moe_core.specs import DispatcherSpec
from moe_core.vocabulary import PayloadId
from moe_core_mori import facts
from moe_core_mori.plugin import MoriPlugin
from moe_core_mori.testing.errors import DoubleError

__all__ = ["DoubleError", "MoriDouble", "Narrowed", "OnCpu", "double", "install", "open_operators"]


def install(*, arch: str = "gfx950", version: str = facts.NEWEST, compute_units: int = 256, heap_gib: int = 16) -> None:
    """Put the double into `sys.modules` as `mori`, for one device, as a version of which facts are recorded.

    A version without the second interface has none here either, and kernels that it lacks are missing.
    """
    from moe_core_mori.testing import first, second, world

    recorded = facts.load(version)
    world.HERE = world.Device(arch=arch, compute_units=compute_units, heap_bytes=heap_gib << 30)
    ops, shmem = ModuleType("mori.ops"), ModuleType("mori.shmem")
    kernels = recorded.enums["EpDispatchCombineKernelType"]
    kinds = type("EpDispatchCombineKernelType", (), {k: getattr(first.EpDispatchCombineKernelType, k) for k in kernels})
    vars(ops).update(
        EpDispatchCombineKernelType=kinds,
        EpDispatchCombineConfig=first.EpDispatchCombineConfig,
        EpDispatchCombineOp=first.EpDispatchCombineOp,
    )
    names = ("shmem_get_unique_id", "shmem_init_attr", "shmem_mype", "shmem_npes", "MORI_SHMEM_INIT_WITH_UNIQUEID")
    vars(shmem).update({name: getattr(first, name) for name in names})
    modules = {"mori": ModuleType("mori"), "mori.ops": ops, "mori.shmem": shmem}
    if recorded.parameters("mori.ops.dispatch_combine_v2.EpDispatchCombineConfig"):
        v2, cco = ModuleType("mori.ops.dispatch_combine_v2"), ModuleType("mori.cco")
        vars(v2).update(
            EpDispatchCombineConfig=second.EpDispatchCombineConfig, EpDispatchCombineOp=second.EpDispatchCombineOp
        )
        vars(cco).update(Communicator=second.Communicator)
        modules |= {"mori.ops.dispatch_combine_v2": v2, "mori.cco": cco}
    modules["mori"].__version__ = version  # type: ignore[attr-defined]
    for module in modules.values():
        module.__path__ = []
    _replace(modules)


def _replace(modules: dict[str, ModuleType]) -> dict[str, ModuleType]:
    """Put these into `sys.modules` for everything called `mori`; what was there."""
    before = {name: module for name, module in sys.modules.items() if name.partition(".")[0] == "mori"}
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    return before


def open_operators() -> int:
    """Operators of this process that were made and not closed or dropped yet."""
    from moe_core_mori.testing.world import device

    return device().open_operators


@dataclass(frozen=True, slots=True)
class MoriDouble:
    """What `double` yields. plugin: the dispatchers, declared for CPUs."""

    plugin: OnCpu


@contextmanager
def double(**options: Any) -> Iterator[MoriDouble]:
    """`install` inside a `with` block, with its arguments; `moe_core.testing.double("mori", ...)` gives the same."""
    from moe_core_mori.testing import world

    device, before = world.HERE, _replace({})
    try:
        install(**options)
        yield MoriDouble(OnCpu())
    finally:
        _replace(before)
        world.HERE = device


class Narrowed(MoriPlugin):
    """The plugin's dispatchers, offering one payload alone: a runner that prefers another one shows nothing of it."""

    def __init__(self, payload: PayloadId | None = None) -> None:
        self._payload = payload

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """The same, with fewer payloads."""
        specs = super().moe_core_dispatchers()
        return specs if self._payload is None else tuple(_narrowed(spec, self._payload) for spec in specs)


class OnCpu(Narrowed):
    """Likewise, where the double runs."""

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """The same, for CPUs, and without asking whether MoRI is installed."""
        return tuple(
            replace(spec, maturity={}, support=replace(spec.support, devices={"cpu": ("*",)}, requires=()))
            for spec in super().moe_core_dispatchers()
        )


def _narrowed(spec: DispatcherSpec, payload: PayloadId) -> DispatcherSpec:
    offers = {name: replace(offer, payloads=frozenset({payload})) for name, offer in spec.offers.items()}
    return replace(spec, offers=offers)
