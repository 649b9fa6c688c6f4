"""The layouts of TensorRT-LLM's kernels, through FlashInfer's own preparation functions and cached permutations."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_core_flashinfer_trtllm.library import bind_call

#: Rows of a tile of the kernels' epilogue, and bytes of a block along K.
TILE, BLOCK = 128, 128


@lru_cache(maxsize=64)
def row_order(rows: int, gated: bool) -> Tensor:
    """int64 [rows]: the canonical row, [gate; up] or plain, that the kernels want at each place.

    FlashInfer wants [up; gate], pairs the rows of both for the gated activation, and shuffles them for the matrix unit.
    """
    index = torch.arange(rows).unsqueeze(1)
    if gated:
        gate, up = index.chunk(2)
        index = bind_call("reorder_rows_for_gated_act_gemm", {}, ("x",))(x=torch.cat([up, gate]))
    shuffle = bind_call("shuffle_matrix_a", {"epilogue_tile_m": TILE}, ("input_tensor",), "flashinfer")
    shuffled: Tensor = shuffle(input_tensor=index)
    return shuffled.squeeze(1)


def shuffled(tensor: Tensor, gated: bool) -> Tensor:
    """[E, rows, ...] in that order: matrices, scales of their rows, and biases alike."""
    order = row_order(tensor.shape[1], gated).to(tensor.device)
    # float8 has no index_select on every device: bytes have.
    raw = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
    return raw.index_select(1, order).view(tensor.dtype)


def blocked(tensor: Tensor) -> Tensor:
    """[E, rows, K] -> [E, K / b, rows, b] with b elements in 128 bytes (`WeightLayout.BlockMajorK`)."""
    convert = bind_call("convert_to_block_layout", {"blockK": BLOCK}, ("input_tensor",))
    blocks = [convert(input_tensor=expert.view(torch.uint8)) for expert in tensor]
    return torch.stack(blocks).view(tensor.dtype)


def swizzled(scale: Tensor) -> Tensor:
    """[E, rows, K / group] of bytes or bfloat16 -> the same shape in tiles of 128 x 4, which rows and columns fill."""
    swizzle = bind_call("block_scale_interleave", {}, ("unswizzled_sf",), "flashinfer")
    tiles: Tensor = swizzle(unswizzled_sf=scale.contiguous())
    return tiles.view(scale.dtype).reshape(scale.shape)
