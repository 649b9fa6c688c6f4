"""Weights, tokens and routings, made on the device they are used on."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Final

import torch
from shapes import Shape
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.quant import QuantizedTensor, QuantScheme, builtin_scheme, dequantize
from moe_core.topk import TopKOutput
from moe_core.weights import CanonicalWeights, torch_dtype

#: Bytes of weights that pass before an expert is read again: four times the L2 of an H200.
REUSE_DISTANCE: Final = 240e6
MOST_COPIES: Final = 6
_E8M0_BIAS: Final = 127


@dataclass(slots=True)
class Inputs:
    """One batch. Peers get ids and weights in the dtypes that their own routers give."""

    hidden: Tensor
    topk: TopKOutput
    ids64: Tensor
    weights16: Tensor
    experts: list[int]

    @property
    def activated(self) -> int:
        """Experts with at least one token."""
        return len(self.experts)


def random_inputs(shape: Shape, tokens: int, routing: str, device: torch.device, seed: int) -> Inputs:
    """Random tokens; softmax top-k of random logits. `skewed`: a quarter of the experts is far more likely."""
    random = torch.Generator(device).manual_seed(seed)
    hidden = torch.randn(tokens, shape.hidden, generator=random, device=device).to(torch.bfloat16)
    logits = torch.randn(tokens, shape.experts, generator=random, device=device)
    if routing == "skewed":
        hot = torch.randperm(shape.experts, generator=random, device=device)[: max(1, shape.experts // 4)]
        logits[:, hot] += 1.5
    chosen, ids = logits.softmax(-1).topk(shape.top_k)
    weights = chosen / chosen.sum(-1, keepdim=True)
    experts = ids.unique().tolist()
    return Inputs(hidden, TopKOutput(ids.int(), weights), ids, weights.to(torch.bfloat16), experts)


def number_of_sets(tokens: int) -> int:
    """How many batches take turns."""
    return 16 if tokens <= 64 else 4 if tokens <= 1024 else 2


def copies_needed(sets: list[Inputs], bytes_an_expert: int) -> int:
    """Copies of the weights, one after another a call, with which no expert is read again too soon."""
    for copies in range(1, MOST_COPIES):
        if reuse_distance(sets, bytes_an_expert, copies) >= REUSE_DISTANCE:
            return copies
    return MOST_COPIES


def reuse_distance(sets: list[Inputs], bytes_an_expert: int, copies: int) -> float:
    """The fewest bytes of weights read between two reads of the same expert of the same copy, over an endless cycle."""
    least, last, read = math.inf, dict[tuple[int, int], int](), 0
    for call, batch in enumerate(itertools.chain(*itertools.repeat(sets, 2 * copies))):
        for expert in batch.experts:
            before = last.get((call % copies, expert))
            if before is not None:
                least = min(least, read - before)
            last[call % copies, expert] = read
        read += batch.activated * bytes_an_expert
    return least


def random_weights(config: MoeConfig, device: torch.device, seed: int) -> CanonicalWeights:
    """Valid random storage and scales of any scheme, so that dequantized weights have scale 1 / sqrt(fan-in).

    Nothing is quantized: the values *are* what the storage says, and checks dequantize it.
    """
    random = torch.Generator(device).manual_seed(seed)
    experts, rows = config.num_experts, config.gate_up_factor * config.intermediate_size
    tensors: dict[str, Tensor] = {}
    for name, n, k in (
        ("w13", rows, config.hidden_size),
        ("w2", config.hidden_size, config.intermediate_size),
    ):
        tensors |= _matrix(config, builtin_scheme(config.scheme), name, experts, n, k, random)
        if config.bias:
            bias = torch.randn(experts, n, generator=random, device=device) * 0.1
            tensors[f"{name}_bias"] = bias.to(torch_dtype(config.dtype))
    return CanonicalWeights(**tensors)


def _matrix(
    config: MoeConfig, scheme: QuantScheme, name: str, experts: int, n: int, k: int, random: torch.Generator
) -> dict[str, Tensor]:
    dtype = torch_dtype(config.dtype if scheme.scale is None else scheme.storage_dtype)
    data = torch.empty(experts, *scheme.storage_shape(n, k), dtype=dtype, device=random.device)
    for expert in data:  # one at a time: no temporary of the size of the layer
        if dtype in (torch.uint8, torch.int8):
            low, high = (0, 256) if dtype is torch.uint8 else (-127, 128)
            expert.random_(low, high, generator=random)
        elif dtype is torch.float8_e4m3fn:
            values = torch.randn(expert.shape, generator=random, device=random.device, dtype=torch.bfloat16)
            expert.copy_((values * 60).clamp_(-448, 448).to(dtype))
        else:
            expert.normal_(std=k**-0.5, generator=random)
    if scheme.scale is None:
        return {name: data}
    shape = scheme.scale_shape(n, k, config.group_size)
    wide = (experts, *(shape or ()))
    bytes_only = scheme.scale.dtype == "float8_e8m0"
    if bytes_only:
        scale = torch.full(wide, _E8M0_BIAS, dtype=torch.uint8, device=random.device)
    else:
        scale = torch.ones(wide, dtype=torch_dtype(scheme.scale.storage_dtype), device=random.device)
    globals_ = torch.ones(experts, 1, device=random.device) if scheme.global_scale else None
    one = QuantizedTensor(data[:1], scale[:1], None, None if globals_ is None else globals_[:1])
    rms = float(dequantize(one, scheme, group_size=config.group_size).square().mean().sqrt())
    wanted = k**-0.5 / rms
    spread = torch.rand(wide, generator=random, device=random.device)
    if bytes_only:
        # Exponents -1, 0 or 1 around the wanted one; their root mean square is 1.3.
        scale = (_E8M0_BIAS - 1 + round(math.log2(wanted / 1.3)) + (3 * spread).floor()).to(torch.uint8)
    elif globals_ is None:
        scale = ((0.5 + spread) * wanted).to(scale.dtype)
    else:
        globals_ *= wanted
    tensors = {name: data, f"{name}_scale": scale}
    return tensors if globals_ is None else tensors | {f"{name}_global_scale": globals_}


def copy_of(weights: CanonicalWeights) -> CanonicalWeights:
    """The same values at other addresses."""
    return CanonicalWeights(**{name: tensor.clone() for name, tensor in weights.tensors().items()})


def gibibytes(weights: CanonicalWeights) -> float:
    """Size of the stored weights."""
    return sum(tensor.nbytes for tensor in weights.tensors().values()) / 2**30
