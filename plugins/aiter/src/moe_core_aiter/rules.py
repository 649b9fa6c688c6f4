"""What AITER takes in combination, which `Support` lists one by one. Imports no torch and no aiter."""

from __future__ import annotations

from moe_core.capability import Reason
from moe_core.config import Activation
from moe_core.request import PlanRequest

#: Weights of these are padded by the plugin; all others need an intermediate size that its kernels tile.
_PADDED = frozenset({"mxfp4", "mxfp4_w4a16"})
_OAI = Activation.swiglu_oai()


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `aiter`."""
    config, inner = request.config, request.local_intermediate_size
    activation = config.activation
    reasons: list[Reason] = []
    if config.scheme not in _PADDED and inner % 128:
        reasons.append(
            Reason(
                subject,
                "shape.intermediate",
                f"intermediate size {inner} a rank is not a multiple of 128, which {config.scheme} needs",
                "a multiple of 128",
                str(inner),
            )
        )
    if config.scheme == "int4_w4a16" and config.group_size is None:
        reasons.append(
            Reason(
                subject,
                "quant.group_size",
                "runs int4_w4a16 with group size 32, and the scheme's default is 128",
                "32",
                "128",
            )
        )
    if activation.name == "swiglu_oai":
        if config.scheme not in _PADDED:
            reasons.append(
                Reason(subject, "activation", "has swiglu_oai with mxfp4 weights only", "mxfp4", config.scheme)
            )
        if activation != _OAI:
            reasons.append(
                Reason(
                    subject,
                    "activation",
                    "has swiglu_oai with fixed constants only",
                    f"alpha {_OAI.alpha}, beta {_OAI.beta}, limit {_OAI.limit}",
                    f"alpha {activation.alpha}, beta {activation.beta}, limit {activation.limit}",
                )
            )
    elif activation.limit is not None:
        reasons.append(
            Reason(subject, "activation.limit", f"cannot clamp {activation.name}", found=str(activation.limit))
        )
    if config.bias and not (config.scheme in _PADDED and activation.name == "swiglu_oai"):
        reasons.append(
            Reason(subject, "feature", "adds biases with mxfp4 weights and swiglu_oai only", "bias", config.scheme)
        )
    if config.router_weight_on_input and config.top_k != 1:
        reasons.append(
            Reason(subject, "feature", "weights the input with top_k 1 only", "top_k 1", f"top_k {config.top_k}")
        )
    return reasons
