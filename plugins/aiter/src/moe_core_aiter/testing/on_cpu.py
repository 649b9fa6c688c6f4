"""The plugin, declared for a CPU, where the double runs. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from moe_core.hookspecs import hookimpl
from moe_core.specs import RunnerSpec
from moe_core_aiter.plugin import AiterPlugin


class OnCpu(AiterPlugin):
    """The same runner and adapters, for any CPU and without the requirement of an installed AITER."""

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """The runner, for this machine."""
        here = {"devices": {"cpu": ("*",)}, "scheme_archs": {}, "requires": ()}
        return tuple(
            replace(spec, support=replace(spec.support, **here), maturity={})  # type: ignore[arg-type]
            for spec in super().moe_core_runners()
        )


plugin = OnCpu()
