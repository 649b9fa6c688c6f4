"""What MoRI's dispatchers share: what goes in and comes out, and what travels from dispatch to combine.

A row goes once to each rank that has an expert for it, with all its ids and weights; received rows have no order, and a
device scalar says how many count. The experts' weighted sum of a row goes back, and combine adds up a row a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_map, expert_mask
from moe_core.dispatchers.steps import taken_on
from moe_core.errors import BindError, ContractViolation
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, Step
from moe_core_mori.buffers import Lease, Need, Slot, micro_batches, most_tokens, ranks_of
from moe_core_mori.launch import Launch
from moe_core_mori.wire import Ids, Rows


@dataclass(slots=True, eq=False)
class Handle:
    """What travels to `combine`. ids: int32 [tokens, K], this rank's own as they were sent; never the received ones.

    rows: that the dispatch output has. slot: the operator that holds them. routing: the second interface's own.
    """

    ids: Tensor
    tokens: int
    rows: int
    output: Tensor | None
    slot: Slot | None = None
    routing: Any = None


@dataclass(slots=True)
class Outgoing:
    """A dispatch ready to be launched: what MoRI takes, and the handle."""

    rows: Tensor
    weights: Tensor
    scales: Tensor | None
    handle: Handle
    slot: Slot


class MoriDispatcher:
    """See the module. launch: how the first interface's kernels are launched; None for the second."""

    def __init__(self, binding: Binding, launch: Launch | None) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("MoRI's dispatcher was bound without terms")
        if binding.max_tokens is None:
            raise BindError("without max_tokens nobody knows how large MoRI's buffers must be")
        self.launch, self._ids, self._rows = launch, Ids(binding), Rows(binding)
        self._dtype, self._hidden = binding.dtype, binding.config.hidden_size
        self._tokens, self._rank, self._ranks = binding.max_tokens, binding.parallel.ep_rank, binding.parallel.ep_size
        self._check = binding.request.settings.check
        need = Need(
            rank=self._rank,
            ranks=self._ranks,
            dtype=binding.dtype,
            sent_dtype=self._rows.dtype,
            hidden=self._hidden,
            scale_words=self._rows.scale_words,
            most=most_tokens(self._tokens),
            experts_a_rank=self._ids.experts_a_rank,
            top_k=binding.config.top_k,
            micro_batches=micro_batches(binding),
            launch=launch,
            backend=binding.options.get("backend"),
        )
        # No rank sends another more rows than it has tokens: the rest of MoRI's buffer stays empty, at its end where
        # the kernel fills it from row 0 on.
        self._compact = launch is None or launch.compact
        self._most = self._ranks * (self._tokens if self._compact else need.most)
        self._ids.room(self._most)
        sink = terms.dropped is DroppedSlot.SINK
        self.expert_map = expert_map(binding) if "expert_map" in terms.extras else None
        self.expert_mask = expert_mask(binding, sink=sink) if "expert_mask" in terms.extras else None
        self._counted = "num_valid" in terms.extras
        self._scale = binding.config.routed_scaling_factor if Step.ROUTED_SCALING in taken_on(binding) else 1.0
        self._lease = Lease(ranks_of(binding), need)

    def close(self) -> None:
        """Give the buffers back, on all ranks together."""
        self._lease.close()

    def reset(self) -> None:
        """After an error between dispatch and combine: give up what waits, of all layers, on all ranks together."""
        self._lease.shared.reset()

    def _outgoing(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Outgoing:
        """Raises ContractViolation where `state.tokens_per_rank` is wrong or no operator is free."""
        shared, tokens = self._lease.shared, hidden_states.shape[0]
        rows = self._bound(tokens, state)
        ids = self._ids.sent(topk_output.topk_ids)
        weights = topk_output.topk_weights.to(torch.float32).contiguous()
        data, scales = self._rows.sent(hidden_states)
        handle = Handle(ids, tokens, rows, state.output)
        handle.slot = slot = shared.take(handle)
        state.output = None
        return Outgoing(data, weights, scales, handle, slot)

    def _bound(self, tokens: int, state: RunningState) -> int:
        """The most rows that can come: a row a token and rank, of as many tokens as the ranks say, or may, bring."""
        given = state.tokens_per_rank
        if given is None:
            return self._most
        if len(given) != self._ranks or given[self._rank] != tokens:
            me = f"EP rank {self._rank} of {self._ranks} with {tokens} tokens"
            raise ContractViolation(
                f"tokens_per_rank is {list(given)}, and this is {me}",
                hint="give the number of tokens of every EP rank, in the order of ep_rank, the same on every rank",
            )
        # One row at least: MoRI's kernels take no null pointer for granted.
        return max(1, min(sum(given), self._most)) if self._compact else self._most

    def _output(self, given: tuple[Any, ...], handle: Handle) -> StandardDispatchOutput:
        """The dispatch output, of the five tensors that MoRI gave: views of its buffers, valid until the combine."""
        data, weights, words, ids, received = given
        rows = handle.rows
        if self._check and int(received) > rows:
            raise ContractViolation(
                f"{int(received)} rows came, and tokens_per_rank allows for {rows}: a rank brought more than it says",
                hint="give the same true numbers on every rank",
            )
        tokens, scale = self._rows.received(data, words, rows)
        return StandardDispatchOutput(
            tokens,
            self._ids.agreed(ids[:rows], received),
            weights[:rows],
            hidden_scale=scale,
            num_valid=received.view(()) if self._counted else None,
            expert_map=self.expert_map,
            expert_mask=self.expert_mask,
            handle=handle,
        )

    def _returning(self, combine_input: StandardCombineInput) -> tuple[Slot, Handle, Tensor]:
        """What goes back. Raises ContractViolation for rows that MoRI would misread."""
        shared, handle, rows = self._lease.shared, combine_input.handle, combine_input.hidden_states
        if not isinstance(handle, Handle):
            raise ContractViolation(
                f"the combine input's handle is a {type(handle).__name__}, not that of MoRI's dispatch output",
                hint="a post-permute passes the handle of the dispatch output on",
            )
        slot = shared.holds(handle.slot, handle)
        if tuple(rows.shape) != (handle.rows, self._hidden) or rows.dtype != self._dtype:
            raise ContractViolation(
                f"the experts gave {rows.dtype} {list(rows.shape)}, and combine takes {self._dtype} "
                f"{[handle.rows, self._hidden]}: a row for each of the dispatch output"
            )
        handle.slot = None  # it goes back once
        return slot, handle, rows.contiguous()

    def _result(self, summed: Tensor, handle: Handle) -> Tensor:
        """This rank's rows of MoRI's buffer, out of it: the next combine writes there."""
        own, output = summed[: handle.tokens], handle.output
        if output is not None:
            return output.copy_(own) if self._scale == 1.0 else torch.mul(own, self._scale, out=output)
        return own.clone() if self._scale == 1.0 else own * self._scale
