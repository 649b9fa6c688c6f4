"""MoRI's limits that `Support` cannot express. Imports no torch and no mori."""

from __future__ import annotations

from moe_core.capability import Reason
from moe_core.request import PlanRequest


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of all its dispatchers: the numbers of ranks that its kernels run on."""
    ranks, needed = request.parallel.ep_size, "2, 4, or a multiple of 8"
    if ranks == 1 or ranks in (2, 4) or ranks % 8 == 0:
        return []
    return [Reason(subject, "parallel.ep", f"runs on {needed} ranks", needed, str(ranks))]
