"""MoRI's limits that `Support` cannot express. Imports no torch and no mori."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_core.capability import Reason
from moe_core.errors import BindError
from moe_core.request import PlanRequest
from moe_core.resolution import Candidate, PriorityNote
from moe_core_mori.launch import NODE, NODES, Launch, choose, choose_asynchronous

_CHOICES: dict[str, Callable[[PlanRequest, Mapping[str, Any]], Launch]] = {
    "mori": choose,
    "mori_ll": choose_asynchronous,
}


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Rules of all its dispatchers: the numbers of ranks that its kernels run on."""
    ranks, name = request.parallel.ep_size, subject.partition(":")[2]
    options = request.settings.options.get(name, {})
    node = options.get("gpus_per_node", NODE)
    if type(node) is not int or node not in NODES:
        return []  # refused in words when the plan is bound
    if ranks == 1 or (ranks in (2, 4) and ranks <= node) or ranks % node == 0:
        return []
    small = [str(n) for n in (2, 4) if n < node]
    needed = ", ".join([*small, f"or a multiple of {node}"]) if small else f"a multiple of {node}"
    known = name in _CHOICES and node == NODE
    hint = f"say how many GPUs a node has: options={{'{name}': {{'gpus_per_node': 4}}}}" if known else None
    return [Reason(subject, "parallel.ep", f"runs on {needed} ranks", needed, str(ranks), hint)]


def note(request: PlanRequest, candidate: Candidate) -> PriorityNote | None:
    """What a candidate would launch, and why; it changes no priority."""
    pick = _CHOICES.get(candidate.dispatcher)
    if pick is None:
        return None
    try:
        chosen = pick(request, request.settings.options.get(candidate.dispatcher, {}))
    except BindError:
        return None  # said when the plan is bound
    return PriorityNote(0, f"MoRI's {chosen.kernel}, {chosen.blocks} blocks of {chosen.warps} warps: {chosen.why}")
