"""What the kernels take in combination, which `Support` lists one by one. Imports no torch and no vendor package."""

from __future__ import annotations

from moe_core.capability import Reason
from moe_core.request import PlanRequest


def sm90(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `cutedsl_sm90`."""
    activation = request.config.activation
    reasons: list[Reason] = []
    if activation.gated != (activation.name != "relu2"):
        form = "gated" if activation.gated else "non-gated"
        reasons.append(Reason(subject, "activation.gated", f"has no {form} {activation.name}", found=form))
    if activation.limit is not None and activation.name not in ("silu", "swiglu_oai"):
        reasons.append(Reason(subject, "activation.limit", f"cannot clamp {activation.name}"))
    return reasons


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
