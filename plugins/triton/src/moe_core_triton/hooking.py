"""LoRA hooks: the rows of an intermediate result, and which token, slot and expert each belongs to.

Hooks get exactly the live rows, so their number has to be known on the host: a layer with hooks waits for the device
once a hooked step and cannot be captured in a graph. Without hooks nothing here runs.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moe_core.protocols import HookRows
from moe_core_triton.calls import ExpertRows
from moe_core_triton.inputs import live_positions, position_experts
from moe_core_triton.row_table import RowTable


def call_hook(
    hook: Callable[[Tensor, HookRows], None], values: Tensor, rows: ExpertRows, table: RowTable, top_k: int
) -> None:
    """Let `hook` change `values` [positions, N] in place."""
    positions = live_positions(rows, table).nonzero().squeeze(1)
    if positions.numel() == 0:
        return
    slots = positions if table.slots is None else table.slots[positions].long()
    divisor = 1 if table.slots is None else top_k
    experts = position_experts(table)[positions].long()
    given = values[positions]
    hook(given, HookRows(rows.data, slots // divisor, slots % divisor, experts))
    values[positions] = given
