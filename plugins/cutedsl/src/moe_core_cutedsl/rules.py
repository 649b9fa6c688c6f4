"""What the kernels take in combination, which `Support` lists one by one. Imports no torch and no vendor package."""

from __future__ import annotations

from moe_core.capability import Reason
from moe_core.request import PlanRequest

#: Local experts that the sort's histogram has room for.
_MOST_SORTED = 1024


def sm90(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `cutedsl_sm90`."""
    activation, inner = request.config.activation, request.local_intermediate_size
    options = request.settings.options.get("cutedsl_sm90", {})
    reasons: list[Reason] = []
    if activation.gated != (activation.name != "relu2"):
        form = "gated" if activation.gated else "non-gated"
        reasons.append(Reason(subject, "activation.gated", f"has no {form} {activation.name}", found=form))
    if activation.limit is not None and activation.name not in ("silu", "swiglu_oai"):
        reasons.append(Reason(subject, "activation.limit", f"cannot clamp {activation.name}"))
    if activation.gated and inner % 32 and inner % 8 == 0:
        message = f"rows of up and gate alternate by 32, and the intermediate size a rank is {inner}"
        reasons.append(Reason(subject, "shape.intermediate", message, "a multiple of 32", str(inner)))
    local = request.num_local_experts
    if local > _MOST_SORTED:
        message = f"sorts at most {_MOST_SORTED} experts a rank"
        reasons.append(Reason(subject, "shape.num_experts", message, str(_MOST_SORTED), str(local)))
    if options.get("fused_finalize") is True and "deterministic" in request.features:
        reasons.append(_atomics(subject))
    placement = request.parallel.placement
    if options.get("sort") == "flashinfer" and request.parallel.ep_size > 1 and placement != "linear":
        message = "with sort='flashinfer' a rank's experts are those from an offset on"
        reasons.append(Reason(subject, "parallel.placement", message, "linear", str(placement), "leave sort out"))
    return reasons


def nvfp4(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `cutedsl`."""
    options = request.settings.options.get("cutedsl", {})
    asked = options.get("fused_finalize") is True and "deterministic" in request.features
    return [_atomics(subject)] if asked else []


def _atomics(subject: str) -> Reason:
    message = "adds slots up with atomics, as the option fused_finalize asks: not the same bits on every run"
    return Reason(subject, "feature", message, "deterministic", "fused_finalize", "leave fused_finalize out")


def hopper(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `cutedsl_hopper`."""
    config, inner = request.config, request.local_intermediate_size
    if config.scheme != "fp8_block128":
        return []
    sizes = (
        ("shape.hidden", f"hidden size {config.hidden_size}", config.hidden_size),
        ("shape.intermediate", f"intermediate size {inner} a rank", inner),
    )
    return [
        Reason(subject, code, f"{what} cuts through a scale block of 128", "a multiple of 128", str(size))
        for code, what, size in sizes
        if size % 128
    ]
