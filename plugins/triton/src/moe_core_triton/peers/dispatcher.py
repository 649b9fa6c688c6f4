"""`symm_mem`: tokens and results go by stores into the memory of the other GPUs of the host.

Format `standard`, [ep_size * rows, H] as of `allgather`, but a token's row travels only to the ranks that have one of
its experts, and rows that are not there are not moved: their ids are dropped, and nobody reads them. One launch to
dispatch, one to combine, each of which waits on the device for the other ranks' programs; results are added up in
float32 in the order of ranks. Nothing waits for the host, so a call can be captured in a graph.

What `dispatch` gives lies in the shared memory until its `combine`: then the other ranks may send the next tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_core.dispatchers.standard import expert_map, expert_mask
from moe_core.dispatchers.steps import taken_on
from moe_core.dispatchers.torch_distributed.finish import finish
from moe_core.dispatchers.torch_distributed.groups import make_groups
from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.dispatchers.torch_distributed.rows import RowsOfRanks
from moe_core.errors import BindError, CommunicationError, ContractViolation
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import DroppedSlot, IdSpace, Step
from moe_core_triton.kernels.launching import interpreting, is_hopper_or_newer
from moe_core_triton.peers.kernels import send_tokens, sum_results
from moe_core_triton.peers.memory import PROGRAMS, Need, Window, shared_memory
from moe_core_triton.peers.turns import Mark

#: Seconds that a kernel waits for another rank, unless the option says otherwise.
TIMEOUT_S = 60
#: Programs that send, of a processor.
SENDERS = 2
#: Of a rank, up to which the time is latency.
FEW_ROWS = 512


@dataclass(slots=True, eq=False, weakref_slot=True)
class Handle:
    """What travels to `combine`: this rank's tokens, the rows of each rank, its own ids, where it all lies.

    sent: behind the kernel that sends.
    """

    tokens: int
    rows: int
    ids: Tensor
    window: Window
    output: Tensor | None
    sent: Mark | None = None


@dataclass(slots=True)
class Sent:
    """Between `dispatch_begin` and `dispatch_finish`: what was sent is held until then. scale: None without one, or
    where the kernel makes it."""

    handle: Handle
    hidden: Tensor
    scale: Tensor | None
    weights: Tensor


@dataclass(slots=True)
class Returned:
    """Between `combine_begin` and `combine_finish`. sent: behind the kernel that sends."""

    handle: Handle
    result: Tensor
    sent: Mark | None = None


class SymmMemDispatcher:
    """See the module. Keeps nothing between two calls but the shared memory."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None or terms.payload is None:
            raise BindError("the symm_mem dispatcher was bound without terms")
        self._groups, self._rows = make_groups(binding), RowsOfRanks(binding)
        self._travelling, self._payload = Travelling(binding), terms.payload
        config, parallel = binding.config, binding.parallel
        self._me, self._ranks, self._experts = parallel.ep_rank, parallel.ep_size, config.num_experts
        self._hidden, self._dtype, self._top_k = config.hidden_size, binding.dtype, config.top_k
        self._owner, self._index = _places(binding)
        count = binding.num_local_experts
        if terms.id_space is IdSpace.GLOBAL:  # ids of experts elsewhere are dropped all the same
            count = self._experts
            self._index = torch.arange(count, dtype=torch.int32, device=binding.device)
        sink = terms.dropped is DroppedSlot.SINK
        self._dropped = count if sink else -1
        self.expert_map = expert_map(binding) if "expert_map" in terms.extras else None
        self.expert_mask = expert_mask(binding, sink=sink) if "expert_mask" in terms.extras else None
        self._scale = config.routed_scaling_factor if Step.ROUTED_SCALING in taken_on(binding) else 1.0
        self._programs = int(binding.options.get("programs", PROGRAMS))
        self._native = is_hopper_or_newer(binding.device)
        self._timeout_s = float(binding.options.get("timeout_s", TIMEOUT_S))
        if not 1 <= self._programs <= PROGRAMS or self._timeout_s <= 0:
            raise BindError(
                f"the option programs is 1 to {PROGRAMS}, and timeout_s positive, got {self._programs} and "
                f"{self._timeout_s}"
            )
        # Triton's interpreter has no clock.
        self._timeout_ns = 0 if interpreting() else int(1e9 * self._timeout_s)
        # The kernel quantizes what it sends where it can; else another one does before.
        self._quantizes = self._payload == "fp8_group128" and self._hidden % 128 == 0
        one, *scale = self._travelling(torch.zeros(1, self._hidden, dtype=self._dtype, device=binding.device))
        self._sent_dtype, self._scales = one.dtype, scale[0].shape[1] if scale else 0
        if binding.max_tokens is None:
            raise BindError("without max_tokens nobody knows how large the shared memory must be")
        need = Need(
            ranks=self._ranks,
            rows=binding.max_tokens,
            hidden_bytes=self._hidden * self._sent_dtype.itemsize,
            scale_bytes=4 * self._scales,
            result_bytes=self._hidden * self._dtype.itemsize,
            top_k=self._top_k,
        )
        self._memory = shared_memory(self._groups.ep, self._groups.members, need, binding.device)
        # Sending is bound by the link; the sum waits and reads memory, which the programs of other rows hide.
        self._senders = min(self._programs, SENDERS * self._memory.processors)

    def dispatch(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> StandardDispatchOutput:
        """The tokens that this rank has experts for, among [ep_size * rows, H]."""
        return self._given(self._send(hidden_states, topk_output, state, wait=True))

    def dispatch_begin(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState) -> Sent:
        """Send."""
        sent = self._send(hidden_states, topk_output, state, wait=False)
        sent.handle.sent = Mark(hidden_states.device)
        return sent

    def dispatch_finish(self, handle: Sent, state: RunningState) -> StandardDispatchOutput:
        """Wait for the others."""
        if handle.handle.sent is not None:
            handle.handle.sent.follow(handle.handle.ids)
        self._launch_send(handle, send=False, wait=True)
        return self._given(handle)

    def _send(self, hidden_states: Tensor, topk_output: TopKOutput, state: RunningState, *, wait: bool) -> Sent:
        self._heed()
        tokens = hidden_states.shape[0]
        rows = self._rows(tokens, state)
        ids = topk_output.topk_ids.contiguous()
        hidden, scale = hidden_states.contiguous(), None
        if not self._quantizes:
            hidden, *scales = self._travelling(hidden_states)
            if hidden.data_ptr() % 4:  # a view that begins at an odd element cannot be read as words
                hidden = hidden.clone()
            hidden, scale = hidden.view(torch.int32), scales[0].view(torch.int32) if scales else None
        window = self._memory.window()
        output, state.output = state.output, None
        handle = Handle(tokens, rows, ids, window, output)
        window.take(handle)
        sent = Sent(handle, hidden, scale, topk_output.topk_weights.to(torch.float32).contiguous())
        self._launch_send(sent, send=True, wait=wait)
        return sent

    def _heed(self) -> None:
        """Raise CommunicationError where a kernel has waited in vain: the GPU takes no further one."""
        if failed := int(self._memory.failure[0]):
            raise CommunicationError(
                f"EP rank {self._me} waited {self._timeout_s:g} s for EP rank {failed - 1}, in vain: it is "
                "dead, late, or not in this call",
                hint="see what the other ranks say; start the processes again",
            )

    def _launch_send(self, sent: Sent, *, send: bool, wait: bool) -> None:
        handle, window = sent.handle, sent.handle.window
        if not handle.rows:
            return
        self._memory.turns.wait()
        words = self._hidden * self._sent_dtype.itemsize // 4
        place = window.place
        send_tokens[(min(handle.rows, self._senders),)](
            sent.hidden, sent.scale, handle.ids, sent.weights, self._owner, self._index, window.bases, window.epochs[0],
            self._memory.failure, place["sent"], place["hidden"], place["scale"], place["ids"], place["weights"],
            handle.tokens, handle.rows, self._experts, self._me,
            R=self._ranks, K=self._top_k, KP=triton.next_power_of_2(self._top_k), ROW=words,
            BLOCK=triton.next_power_of_2(words), SCALES=self._scales, SP=triton.next_power_of_2(max(1, self._scales)),
            QUANTIZE=self._quantizes, NATIVE=self._native, DROPPED=self._dropped, P=PROGRAMS, SEND=send, WAIT=wait,
            TIMEOUT_NS=self._timeout_ns, num_warps=_warps(self._hidden * self._sent_dtype.itemsize, handle.rows),
        )  # fmt: skip
        if wait:
            self._memory.turns.end()

    def _given(self, sent: Sent) -> StandardDispatchOutput:
        handle, window = sent.handle, sent.handle.window
        rows = self._ranks * handle.rows
        return StandardDispatchOutput(
            window.part("hidden", rows, self._sent_dtype, self._hidden),
            window.part("ids", rows, torch.int32, self._top_k),
            window.part("weights", rows, torch.float32, self._top_k),
            hidden_scale=window.part("scale", rows, torch.float32, self._scales) if self._scales else None,
            expert_map=self.expert_map,
            expert_mask=self.expert_mask,
            handle=handle,
        )

    def combine(self, combine_input: StandardCombineInput, state: RunningState) -> Tensor:
        """This rank's tokens, summed over all ranks."""
        returned = self._return(combine_input)
        return self._sum(returned, send=True)

    def combine_begin(self, combine_input: StandardCombineInput, state: RunningState) -> Returned:
        """Send the results."""
        returned = self._return(combine_input)
        self._launch_sum(returned, returned.result, send=True, wait=False)
        returned.sent = Mark(returned.result.device)
        return returned

    def combine_finish(self, handle: Returned, state: RunningState) -> Tensor:
        """Wait for those of the others, and sum."""
        if handle.sent is not None:
            handle.sent.follow(handle.handle.ids, handle.result)
        return self._sum(handle, send=False)

    def _return(self, combine_input: StandardCombineInput) -> Returned:
        self._heed()
        handle, result = combine_input.handle, combine_input.hidden_states
        expected = self._ranks * handle.rows, self._hidden
        if result.shape != expected or result.dtype != self._dtype:  # another rank's memory holds no more
            raise ContractViolation(
                f"the experts' result is {result.dtype} {list(result.shape)}, expected {self._dtype} {list(expected)}",
                hint="this is a bug of the runner: `standard` rows keep their number and have the layer's dtype",
            )
        return Returned(handle, result.contiguous())

    def _sum(self, returned: Returned, *, send: bool) -> Tensor:
        handle = returned.handle
        given = handle.output if self._groups.tp is None else None
        out = returned.result.new_empty(handle.tokens, self._hidden) if given is None else given
        if out.stride(-1) != 1:
            out = torch.empty_like(out, memory_format=torch.contiguous_format)
        self._launch_sum(returned, out, send=send, wait=True)
        handle.window.give_back()
        if out is given:
            return out
        return finish(out, self._groups, 1.0, handle.output)

    def _launch_sum(self, returned: Returned, out: Tensor, *, send: bool, wait: bool) -> None:
        handle, window = returned.handle, returned.handle.window
        if not handle.rows:
            return
        self._memory.turns.wait()
        place = window.place
        sum_results[(min(handle.rows, self._programs),)](
            returned.result, out, handle.ids, self._owner, window.bases, window.epochs[1], self._memory.failure,
            place["returned"], place["results"], place["ids"], out.stride(0), handle.tokens, handle.rows,
            self._experts, float(self._scale), self._me,
            R=self._ranks, K=self._top_k, KP=triton.next_power_of_2(self._top_k), H=self._hidden,
            BLOCK=triton.next_power_of_2(self._hidden),
            DROPPED=self._dropped, P=PROGRAMS, SEND=send, WAIT=wait, TIMEOUT_NS=self._timeout_ns,
            num_warps=_warps(self._hidden * self._dtype.itemsize, handle.rows),
        )  # fmt: skip
        if wait:
            self._memory.turns.end()


def _places(binding: Binding) -> tuple[Tensor, Tensor]:
    """int32 [E]: the EP rank of each expert, and its number there."""
    experts, parallel = binding.config.num_experts, binding.parallel
    index = [0] * experts
    for rank in range(parallel.ep_size):
        for number, expert in enumerate(parallel.local_experts(experts, rank)):
            index[expert] = number
    owner = torch.tensor(parallel.owners(experts), dtype=torch.int32, device=binding.device)
    return owner, torch.tensor(index, dtype=torch.int32, device=binding.device)


def _warps(row_bytes: int, rows: int) -> int:
    """Few rows: 32 bytes of one a thread, for its latency. Many: 64, and more of them at a time."""
    thread = 32 if rows <= FEW_ROWS else 64
    return max(1, min(16, triton.next_power_of_2(row_bytes) // (32 * thread)))
