"""A Resolution as tables. The facts are those of `moe_core.explanation`."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.text import Text

from moe_core.cli._report import facts, hanging, heading, outline
from moe_core.explanation import candidate_detail, describe_layer, describe_parallel
from moe_core.resolution import Candidate, PathChoice, Resolution, Verdict
from moe_core.vocabulary import Step


def show_resolution(
    model: str, resolution: Resolution, warnings: Sequence[str], *, everything: bool
) -> list[RenderableType]:
    """The whole report; with `everything`, all reasons against backends that are made for other devices."""
    request = resolution.request
    phases = ", ".join(phase.value for phase in request.phases)
    header: list[tuple[str, object]] = [
        ("hardware", request.hardware),
        ("model", model),
        ("layer", describe_layer(request)),
        ("parallel", describe_parallel(request)),
        ("phases", phases),
    ]
    wanted = [*sorted(request.features | request.hooks | request.layer_features)]
    wanted += [f"graph capture in {phase.value}" for phase in sorted(request.graph_capture)]
    wanted += [f"no host sync in {phase.value}" for phase in sorted(request.no_host_sync)]
    if wanted:
        header.append(("must have", ", ".join(wanted)))
    settings = request.settings
    forced = {"runner": settings.runner, "dispatcher": settings.dispatcher, "path": settings.path}
    asked = [f"{kind} {name}" for kind, name in forced.items() if name is not None]
    if asked:
        header.append(("asked for", ", ".join(asked)))
    show: list[RenderableType] = [facts(header), heading("components")]
    show.append(
        outline(
            ("use", "component", "plugin", "priority", "maturity"),
            [(_cells(v), _reasons(v, everything)) for v in _ordered(resolution)],
        )
    )
    show += _combinations(resolution)
    notes = [*resolution.notes, *warnings]
    if notes:
        show.append(heading("notes"))
        show += [hanging(f"- {note}") for note in notes]
    show.append(heading("chosen"))
    show += _chosen(resolution)
    return show


def _ordered(resolution: Resolution) -> list[Verdict]:
    return sorted(resolution.verdicts, key=lambda v: (not v.usable, -v.spec.priority, v.spec.subject))


def _cells(verdict: Verdict) -> tuple[object, ...]:
    mark = "yes" if verdict.usable else "no"
    return (mark, verdict.spec.subject, verdict.plugin, verdict.spec.priority, verdict.maturity.value)


def _reasons(verdict: Verdict, everything: bool) -> list[str]:
    reasons = list(verdict.reasons)
    shown = reasons
    device = [reason for reason in reasons if reason.code == "device.type"]
    if device and not everything:
        shown = device
    lines = []
    for reason in shown:
        lines.append(f"- [{reason.code}] {reason.message}")
        if reason.hint:
            lines.append(f"-> {reason.hint}")
    hidden = len(reasons) - len(shown)
    if hidden:
        lines.append(f"- and {hidden} more reason{'s' if hidden > 1 else ''} (--all)")
    return lines


def _combinations(resolution: Resolution) -> list[RenderableType]:
    rows: list[tuple[tuple[object, ...], list[str]]] = []
    for rank, candidate in enumerate(resolution.candidates, start=1):
        detail = candidate_detail(candidate).removeprefix("(").removesuffix(")")
        rows.append((("yes", rank, candidate.id, candidate.maturity.value), [detail]))
    for rejected in resolution.rejected:
        lines = []
        for reason in rejected.reasons:
            lines.append(f"- [{reason.code}] {reason.message}")
            lines += [f"-> {reason.hint}"] if reason.hint else []
        rows.append((("no", "-", rejected.id, "-"), lines))
    if not rows:
        return []
    return [heading("combinations"), outline(("use", "rank", "combination", "maturity"), rows)]


def _chosen(resolution: Resolution) -> list[RenderableType]:
    chosen = resolution.chosen
    if chosen is None:
        return [Text("nothing: no installed backend can serve this request", style="red")]
    rows: list[tuple[str, object]] = [("candidate", chosen.id), ("fingerprint", resolution.fingerprint)]
    for phases, choice in _merged(chosen):
        terms = choice.terms
        rows += [
            (phases, f"format {choice.format}, {choice.kind}"),
            ("  ids", f"{terms.id_space.value}, {terms.ids_dtype}; dropped slots: {terms.dropped.value}"),
            ("  payload", terms.payload),
        ]
        if terms.extras:
            rows.append(("  extras", ", ".join(sorted(terms.extras))))
        steps = [f"{step.value}: {terms.steps[step].value}" for step in Step if step in terms.steps]
        rows.append(("  who does", ", ".join(steps) or "nothing to do"))
    if chosen.fused_path is not None:
        rows.append(("path", "the fused path does every step that the caller does not"))
    return [facts(rows)]


def _merged(candidate: Candidate) -> list[tuple[str, PathChoice]]:
    """Phases that run the same path, on one line."""
    merged: list[tuple[list[str], PathChoice]] = []
    for phase, choice in candidate.paths:
        same = next((row for row in merged if row[1] == choice), None)
        if same is not None:
            same[0].append(phase.value)
        else:
            merged.append(([phase.value], choice))
    return [(", ".join(phases), choice) for phases, choice in merged]
