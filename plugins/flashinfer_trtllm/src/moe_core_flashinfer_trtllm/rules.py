"""What FlashInfer's kernels take in combination, which `Support` lists one by one. Imports no torch, no flashinfer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from moe_core.capability import Reason
from moe_core.config import MoeConfig
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_BYPASSED
from moe_core.weights import WeightRequirements

_CLAMPED = frozenset({"mxfp8", "nvfp4", "mxfp4_w4a16"})
#: Sizes that the kernels need. mxfp4 is not listed: its weights and tokens are padded by the plugin.
_TRTLLM_MULTIPLE = {"bf16": 128, "fp8_block128": 128, "fp8_tensor": 128, "mxfp8": 128, "nvfp4": 128}
_CUTLASS_MULTIPLE = {"bf16": 8, "fp8_tensor": 16, "fp8_block128": 128, "nvfp4": 128}


def trtllm(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of the runner `flashinfer_trtllm`."""
    config = request.config
    activation, scheme = config.activation, config.scheme
    reasons = [
        *_gated(config, subject),
        *_sizes(request, subject, _TRTLLM_MULTIPLE),
        *_bias(config, subject, frozenset({"mxfp4_w4a16"})),
    ]
    if activation.name == "swiglu_oai" and scheme not in _CLAMPED:
        reasons.append(Reason(subject, "activation", f"has no swiglu_oai with {scheme}", ", ".join(sorted(_CLAMPED))))
    elif activation.limit is not None and (scheme not in _CLAMPED or not activation.gated):
        reasons.append(Reason(subject, "activation.limit", f"cannot clamp {activation.name} with {scheme}"))
    if activation.name == "relu2" and scheme == "mxfp4_w4a16":
        reasons.append(Reason(subject, "activation", "has no relu2 with mxfp4_w4a16"))
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


def routing_method(config: MoeConfig) -> str | None:
    """The name in FlashInfer's `RoutingMethodType` of the layer's routing; None where the kernels have none.

    Only those that every supported FlashInfer version has.
    """
    routing = config.routing
    if routing.method == "sigmoid" and routing.correction_bias and routing.renormalize:
        grouped = routing.num_groups > 1
        return "DeepSeekV3" if not grouped or routing.group_score == "top2_sum" else None
    if routing.correction_bias or routing.num_groups > 1:
        return None
    if routing.method == "softmax":
        return "RenormalizeNaive" if routing.renormalize else "Default"
    if routing.method == "topk_softmax":
        return "Renormalize"  # softmax over the chosen already sums to 1
    if routing.method == "topk_sigmoid" and config.top_k == 1 and not routing.renormalize:
        return "Llama4"
    return None


def _bypassed(config: MoeConfig, subject: str) -> Iterator[Reason]:
    hint = "let the caller route, and pass a TopKOutput"
    method = routing_method(config)
    if method is None:
        what = str(config.routing)
        yield Reason(subject, "topk.format", f"the kernels do not route by {what}", found=what, hint=hint)
    if method == "DeepSeekV3" and config.top_k > 22:
        yield Reason(subject, "shape.top_k", "routes to 22 experts at most", "22", str(config.top_k), hint)
    if method == "DeepSeekV3" and config.routing.topk_groups > 4:
        found = str(config.routing.topk_groups)
        yield Reason(subject, "topk.format", "routes to 4 expert groups at most", "4", found, hint)
    if config.scheme == "fp8_block128" and config.num_experts % 4:
        found = str(config.num_experts)
        yield Reason(subject, "shape.num_experts", "routes among a multiple of 4 experts", "4", found, hint)


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
