"""The `standard` dispatcher: no all-to-all. Every rank sees all tokens (TP, or EP over replicated tokens).

It owns the expert map and the expert mask of the rank, both built when the plan is bound. Ids are translated with one
table look-up; where the agreed terms need no translation, not even that.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.steps import finish_slots, taken_on
from moe_core.errors import BindError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import BypassedTopK, TopKOutput
from moe_core.vocabulary import DroppedSlot, IdSpace, Step


def expert_map(binding: Binding) -> Tensor:
    """int32 [E]: the local id of each global expert, or -1."""
    experts = binding.config.num_experts
    local = binding.parallel.local_experts(experts)
    table = torch.full((experts,), -1, dtype=torch.int32)
    table[torch.tensor(local, dtype=torch.int64)] = torch.arange(len(local), dtype=torch.int32)
    return table.to(binding.device)


def expert_mask(binding: Binding, *, sink: bool) -> Tensor:
    """int32 over the agreed id space, 1 for the experts of this rank: [E] for global ids, [E_local] for local ones.

    With the sink encoding it has one more entry, 0.
    """
    if binding.terms is not None and binding.terms.id_space is IdSpace.LOCAL:
        mask = torch.ones(binding.num_local_experts, dtype=torch.int32, device=binding.device)
    else:
        mask = (expert_map(binding) >= 0).to(torch.int32)
    return torch.cat([mask, mask.new_zeros(1)]) if sink else mask


class StandardDispatcher:
    """See the module. Made from the binding; keeps nothing between two calls."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("the standard dispatcher was bound without terms")
        self._ids_dtype = getattr(torch, terms.ids_dtype)
        self._table = id_table(binding) if _translates(binding) else None
        self._num_experts = binding.config.num_experts
        sink = terms.dropped is DroppedSlot.SINK
        self.expert_map = expert_map(binding) if "expert_map" in terms.extras else None
        self.expert_mask = expert_mask(binding, sink=sink) if "expert_mask" in terms.extras else None
        mine = taken_on(binding)
        self._weigh, self._sum = Step.ROUTER_WEIGHT in mine, Step.TOPK_SUM in mine
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in mine else None
        self._group = binding.group if mine & {Step.EP_REDUCE, Step.TP_REDUCE} else None
        self._touches = self._weigh or self._sum or self._scale is not None or self._group is not None

    def dispatch(
        self, hidden_states: Tensor, topk_output: TopKOutput | BypassedTopK, state: RunningState
    ) -> StandardDispatchOutput:
        """Tokens stay where they are; ids are translated to the agreed id space and encoding."""
        if isinstance(topk_output, BypassedTopK):
            return StandardDispatchOutput(
                hidden_states,
                None,
                None,
                router_logits=topk_output.router_logits,
                correction_bias=topk_output.correction_bias,
                expert_map=self.expert_map,
                expert_mask=self.expert_mask,
                handle=self._handle(None, None, state) if self._touches else None,
            )
        ids, weights = topk_output.topk_ids, topk_output.topk_weights
        # -1 finds the table's last entry, and so does the sink id: both are "dropped". Any other id outside the id
        # space is the caller's error, found by MOE_CORE_CHECK=1.
        ids = self._table[ids] if self._table is not None else ids.to(self._ids_dtype)
        return StandardDispatchOutput(
            hidden_states,
            ids,
            weights.to(torch.float32),
            expert_map=self.expert_map,
            expert_mask=self.expert_mask,
            handle=self._handle(topk_output.topk_ids, weights, state) if self._touches else None,
        )

    def _handle(self, ids: Tensor | None, weights: Tensor | None, state: RunningState) -> tuple[Any, ...]:
        """What `combine` needs. It takes the output tensor along: the runner's result is not yet the layer's."""
        output, state.output = state.output, None
        return ids, weights, output

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """The experts' result, after the steps that the terms give to the dispatcher."""
        result = combine_input.hidden_states
        return self._finish(result, combine_input.handle) if self._touches else result

    def _finish(self, result: Tensor, handle: Any) -> Tensor:
        ids, weights, output = handle
        if self._weigh or self._sum:
            live = (ids >= 0) & (ids < self._num_experts)  # -1 and the sink alike
            result = finish_slots(result, live, weights, weigh=self._weigh, total=self._sum)
        if self._scale is not None:
            result = result * self._scale
        if self._group is not None:
            torch.distributed.all_reduce(result, group=self._group)
        return result if output is None else output.copy_(result)


def _translates(binding: Binding) -> bool:
    """Whether agreed ids differ from the caller's."""
    terms = binding.terms
    same_space = terms is None or terms.id_space is IdSpace.GLOBAL or binding.parallel.ep_size == 1
    unchanged = terms is None or binding.incoming is DroppedSlot.NEVER or binding.incoming is terms.dropped
    return not (same_space and unchanged)


def id_table(binding: Binding) -> Tensor:
    """[E + 1] in the agreed dtype: global id -> agreed id; the last entry is the dropped id, which -1 finds too."""
    terms = binding.terms
    if terms is None:
        raise BindError("ids are agreed upon in terms, and this dispatcher was bound without")
    if terms.id_space is IdSpace.GLOBAL:
        count = binding.config.num_experts
        table = torch.arange(count, device=binding.device)
    else:
        table, count = expert_map(binding).long(), binding.num_local_experts
    dropped = count if terms.dropped is DroppedSlot.SINK else -1
    table = torch.where(table < 0, dropped, table)
    table = torch.cat([table, table.new_full((1,), dropped)])
    return table.to(getattr(torch, terms.ids_dtype))
