"""DeepEP's limits that `Support` cannot express. Imports no torch and no deep_ep."""

from __future__ import annotations

from collections.abc import Iterator

from moe_core.capability import Reason
from moe_core.request import PlanRequest
from moe_core.vocabulary import Phase

#: Rank counts that DeepEP ships tuned buffer sizes for; up to 8 within a node, above that over RDMA.
_NORMAL_RANKS = (2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 144, 160)
#: The normal kernels move a row of at most this many bytes; combine's are bfloat16.
_NORMAL_ROW_BYTES = 16368
#: Within a node, of at most 8 ranks, each rank of the normal kernels has at most so many experts.
_NODE, _NODE_EXPERTS = 8, 128
_LL_MAX_TOKENS = 1024
_ELASTIC_LOCAL_EXPERTS = 256


def normal(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `deepep_normal` and `deepep_normal_static`."""
    return list(_normal_ranks(request, subject))


def low_latency(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `deepep_ll`."""
    return list(_low_latency(request, subject))


def auto(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `deepep`."""
    reasons = list(_normal_ranks(request, subject))
    if Phase.DECODE not in request.phases:
        return reasons
    reasons += _low_latency(request, subject)
    tokens = request.settings.options.get("deepep", {}).get("decode_max_tokens", request.max_tokens)
    if tokens is not None and not (isinstance(tokens, int) and 1 <= tokens <= _LL_MAX_TOKENS):
        reasons.append(
            Reason(
                subject,
                "shape.max_tokens",
                f"a decode call takes 1 to {_LL_MAX_TOKENS} tokens of a rank, this is {tokens}",
                str(_LL_MAX_TOKENS),
                str(tokens),
                "set the option: options={'deepep': {'decode_max_tokens': 128}}",
            )
        )
    return reasons


def elastic(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `deepep_v2`."""
    return list(_elastic("deepep_v2", request, subject))


def expanded(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `deepep_v2_grouped`."""
    return list(_elastic("deepep_v2_grouped", request, subject))


def _normal_ranks(request: PlanRequest, subject: str) -> Iterator[Reason]:
    ranks = request.parallel.ep_size
    if ranks > 1 and ranks not in _NORMAL_RANKS:
        needed = ", ".join(map(str, _NORMAL_RANKS))
        yield Reason(subject, "parallel.ep", f"the normal kernels run on {needed} ranks", needed, str(ranks))
    hidden, most = request.config.hidden_size, _NORMAL_ROW_BYTES // 2
    if hidden > most:
        message = f"the normal kernels move rows of at most {_NORMAL_ROW_BYTES} bytes"
        yield Reason(subject, "shape.hidden", message, f"at most {most}", str(hidden), "use deepep_ll or deepep_v2")

    local = request.num_local_experts
    if ranks <= _NODE and local > _NODE_EXPERTS:
        needed = str(_NODE_EXPERTS)
        yield Reason(subject, "shape.num_experts", f"holds {needed} experts a rank at most", needed, str(local))


def _low_latency(request: PlanRequest, subject: str) -> Iterator[Reason]:
    ranks = request.parallel.ep_size
    if ranks > 8 and ranks % 8:
        yield Reason(subject, "parallel.ep", "runs on whole nodes of 8 ranks", "a multiple of 8", str(ranks))
    if request.config.router_weight_on_input:
        yield Reason(
            subject,
            "feature",
            "the low-latency combine applies the router weights to the result",
            "router_weight_on_input",
            hint="use deepep_normal",
        )


def _elastic(name: str, request: PlanRequest, subject: str) -> Iterator[Reason]:
    local, needed = request.num_local_experts, str(_ELASTIC_LOCAL_EXPERTS)
    if local > _ELASTIC_LOCAL_EXPERTS:
        yield Reason(subject, "shape.num_experts", f"holds {needed} experts a rank at most", needed, str(local))
    options, config = request.settings.options.get(name, {}), request.config
    if config.router_weight_on_input and config.top_k > 1 and not options.get("distinct_experts", False):
        yield Reason(
            subject,
            "feature",
            "a token that names an expert twice goes there once, with the sum of its weights, which is another result "
            "where the experts' input is weighted",
            "router_weight_on_input",
            hint=f"where no token does, set options={{'{name}': {{'distinct_experts': True}}}}",
        )
    tokens, most = options.get("decode_max_tokens"), request.max_tokens
    if tokens is not None and not (isinstance(tokens, int) and tokens >= 1 and (most is None or tokens <= most)):
        yield Reason(
            subject,
            "shape.max_tokens",
            f"decode_max_tokens is between 1 and max_tokens, this is {tokens!r}",
            "1 or more" if most is None else f"1 to {most}",
            str(tokens),
            "max_tokens holds for the calls of every phase",
        )
