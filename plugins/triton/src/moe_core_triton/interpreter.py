"""When the interpreter's runner may be chosen. Never imports torch or triton."""

from __future__ import annotations

import os

from moe_core.capability import Reason
from moe_core.request import PlanRequest


def why_not(request: PlanRequest, subject: str) -> list[Reason]:
    """Refused unless TRITON_INTERPRET=1: kernels are made for the interpreter when their modules are imported."""
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        return []
    return [
        Reason(
            subject,
            "device.type",
            "runs the kernels in Triton's interpreter, which is off",
            hint="set TRITON_INTERPRET=1 before Python starts",
        )
    ]
