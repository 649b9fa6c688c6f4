"""What both runners read off a layer when they are bound: its activation and its experts in FlashInfer's terms."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.errors import BindError
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import IdSpace
from moe_core_flashinfer_trtllm.library import member


def activation_type(activation: Activation) -> Any:
    """FlashInfer's `ActivationType` of a layer; its Swiglu takes alpha, beta and limit for each expert."""
    return member("ActivationType", "Swiglu" if activation.gated else "Relu2")


def activation_tensors(binding: Binding) -> dict[str, Tensor]:
    """alpha, beta and limit where the layer has other than plain silu's: float32 [E_local] each.

    FlashInfer computes g * sigmoid(alpha * g) * (u + beta) with g = min(gate, limit), u = clamp(up, -limit, limit):
    the core's swiglu_oai, and with alpha 1 and beta 0 its silu with a limit.
    """
    activation = binding.config.activation
    values: dict[str, float] = {}
    if activation.name == "swiglu_oai":
        values |= {"alpha": activation.alpha, "beta": activation.beta}
    if activation.limit is not None:
        values["limit"] = activation.limit
    experts = binding.num_local_experts
    return {
        name: torch.full((experts,), value, dtype=torch.float32, device=binding.device)
        for name, value in values.items()
    }


class Experts(NamedTuple):
    """The experts that the ids of a call can name (total), and this rank's: `local` of them from `first` on."""

    total: int
    first: int
    local: int


def experts_of(binding: Binding) -> Experts:
    """With global ids the kernels skip other ranks' experts; with local ones there are no others."""
    total, local = binding.config.num_experts, binding.num_local_experts
    if binding.terms is not None and binding.terms.id_space is IdSpace.LOCAL:
        return Experts(local, 0, local)
    owned = binding.parallel.local_experts(total)
    if owned != tuple(range(owned[0], owned[0] + len(owned))):
        raise BindError("FlashInfer finds a rank's experts by an offset, and these are not consecutive")
    return Experts(total, owned[0], local)


def flag(binding: Binding, name: str) -> bool:
    """The option `name`, off where it is not given. Raises BindError for anything but true and false."""
    value = binding.options.get(name, False)
    if not isinstance(value, bool):
        raise BindError(f"the option {name} of FlashInfer's runners is true or false, got {value!r}")
    return value


def most_rows(binding: Binding) -> int:
    """The most rows of one call: where ranks bring their own tokens, those of all ranks may come to this one."""
    if binding.max_tokens is None:
        raise BindError("this plan needs max_tokens: the most tokens of one call")
    return binding.max_tokens * (binding.parallel.ep_size if binding.parallel.tokens == "sharded" else 1)


def result(state: RunningState, like: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Where a kernel writes: the caller's tensor where it brings one that a kernel can write, else a new [T, width]."""
    output = state.output
    if output is not None and output.is_contiguous() and output.shape[1] == width:
        return output
    return like.new_empty(like.shape[0], width, dtype=dtype)


def finish(computed: Tensor, state: RunningState, hidden_size: int) -> Tensor:
    """The result without the columns of padding, in the caller's tensor where it brings one."""
    if state.output is not None:
        if state.output.data_ptr() != computed.data_ptr():
            state.output.copy_(computed[:, :hidden_size])
        return state.output
    return computed if computed.shape[1] == hidden_size else computed[:, :hidden_size].contiguous()
