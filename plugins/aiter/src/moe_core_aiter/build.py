"""The installed AITER: imported when a plan is bound, and held against what a layer needs of it.

Its interface changes from release to release, and what its kernels are handed is hardly checked there. So a build is
probed by what it has, never by its version: an argument that a layer needs and the build lacks is an error here.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.doctor import DoctorResult
from moe_core.errors import BindError
from moe_core.protocols import Binding
from moe_core_aiter import contract
from moe_core_aiter.schemes import ACTIVATIONS, SCHEMES

_HINT = "install AMD's AITER from source (github.com/ROCm/aiter) or use a ROCm image; PyPI's 'aiter' is another project"
_LITERALS = (type(None), bool, int, float)


@dataclass(frozen=True, slots=True)
class Build:
    """What an installed AITER has.

    parameters: of `fused_moe`, in order, with their defaults as text where they are literals. stages: of
    `get_2stage_cfgs`, none where there is no such function. flydsl: whether its FlyDSL kernels are there. mxfp8:
    whether it has some for mxfp8 weights.

    fp8, fp4x2, i4x2, e8m0: the torch dtypes by which it knows such tensors; fp8 is the hardware's own kind.
    """

    fused_moe: Callable[..., torch.Tensor]
    parameters: Mapping[str, str]
    stages: tuple[str, ...]
    activations: Any
    quant_types: Any
    fp8: torch.dtype
    fp4x2: torch.dtype
    i4x2: torch.dtype
    e8m0: torch.dtype
    flydsl: bool
    mxfp8: bool

    def has(self, *names: str) -> bool:
        """Whether `fused_moe` has all of these arguments."""
        return all(name in self.parameters for name in names)

    @property
    def counts_masked_slot(self) -> bool:
        """Whether it takes every masked call to have one slot more a row, which is masked always.

        v0.1.16 began with that: its choice of kernels is told whether there is a mask, and subtracts a slot then.
        """
        return "is_ep" in self.stages

    @property
    def takes_fp4_tokens(self) -> bool:
        """Whether rows that arrive in mxfp4 may be handed on: older builds quantize their bytes again.

        Without FlyDSL, small calls take them for numbers too.
        """
        return self.flydsl and self.has("gate_mode")


def load() -> Build:
    """The installed build. Raises BindError where it does not load, or is not AMD's."""
    try:
        package, module = importlib.import_module("aiter"), importlib.import_module("aiter.fused_moe")
    except Exception as error:  # a missing driver or compiler raises anything
        raise BindError(f"aiter does not load: {type(error).__name__}: {error}", hint=_HINT) from error
    wanted = [(package, "ActivationType"), (package, "QuantType"), (package, "dtypes"), (module, "fused_moe")]
    lacking = [f"{owner.__name__}.{name}" for owner, name in wanted if not hasattr(owner, name)]
    if lacking:
        raise BindError(f"the installed aiter has no {', '.join(lacking)}: it is not AMD's, or not whole", hint=_HINT)
    dtypes = package.dtypes
    flydsl = getattr(module, "is_flydsl_available", None)
    stages = getattr(module, "get_2stage_cfgs", None)
    defaults = {name: p.default for name, p in inspect.signature(module.fused_moe).parameters.items()}
    return Build(
        fused_moe=module.fused_moe,
        parameters={name: repr(value) if isinstance(value, _LITERALS) else "" for name, value in defaults.items()},
        stages=tuple(inspect.signature(stages).parameters) if callable(stages) else (),
        activations=package.ActivationType,
        quant_types=package.QuantType,
        fp8=dtypes.fp8,
        fp4x2=getattr(dtypes, "fp4x2", torch.uint8),
        i4x2=getattr(dtypes, "i4x2", torch.uint8),
        e8m0=getattr(dtypes, "fp8_e8m0", torch.uint8),
        flydsl=bool(flydsl()) if callable(flydsl) else False,
        # No argument says so. They came with v0.1.17, which changed this default.
        mxfp8=defaults.get("swiglu_limit", 0.0) is None,
    )


def problems(build: Build, binding: Binding) -> list[str]:
    """Everything that a layer needs and the build lacks."""
    config = binding.config
    scheme = SCHEMES[config.scheme]
    found = [f"fused_moe has no argument {name!r}" for name in contract.SENT if not build.has(name)]
    activation, quant = ACTIVATIONS[config.activation.name], scheme.quant_type
    members = (("ActivationType", build.activations, activation), ("QuantType", build.quant_types, quant))
    found += [f"{name} has no member {member}" for name, enum, member in members if not hasattr(enum, member)]
    if "fp8" in config.scheme and build.fp8 not in (torch.float8_e4m3fn, torch.float8_e4m3fnuz):
        found.append(f"its fp8 is {build.fp8} on this device, which is no kind of e4m3")
    if config.scheme in ("mxfp4_w4a16", "int4_w4a16") and not build.has("gate_mode"):
        # The release that brought it also brought the kernels that leave the tokens in 16 bits.
        found.append(f"fused_moe has no argument 'gate_mode': it quantizes the tokens of {config.scheme}")
    if config.scheme == "mxfp8" and not build.mxfp8:
        found.append("its kernels for mxfp8 weights came with v0.1.17, where the default of swiglu_limit became None")
    if config.scheme in ("int4_w4a16", "mxfp8") and not build.flydsl:
        found.append(f"its kernels for {config.scheme} need FlyDSL (in the version that AITER asks for)")
    if config.bias and not build.has("bias1", "bias2"):
        found.append("fused_moe has no arguments 'bias1' and 'bias2'")
    return found


def load_for(binding: Binding) -> Build:
    """`load`, and a BindError that lists everything that this layer needs and the build lacks."""
    build = load()
    lacking = problems(build, binding)
    if lacking:
        about = contract.like(build.parameters, build.stages)
        raise BindError(
            f"the installed AITER cannot run {binding.config.scheme} with {binding.config.activation.name} "
            f"({'arguments as in ' + about if about else 'arguments of no recorded version'}):\n    "
            + "\n    ".join(lacking),
            hint="take a newer AITER, or another runner",
        )
    return build


def examine() -> DoctorResult:
    """The installed build beside the recorded ones, for `moe-core doctor`."""
    build = load()
    about, news = contract.like(build.parameters, build.stages), contract.differences(build.parameters)
    if about is not None:
        return DoctorResult(True, f"the arguments of fused_moe are those of the recorded version {about}")
    broken = [one for one in news if one.endswith("missing")]
    return DoctorResult(
        not broken,
        f"the arguments of fused_moe are of no recorded version: {', '.join(news) or 'another order'}",
        "take an AITER of at least 0.1.4" if broken else None,
    )
