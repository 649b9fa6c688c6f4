"""`allgather`: every EP rank computes its experts for the tokens of all ranks.

Tokens, ids and weights are gathered, each rank's part padded to the same number of rows (`rows.py`); the ids of
experts elsewhere and of padding become dropped slots. What the experts give is reduce-scattered, and summed over TP
ranks where there are some. Nothing waits for the device, so a call can be captured in a graph.

Cost, H bytes a token in the payload: (ep_size - 1) * rows * H received, and twice that of 16 bits in combine. That pays
within a node, and where most tokens would go to most ranks anyhow (top_k near ep_size).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_map, expert_mask, id_table
from moe_core.dispatchers.steps import finish_slots, taken_on
from moe_core.dispatchers.torch_distributed.finish import finish
from moe_core.dispatchers.torch_distributed.gathering import gather, reduce_scatter
from moe_core.dispatchers.torch_distributed.groups import make_groups
from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.dispatchers.torch_distributed.rows import RowsOfRanks
from moe_core.dispatchers.torch_distributed.waiting import together
from moe_core.errors import BindError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, Step


@dataclass(slots=True)
class Handle:
    """What travels to `combine`: this rank's tokens and rows, the agreed ids and the weights of all, the output."""

    tokens: int
    rows: int
    ids: Tensor
    weights: Tensor
    output: Tensor | None


@dataclass(slots=True)
class Flying:
    """Collectives that were started, and what they fill. sent: held until they end, which not every backend does."""

    works: list[Any]
    parts: list[Tensor]
    handle: Any
    sent: list[Tensor]


class AllGatherDispatcher:
    """See the module. Keeps nothing between two calls."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("the allgather dispatcher was bound without terms")
        self._groups, self._rows = make_groups(binding), RowsOfRanks(binding)
        self._ranks, self._travelling = binding.parallel.ep_size, Travelling(binding)
        self._table = id_table(binding)
        self._dropped = int(self._table[-1])
        self.expert_map = expert_map(binding) if "expert_map" in terms.extras else None
        sink = terms.dropped is DroppedSlot.SINK
        self.expert_mask = expert_mask(binding, sink=sink) if "expert_mask" in terms.extras else None
        mine = taken_on(binding)
        self._weigh, self._sum = Step.ROUTER_WEIGHT in mine, Step.TOPK_SUM in mine
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in mine else 1.0

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The tokens of all ranks, [ep_size * rows, H]."""
        return self.dispatch_finish(self.dispatch_begin(hidden_states, topk_output, state), state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """Start the collectives."""
        tokens, top_k = topk_output.topk_ids.shape
        rows = self._rows(tokens, state)
        ids = _padded(topk_output.topk_ids.to(torch.int32), rows, -1)
        weights = _padded(topk_output.topk_weights.to(torch.float32), rows, 0)
        sent = [torch.cat([ids, weights.view(torch.int32)], dim=1)]
        sent += self._travelling(_padded(hidden_states, rows, 0))
        output, state.output = state.output, None
        parts = [part.new_empty(self._ranks * rows, *part.shape[1:]) for part in sent]
        with together("gathering tokens", self._groups.ep):
            works = gather(parts, sent, self._groups.ep) if rows else []
        return Flying(works, parts, (tokens, rows, top_k, output), sent)

    def dispatch_finish(self, handle: Flying, state: RunningState) -> StandardDispatchOutput:
        """Wait for them."""
        with together("gathering tokens", self._groups.ep):
            for work in handle.works:
                work.wait()
        tokens, rows, top_k, output = handle.handle
        ids, weights = handle.parts[0][:, :top_k], handle.parts[0][:, top_k:].view(torch.float32)
        # -1 and the sink id find the table's last entry, which is the dropped id.
        ids = self._table[ids]
        return StandardDispatchOutput(
            handle.parts[1],
            ids,
            weights,
            hidden_scale=handle.parts[2] if len(handle.parts) > 2 else None,
            expert_map=self.expert_map,
            expert_mask=self.expert_mask,
            handle=Handle(tokens, rows, ids, weights, output),
        )

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks."""
        return self.combine_finish(self.combine_begin(combine_input, state), state)

    def combine_begin(self, combine_input: StandardCombineInput, state: RunningState) -> Flying:
        """Start the reduce-scatter."""
        result, handle = combine_input.hidden_states, combine_input.handle
        if self._weigh or self._sum:
            live = handle.ids != self._dropped
            result = finish_slots(result, live, handle.weights, weigh=self._weigh, total=self._sum)
        result, mine = result.contiguous(), result.new_empty(handle.rows, *result.shape[1:])
        works = []
        if handle.rows:
            with together("summing results", self._groups.ep):
                works = [reduce_scatter(mine, result, group=self._groups.ep, async_op=True)]
        return Flying(works, [mine], handle, [result])

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Wait for it."""
        with together("summing results", self._groups.ep):
            for work in handle.works:
                work.wait()
        result = handle.parts[0][: handle.handle.tokens]
        return finish(result, self._groups, self._scale, handle.handle.output)


def _padded(rows: Tensor, wanted: int, value: float) -> Tensor:
    """[wanted, ..], `value` behind the rows that are there."""
    missing = wanted - rows.shape[0]
    return rows if missing == 0 else torch.nn.functional.pad(rows, (0, 0, 0, missing), value=value)
