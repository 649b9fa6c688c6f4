"""Between the format `standard` of the core and a call of AITER."""

from __future__ import annotations

from collections.abc import Callable

from moe_core.config import MoeConfig
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core_aiter.calls import Call
from moe_core_aiter.tokens import TokenReader
from moe_core_aiter.weights import AiterWeights


def pre_standard(binding: Binding) -> Callable[..., Call]:
    """Pre-permute of the format `standard`."""
    read = TokenReader(binding)

    def pre(d: StandardDispatchOutput, q: AiterWeights, c: MoeConfig, s: RunningState) -> Call:
        return read(d, q)

    return pre


def post_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """Post-permute of the format `standard`: AITER has weighted and summed already."""

    def post(call: Call, q: AiterWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        result = call.result
        if result is None:
            raise TypeError("post-permute of a call that did not run")
        return StandardCombineInput(result, call.handle)

    return post
