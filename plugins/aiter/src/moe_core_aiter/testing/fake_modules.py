"""The double as modules: `aiter`, `aiter.fused_moe`, with the interface of one recorded version."""

from __future__ import annotations

import ast
import inspect
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from moe_core_aiter import contract
from moe_core_aiter.testing import kernel
from moe_core_aiter.testing.on_cpu import OnCpu

_FP8 = {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}


class AiterDouble:
    """A fake AITER for one architecture, in the form of one recorded version.

    arch: "gfx942", whose fp8 is e4m3fnuz, or "gfx950". version: one of `moe_core_aiter.contract.recorded()`, by default
    the newest. more: arguments of `fused_moe` that no record has ("output"). flydsl: whether FlyDSL is "installed".
    calls: the arguments of the last hundred calls. plugin: the same runner, declared for a CPU.
    """

    def __init__(
        self, arch: str = "gfx950", version: str | None = None, *, more: Iterable[str] = (), flydsl: bool = True
    ) -> None:
        records = contract.recorded()
        self.arch, self.facts = arch, records[version or [*records][-1]]
        self.calls: deque[dict[str, Any]] = deque(maxlen=100)
        self.plugin = OnCpu()
        # Other numbers than AITER's: only names may be relied upon.
        enums = {
            name: Enum(name, [(member, 100 + i) for i, member in enumerate(members)])
            for name, members in (
                ("ActivationType", self.facts.activation_type),
                ("QuantType", self.facts.quant_type),
            )
        }
        parameters = {**self.facts.fused_moe, **dict.fromkeys(more, "None")}
        signature = _signature(parameters, {**enums, "GateMode": _GateMode})
        mxfp8 = "swiglu_limit" in parameters and signature.parameters["swiglu_limit"].default is None
        device = kernel.Device(arch, _FP8[arch], flydsl, "is_ep" in self.facts.get_2stage_cfgs, mxfp8)
        inner = ModuleType("aiter.fused_moe")
        inner.__dict__["fused_moe"] = kernel.make(signature, device, self.calls.append)
        if self.facts.get_2stage_cfgs:
            inner.__dict__["get_2stage_cfgs"] = _described(self.facts.get_2stage_cfgs)
        if "gate_mode" in parameters:
            inner.__dict__["is_flydsl_available"] = lambda: flydsl
        outer = ModuleType("aiter")
        outer.__path__ = []
        dtypes = SimpleNamespace(
            fp8=device.fp8, fp4x2=torch.float4_e2m1fn_x2, i4x2=kernel.INT4, fp8_e8m0=torch.float8_e8m0fnu
        )
        outer.__dict__.update(enums, dtypes=dtypes, fused_moe=inner)
        self.modules = {"aiter": outer, "aiter.fused_moe": inner}

    def install(self) -> dict[str, ModuleType | None]:
        """Let `import aiter` find it; returns what was there before, for `restore`."""
        before = {name: sys.modules.get(name) for name in self.modules}
        sys.modules.update(self.modules)
        return before

    @staticmethod
    def restore(before: Mapping[str, ModuleType | None]) -> None:
        """Undo `install`."""
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module


class _GateMode(Enum):
    SEPARATED = "separated"


def _described(names: Iterable[str]) -> Callable[..., None]:
    """A function of these arguments, which is looked at and never called."""

    def described() -> None:
        raise NotImplementedError("the double chooses no kernels")

    described.__signature__ = _signature(dict.fromkeys(names), {})  # type: ignore[attr-defined]
    return described


def _signature(parameters: Mapping[str, str | None], names: Mapping[str, Any]) -> inspect.Signature:
    empty, either = inspect.Parameter.empty, inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature(
        [
            inspect.Parameter(name, either, default=empty if text is None else _value(text, names))
            for name, text in parameters.items()
        ]
    )


def _value(text: str, names: Mapping[str, Any]) -> Any:
    """A recorded default: a literal, or an attribute of an enum."""
    first, *rest = text.split(".")
    if first not in names:
        return ast.literal_eval(text)
    value = names[first]
    for attribute in rest:
        value = getattr(value, attribute)
    return value


@contextmanager
def double(arch: str = "gfx950", version: str | None = None, **more: Any) -> Iterator[AiterDouble]:
    """An `AiterDouble`, installed inside the block."""
    made = AiterDouble(arch, version, **more)
    before = made.install()
    try:
        yield made
    finally:
        made.restore(before)
