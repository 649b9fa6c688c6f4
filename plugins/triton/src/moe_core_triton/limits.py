"""Rules that a declaration of support cannot express. Never imports torch or triton."""

from __future__ import annotations

import os

from moe_core.capability import Reason
from moe_core.request import PlanRequest


def hooks(request: PlanRequest, subject: str) -> list[Reason]:
    """A hook gets exactly the live rows, so their number has to come to the host: no graph can hold that."""
    if not request.hooks:
        return []
    named = ", ".join(sorted(request.hooks))
    reasons = []
    if request.graph_capture:
        reasons.append(
            Reason(
                subject,
                "feature",
                f"cannot be captured in a device graph with hooks ({named})",
                hint="make a plan without hooks for what is captured",
            )
        )
    if request.no_host_sync:
        reasons.append(Reason(subject, "feature.host_sync", f"synchronizes with the host for hooks ({named})"))
    return reasons


def one_host(request: PlanRequest, subject: str) -> list[Reason]:
    """Peers' memory is mapped, so all ranks of the layer must be on this host, each with a GPU that this one sees."""
    ranks, here = request.parallel.ep_size * request.parallel.tp_size, request.hardware.device_count
    if ranks <= here:
        if ranks == 1 or "peer_access" in request.hardware.features:
            return []
        return [Reason(subject, "parallel.ep", "the GPUs of this host do not reach each other's memory (peer access)")]
    return [
        Reason(
            subject,
            "parallel.ep",
            f"all ranks must be on one host, and {here} GPUs are seen here",
            f"at most {here}",
            str(ranks),
            "let each process see all GPUs of the host (CUDA_VISIBLE_DEVICES)",
        )
    ]


def interpreter(request: PlanRequest, subject: str) -> list[Reason]:
    """Refused unless TRITON_INTERPRET=1: kernels are made for the interpreter when their modules are imported."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return hooks(request, subject)
    return [
        Reason(
            subject,
            "device.type",
            "runs the kernels in Triton's interpreter, which is off",
            hint="set TRITON_INTERPRET=1 before Python starts",
        )
    ]
