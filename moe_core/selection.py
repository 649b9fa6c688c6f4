"""Selection: candidates, hard filters, negotiation, ranking. A pure function of request, specs and measurements.

Components are judged first and pairs only among those that can serve, so that a report says each thing once.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from moe_core import _checks, _lazy
from moe_core.capability import Reason
from moe_core.errors import did_you_mean
from moe_core.negotiation import negotiate
from moe_core.request import PlanRequest
from moe_core.resolution import Candidate, Component, PathChoice, PriorityNote, Rejected, Resolution, Verdict
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedPathSpec, FusedSpec, RunnerSpec, Terms, maturity_on
from moe_core.vocabulary import DroppedSlot, FormatId, Maturity, Owner, Phase, Step

if TYPE_CHECKING:
    from moe_core.measurements import Measurements
    from moe_core.registry import Registry

#: Two measured times closer than this, as a part of the faster one, say nothing about which is better.
MEASUREMENT_NOISE: Final = 0.05


def resolve(request: PlanRequest, registry: Registry, measurements: Measurements | None = None) -> Resolution:
    """Answer `request`. Never raises for a layer that nothing can run: see `Resolution.require`.

    Raises ConfigError for a forced name that does not exist.
    """
    settings = request.settings
    if settings.runner is not None:
        registry.runner(settings.runner)
    if settings.dispatcher is not None and settings.dispatcher not in registry.fused_paths:
        registry.dispatcher(settings.dispatcher)
    dispatchers = [_judge(s, "dispatcher", request, registry) for _, s in sorted(registry.dispatchers.items())]
    runners = [_judge(s, "runner", request, registry) for _, s in sorted(registry.runners.items())]
    wholes = [_judge(s, "fused path", request, registry) for _, s in sorted(registry.fused_paths.items())]

    candidates: list[Candidate] = []
    rejected: list[Rejected] = []
    for dispatcher in (v.spec for v in dispatchers if v.usable):
        for runner in (v.spec for v in runners if v.usable):
            if isinstance(dispatcher, DispatcherSpec) and isinstance(runner, RunnerSpec):
                _join(dispatcher, runner, request, registry, candidates, rejected)
    usable_runners = {v.spec.name for v in runners if v.usable}
    for whole in (v.spec for v in wholes if v.usable):
        if isinstance(whole, FusedPathSpec) and whole.runner in usable_runners:
            _whole(whole, request, registry, candidates, rejected)
    failures: list[str] = []
    ranked = _rank(candidates, request, registry, measurements, failures)
    verdicts = (*runners, *dispatchers, *wholes)
    return Resolution(
        request,
        verdicts,
        tuple(ranked),
        tuple(rejected),
        (*_notes(ranked, request, registry), *dict.fromkeys(failures)),
        _versions(ranked, request, registry),
    )


def _judge(spec: Component, kind: str, request: PlanRequest, registry: Registry) -> Verdict:
    subject, settings = spec.subject, request.settings
    reasons = spec.support.why_not(request, subject)
    maturity = maturity_on(spec.maturity, request.hardware.arch)
    levels = list(Maturity)
    if levels.index(maturity) > levels.index(settings.min_maturity):
        reasons.append(
            Reason(
                subject,
                "maturity",
                f"{maturity.value} on {request.hardware.arch}, the settings ask for {settings.min_maturity.value}",
                settings.min_maturity.value,
                maturity.value,
            )
        )
    if "targets" not in request.assume:
        missing = sorted({t for t in spec.targets if not _lazy.module_exists(t)})
        if missing:
            owner = registry.owner(kind, spec.name)
            reasons.append(
                Reason(
                    subject,
                    "target.missing",
                    f"plugin {owner!r} {registry.version_of(owner) or ''} declares it without its code "
                    f"({', '.join(missing)})".replace("  ", " "),
                    hint="this version only announces the backend; upgrade the plugin",
                )
            )
    # A fused path replaces the dispatcher: forcing one by name excludes the others, in both directions.
    forced = settings.runner if isinstance(spec, RunnerSpec) else settings.dispatcher
    if forced is not None and spec.name != forced:
        reasons.append(Reason(subject, "override.excluded", f"{forced!r} was asked for by name", forced, spec.name))
    if isinstance(spec, RunnerSpec):
        reasons += _checks.scheme_reasons(request, subject, dict(registry.schemes))
        if request.config.scheme not in registry.schemes:
            reasons.append(
                Reason(
                    subject,
                    "quant.unknown",
                    f"no plugin describes the scheme {request.config.scheme!r}",
                    request.config.scheme,
                    ", ".join(sorted(registry.schemes)),
                    did_you_mean(request.config.scheme, registry.schemes),
                )
            )
        if spec.last_resort and not settings.allow_last_resort and settings.runner != spec.name:
            reasons.append(
                Reason(
                    subject,
                    "last_resort",
                    "correct but slow; the settings exclude it",
                    hint=f"name it (runner={spec.name!r}), or set allow_last_resort",
                )
            )
    why_not = None if isinstance(spec, FusedPathSpec) else spec.why_not
    if why_not is not None:
        try:
            reasons += _lazy.load(why_not, wanted_by=subject)(request, subject)
        except Exception as error:  # a plugin's rule may raise anything; that speaks against the plugin only
            reasons.append(Reason(subject, "probe.failed", f"{why_not} raised {type(error).__name__}: {error}"))
    return Verdict(spec, registry.owner(kind, spec.name), tuple(reasons), maturity)


def _join(
    dispatcher: DispatcherSpec,
    runner: RunnerSpec,
    request: PlanRequest,
    registry: Registry,
    candidates: list[Candidate],
    rejected: list[Rejected],
) -> None:
    """All candidates of one dispatcher and one runner: with fused funcs where there are any, and without."""
    by_kind: dict[str, dict[Phase, PathChoice]] = {"fused": {}, "split": {}}
    pair = f"{dispatcher.name}+{runner.name}"
    scheme = registry.schemes[request.config.scheme]
    admitted = frozenset({"bf16"} | ({scheme.activation} if scheme.activation else set()))
    for phase in request.phases:
        format_id = dispatcher.formats.get(phase)
        if format_id is None:
            rejected.append(
                Rejected(
                    pair,
                    (Reason(f"path:{pair}", "phase", f"{dispatcher.name} does not serve {phase.value}"),),
                )
            )
            return
        options: dict[str, AdapterSpec | FusedSpec | None] = {
            "fused": registry.fused.get((format_id, runner.name)),
            "split": registry.adapters.get((format_id, runner.name)),
        }
        found = False
        for kind, spec in options.items():
            if spec is None:
                continue
            path_id = f"{pair}/{kind}[{format_id}]"
            outcome = _path(dispatcher, spec, kind, format_id, request, admitted, f"path:{path_id}")
            if isinstance(outcome, PathChoice):
                by_kind[kind][phase], found = outcome, True
            elif Rejected(path_id, tuple(outcome)) not in rejected:
                rejected.append(Rejected(path_id, tuple(outcome)))
        if not found:
            if not any(options.values()):
                reason = Reason(
                    f"path:{pair}",
                    "path.missing",
                    f"no adapter joins the format {format_id!r} with the runner {runner.name!r}",
                    hint="anyone can register an AdapterSpec for them",
                )
                rejected.append(Rejected(f"{pair}[{format_id}]", (reason,)))
            return
    callers = {
        frozenset(s for s, o in c.terms.steps.items() if o is Owner.CALLER)
        for k in by_kind.values()
        for c in k.values()
    }
    if len(callers) > 1:
        # A caller does not know the phase's terms: what it has to do must not depend on them.
        reason = Reason(f"path:{pair}", "step.never", "the phases would leave different steps to the caller")
        rejected.append(Rejected(pair, (reason,)))
        return
    for preferred, other in (("fused", "split"), ("split", "fused")):
        paths = tuple((p, by_kind[preferred].get(p) or by_kind[other][p]) for p in request.phases)
        maturity = max(
            (maturity_on(s.maturity, request.hardware.arch) for s in (dispatcher, runner)),
            key=list(Maturity).index,
        )
        layouts = frozenset.intersection(runner.layouts, *(c.spec.layouts or runner.layouts for _, c in paths))
        if not layouts:
            wanted = "; ".join(f"{c.format}: {', '.join(sorted(c.spec.layouts or ()))}" for _, c in paths)
            reason = Reason(f"path:{pair}", "contract.layout", f"no weight layout serves all phases ({wanted})")
            if Rejected(pair, (reason,)) not in rejected:
                rejected.append(Rejected(pair, (reason,)))
            continue
        priority = dispatcher.priority + runner.priority
        candidate = Candidate(dispatcher.name, runner.name, paths, priority, maturity, layouts=layouts)
        if candidate not in candidates:
            candidates.append(candidate)


def _path(
    dispatcher: DispatcherSpec,
    spec: AdapterSpec | FusedSpec,
    kind: str,
    format_id: FormatId,
    request: PlanRequest,
    admitted: frozenset[str],
    subject: str,
) -> PathChoice | list[Reason]:
    reasons: list[Reason] = []
    wanted = request.settings.path
    if wanted is not None and wanted != kind:
        reasons.append(Reason(subject, "path.excluded", f"the path {wanted!r} was asked for", wanted, kind))
    if "targets" not in request.assume:
        missing = sorted({t for t in spec.targets if not _lazy.module_exists(t)})
        if missing:
            reasons.append(Reason(subject, "target.missing", f"declared without its code ({', '.join(missing)})"))
    if isinstance(spec, FusedSpec):
        needed = request.layer_features | request.features | request.hooks
        for feature in sorted(needed & spec.gives_up):
            reasons.append(Reason(subject, "feature", f"the fused func gives up {feature!r}", feature))
    refused: list[Reason] = []
    for wants in spec.wants if isinstance(spec.wants, tuple) else (spec.wants,):
        terms = negotiate(
            dispatcher.offers[format_id],
            wants,
            subject=subject,
            steps=request.steps,
            caller_does=request.caller_does | _caller_reduces(request),
            caller_can=request.caller_can,
            caller_drops_none=request.incoming is DroppedSlot.NEVER,
            partial=request.parallel.ep_size > 1,
            admitted=admitted,
        )
        if isinstance(terms, Terms):
            if request.config.router_weight_on_input and terms.owner(Step.ROUTER_WEIGHT) is Owner.DISPATCHER:
                message = "nobody would do router_weight before the experts: the dispatcher multiplies their results"
                refused.append(Reason(subject, "step.never", message))
                continue
            return reasons or PathChoice(format_id, kind, terms, spec)
        refused += [reason for reason in terms if reason not in refused]
    return reasons + refused


def _caller_reduces(request: PlanRequest) -> frozenset[Any]:
    both = frozenset({Step.EP_REDUCE, Step.TP_REDUCE})
    return both if request.parallel.reduce == "caller" else frozenset()


def _whole(
    spec: FusedPathSpec,
    request: PlanRequest,
    registry: Registry,
    candidates: list[Candidate],
    rejected: list[Rejected],
) -> None:
    subject, reasons = spec.subject, []
    wanted = request.settings.path
    if wanted is not None and wanted != "whole":
        reasons.append(Reason(subject, "path.excluded", f"the path {wanted!r} was asked for", wanted, "whole"))
    for feature in sorted((request.layer_features | request.features | request.hooks) & spec.gives_up):
        reasons.append(Reason(subject, "feature", f"the fused path gives up {feature!r}", feature))
    for step in sorted(request.steps & (request.caller_does | _caller_reduces(request))):
        reasons.append(Reason(subject, "step.twice", f"{step.value} would be done by the fused path and the caller"))
    if reasons:
        rejected.append(Rejected(spec.name, tuple(reasons)))
        return
    runner = registry.runners[spec.runner]
    maturity = maturity_on(spec.maturity, request.hardware.arch)
    candidates.append(
        Candidate(
            spec.name,
            spec.runner,
            (),
            spec.priority + runner.priority,
            maturity,
            fused_path=spec.name,
            layouts=runner.layouts,
        )
    )


def _rank(
    candidates: list[Candidate],
    request: PlanRequest,
    registry: Registry,
    measurements: Measurements | None,
    failures: list[str],
) -> list[Candidate]:
    """Best first: by priority, fused before split, then by name; measured candidates among themselves by time."""
    judged = []
    for candidate in candidates:
        notes = []
        for record, note in registry.call("moe_core_adjust_priority", failures, request=request, candidate=candidate):
            if isinstance(note, PriorityNote):
                notes.append(note)
            else:
                failures.append(f"plugin {record.name!r} adjusted a priority with {note!r}, which is no PriorityNote")
        judged.append(
            replace(
                candidate,
                priority=candidate.priority + sum(n.delta for n in notes),
                notes=tuple(notes),
                measured_ms=measurements.score(request, candidate.id) if measurements is not None else None,
            )
        )
    order = {"whole": 0, "fused": 1, "mixed": 2, "split": 3}
    # A slow runner stays last however good its dispatcher is.
    judged.sort(key=lambda c: (registry.runners[c.runner].last_resort, -c.priority, order[c.kind], c.id))
    # An unmeasured candidate keeps its place; measured ones share out theirs by time. So a measurement never decides
    # against something that it says nothing about.
    places = [i for i, c in enumerate(judged) if c.measured_ms is not None]
    for place, candidate in zip(places, _by_time([judged[i] for i in places]), strict=True):
        judged[place] = candidate
    return judged


def _by_time(measured: list[Candidate]) -> list[Candidate]:
    """Fastest first. Within the noise of a measurement the order by priority stays, so that a choice does not flap."""
    waiting, order = list(measured), []
    while waiting:
        fastest = min(c.measured_ms or 0.0 for c in waiting)
        order.append(next(c for c in waiting if (c.measured_ms or 0.0) <= fastest * (1 + MEASUREMENT_NOISE)))
        waiting.remove(order[-1])
    return order


def _notes(ranked: list[Candidate], request: PlanRequest, registry: Registry) -> list[str]:
    if not ranked:
        return []
    chosen, arch, notes = ranked[0], request.hardware.arch, []
    for kind, spec in (
        ("runner", registry.runners[chosen.runner]),
        (
            "dispatcher",
            registry.dispatchers.get(chosen.dispatcher) or registry.fused_paths[chosen.dispatcher],
        ),
    ):
        level = maturity_on(spec.maturity, arch)
        if level is not Maturity.EXECUTED:
            notes.append(f"{kind} {spec.name!r} is {level.value} on {arch}: it has not been seen running there")
    runner = registry.runners[chosen.runner]
    if runner.last_resort and request.settings.runner != runner.name:
        notes.append(f"runner {runner.name!r} is correct but slow; nothing faster that is installed can serve this")
    if request.assume:
        notes.append(f"taken for granted, not checked on this machine: {', '.join(sorted(request.assume))}")
    return notes


def _versions(ranked: list[Candidate], request: PlanRequest, registry: Registry) -> dict[str, str | None]:
    """The versions of every plugin that has a part in the choice."""
    if not ranked:
        return {}
    chosen = ranked[0]
    kind = "fused path" if chosen.fused_path else "dispatcher"
    owners = {
        registry.owner("runner", chosen.runner),
        registry.owner(kind, chosen.dispatcher),
        registry.owner("quant scheme", request.config.scheme),
        *(
            registry.owner("fused func" if choice.kind == "fused" else "adapter", (choice.format, chosen.runner))
            for _, choice in chosen.paths
        ),
    }
    return {owner: registry.version_of(owner) for owner in sorted(owners)}
