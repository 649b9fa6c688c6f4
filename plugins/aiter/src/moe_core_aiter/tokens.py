"""From a dispatch output to a call: ids that are safe on every row, and tokens in a form that AITER has kernels for."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_core.errors import BindError, ContractViolation
from moe_core.formats import StandardDispatchOutput
from moe_core.protocols import Binding
from moe_core.quant import dequantize_activation
from moe_core.vocabulary import DroppedSlot, Step
from moe_core_aiter.build import Build
from moe_core_aiter.calls import Call, CallCheck
from moe_core_aiter.layouts import to_fnuz
from moe_core_aiter.weights import AiterWeights

_E8M0_ONE = 127


class TokenReader:
    """Reads the format `standard` for one path of a plan. Keeps nothing between two calls."""

    def __init__(self, binding: Binding) -> None:
        terms = binding.terms
        if terms is None:
            raise BindError("AITER's adapter was bound without terms")
        if terms.dropped is DroppedSlot.NEGATIVE:
            raise BindError("AITER was bound to ids of -1, and its kernels write out of bounds for them")
        build: Build = binding.runner.build
        config = binding.config
        self._check = CallCheck(binding)
        self._payload, self._dtype = terms.payload, binding.dtype
        self._on_input = config.router_weight_on_input
        self._scale = config.routed_scaling_factor if terms.runner_does(Step.ROUTED_SCALING) else 1.0
        self._fnuz = build.fp8 is torch.float8_e4m3fnuz
        # Four-bit rows cannot carry a router weight in their scales, which are powers of two.
        whole = terms.payload != "mxfp4" or (build.takes_fp4_tokens and not self._on_input)
        self._as_is = terms.payload != "bf16" and whole
        self._fp4, self._e8m0 = build.fp4x2, build.e8m0
        self._masked_id = self._find_masked_id(binding, terms.dropped is DroppedSlot.SINK)
        # With one slot more, its tables of tuned kernels are looked up by the layer's own top-k; without, some calls of
        # top-1 layers divide by zero.
        self._adds_slot = build.counts_masked_slot and self._masked_id is not None

    def _find_masked_id(self, binding: Binding, sink: bool) -> int | None:
        """An id that the mask leaves out; None where it leaves out none."""
        if sink or not self._check.masked:
            return self._check.ids - 1 if sink else None
        mine = binding.parallel.local_experts(binding.config.num_experts)
        return next((e for e in range(self._check.ids) if e not in mine), None)

    def __call__(self, given: StandardDispatchOutput, weights: AiterWeights) -> Call:
        """Raises ContractViolation for what the terms do not promise."""
        if given.topk_ids is None or given.topk_weights is None:
            raise ContractViolation("AITER needs top-k ids and weights, but the router was bypassed")
        call = Call(
            given.hidden_states,
            given.topk_ids.contiguous(),
            given.topk_weights.contiguous(),
            given.expert_mask if self._check.masked else None,
            given.hidden_scale,
            handle=given.handle,
        )
        if given.num_valid is not None:
            self._mark_padding(call, given.num_valid)
        self._check(call)
        if self._payload != "bf16":
            self._unpack(call, weights)
        if self._on_input:
            self._weigh_input(call)
        if self._scale != 1.0:
            call.weights = call.weights * self._scale
        if call.hidden.dtype is self._dtype and weights.hidden_pad:
            call.hidden = pad(call.hidden, (0, weights.hidden_pad))
        call.hidden = call.hidden.contiguous()
        if self._adds_slot:
            call.ids, call.weights = pad(call.ids, (0, 1), value=self._masked_id), pad(call.weights, (0, 1))
        elif self._masked_id is None:
            call.mask = None  # all ones: not to be taken for one that leaves out a slot
        return call

    def _mark_padding(self, call: Call, num_valid: Tensor) -> None:
        """Rows at and above num_valid hold any ids; some kernels look at all of them."""
        call.num_valid = num_valid.reshape(1).to(torch.int32)
        row = torch.arange(call.ids.shape[0], device=call.ids.device, dtype=torch.int32)
        call.ids = torch.where((row < call.num_valid)[:, None], call.ids, self._masked_id or 0).to(torch.int32)

    def _unpack(self, call: Call, weights: AiterWeights) -> None:
        """Quantized rows: as they are where AITER has kernels for them, else in 16 bits again."""
        if call.scale is None:
            raise TypeError("checked before")
        if not self._as_is:
            call.hidden = dequantize_activation(call.hidden, call.scale, self._payload, self._dtype)
            call.scale = None
        elif self._payload == "mxfp4":
            more = weights.hidden_pad
            data, scale = call.hidden.view(torch.uint8), call.scale.view(torch.uint8)
            if more:
                data, scale = pad(data, (0, more // 2)), pad(scale, (0, more // 32), value=_E8M0_ONE)
            call.hidden, call.scale = data.contiguous().view(self._fp4), scale.contiguous().view(self._e8m0)
        elif self._fnuz:
            call.hidden, call.scale = to_fnuz(call.hidden), call.scale.contiguous() * 2
        else:
            call.scale = call.scale.contiguous()

    def _weigh_input(self, call: Call) -> None:
        """The router's weight on the tokens, whose only slot it is. That of a dropped slot may be NaN."""
        live = None if call.mask is None else call.mask[call.ids] > 0
        weight = call.weights if live is None else torch.where(live, call.weights, 1.0)
        if call.scale is None:
            call.hidden = (call.hidden * weight).to(self._dtype)
        else:
            call.scale = call.scale * weight
        call.weights = torch.ones_like(call.weights)
