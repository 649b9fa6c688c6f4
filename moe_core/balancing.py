"""Balancing experts over ranks: copies of busy experts, and how busy each one is.

A plan knows physical experts only. With copies there are more of them than the model has: `ExpertReplicas` makes the
plan's configuration and weights from the model's, and turns the router's logical ids into physical ones, so every
dispatcher and runner serves copies without knowing of them. `ExpertLoad` counts what each expert got.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moe_core.config import MoeConfig, RoutingConfig
from moe_core.errors import ConfigError, WeightError
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights


@dataclass(frozen=True)
class ExpertReplicas:
    """Which logical expert each physical one is: `ExpertReplicas((0, 1, 2, 3, 1))` has expert 1 twice.

    logical: for each physical expert, in the order that `ParallelConfig.placement` divides over ranks. Every expert of
    the model is there at least once. Raises ConfigError otherwise.
    """

    logical: tuple[int, ...]
    _tables: dict[torch.device, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "logical", tuple(int(expert) for expert in self.logical))
        missing = sorted(set(range(self.num_logical)) - set(self.logical))
        if not self.logical or missing or min(self.logical) < 0:
            what = f"experts {missing} are nowhere" if missing else "the ids start at 0"
            raise ConfigError(
                f"replicas {list(self.logical)}: {what}", hint="name every expert of the model at least once"
            )

    @property
    def num_logical(self) -> int:
        """Experts of the model."""
        return max(self.logical, default=-1) + 1

    def config(self, config: MoeConfig) -> MoeConfig:
        """The layer with physical experts, for the plan. Routing stays the model's: `moe_core.route` with its config.

        Raises ConfigError where the model has another number of experts.
        """
        if config.num_experts != self.num_logical:
            raise ConfigError(f"the layer has {config.num_experts} experts, these replicas have {self.num_logical}")
        return config.replace(num_experts=len(self.logical), routing=RoutingConfig())

    def weights(self, weights: CanonicalWeights) -> CanonicalWeights:
        """The model's weights (all experts) as physical ones; `shard` divides them. Copies take memory."""
        if weights.w13.shape[0] != self.num_logical:
            raise WeightError(f"replicas of {self.num_logical} experts, but the weights have {weights.w13.shape[0]}")
        self._on(weights.device)  # now, so that no forward makes tables
        index = torch.tensor(self.logical, device=weights.device)
        return CanonicalWeights(**{name: _select(tensor, index) for name, tensor in weights.tensors().items()})

    def physical(self, topk: TopKOutput, *, offset: int = 0) -> TopKOutput:
        """The router's choice with physical ids: tokens take the copies of an expert in turn.

        offset: where this rank begins (its rank, say), so that ranks with few tokens do not all take the first copy.
        Ids outside [0, num_logical) stay as they are. Nothing waits for the device.
        """
        ids = topk.topk_ids
        copies, counts = self._on(ids.device)
        valid = (ids >= 0) & (ids < self.num_logical)
        safe = torch.where(valid, ids, 0).long()
        turn = torch.arange(offset, offset + ids.shape[0], device=ids.device)[:, None] % counts[safe]
        return TopKOutput(torch.where(valid, copies[safe, turn].to(ids.dtype), ids), topk.topk_weights)

    def _on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [num_logical, most copies] physical ids, and [num_logical] how many there are; made once a device,
        by `weights` where that was called."""
        if device not in self._tables:
            places = [[p for p, logical in enumerate(self.logical) if logical == e] for e in range(self.num_logical)]
            most = max(map(len, places))
            copies = torch.tensor([row + row[:1] * (most - len(row)) for row in places], device=device)
            self._tables[device] = copies, torch.tensor([len(row) for row in places], device=device)
        return self._tables[device]


def _select(tensor: Tensor, index: Tensor) -> Tensor:
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.index_select(0, index).view(tensor.dtype)


class ExpertLoad:
    """How many slots each expert got, counted on the device. What an expert balancer starts from."""

    def __init__(self, num_experts: int, device: torch.device | str) -> None:
        self._counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)

    def add(self, topk_ids: Tensor) -> None:
        """Count the ids [T, K] of a call, but for dropped slots. Nothing waits for the device; graphs can hold it."""
        experts = self._counts.shape[0] - 1
        ids = topk_ids.reshape(-1).long()
        ids = torch.where((ids >= 0) & (ids < experts), ids, experts)
        self._counts.scatter_add_(0, ids, torch.ones_like(ids))

    def counts(self, group: Any = None) -> Tensor:
        """int64 [E], so far: of this rank, or summed over a process group whose ranks bring their own tokens."""
        counts = self._counts[:-1].clone()
        if group is not None:
            torch.distributed.all_reduce(counts, group=group)
        return counts

    def reset(self) -> None:
        """Start anew."""
        self._counts.zero_()


def balanced(load: Sequence[float], num_physical: int) -> ExpertReplicas:
    """Replicas for a load: each further copy goes to the expert whose copies are the busiest.

    load: of each logical expert. num_physical: how many there shall be, at least one each. Copies follow the model's
    experts in order, so with `round_robin` they are spread over ranks. Raises ConfigError for too few.
    """
    if num_physical < len(load):
        raise ConfigError(f"{num_physical} physical experts cannot hold {len(load)} logical ones")
    copies = [1] * len(load)
    extra = []
    for _ in range(num_physical - len(load)):
        busiest = max(range(len(load)), key=lambda expert: (load[expert] / copies[expert], -expert))
        copies[busiest] += 1
        extra.append(busiest)
    return ExpertReplicas((*range(len(load)), *extra))
