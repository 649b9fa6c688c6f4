"""`alltoall`: a token travels once to each rank that has experts for it, and its experts' sum travels back.

Local ids and weights travel with the token. The host waits once a call, for how many rows go to and come from each
rank; nothing is padded. Cost: a row for each rank that a token needs, in each direction, where `allgather` has one for
every rank: less with many ranks and a small top_k.

`alltoall_grouped` then sorts what came by local expert, a row a slot, for runners that want it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_map, expert_mask
from moe_core.dispatchers.steps import finish_slots, taken_on
from moe_core.dispatchers.torch_distributed.finish import finish
from moe_core.dispatchers.torch_distributed.groups import make_groups
from moe_core.dispatchers.torch_distributed.payload import Travelling, as_bytes
from moe_core.dispatchers.torch_distributed.routes import Route, Router, gathered
from moe_core.dispatchers.torch_distributed.waiting import together
from moe_core.errors import BindError
from moe_core.formats import (
    GroupedCombineInput,
    GroupedDispatchOutput,
    StandardCombineInput,
    StandardDispatchOutput,
)
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, IdSpace, Step


@dataclass(slots=True)
class Handle:
    """What travels to `combine`. local: int32 [received, K], local ids and -1; where: int64 [received, K], the row of a
    slot in the format `grouped`."""

    route: Route
    local: Tensor
    weights: Tensor
    output: Tensor | None
    where: Tensor | None = None


@dataclass(slots=True)
class Flying:
    """Transfers that were started, and what they fill."""

    works: list[Any]
    parts: list[Tensor]
    handle: Any


class AllToAllDispatcher:
    """See the module. Keeps nothing between two calls."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("the alltoall dispatcher was bound without terms")
        self._groups = make_groups(binding)
        self._router, self._travelling = Router(binding, self._groups), Travelling(binding)
        self._ids_dtype, count = getattr(torch, terms.ids_dtype), binding.num_local_experts
        self._mine = None
        if terms.id_space is IdSpace.GLOBAL:
            local, count = binding.parallel.local_experts(binding.config.num_experts), binding.config.num_experts
            self._mine = torch.tensor(local, dtype=self._ids_dtype, device=binding.device)
        sink = terms.dropped is DroppedSlot.SINK
        self._dropped = count if sink else -1
        self.expert_map = expert_map(binding) if "expert_map" in terms.extras else None
        self.expert_mask = expert_mask(binding, sink=sink) if "expert_mask" in terms.extras else None
        mine = taken_on(binding)
        self._weigh, self._sum = Step.ROUTER_WEIGHT in mine, Step.TOPK_SUM in mine
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in mine else 1.0

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Any:
        """The rows of all ranks that need an expert of this one."""
        return self.dispatch_finish(self.dispatch_begin(hidden_states, topk_output, state), state)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Flying:
        """Find the way, which waits for the other ranks and for the device, and start the transfers."""
        ids, weights = topk_output.topk_ids, topk_output.topk_weights.to(torch.float32)
        with together("agreeing on the number of rows", self._groups.ep):
            route, there = self._router.find(ids)
        parts = [torch.cat([there, weights[route.token].view(torch.int32)], dim=1)]
        parts += [as_bytes(part)[route.token].view(part.dtype) for part in self._travelling(hidden_states)]
        with together("sending tokens", self._groups.ep):
            started = [self._router.send(part, route) for part in parts]
        output, state.output = state.output, None
        works, received = [work for _, work in started], [rows for rows, _ in started]
        return Flying(works, received, (route, ids.shape[1], output))

    def dispatch_finish(self, handle: Flying, state: RunningState) -> Any:
        """Wait for them."""
        with together("sending tokens", self._groups.ep):
            for work in handle.works:
                work.wait()
        route, top_k, output = handle.handle
        local, weights = handle.parts[0][:, :top_k], handle.parts[0][:, top_k:].view(torch.float32)
        scale = handle.parts[2] if len(handle.parts) > 2 else None
        return self._given(handle.parts[1], scale, Handle(route, local, weights, output))

    def _given(self, rows: Tensor, scale: Tensor | None, handle: Handle) -> Any:
        here = handle.local >= 0
        ids = handle.local.to(self._ids_dtype)
        if self._mine is not None:
            ids = self._mine[handle.local.clamp(min=0).long()]
        return StandardDispatchOutput(
            rows,
            torch.where(here, ids, self._dropped),
            handle.weights,
            hidden_scale=scale,
            expert_map=self.expert_map,
            expert_mask=self.expert_mask,
            handle=handle,
        )

    def _rows(self, combine_input: Any, handle: Handle) -> Tensor:
        """The experts' result of each received row."""
        result: Tensor = combine_input.hidden_states
        if self._weigh or self._sum:
            result = finish_slots(result, handle.local >= 0, handle.weights, weigh=self._weigh, total=self._sum)
        return result

    def combine(self, combine_input: StandardCombineInput | GroupedCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks."""
        return self.combine_finish(self.combine_begin(combine_input, state), state)

    def combine_begin(self, combine_input: StandardCombineInput | GroupedCombineInput, state: RunningState) -> Flying:
        """Start sending results back."""
        handle: Handle = combine_input.handle
        result = self._rows(combine_input, handle).contiguous()
        with together("sending results back", self._groups.ep):
            rows, work = self._router.send(result, handle.route, back=True)
        return Flying([work], [rows], handle)

    def combine_finish(self, handle: Flying, state: RunningState) -> Tensor:
        """Wait for them, and add up."""
        with together("sending results back", self._groups.ep):
            for work in handle.works:
                work.wait()
        result = gathered(handle.parts[0], handle.handle.route.place)
        return finish(result, self._groups, self._scale, handle.handle.output)


class GroupedAllToAllDispatcher(AllToAllDispatcher):
    """The same, and rows sorted by local expert: one for each slot that is computed here."""

    def __init__(self, binding: Binding) -> None:
        super().__init__(binding)
        self._experts = binding.num_local_experts
        terms = binding.terms
        self._gives_weights = terms is not None and terms.runner_does(Step.ROUTER_WEIGHT)

    def _given(self, rows: Tensor, scale: Tensor | None, handle: Handle) -> GroupedDispatchOutput:
        slots, top_k = handle.route.received_slots, handle.local.shape[1]
        expert = torch.where(handle.local >= 0, handle.local, self._experts).flatten().long()
        order = expert.argsort(stable=True)
        counts = torch.zeros(self._experts + 1, dtype=torch.int32, device=rows.device)
        counts.scatter_add_(0, expert, torch.ones_like(expert, dtype=torch.int32))
        offsets = torch.cat([counts.new_zeros(1), counts[:-1].cumsum(0, dtype=torch.int32)])
        handle.where = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=rows.device))
        handle.where = handle.where.view(-1, top_k)
        order = order[:slots]
        row = order // max(top_k, 1)
        return GroupedDispatchOutput(
            as_bytes(rows)[row].view(rows.dtype),
            offsets,
            row_weights=handle.weights.flatten()[order] if self._gives_weights else None,
            hidden_scale=None if scale is None else as_bytes(scale)[row].view(scale.dtype),
            handle=handle,
        )

    def _rows(self, combine_input: Any, handle: Handle) -> Tensor:
        result, where = combine_input.hidden_states, handle.where
        if where is None:
            raise TypeError("the combine input carries a handle of another dispatcher")
        if not self._weigh:
            return gathered(result, where)
        slots = torch.cat([result, result.new_zeros(1, result.shape[1])])[where.clamp(max=result.shape[0])]
        return finish_slots(slots, handle.local >= 0, handle.weights, weigh=True, total=True)
