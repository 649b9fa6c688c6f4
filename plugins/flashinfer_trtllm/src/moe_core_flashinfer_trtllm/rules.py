"""What FlashInfer's kernels take in combination, which `Support` lists one by one. Imports no torch, no flashinfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_core.capability import Reason
from moe_core.config import MoeConfig
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_BYPASSED
from moe_core.weights import WeightRequirements

#: Sizes that the kernels need. mxfp4_w4a16 is not listed: its weights and tokens are padded by the plugin.
_TRTLLM_MULTIPLE = {
    "bf16": 128,
    "fp8_block128": 128,
    "fp8_tensor": 128,
    "mxfp8": 128,
    "nvfp4": 128,
    "int4_w4a16": 256,
}
_CUTLASS_MULTIPLE = {"bf16": 8, "fp8_tensor": 16, "fp8_block128": 128, "nvfp4": 128}
#: Experts and slots of a token that FlashInfer's routing kernels are compiled for, by method (those not here: all that
#: `Support` lets through).
_ROUTED = {
    "Default": (256, 8),
    "SigmoidRenorm": (256, 8),
    "Sigmoid": (256, 8),
    "TopKSigmoid": (256, 8),
    "Llama4": (128, 1),
    "DeepSeekV3": (256, 8),
}
#: DeepSeek's grouped routing: groups, chosen groups, experts of a group (a warp looks at one group).
_GROUPS, _CHOSEN_GROUPS, _GROUP_EXPERTS = 8, 4, 32


def trtllm(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `flashinfer_trtllm`."""
    config = request.config
    activation, scheme = config.activation, config.scheme
    reasons = [
        *_gated(config, subject),
        *_sizes(request, subject, _TRTLLM_MULTIPLE),
        *_bias(config, subject, frozenset({"mxfp4_w4a16"})),
    ]
    if activation.name == "swiglu_oai" and scheme == "fp8_tensor":
        reasons.append(Reason(subject, "activation", "has no swiglu_oai with fp8_tensor", "another scheme", scheme))
    elif activation.limit is not None and (scheme == "fp8_tensor" or not activation.gated):
        reasons.append(Reason(subject, "activation.limit", f"cannot clamp {activation.name} with {scheme}"))
    if activation.name == "relu2" and scheme in ("mxfp4_w4a16", "int4_w4a16"):
        reasons.append(Reason(subject, "activation", f"has no relu2 with {scheme}"))
    if scheme == "int4_w4a16" and config.group_size != 32:
        found = str(config.group_size or "the default")
        reasons.append(Reason(subject, "quant.group_size", f"runs int4 in groups of 32, not {found}", "32", found))
    if scheme in ("fp8_block128", "mxfp8") and (config.num_experts % 4 or config.num_experts <= config.top_k):
        reasons.append(
            Reason(
                subject,
                "shape.num_experts",
                f"runs {scheme} with a multiple of 4 experts, more than top_k",
                f"a multiple of 4 above {config.top_k}",
                str(config.num_experts),
            )
        )
    if config.router_weight_on_input and (scheme != "fp8_tensor" or config.top_k != 1):
        reasons.append(
            Reason(
                subject,
                "feature",
                "weights the input with fp8_tensor and top_k 1 only",
                "fp8_tensor, top_k 1",
                f"{scheme}, top_k {config.top_k}",
            )
        )
    if request.topk_format == TOPK_BYPASSED:
        reasons += _bypassed(config, subject)
    return reasons


