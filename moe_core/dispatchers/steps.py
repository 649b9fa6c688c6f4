"""Steps of a layer that a dispatcher may take on in `combine`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.protocols import Binding
from moe_core.vocabulary import Owner, Step


def taken_on(binding: Binding) -> frozenset[Step]:
    """The steps that the terms give to the dispatcher."""
    terms = binding.terms
    if terms is None:
        return frozenset()
    return frozenset(step for step, owner in terms.steps.items() if owner is Owner.DISPATCHER)


def finish_slots(slots: Tensor, live: Tensor, weights: Tensor, *, weigh: bool, total: bool) -> Tensor:
    """Slots [rows, K, H] times their weights [rows, K] (weigh), summed over K (total), in float32 between.

    A slot that is not `live` (bool [rows, K]) contributes exactly zero, whatever its weight and its row hold.
    """
    wide = slots.to(torch.float32)
    if weigh:
        wide = torch.where(live[..., None], wide, 0.0) * torch.where(live, weights.float(), 0.0)[..., None]
    return (wide.sum(dim=1) if total else wide).to(slots.dtype)
