"""Is the output right? A sample of tokens against a float32 computation from dequantized weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.quant import QuantizedTensor, activation_payload, builtin_scheme, dequantize, roundtrip_activation
from moe_core.runners.activation import apply_activation
from moe_core.weights import CanonicalWeights

from .making import Inputs

#: ||out - reference|| / ||reference|| over the sample. Schemes that quantize activations are compared with a reference
#: that does too; what is left there are roundings that fall on the other side.
LIMITS: Final = {"bf16": 1e-2, "mxfp4_w4a16": 1e-2, "int4_w4a16": 1e-2, "int8_w8a16": 1e-2, "fp8_tensor": 8e-2}
QUANTIZED_LIMIT: Final = 3e-2
SAMPLE: Final = 24


def limit(scheme: str) -> float:
    """The largest relative norm error that counts as right."""
    return LIMITS.get(scheme, QUANTIZED_LIMIT)


@dataclass(slots=True)
class Sample:
    """Some tokens of a batch and what they must give, float32 [tokens, H]."""

    rows: Tensor
    wanted: Tensor

    def error(self, out: Tensor) -> float:
        """Relative norm error of the sampled rows; NaN where anything in `out` is not finite."""
        if not bool(torch.isfinite(out).all()):
            return float("nan")
        difference = out[self.rows].float() - self.wanted
        return float(difference.norm() / self.wanted.norm())


def sample(config: MoeConfig, weights: CanonicalWeights, batch: Inputs, seed: int) -> Sample:
    """The first and the last token, and random ones between them."""
    tokens, device = batch.hidden.shape[0], batch.hidden.device
    random = torch.Generator().manual_seed(seed)
    chosen = {0, tokens - 1, *torch.randint(tokens, (SAMPLE - 2,), generator=random).tolist()}
    rows = torch.tensor(sorted(chosen), device=device)
    topk = batch.topk
    wanted = reference(config, weights, batch.hidden[rows], topk.topk_ids[rows], topk.topk_weights[rows])
    return Sample(rows, wanted)


def reference(config: MoeConfig, weights: CanonicalWeights, hidden: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
    """The layer in float32, expert by expert. Not for `router_weight_on_input` or `no_combine`."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        out = torch.zeros(hidden.shape, device=hidden.device)
        for expert in ids.unique().tolist():
            if expert < 0:
                continue
            token, slot = torch.where(ids == expert)
            inner = apply_activation(_linear(config, weights, "w13", expert, hidden[token].float()), config.activation)
            down = _linear(config, weights, "w2", expert, inner)
            out.index_add_(0, token, down * scales[token, slot, None].float())
        return out * config.routed_scaling_factor
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _linear(config: MoeConfig, weights: CanonicalWeights, name: str, expert: int, x: Tensor) -> Tensor:
    scheme = builtin_scheme(config.scheme)

    def part(suffix: str) -> Tensor | None:
        tensor: Tensor | None = getattr(weights, f"{name}{suffix}")
        return None if tensor is None else tensor[expert]

    matrix = getattr(weights, name)[expert]
    if scheme.scale is not None:
        stored = QuantizedTensor(matrix, part("_scale"), part("_zero"), part("_global_scale"))
        matrix = dequantize(stored, scheme, group_size=config.group_size)
    if scheme.activation is not None and activation_payload(scheme.activation).scale.granularity != "tensor":
        x = roundtrip_activation(x, scheme.activation)  # a scale of the whole tensor would need all tokens
    bias = part("_bias")
    result = x @ matrix.float().t()
    return result if bias is None else result + bias.float()
