"""What a plugin declares: frozen data with string targets, and the negotiation of terms between two sides.

A target is "package.module:attribute", imported only when a plan that uses it is bound. Every target names a *factory*
that is called once with a `moe_core.protocols.Binding` (weights functions take the weights too) and returns what the
protocol says. Nothing here imports torch.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from moe_core._frozen import FrozenDict
from moe_core.capability import Support, arch_matches
from moe_core.errors import SpecError
from moe_core.vocabulary import (
    PLUGIN_API,
    BackendName,
    DroppedSlot,
    FormatId,
    IdSpace,
    Maturity,
    Owner,
    PayloadId,
    Phase,
    Step,
)

_NAME = re.compile(r"^[a-z][a-z0-9_]*$")
_TARGET = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")


def _check(owner: str, name: str, *targets: str | None) -> None:
    if not _NAME.match(name):
        raise SpecError(f"{owner} has the name {name!r}", hint="use lower-case letters, digits and underscores")
    for target in targets:
        if target is not None and not _TARGET.match(target):
            raise SpecError(f"{owner} {name!r} has the target {target!r}", hint="write 'package.module:attribute'")


def _check_wants(kind: str, format_id: str, runner: str, wants: object) -> None:
    if wants == ():
        raise SpecError(f"the {kind} of ({format_id}, {runner}) has no wants: name at least one alternative")


@dataclass(frozen=True, slots=True, kw_only=True)
class PluginInfo:
    """Who a plugin is. `api` is the plugin API that it was written for."""

    name: str
    summary: str
    url: str = ""
    api: tuple[int, int] = PLUGIN_API


@dataclass(frozen=True, slots=True, kw_only=True)
class FormatSpec:
    """A layout of dispatch outputs and of the combine inputs that match it (targets name the two classes)."""

    id: FormatId
    summary: str
    dispatch_output: str
    combine_input: str

    def __post_init__(self) -> None:
        _check("format", self.id, self.dispatch_output, self.combine_input)


@dataclass(frozen=True, slots=True, kw_only=True)
class Offers:
    """What a dispatcher can give in one format. Sets: the runner's side has the preference.

    can: steps that it may take on in `combine`; always: steps that it does whatever was agreed.
    extras: open strings, "expert_map", "expert_mask", "host_counts", "num_valid", ...
    """

    id_spaces: frozenset[IdSpace]
    dropped: frozenset[DroppedSlot]
    payloads: frozenset[PayloadId] = frozenset({"bf16"})
    ids_dtypes: frozenset[str] = frozenset({"int32"})
    extras: frozenset[str] = frozenset()
    can: frozenset[Step] = frozenset()
    always: frozenset[Step] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wants:
    """What an adapter or fused func takes. Tuples are in order of preference.

    extras: must all be offered; optional: taken where offered. payloads: of these, a layer admits "bf16" (unquantized)
    and the one that its scheme quantizes activations to, so a runner of many schemes lists all that it can take.
    """

    id_spaces: tuple[IdSpace, ...] = (IdSpace.LOCAL,)
    dropped: tuple[DroppedSlot, ...] = (DroppedSlot.NEGATIVE, DroppedSlot.NEVER)
    payloads: tuple[PayloadId, ...] = ("bf16",)
    ids_dtypes: tuple[str, ...] = ("int32",)
    extras: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()
    can: frozenset[Step] = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.ROUTED_SCALING})
    always: frozenset[Step] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Terms:
    """What both sides agreed on. `steps` names the owner of each semantic step of the layer."""

    id_space: IdSpace
    dropped: DroppedSlot
    payload: PayloadId
    ids_dtype: str
    extras: frozenset[str]
    steps: Mapping[Step, Owner]

    def owner(self, step: Step) -> Owner | None:
        """Who performs `step`, or None where the layer has no such step."""
        return self.steps.get(step)

    def runner_does(self, step: Step) -> bool:
        """Whether the runner's side performs `step`."""
        return self.steps.get(step) is Owner.RUNNER


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatcherSpec:
    """A dispatcher. `formats` says which format it gives in each phase, `offers` its offer in each format.

    split_phases: it has `dispatch_begin`, `dispatch_finish`, `combine_begin` and `combine_finish` (AsyncDispatcher).
    maturity: architecture window -> how it was verified there. why_not: target of an import-free function
    (request, subject) -> list[Reason], for rules that `Support` cannot express.
    """

    name: BackendName
    summary: str
    factory: str
    formats: Mapping[Phase, FormatId]
    offers: Mapping[FormatId, Offers]
    support: Support
    priority: int = 100
    maturity: Mapping[str, Maturity] = field(default_factory=FrozenDict)
    options: Mapping[str, str] = field(default_factory=FrozenDict)
    split_phases: bool = False
    why_not: str | None = None

    def __post_init__(self) -> None:
        _check("dispatcher", self.name, self.factory, self.why_not)
        for name in ("formats", "offers", "maturity", "options"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        if not self.formats:
            raise SpecError(f"dispatcher {self.name!r} gives no format in any phase")
        lacking = sorted(set(self.formats.values()) - set(self.offers))
        if lacking:
            raise SpecError(f"dispatcher {self.name!r} gives {lacking} without saying what it offers there")

    @property
    def subject(self) -> str:
        """Its name in reasons."""
        return f"dispatcher:{self.name}"

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets that binding will import."""
        return (self.factory,)


@dataclass(frozen=True, slots=True, kw_only=True)
class RunnerSpec:
    """A runner core.

    factory(binding) -> RunnerCore. prepare(weights, binding) -> QuantInfo in one of `layouts`.
    update(quant_info, weights, binding) refreshes it in place; without one, the core prepares anew and copies.
    requirements(request) -> WeightRequirements: sizes to pad to, known before weights are allocated; import-free.
    router(binding) -> BoundRouter: the layer's routing function by kernels of its own; without one, the core's is used.
    quantizer(binding) -> BoundQuantizer: tokens that travel quantized, by kernels of its own; without one, the core's.
    tune(job: TuningJob) -> list[TuningRow]: measure and keep the best kernels for one layer (`moe-core tune`).
    options: name -> what it does; the values come from `Settings.options[name]`. last_resort: correct, but slow.
    """

    name: BackendName
    summary: str
    factory: str
    prepare: str
    support: Support
    layouts: frozenset[str]
    update: str | None = None
    requirements: str | None = None
    router: str | None = None
    quantizer: str | None = None
    tune: str | None = None
    priority: int = 100
    maturity: Mapping[str, Maturity] = field(default_factory=FrozenDict)
    options: Mapping[str, str] = field(default_factory=FrozenDict)
    last_resort: bool = False
    why_not: str | None = None

    def __post_init__(self) -> None:
        _check("runner", self.name, *self.targets, self.tune, self.why_not)
        for name in ("maturity", "options"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))
        if not self.layouts:
            raise SpecError(f"runner {self.name!r} declares no weight layout")
        if not self.support.schemes:
            raise SpecError(f"runner {self.name!r} supports no quant scheme")

    @property
    def subject(self) -> str:
        """Its name in reasons."""
        return f"runner:{self.name}"

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets that binding will import."""
        wanted = (self.factory, self.prepare, self.update, self.requirements, self.router, self.quantizer)
        return tuple(target for target in wanted if target is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterSpec:
    """The two adapters of one (format, runner): pre(binding) -> pre-permute, post(binding) -> post-permute.

    An adapter belongs to the runner's plugin, or to anyone who can write it. Several `wants` are alternatives; the
    first for which terms can be agreed counts. layouts: those of the runner's weight layouts that it takes (None: all);
    a plan with several paths needs one that serves them all.
    """

    runner: BackendName
    format: FormatId
    pre: str
    post: str
    wants: Wants | tuple[Wants, ...]
    layouts: frozenset[str] | None = None

    def __post_init__(self) -> None:
        _check("adapter for runner", self.runner, self.pre, self.post)
        _check_wants("adapter", self.format, self.runner, self.wants)

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets that binding will import."""
        return (self.pre, self.post)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedSpec:
    """A fused func for one (format, runner): target(binding) -> callable replacing pre-permute, run, post-permute.

    gives_up: features and hook points that the runner has and the fused func has not ("after_gate_up", ...).
    layouts: as for an adapter.
    """

    runner: BackendName
    format: FormatId
    target: str
    wants: Wants | tuple[Wants, ...]
    layouts: frozenset[str] | None = None
    gives_up: frozenset[str] = frozenset()

    def __post_init__(self) -> None:
        _check("fused func for runner", self.runner, self.target)
        _check_wants("fused func", self.format, self.runner, self.wants)

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets that binding will import."""
        return (self.target,)


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedPathSpec:
    """A path where dispatch and combine happen inside the kernel too: target(binding) -> FusedPath.

    `runner` names the runner spec whose weights it uses. It performs every step but those that the caller does.
    """

    name: BackendName
    summary: str
    runner: BackendName
    target: str
    support: Support
    priority: int = 100
    gives_up: frozenset[str] = frozenset()
    maturity: Mapping[str, Maturity] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        _check("fused path", self.name, self.target)
        object.__setattr__(self, "maturity", FrozenDict(self.maturity))

    @property
    def subject(self) -> str:
        """Its name in reasons."""
        return f"fused_path:{self.name}"

    @property
    def targets(self) -> tuple[str, ...]:
        """All targets that binding will import."""
        return (self.target,)


def maturity_on(maturity: Mapping[str, Maturity], arch: str) -> Maturity:
    """The best maturity that a spec declares for `arch`; `untested` where it declares none."""
    levels = list(Maturity)
    found = [level for window, level in maturity.items() if arch_matches(arch, window)]
    return min(found, key=levels.index) if found else Maturity.UNTESTED