def cutlass(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `flashinfer_cutlass`."""
    config, activation = request.config, request.config.activation
    reasons = [
        *_gated(config, subject),
        *_sizes(request, subject, _CUTLASS_MULTIPLE),
        *_bias(config, subject, frozenset({"bf16", "mxfp4_w4a16"})),
    ]
    if activation.limit is not None and not activation.gated:
        reasons.append(Reason(subject, "activation.limit", f"cannot clamp non-gated {activation.name}"))
    if activation.name == "relu2" and config.scheme not in ("bf16", "fp8_tensor", "nvfp4"):
        reasons.append(Reason(subject, "activation", f"has no relu2 with {config.scheme}"))
    if config.dtype == "float16" and config.scheme not in ("bf16", "fp8_tensor"):
        reasons.append(Reason(subject, "dtype", f"runs {config.scheme} in bfloat16 only", "bfloat16", "float16"))
    options = request.settings.options.get("flashinfer_cutlass", {})
    if options.get("fused_finalize") and "deterministic" in request.features:
        reasons.append(
            Reason(
                subject,
                "feature",
                "the option fused_finalize is on, and it is not deterministic",
                "deterministic",
                "fused_finalize",
                "leave the option out",
            )
        )
    return reasons


def cutlass_sizes(request: PlanRequest) -> WeightRequirements:
    """Sizes to allocate for `flashinfer_cutlass`: the four-bit kernels for Hopper read tiles of 64 rows by 128 of K."""
    return _padded(request, 128 if request.config.scheme == "mxfp4_w4a16" else 1)


def _padded(request: PlanRequest, multiple: int) -> WeightRequirements:
    hidden, inner = request.config.hidden_size, request.local_intermediate_size
    return WeightRequirements(
        hidden_size=-(-hidden // multiple) * multiple, intermediate_size=-(-inner // multiple) * multiple
    )


def trtllm_sizes(request: PlanRequest) -> WeightRequirements:
    """Sizes to allocate for `flashinfer_trtllm`: whole tiles of its shuffled weights."""
    return _padded(request, 128 if request.config.scheme == "mxfp4_w4a16" else 1)


def routing_method(config: MoeConfig) -> str | None:
    """The name in FlashInfer's `RoutingMethodType` of the layer's routing; None where the kernels have none.

    Not used: `TopK` gives the logits themselves as weights, which no routing of the core does (it serves choices that
    were made outside), and `Unspecified` is none. Without a method of their own are: a bias for softmax or without
    renormalization, groups but by the two best sigmoid scores with a bias, top-k of logits with a bias, and
    `topk_sigmoid` with renormalization.
    """
    routing = config.routing
    if routing.method == "sigmoid" and routing.correction_bias and routing.renormalize:
        if routing.num_groups == 1:
            return "MiniMax2"
        return "DeepSeekV3" if routing.group_score == "top2_sum" else None
    if routing.correction_bias or routing.num_groups > 1:
        return None
    if routing.method == "softmax":
        return "RenormalizeNaive" if routing.renormalize else "Default"
    if routing.method == "topk_softmax":
        return "Renormalize"  # softmax over the chosen already sums to 1
    if routing.method == "sigmoid":
        return "SigmoidRenorm" if routing.renormalize else "Sigmoid"
    if routing.method == "topk_sigmoid" and not routing.renormalize:
        return "Llama4" if config.top_k == 1 else "TopKSigmoid"
    return None


def scales_in_kernel(config: MoeConfig) -> bool:
    """Whether the routing kernel applies `routed_scaling_factor`: only DeepSeek's does in every version."""
    return routing_method(config) == "DeepSeekV3"


def _bypassed(config: MoeConfig, subject: str) -> Iterator[Reason]:
    hint = "let the caller route, and pass a TopKOutput"
    routing, method = config.routing, routing_method(config)
    if method is None:
        what = str(routing)
        yield Reason(subject, "topk.format", f"the kernels do not route by {what}", found=what, hint=hint)
        return
    experts, top_k = _ROUTED.get(method, (config.num_experts, config.top_k))
    for code, what, most, found in (
        ("shape.num_experts", "experts", experts, config.num_experts),
        ("shape.top_k", "experts a token", top_k, config.top_k),
    ):
        if found > most:
            message = f"routes by FlashInfer's {method} to at most {most} {what}"
            yield Reason(subject, code, message, str(most), str(found), hint)
    if method == "DeepSeekV3":
        yield from _grouped(config, subject, hint)


def _grouped(config: MoeConfig, subject: str, hint: str) -> Iterator[Reason]:
    routing, experts = config.routing, config.num_experts
    for what, most, count in (
        ("expert groups", _GROUPS, routing.num_groups),
        ("chosen expert groups", _CHOSEN_GROUPS, routing.topk_groups),
        ("experts a group", _GROUP_EXPERTS, experts // routing.num_groups),
    ):
        if count > most:
            message = f"routes with at most {most} {what}"
            yield Reason(subject, "topk.format", message, str(most), str(count), hint)
    if experts % 4:
        message = "routes by groups with a multiple of 4 experts"
        yield Reason(subject, "shape.num_experts", message, "a multiple of 4", str(experts), hint)
    eligible = routing.topk_groups * experts // routing.num_groups
    if config.top_k >= eligible:
        message = f"routes to fewer experts than the {eligible} of the chosen groups"
        yield Reason(subject, "shape.top_k", message, f"below {eligible}", str(config.top_k), hint)


def _gated(config: MoeConfig, subject: str) -> Iterator[Reason]:
    activation = config.activation
    if activation.gated != (activation.name != "relu2"):
        form = "gated" if activation.gated else "non-gated"
        yield Reason(subject, "activation.gated", f"has no {form} {activation.name}", found=form)


def _sizes(request: PlanRequest, subject: str, multiples: Mapping[str, int]) -> Iterator[Reason]:
    scheme = request.config.scheme
    multiple = multiples.get(scheme, 1)
    hidden, inner = request.config.hidden_size, request.local_intermediate_size
    for code, what, size in (
        ("shape.hidden", f"hidden size {hidden}", hidden),
        ("shape.intermediate", f"intermediate size {inner} a rank", inner),
    ):
        if size % multiple:
            needed = f"a multiple of {multiple}"
            yield Reason(subject, code, f"{what} is not {needed}, which {scheme} needs", needed, str(size))


def _bias(config: MoeConfig, subject: str, schemes: frozenset[str]) -> Iterator[Reason]:
    if config.bias and config.scheme not in schemes:
        needed = ", ".join(sorted(schemes))
        yield Reason(subject, "feature", f"adds biases with {needed} only", needed, config.scheme)
