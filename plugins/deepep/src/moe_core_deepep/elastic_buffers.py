"""What an `ElasticBuffer` must hold, and its making: shared, given back and refused as `buffers.Lease` says."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from moe_core.errors import BindError
from moe_core.protocols import Binding
from moe_core.vocabulary import Phase
from moe_core_deepep.buffers import deep_ep


@dataclass(frozen=True, slots=True)
class ElasticNeed:
    """tokens: the most of a rank in any call, a power of two. fp8: rows travel with a scale per 128 values."""

    tokens: int
    hidden: int
    top_k: int
    fp8: bool

    def make(self, group: Any) -> Any:
        """A `deep_ep.ElasticBuffer`."""
        if torch.cuda.is_available():
            _need_communicator(group)
        try:
            return deep_ep().ElasticBuffer(
                group,
                num_max_tokens_per_rank=self.tokens,
                hidden=self.hidden,
                num_topk=self.top_k,
                use_fp8_dispatch=self.fp8,
                explicitly_destroy=True,
            )
        except (RuntimeError, AssertionError, TypeError, AttributeError) as error:
            raise BindError(
                f"DeepEP made no ElasticBuffer for {self.tokens} tokens a rank of {self.hidden} on "
                f"{dist.get_world_size(group)} ranks: {error}",
                hint="its memory grows with max_tokens and ranks; it wants NCCL 2.30.4 or newer, every pair of GPUs of "
                "a host connected, and EP_DISABLE_GIN=1 in the environment where there is no InfiniBand",
            ) from error

    def beside(self, other: Any, *, same_group: bool) -> None:
        """Buffers of V2 share nothing but the communicator, so any number of them is fine."""


def _need_communicator(group: Any) -> None:
    """DeepEP takes NCCL's communicator out of torch's group, and crashes on one that was not initialized."""
    reuses = os.environ.get("EP_REUSE_NCCL_COMM", "1") != "0"
    try:
        backend = group._get_backend(torch.device("cuda"))
        missing = reuses and hasattr(backend, "_comm_ptr") and not backend._comm_ptr()
    except RuntimeError as error:
        raise BindError(
            f"DeepEP's ElasticBuffer runs over NCCL, and the group has no communicator of it: {error}",
            hint="pass a group of the backend 'nccl'",
        ) from error
    if missing:
        raise BindError(
            "NCCL's communicator of the group does not exist yet, and DeepEP's ElasticBuffer would use it",
            hint="name the device, init_process_group('nccl', device_id=...), or set EP_REUSE_NCCL_COMM=0: DeepEP then "
            "makes its own",
        )


def most_tokens(binding: Binding) -> dict[Phase, int]:
    """M of each phase: the most tokens of a rank, rounded up to a power of two, for each of which kernels are compiled.

    Raises BindError.
    """
    if binding.max_tokens is None:
        raise BindError("without max_tokens nobody knows how large DeepEP's ElasticBuffer must be")
    decode = binding.options.get("decode_max_tokens", binding.max_tokens)
    return {Phase.PREFILL: _power_of_two(binding.max_tokens), Phase.DECODE: _power_of_two(decode)}


def _power_of_two(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def need(binding: Binding, most: dict[Phase, int], payload: str) -> ElasticNeed:
    """Of a plan's phases together."""
    tokens = max(most[phase] for phase in binding.request.phases)
    return ElasticNeed(tokens, binding.config.hidden_size, binding.config.top_k, payload != "bf16")
