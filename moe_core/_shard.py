"""A rank's part of a whole model's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core._pad import coverage
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import WeightError
from moe_core.quant import QuantScheme, builtin_scheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.weights import CanonicalWeights


def shard(
    weights: CanonicalWeights, config: MoeConfig, parallel: ParallelConfig, scheme: QuantScheme | None
) -> CanonicalWeights:
    """See `CanonicalWeights.shard`."""
    import torch

    from moe_core.weights import CanonicalWeights

    described = scheme or builtin_scheme(config.scheme)
    experts = torch.tensor(parallel.local_experts(config.num_experts), dtype=torch.int64, device=weights.device)
    inner, size, rank = config.intermediate_size, parallel.tp_size, parallel.tp_rank
    if inner % size:
        raise WeightError(f"intermediate size {inner} cannot be divided by tp_size {size}")
    parts = config.gate_up_factor
    result = {}
    for name, tensor in weights.tensors().items():
        local = tensor.index_select(0, experts)
        if size > 1:
            rows, columns = coverage(described, config, name.partition("_")[2])
            if name in ("w13", "w13_scale", "w13_zero", "w13_bias"):
                local = _slice(local, 1, name, inner, parts, rows, size, rank)
            elif name in ("w2", "w2_scale", "w2_zero"):
                local = _slice(local, 2, name, inner, 1, columns, size, rank)
            elif name == "w2_bias" and rank > 0:
                continue  # partial results are summed over TP: the bias must enter once
        result[name] = local.contiguous()
    return CanonicalWeights(**result)


def _slice(tensor: Tensor, axis: int, name: str, inner: int, parts: int, covered: int, size: int, rank: int) -> Tensor:
    """The rank's slice of each of `parts` stacked blocks of `inner` rows or columns; an entry stands for `covered`."""
    import torch

    if not covered or tensor.dim() <= axis:
        return tensor  # one scale for the whole extent, or for each block of it
    length = tensor.shape[axis]
    if inner % (size * covered):
        raise WeightError(
            f"{name} has one entry for {covered} of {inner}: tp_size {size} would cut through a scale or a packed item",
            hint="use a tp_size for which intermediate_size / tp_size is a multiple of the scheme's block",
        )
    step = length // parts // size
    return torch.cat([block[_at(axis, rank * step, step)] for block in tensor.chunk(parts, dim=axis)], dim=axis)


def _at(axis: int, start: int, length: int) -> tuple[slice, ...]:
    return (*(slice(None),) * axis, slice(start, start + length))
