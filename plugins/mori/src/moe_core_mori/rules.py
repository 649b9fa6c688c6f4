"""MoRI's limits that `Support` cannot express. Imports no torch and no mori."""

from __future__ import annotations

from moe_core.capability import Reason
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_STANDARD


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `mori` and `mori_ll`."""
    return _common(request, subject, ("bfloat16", "float32"))


def v2(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of `mori_v2`."""
    return _common(request, subject, ("bfloat16",))


def _common(request: PlanRequest, subject: str, dtypes: tuple[str, ...]) -> list[Reason]:
    config, ranks = request.config, request.parallel.ep_size
    reasons: list[Reason] = []
    if config.dtype not in dtypes:
        needed = ", ".join(dtypes)
        reasons.append(Reason(subject, "dtype", f"moves {needed}, this is {config.dtype}", needed, config.dtype))
    if request.topk_format != TOPK_STANDARD:
        found = request.topk_format
        reasons.append(Reason(subject, "topk.format", "sends tokens by their expert ids", TOPK_STANDARD, found))
    if config.num_experts % ranks:
        reasons.append(
            Reason(
                subject,
                "parallel.ep",
                f"needs the same number of experts on every rank: {config.num_experts} over {ranks}",
                f"a divisor of {config.num_experts}",
                str(ranks),
            )
        )
    if ranks > 1 and ranks not in (2, 4) and ranks % 8:
        needed = "2, 4, or a multiple of 8"
        reasons.append(Reason(subject, "parallel.ep", f"runs on {needed} ranks", needed, str(ranks)))
    return reasons
