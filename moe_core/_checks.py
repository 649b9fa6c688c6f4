"""The hard filters: every reason why a `Support` cannot serve a request. Pure, and never stops at the first."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from moe_core.capability import Reason, Support, arch_matches
from moe_core.errors import did_you_mean
from moe_core.request import PlanRequest

#: Must-have features that concern what carries the tokens as well as what computes.
_CARRIED = frozenset({"compile", "deterministic"})


def support_reasons(support: Support, request: PlanRequest, subject: str) -> list[Reason]:
    """See `Support.why_not`. Reasons about the device come first."""
    reasons = list(_device(support, request, subject))
    if "dependencies" not in request.assume:
        for requirement in support.requires:
            reasons += requirement.why_not(subject)
    if subject.startswith("dispatcher:"):
        reasons += _carried(support, request, subject)
    else:
        reasons += _layer(support, request, subject)
    reasons += _shape(support, request, subject)
    reasons += _run_time(support, request, subject)
    return reasons


def _names(values: Iterable[object]) -> str:
    return ", ".join(sorted(str(value) for value in values)) or "none"


def _device(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    kind, arch = request.hardware.device_type, request.hardware.arch
    if kind not in support.devices and "*" not in support.devices:
        needed = _names(support.devices)
        yield Reason(subject, "device.type", f"made for {needed}, this is {kind}", needed, kind)
    elif not support.arch_supported(kind, arch):
        windows = (*support.devices.get(kind, ()), *support.devices.get("*", ()))
        needed = " or ".join(windows)
        yield Reason(subject, "device.arch", f"made for {needed}, this is {arch}", needed, arch)


def _layer(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    config, arch = request.config, request.hardware.arch
    if config.scheme not in support.schemes:
        yield Reason(
            subject,
            "quant.scheme",
            f"does not run {config.scheme}; it runs {_names(support.schemes)}",
            config.scheme,
            _names(support.schemes),
        )
    else:
        windows = support.scheme_archs.get(config.scheme)
        if windows is not None and not any(arch_matches(arch, window) for window in windows):
            needed = " or ".join(windows)
            yield Reason(subject, "device.arch", f"runs {config.scheme} on {needed} only, this is {arch}", needed, arch)
    if config.group_size is not None and config.group_size not in support.group_sizes:
        found = _names(support.group_sizes)
        yield Reason(subject, "quant.group_size", f"no group size {config.group_size}", str(config.group_size), found)
    if config.scheme in support.needs_input_scales and request.input_scales is False:
        yield Reason(
            subject,
            "quant.input_scales",
            f"runs {config.scheme} with static input scales only, and these weights have none",
            "w13_input_scale and w2_input_scale",
            "none",
            hint="give CanonicalWeights the checkpoint's input scales, one an expert",
        )
    if config.dtype not in support.dtypes:
        found = _names(support.dtypes)
        yield Reason(subject, "dtype", f"does not run {config.dtype}; it runs {found}", config.dtype, found)
    activation = config.activation
    if activation.name not in support.activations:
        found = _names(support.activations)
        hint = did_you_mean(activation.name, support.activations) if support.activations else None
        yield Reason(subject, "activation", f"has no {activation.name}; it has {found}", activation.name, found, hint)
    if activation.gated not in support.gated:
        form = "gated" if activation.gated else "non-gated"
        yield Reason(subject, "activation.gated", f"does not run {form} layers", form)
    if activation.limit is not None and not support.activation_limit:
        yield Reason(subject, "activation.limit", "cannot clamp gate and up", f"limit {activation.limit}")
    for feature in sorted((request.layer_features | request.features) - support.features):
        yield Reason(subject, "feature", f"does not declare {feature!r}", feature, _names(support.features))
    for hook in sorted(request.hooks - support.hooks):
        yield Reason(subject, "feature", f"does not call the hook {hook!r}", hook, _names(support.hooks))
    yield from _topk_format(support, request, subject)
    yield from _parallel(support, request, subject)


def _carried(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    """What a dispatcher carries but does not compute with."""
    dtype = request.config.dtype
    if support.dtypes and dtype not in support.dtypes:
        found = _names(support.dtypes)
        yield Reason(subject, "dtype", f"does not carry {dtype}; it carries {found}", dtype, found)
    tokens = request.parallel.tokens
    if request.parallel.ep_size > 1 and tokens not in support.tokens:
        found = _names(support.tokens)
        yield Reason(
            subject,
            "parallel.tokens",
            f"takes {found} tokens; ranks bring {tokens} ones",
            found,
            tokens,
            hint="say what your ranks bring: ParallelConfig(tokens='replicated') or (tokens='sharded')",
        )
    for feature in sorted((request.features & _CARRIED) - support.features):
        yield Reason(subject, "feature", f"does not declare {feature!r}", feature, _names(support.features))
    if request.config.no_combine and "no_combine" not in support.features:
        message = "returns summed tokens [T, H]; no_combine asks for every slot, [T, K, H]"
        yield Reason(subject, "feature", message, "no_combine", _names(support.features))
    yield from _topk_format(support, request, subject)
    yield from _parallel(support, request, subject)


def _topk_format(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    if request.topk_format not in support.topk_formats:
        found = _names(support.topk_formats)
        yield Reason(subject, "topk.format", f"takes the router's decision as {found}", request.topk_format, found)


def _parallel(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    low, high = support.ep_sizes
    size = request.parallel.ep_size
    if size < low or (high is not None and size > high):
        window = f"{low}..{high}" if high is not None else f">={low}"
        yield Reason(subject, "parallel.ep", f"runs with ep_size {window}, this is {size}", window, str(size))
    experts = request.config.num_experts
    if support.even_experts and len(set(Counter(request.parallel.owners(experts)).values())) > 1:
        yield Reason(subject, "parallel.ep", f"the {experts} experts are not spread evenly over {size} ranks", "even")
    placement = request.parallel.placement
    kind = placement if isinstance(placement, str) else "map"
    if size > 1 and kind not in support.placements:
        found = _names(support.placements)
        yield Reason(subject, "parallel.placement", f"takes placement {found}, this is {kind}", kind, found)


def _shape(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    config = request.config
    hidden, intermediate = config.hidden_size, request.local_intermediate_size
    if hidden % support.hidden_multiple:
        needed = f"a multiple of {support.hidden_multiple}"
        yield Reason(subject, "shape.hidden", f"hidden size {hidden} is not {needed}", needed, str(hidden))
    if support.hidden_sizes and hidden not in support.hidden_sizes:
        needed = _names(support.hidden_sizes)
        yield Reason(subject, "shape.hidden", f"hidden size {hidden} is not one of {needed}", needed, str(hidden))
    if intermediate % support.intermediate_multiple:
        needed = f"a multiple of {support.intermediate_multiple}"
        yield Reason(
            subject,
            "shape.intermediate",
            f"intermediate size {intermediate} a rank is not {needed}",
            needed,
            str(intermediate),
        )
    for limit, value, code, what in (
        (support.max_top_k, config.top_k, "shape.top_k", "top_k"),
        (support.max_experts, config.num_experts, "shape.num_experts", "num_experts"),
        (support.max_tokens, request.max_tokens, "shape.max_tokens", "max_tokens"),
    ):
        if limit is not None and value is not None and value > limit:
            yield Reason(subject, code, f"{what} is at most {limit}, this is {value}", str(limit), str(value))
    if support.needs_max_tokens and request.max_tokens is None:
        yield Reason(
            subject,
            "shape.max_tokens",
            "sizes its buffers when the plan is bound, and max_tokens was not given",
            "max_tokens",
            hint="pass max_tokens=... (the most tokens of one call)",
        )


def _run_time(support: Support, request: PlanRequest, subject: str) -> Iterator[Reason]:
    for phase in request.phases:
        if phase not in support.phases:
            yield Reason(subject, "phase", f"does not serve {phase.value}", phase.value, _names(support.phases))
    for phase in sorted(request.graph_capture & set(request.phases)):
        if phase not in support.graph_capture:
            yield Reason(
                subject,
                "feature",
                f"cannot be captured in a device graph in {phase.value}",
                f"graph:{phase.value}",
            )
    for phase in sorted(request.no_host_sync & set(request.phases) & support.host_sync):
        yield Reason(subject, "feature.host_sync", f"synchronizes with the host in {phase.value}", phase.value)


def scheme_reasons(request: PlanRequest, subject: str, schemes: dict[str, object]) -> list[Reason]:
    """Whether the layer's matrices can be stored in its scheme at all."""
    from moe_core.quant import QuantScheme

    scheme = schemes.get(request.config.scheme)
    if not isinstance(scheme, QuantScheme):
        return []
    config = request.config
    rows = config.gate_up_factor * request.local_intermediate_size
    problems = []
    for name, n, k in (
        ("w13", rows, config.hidden_size),
        ("w2", config.hidden_size, request.local_intermediate_size),
    ):
        problems += [f"{name}: {p}" for p in scheme.matrix_problems(n, k, config.group_size)]
    return [Reason(subject, "quant.shape", problem) for problem in problems]
