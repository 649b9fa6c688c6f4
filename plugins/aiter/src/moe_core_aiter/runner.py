"""The runner core: one call of `aiter.fused_moe.fused_moe`, which sorts, multiplies, weighs and sums."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from moe_core.errors import BindError
from moe_core.protocols import Binding, RunningState
from moe_core_aiter.build import load_for
from moe_core_aiter.calls import Call
from moe_core_aiter.schemes import ACTIVATIONS, BLOCK_SIZES, INTERLEAVED, MXFP4_INTERLEAVED, ROUNDED_ROWS, SCHEMES
from moe_core_aiter.weights import AiterWeights

_BOUND = "AITER_BF16_FP8_MOE_BOUND"


def _exact_rows() -> int:
    """The most rows of a call whose tokens AITER leaves in 16 bits. A variable of its own moves the bound."""
    given = os.environ.get(_BOUND, str(ROUNDED_ROWS))
    bound = int(given) if given.isdecimal() else 0
    if bound < 2:
        raise BindError(
            f"with {_BOUND}={given} AITER quantizes the tokens of every call to fp8, and mxfp4_w4a16 leaves them as "
            "they are",
            hint=f"unset {_BOUND}, or allow it: options={{'aiter': {{'round_tokens': True}}}}",
        )
    return bound - 1


class AiterRunner:
    """Holds what a plan fixes: the installed build and the arguments that no call changes."""

    def __init__(self, binding: Binding) -> None:
        self.build = build = load_for(binding)
        config = binding.config
        self._hidden_size, self._dtype = config.hidden_size, binding.dtype
        self._fused_moe = build.fused_moe
        self._quant_types = build.quant_types
        self._fixed: dict[str, Any] = {
            "activation": getattr(build.activations, ACTIVATIONS[config.activation.name]),
            "dtype": binding.dtype,
        }
        if config.activation.limit is not None and build.has("swiglu_limit"):
            self._fixed["swiglu_limit"] = config.activation.limit
        self._most = 0
        layout = SCHEMES[config.scheme].layout
        if layout in INTERLEAVED:
            self._fixed["gate_mode"] = "interleave"
        if layout == MXFP4_INTERLEAVED:
            rounds = binding.options.get("round_tokens", False)
            if not isinstance(rounds, bool):
                raise BindError(f"the option round_tokens is true or false, got {rounds!r}")
            self._most = 0 if rounds else _exact_rows()
        block = binding.options.get("block_size_m")
        if block not in (None, *BLOCK_SIZES):
            raise BindError(f"the option block_size_m is one of {', '.join(map(str, BLOCK_SIZES))}, got {block!r}")
        if block is not None:
            self._fixed["block_size_M"] = block
        self._into = build.has("output")

    def run(self, runner_input: Call, quant_info: AiterWeights, state: RunningState) -> Call:
        """The call with its result [rows, H]; in `state.output` where the caller brought it."""
        call, output = runner_input, state.output
        rows = call.hidden.shape[0]
        if rows == 0:
            result = call.hidden.new_empty((0, self._hidden_size), dtype=self._dtype)
        elif self._most and rows > self._most:
            result = self._in_pieces(call, quant_info)
        else:
            result = self._compute(call, quant_info, output)
        if output is not None and result is not output:
            result = output.copy_(result)
        call.result = result
        return call

    def _in_pieces(self, call: Call, q: AiterWeights) -> Tensor:
        """Calls small enough that AITER leaves the tokens in 16 bits. How many there are depends on shapes alone."""
        rows = call.hidden.shape[0]
        result = call.hidden.new_empty((rows, self._hidden_size), dtype=self._dtype)
        for start in range(0, rows, self._most):
            here = slice(start, start + self._most)
            valid = call.num_valid
            if valid is not None:
                valid = (valid - start).clamp(0, min(self._most, rows - start))
            piece = Call(call.hidden[here], call.ids[here], call.weights[here], call.mask, num_valid=valid)
            result[here] = self._compute(piece, q, None)
        return result

    def _compute(self, call: Call, q: AiterWeights, output: Tensor | None) -> Tensor:
        # Sizes are not told to be padded: kernels that skip padding skip it by other tiles in one product than in the
        # next, which then reads what was not written. Zeros are right, whatever they do.
        given: dict[str, Any] = dict(
            self._fixed,
            expert_mask=call.mask,
            quant_type=getattr(self._quant_types, q.quant_type),
            w1_scale=q.w1_scale,
            w2_scale=q.w2_scale,
            a1_scale=q.a1_scale if call.scale is None else call.scale,
            a2_scale=q.a2_scale,
        )
        if call.num_valid is not None and q.quant_type != "per_Tensor":
            # The quantization of whole tensors refuses a number of rows. Those past it are computed for nothing.
            given["num_local_tokens"] = call.num_valid
        if q.bias1 is not None:
            given.update(bias1=q.bias1, bias2=q.bias2)
        if self._into and output is not None and not q.hidden_pad and output.is_contiguous():
            given["output"] = output
        # An attribute of a tensor is lost by views and copies, and fp4 kernels are chosen by it.
        q.w1.is_shuffled = q.w2.is_shuffled = True  # type: ignore[attr-defined]
        try:
            result = self._fused_moe(call.hidden, q.w1, q.w2, call.weights, call.ids, **given)
        except NotImplementedError as error:  # some kernels of its tuned tables know no mask
            raise BindError(
                f"AITER has no kernel for this call of {call.hidden.shape[0]} rows: {error}",
                hint="choose another runner for this layer, or leave its tuned tables out (AITER_BYPASS_TUNE_CONFIG=1)",
            ) from error
        if q.hidden_pad:
            result = result[:, : self._hidden_size].contiguous()
        return output if output is not None and result.data_ptr() == output.data_ptr() else result
