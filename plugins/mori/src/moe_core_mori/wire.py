"""Ids and rows at MoRI's edge.

MoRI finds the rank of a slot by dividing its id by the number of experts a rank, and in some kernels a negative id
divides to rank 0; so none ever travels. Where the caller may drop slots, every rank has one expert more on the wire
than in the layer, its sink: a dropped slot goes to the sender's own, over no link, and is told apart where it arrives.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.dispatchers.torch_distributed.payload import Travelling
from moe_core.errors import BindError
from moe_core.protocols import Binding
from moe_core.vocabulary import DroppedSlot, IdSpace

#: Rows on gfx942 travel as the eight-bit floats that MoRI has kernels for there; they are copied, never computed with.
_FNUZ_ARCH = "gfx942"


class Ids:
    """The caller's ids to the wire and back. experts_a_rank: as MoRI is told."""

    def __init__(self, binding: Binding) -> None:
        terms, parallel, device = binding.terms, binding.parallel, binding.device
        if terms is None:
            raise BindError("ids are agreed upon in terms, and MoRI's dispatcher was bound without")
        experts, local, rank = binding.config.num_experts, binding.num_local_experts, parallel.ep_rank
        dtype = getattr(torch, terms.ids_dtype)
        drops = terms.dropped is not DroppedSlot.NEVER
        self.experts_a_rank = local + 1 if drops else local
        wire = self.experts_a_rank * parallel.ep_size
        ids = torch.arange(experts)
        places = ids + ids // local if drops else ids
        if drops:  # the last entry is found by -1 and by the caller's sink id alike
            to_wire = torch.cat([places, torch.tensor([rank * (local + 1) + local])])
            self._to_wire: Tensor | None = to_wire.to(device, torch.int32)
            count = experts if terms.id_space is IdSpace.GLOBAL else local
            nothing = count if terms.dropped is DroppedSlot.SINK else -1
        else:
            self._to_wire = None
            nothing = (rank + 1) * local % experts  # another rank's, which this rank's mask and map leave out
        if terms.id_space is IdSpace.GLOBAL:
            agreed = ids
        else:
            agreed = torch.where(ids // local == rank, ids - rank * local, nothing)
        table = torch.full((wire + 1,), nothing)
        table[places] = agreed
        # Without dropped slots the wire speaks global ids already, and only rows that nobody sent are rewritten.
        self._table = table.to(device, dtype) if drops else None
        self._nothing, self._last, self._dtype = nothing, wire, dtype
        self._rows = torch.empty(0, 1, dtype=torch.int32, device=device)

    def room(self, rows: int) -> None:
        """Before the first call: the most rows that may be received."""
        self._rows = torch.arange(rows, dtype=torch.int32, device=self._rows.device).unsqueeze(1)

    def sent(self, ids: Tensor) -> Tensor:
        """[T, K] as the caller writes them -> int32 for MoRI, all of them in its id space."""
        return (ids.to(torch.int32) if self._to_wire is None else self._to_wire[ids]).contiguous()

    def agreed(self, ids: Tensor, received: Tensor) -> Tensor:
        """[rows, K] as received, and int32 [1], how many rows count -> as the terms say, in rows past those too."""
        live = self._rows[: ids.shape[0]] < received
        if self._table is None:
            return torch.where(live, ids, self._nothing).to(self._dtype)
        return self._table[torch.where(live, ids, self._last)]


class Rows:
    """Tokens to the tensors that MoRI copies, and back to the payload of the terms.

    dtype: of rows as they travel; scale_words: 4-byte words of scales a row, 0 where there are none.
    """

    def __init__(self, binding: Binding) -> None:
        if binding.terms is None:
            raise BindError("what travels is agreed upon in terms, and MoRI's dispatcher was bound without")
        self.payload, self._travelling = binding.terms.payload, Travelling(binding)
        example = torch.empty(0, binding.config.hidden_size, dtype=binding.dtype, device=binding.device)
        data, *scales = self._travelling(example)
        self._data_dtype = data.dtype
        self.dtype = _carrier(data.dtype, self.payload, binding.hardware.arch)
        self.scale_words, self._scale_dtype = 0, torch.float32
        if scales:
            self._scale_dtype = scales[0].dtype
            size = scales[0].shape[1] * self._scale_dtype.itemsize
            if size % 4:
                raise BindError(
                    f"payload {self.payload!r} has {size} bytes of scales a row, and MoRI moves words of 4 bytes",
                    hint="such layers need a hidden size that is a multiple of 128",
                )
            self.scale_words = size // 4

    def sent(self, hidden_states: Tensor) -> tuple[Tensor, Tensor | None]:
        """[T, H] -> rows [T, width], and their scales as words, int32 [T, scale_words]."""
        data, *scales = self._travelling(hidden_states)
        return data.view(self.dtype), scales[0].view(torch.int32) if scales else None

    def received(self, data: Tensor, words: Tensor | None, rows: int) -> tuple[Tensor, Tensor | None]:
        """The first `rows` of what MoRI gave, in the payload's dtypes: views, but for scales that lie strided."""
        data = data[:rows].view(self._data_dtype)
        if words is None:
            return data, None
        return data, words[:rows, : self.scale_words].contiguous().view(self._scale_dtype)


def _carrier(dtype: torch.dtype, payload: str, arch: str) -> torch.dtype:
    """The dtype that MoRI has a kernel for, of the same size."""
    if dtype.itemsize != 1:
        return dtype
    if arch == _FNUZ_ARCH:
        return torch.float8_e4m3fnuz
    if payload == "mxfp4":
        return getattr(torch, "float4_e2m1fn_x2", torch.float8_e4m3fn)
    return torch.float8_e4m3fn
