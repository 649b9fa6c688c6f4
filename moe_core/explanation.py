"""Why this plan: a Resolution as text and as JSON. The command line renders the same facts as tables."""

from __future__ import annotations

from typing import Any

from moe_core.request import PlanRequest, plain
from moe_core.resolution import Candidate, Resolution, Verdict
from moe_core.specs import RunnerSpec


def describe_layer(request: PlanRequest) -> str:
    """One line about the layer."""
    c, p = request.config, request.parallel
    local = f" (local {request.num_local_experts})" if p.ep_size > 1 else ""
    activation = c.activation.name + ("" if c.activation.gated else ", not gated")
    return (
        f"{c.num_experts} experts{local}, top-{c.top_k}, hidden {c.hidden_size}, "
        f"intermediate {c.intermediate_size}, {c.dtype}, {c.scheme}, {activation}"
    )


def describe_parallel(request: PlanRequest) -> str:
    """One line about the ranks."""
    p = request.parallel
    placement = p.placement if isinstance(p.placement, str) else "map"
    experts = f", placement {placement}, {p.tokens} tokens" if p.ep_size > 1 else ""
    return f"tp {p.tp_size}, ep {p.ep_size}{experts}"


def _order(verdict: Verdict) -> tuple[bool, int, str]:
    return (not verdict.usable, -verdict.spec.priority, verdict.spec.subject)


def text(resolution: Resolution, *, brief: bool = False) -> str:
    """The whole report. brief: of a component made for another kind of device, that reason alone."""
    request, chosen = resolution.request, resolution.chosen
    lines = [
        f"hardware  {request.hardware}",
        f"layer     {describe_layer(request)}",
        f"parallel  {describe_parallel(request)}",
    ]
    wanted = sorted(request.features | request.hooks | request.layer_features)
    if wanted:
        lines.append(f"must have {', '.join(wanted)}")
    lines.append("components")
    lines += component_lines(resolution, brief=brief)
    lines.append("combinations")
    for i, candidate in enumerate(resolution.candidates):
        lines.append(f"  {'->' if i == 0 else '  '} {candidate.id}  {candidate_detail(candidate)}".rstrip())
    for rejected in resolution.rejected:
        lines.append(f"  no {rejected.id}")
        lines += [f"       {reason}" for reason in rejected.reasons]
    lines += [f"note      {note}" for note in resolution.notes]
    lines.append(
        f"chosen    {chosen.id}{_warning(resolution)}  fingerprint {resolution.fingerprint}"
        if chosen
        else "chosen    nothing: no plan"
    )
    return "\n".join(lines)


def _warning(resolution: Resolution) -> str:
    chosen = resolution.chosen
    slow = {v.spec.name for v in resolution.verdicts if isinstance(v.spec, RunnerSpec) and v.spec.last_resort}
    return "  (last resort: correct, but not for serving)" if chosen and chosen.runner in slow else ""


def component_lines(resolution: Resolution, *, brief: bool = False) -> list[str]:
    """Every component, usable ones first, with all reasons against the others."""
    lines = []
    for verdict in sorted(resolution.verdicts, key=_order):
        mark = "yes" if verdict.usable else "no "
        lines.append(
            f"  {mark} {verdict.spec.subject}  priority {verdict.spec.priority}, {verdict.maturity.value} "
            f"on {resolution.request.hardware.arch}"
        )
        elsewhere = [reason for reason in verdict.reasons if reason.code == "device.type"] if brief else []
        lines += [f"        {reason}" for reason in elsewhere or verdict.reasons]
        if elsewhere and len(verdict.reasons) > 1:
            lines[-1] += f" (and {len(verdict.reasons) - 1} more)"
    return lines


def refusal(resolution: Resolution) -> str:
    """The part of the report that matters when nothing can be chosen."""
    lines = [f"  layer: {describe_layer(resolution.request)}", f"  hardware: {resolution.request.hardware}"]
    lines += component_lines(resolution)
    for rejected in resolution.rejected:
        lines.append(f"  no  {rejected.id}")
        lines += [f"        {reason}" for reason in rejected.reasons]
    return "\n".join(lines)


def candidate_detail(candidate: Candidate) -> str:
    """Priority, adjustments and measured time of a candidate."""
    parts = [f"priority {candidate.priority}"]
    parts += [f"{note.delta:+d} {note.why}" for note in candidate.notes]
    if candidate.measured_ms is not None:
        parts.append(f"measured {candidate.measured_ms:.3f} ms")
    if candidate.formats:
        parts.append("format " + ", ".join(candidate.formats))
    return "(" + "; ".join(parts) + ")"


def one_line(resolution: Resolution) -> str:
    """For the log: once a distinct resolution."""
    chosen = resolution.require()
    refused = sum(not v.usable for v in resolution.verdicts)
    return (
        f"{chosen.id} for {describe_layer(resolution.request)} on {resolution.request.hardware.product} "
        f"[{resolution.fingerprint}]; {refused} components refused, `moe-core explain` tells why"
    )


def to_json(resolution: Resolution) -> dict[str, Any]:
    """The whole report in JSON types."""
    chosen = resolution.chosen
    return {
        "request": resolution.request.to_json(),
        "components": [
            {
                "component": v.spec.subject,
                "plugin": v.plugin,
                "usable": v.usable,
                "priority": v.spec.priority,
                "maturity": v.maturity.value,
                "reasons": [r.to_json() for r in v.reasons],
            }
            for v in sorted(resolution.verdicts, key=_order)
        ],
        "candidates": [_candidate_json(c) for c in resolution.candidates],
        "rejected": [{"id": r.id, "reasons": [x.to_json() for x in r.reasons]} for r in resolution.rejected],
        "notes": list(resolution.notes),
        "chosen": chosen.id if chosen else None,
        "fingerprint": resolution.fingerprint if chosen else None,
    }


def _candidate_json(candidate: Candidate) -> dict[str, Any]:
    return {
        "id": candidate.id,
        "dispatcher": candidate.dispatcher,
        "runner": candidate.runner,
        "kind": candidate.kind,
        "priority": candidate.priority,
        "maturity": candidate.maturity.value,
        "adjustments": [{"delta": n.delta, "why": n.why} for n in candidate.notes],
        "measured_ms": candidate.measured_ms,
        "paths": [
            {"phase": phase.value, "format": c.format, "kind": c.kind, "terms": plain(c.terms)}
            for phase, c in candidate.paths
        ],
    }
