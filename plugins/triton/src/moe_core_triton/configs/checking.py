"""What a layer must give, in float32 from its own stored weights: to check the first result of a tuning run."""

from __future__ import annotations

import torch  # noqa: TID253 - imported when something is tuned
from torch import Tensor  # noqa: TID253

from moe_core.quant import QuantizedTensor, activation_payload, dequantize, roundtrip_activation
from moe_core.runners.activation import apply_activation
from moe_core_triton.calls import ExpertRows
from moe_core_triton.sequence import LayerSequence
from moe_core_triton.weights import Projection, TritonWeights

#: Tokens that are computed.
SAMPLE = 6


def sample(tokens: int, device: torch.device) -> Tensor:
    """int64: a few tokens of a call, the first and the last among them."""
    count = min(tokens, SAMPLE)
    return torch.linspace(0, tokens - 1, count, dtype=torch.float64).round().long().to(device)


def dequantized(w: Projection, expert: int, binding: object) -> Tensor:
    """float32 [parts * n, k] of one expert."""
    scheme, group = binding.scheme, binding.config.group_size  # type: ignore[attr-defined]
    data, rows = w.data[expert], w.parts * w.n
    if scheme.scale is None:
        return data.float()
    shape = scheme.scale_shape(rows, w.k, group)
    scale, zero = w.scale[expert], None if w.zero is None else w.zero[expert]  # type: ignore[index]
    if w.pack:
        # Halves of a block to neighbors in a byte, as the core has them; no scales of the padding.
        blocks = data.view(rows, -1, w.pack_width // 2)
        halves = _from_words(blocks) if w.pack.endswith("words") else (blocks & 15, blocks >> 4)
        codes = torch.stack(halves, dim=2).view(rows, -1)[:, : w.k]
        data = codes[:, 0::2] | (codes[:, 1::2] << 4)
        scale, zero = scale[..., : shape[-1]], None if zero is None else zero[..., : shape[-1]]
    scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    return dequantize(QuantizedTensor(data, scale, zero), scheme, group_size=group).float()


def _from_words(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """What `packing.halves(words=True)` wrote -> codes of the two halves, uint8."""
    given = blocks.unflatten(-1, (-1, 4)).int()
    halves = (torch.empty_like(given), torch.empty_like(given))
    for odd in (0, 1):
        lane = given[..., 2 * odd] | (given[..., 2 * odd + 1] << 8)
        # Codes 0 to 3 of a lane: where their signs and magnitudes begin.
        for code, (sign, size) in enumerate(((15, 6), (12, 3), (14, 0), (13, 9))):
            halves[code // 2][..., odd + 2 * (code % 2)] = (lane >> sign & 1) << 3 | (lane >> size & 7)
    low, high = (half.to(torch.uint8).flatten(-2) for half in halves)
    return low, high


def expected(layer: LayerSequence, binding: object, rows: ExpertRows, weights: TritonWeights, which: Tensor) -> Tensor:
    """float32 [tokens, H], or [tokens, K, H] where slots are not summed, for the tokens `which` of a call."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        return _expected(layer, binding, rows, weights, which)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def _expected(layer: LayerSequence, binding: object, rows: ExpertRows, weights: TritonWeights, which: Tensor) -> Tensor:
    ids, scales = rows.ids[which].long(), rows.weights[which].float()  # type: ignore[index]
    if rows.expert_map is not None:
        inside = (ids >= 0) & (ids < rows.expert_map.shape[0])
        ids = torch.where(inside, rows.expert_map[ids.clamp(0, rows.expert_map.shape[0] - 1)].long(), -1)
    out = torch.zeros(*ids.shape, layer.config.hidden_size, device=ids.device)
    for expert in ids.unique().tolist():
        if not 0 <= expert < layer.experts:
            continue
        token, slot = torch.where(ids == expert)
        x = rows.data[which][token].float()
        if layer.weigh_input:
            x = x * scales[token, slot, None]
        hidden = apply_activation(_product(x, weights.up, expert, layer, binding), layer.config.activation)
        out[token, slot] = _product(hidden, weights.down, expert, layer, binding)
    if layer.weigh:
        out *= scales[:, :, None]
    out *= layer.factor
    return out.sum(1) if layer.sums else out


def _product(x: Tensor, w: Projection, expert: int, layer: LayerSequence, binding: object) -> Tensor:
    payload = layer.payload
    if payload is not None and activation_payload(payload).scale.granularity != "tensor":
        x = roundtrip_activation(x, payload)  # a scale of the whole tensor would take all tokens
    result = x @ dequantized(w, expert, binding).t()
    return result if w.bias is None else result + w.bias[expert].float()
