"""What AITER takes in combination, which `Support` lists one by one. Imports no torch and no aiter."""

from __future__ import annotations

from collections.abc import Iterator

from moe_core.capability import Reason
from moe_core.config import Activation
from moe_core.request import PlanRequest
from moe_core.weights import WeightRequirements
from moe_core_aiter.schemes import SCHEMES, Scheme, rounded

_OAI = Activation.swiglu_oai()


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `aiter`."""
    scheme = SCHEMES.get(request.config.scheme)
    if scheme is None:
        return []  # refused by `Support` already
    parts = (_sizes, _activation, _layer)
    return [reason for part in parts for reason in part(request, subject, scheme)]


def requirements(request: PlanRequest) -> WeightRequirements:
    """The sizes to pad to. Layers that cannot be padded have them already, or are refused."""
    hidden, inner = request.config.hidden_size, request.local_intermediate_size
    scheme = SCHEMES[request.config.scheme]
    if scheme.padded:
        hidden, inner = rounded(hidden, scheme.hidden), rounded(inner, scheme.inner)
    return WeightRequirements(hidden_size=hidden, intermediate_size=inner)


def _sizes(request: PlanRequest, subject: str, scheme: Scheme) -> Iterator[Reason]:
    config, inner = request.config, request.local_intermediate_size
    if not scheme.padded and config.hidden_size % scheme.hidden:
        message = f"hidden size {config.hidden_size} is not a multiple of {scheme.hidden}, which {config.scheme} needs"
        yield Reason(subject, "shape.hidden", message, f"a multiple of {scheme.hidden}", str(config.hidden_size))
    if not scheme.padded and inner % scheme.inner:
        message = f"intermediate size {inner} a rank is not a multiple of {scheme.inner}, which {config.scheme} needs"
        yield Reason(subject, "shape.intermediate", message, f"a multiple of {scheme.inner}", str(inner))
    if config.scheme == "int4_w4a16" and config.group_size is None:
        message = "runs int4_w4a16 with group size 32, and the scheme's default is 128"
        yield Reason(subject, "quant.group_size", message, "32", "128")


def _activation(request: PlanRequest, subject: str, scheme: Scheme) -> Iterator[Reason]:
    config = request.config
    activation = config.activation
    if activation.name in ("silu", "gelu", "swiglu_oai") and activation.name not in scheme.activations:
        needed = " or ".join(scheme.activations)
        message = f"has {needed} with {config.scheme} weights"
        yield Reason(subject, "activation", message, needed, activation.name)
    if activation.name == "swiglu_oai" and activation != _OAI:
        yield Reason(
            subject,
            "activation",
            "has swiglu_oai with fixed constants only",
            f"alpha {_OAI.alpha}, beta {_OAI.beta}, limit {_OAI.limit}",
            f"alpha {activation.alpha}, beta {activation.beta}, limit {activation.limit}",
        )
    elif activation.name != "swiglu_oai" and activation.limit is not None:
        message = f"cannot clamp {activation.name}: only some of its kernels look at the limit"
        yield Reason(subject, "activation.limit", message, found=str(activation.limit))


def _layer(request: PlanRequest, subject: str, scheme: Scheme) -> Iterator[Reason]:
    config = request.config
    if config.dtype == "float16" and not scheme.float16:
        message = f"runs {config.scheme} in bfloat16 only"
        yield Reason(subject, "dtype", message, "bfloat16", "float16")
    if config.bias and config.scheme != "mxfp4_w4a16":
        message = "adds biases with mxfp4_w4a16 weights only"
        yield Reason(subject, "feature", message, "mxfp4_w4a16", f"bias with {config.scheme}")
    if config.router_weight_on_input and config.top_k != 1:
        message = "weights the input with top_k 1 only"
        yield Reason(subject, "feature", message, "top_k 1", f"top_k {config.top_k}")
    if config.no_combine:
        message = "its kernels sum the top-k slots: fused_moe has no argument that leaves that out"
        yield Reason(subject, "feature", message, "no_combine")
