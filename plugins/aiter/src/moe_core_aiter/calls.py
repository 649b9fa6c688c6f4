"""One call of `fused_moe`, and what is checked about it: AITER itself looks at almost nothing.

Ids of another dtype make it start no kernel and return garbage; a mask of another kind, or an id outside of it, makes
it read and write beyond its memory. Kinds and shapes are compared on every call; values in checked mode, on every row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.dispatchers.standard import expert_mask
from moe_core.errors import ContractViolation
from moe_core.protocols import Binding
from moe_core.vocabulary import DroppedSlot, IdSpace


@dataclass(slots=True)
class Call:
    """hidden: [rows, H], with its padding (H / 2 bytes in mxfp4); scale: of rows that arrive quantized.

    ids: int32 [rows, K], weights: float32 [rows, K], both contiguous; every id lies in [0, number of the mask's
    entries), or in [0, E_local) without one. mask: int32, 1 for the experts of this rank. num_valid: int32 [1], the
    rows that count, where not all do. result: [rows, H] without padding, once it ran.
    """

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    mask: Tensor | None = None
    scale: Tensor | None = None
    num_valid: Tensor | None = None
    handle: Any = None
    result: Tensor | None = None


#: Payload -> values of a row that share an item, and a scale. mxfp4 is bytes, by whatever dtype they go.
_PACKED = {"mxfp4": 2}
_GROUPS = {"fp8_group128": 128, "mxfp4": 32}


class CallCheck:
    """The checks of one path of a plan."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        self.masked = terms is not None and "expert_mask" in terms.extras
        space = binding.num_local_experts
        if terms is not None and terms.id_space is IdSpace.GLOBAL:
            space = binding.config.num_experts
        sink = terms is not None and terms.dropped is DroppedSlot.SINK
        #: Ids lie below this; the last one is the sink, where there is one.
        self.ids = space + sink
        self._top_k = binding.config.top_k
        self._payload = payload = "bf16" if terms is None else terms.payload
        hidden = binding.config.hidden_size
        self._width, self._columns = hidden // _PACKED.get(payload, 1), hidden // _GROUPS.get(payload, hidden)
        kinds = {"bf16": (binding.dtype, None), "mxfp4": (torch.uint8, torch.uint8)}
        self._dtype, self._scale_dtype = kinds.get(payload, (torch.float8_e4m3fn, torch.float32))
        self._values = binding.request.settings.check
        # What the dispatcher's mask must be: the n-th 1 stands for the n-th expert of w1.
        self._mask = expert_mask(binding, sink=sink) if self.masked else None

    def __call__(self, call: Call) -> None:
        """Raise ContractViolation for what AITER would not survive. Comparisons only, unless in checked mode."""
        ids, weights, mask = call.ids, call.weights, call.mask
        rows = (call.hidden.shape[0], self._top_k)
        if (
            not self._is(call.hidden, self._dtype, self._width)
            or not self._scales_fit(call)
            or ids.dtype is not torch.int32
            or ids.shape != rows
            or weights.dtype is not torch.float32
            or weights.shape != rows
            or (mask is None) is self.masked
            or (mask is not None and not self._fits(mask))
        ):
            raise ContractViolation("AITER cannot take this dispatch output:\n    " + "\n    ".join(self._why(call)))
        if self._values:
            self._check_values(call)

    def _is(self, tensor: Tensor, dtype: torch.dtype | None, columns: int) -> bool:
        same = tensor.dtype is dtype or (dtype is torch.uint8 and tensor.element_size() == 1)
        return same and tensor.dim() == 2 and tensor.shape[1] == columns

    def _scales_fit(self, call: Call) -> bool:
        scale = call.scale
        if scale is None or self._scale_dtype is None:
            return scale is None and self._scale_dtype is None
        return self._is(scale, self._scale_dtype, self._columns) and scale.shape[0] == call.hidden.shape[0]

    def _fits(self, mask: Tensor) -> bool:
        return mask.dtype is torch.int32 and mask.shape == (self.ids,) and mask.is_contiguous()

    def _why(self, call: Call) -> list[str]:
        rows, found = (call.hidden.shape[0], self._top_k), []
        if not self._is(call.hidden, self._dtype, self._width):
            found.append(
                f"hidden_states is {call.hidden.dtype} {tuple(call.hidden.shape)}, not {self._dtype} "
                f"{(rows[0], self._width)}"
            )
        if not self._scales_fit(call):
            if call.scale is None:
                said = f"is missing: rows in {self._payload} come with their scales"
            elif self._scale_dtype is None:
                said = f"was given, and rows in {self._payload} have none"
            else:
                said = f"is {call.scale.dtype} {tuple(call.scale.shape)}"
                said += f", not {self._scale_dtype} {(rows[0], self._columns)}"
            found.append(f"hidden_scale {said}")
        for name, tensor, dtype in (("topk_ids", call.ids, torch.int32), ("topk_weights", call.weights, torch.float32)):
            if tensor.dtype is not dtype or tensor.shape != rows:
                found.append(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not {dtype} {rows}")
        if call.mask is None and self.masked:
            found.append("expert_mask is missing, and the terms promise it")
        elif call.mask is not None and not self.masked:
            found.append("expert_mask was given, and the terms promise none: ids are those of local experts")
        elif call.mask is not None and not self._fits(call.mask):
            kind = "contiguous" if call.mask.is_contiguous() else "strided"
            found.append(
                f"expert_mask is {kind} {call.mask.dtype} {tuple(call.mask.shape)}, not contiguous int32 ({self.ids},)"
            )
        return found

    def _check_values(self, call: Call) -> None:
        """Every id of every row, padding rows too, and the mask. Synchronizes."""
        bad = (call.ids < 0) | (call.ids >= self.ids)
        if bool(bad.any()):
            row, slot = (int(i) for i in bad.nonzero()[0])
            raise ContractViolation(
                f"topk_ids[{row}, {slot}] is {int(call.ids[row, slot])}: AITER takes ids from 0 to {self.ids - 1} on "
                f"every row, also on rows that do not count ({int(bad.sum())} such slots)"
            )
        mask = call.mask
        if mask is not None and self._mask is not None and not torch.equal(mask, self._mask):
            raise ContractViolation(
                f"expert_mask is {mask.tolist()}, and this rank's experts are {self._mask.tolist()}: AITER finds its "
                "weights by counting the ones"
            )
        if call.num_valid is not None and not 0 <= int(call.num_valid) <= call.hidden.shape[0]:
            raise ContractViolation(f"num_valid is {int(call.num_valid)}, for {call.hidden.shape[0]} rows")
