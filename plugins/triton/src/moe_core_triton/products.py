"""Launches of the grouped matrix product: from tensors and a configuration to one kernel call."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from moe_core.config import Activation
from moe_core_triton import hopper
from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.kernels.gemm import grouped_gemm
from moe_core_triton.kernels.launching import dependent_launch, early_bytes, is_hopper_or_newer, processors
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection


@dataclass(frozen=True, slots=True)
class Rows:
    """What is multiplied.

    data: [rows, K]. kind: "" (as it is), "row" (scale [rows, 1]), "group" ([rows, K / 128]), "expert" (one scale an
    expert, or one in all: then its stride is 0), or "wide" (no scale, columns in the order of
    `kernels.hopper_unpack.wide_order`). divisor: row of a slot is slot // divisor; 0
    where a position is its own row."""

    data: Tensor
    divisor: int = 0
    scale: Tensor | None = None
    kind: str = ""


@dataclass(frozen=True, slots=True)
class Epilogue:
    """What happens to a product before it is stored. activation: None stores the product as it is (gate, then up).

    weigh: "" (no), "in" (router weight before bias and activation), "out" (router weight times factor) or "scale"
    (factor alone). weights: float32 [slots]. scatter: rows go to their slots, not to their positions. quant: "" or
    "group" (scale: float32 [positions, n / 128], written) or "expert" (scale: float32 [E], read).
    """

    activation: Activation | None = None
    weigh: str = ""
    weights: Tensor | None = None
    factor: float = 1.0
    scatter: bool = False
    quant: str = ""
    scale: Tensor | None = None


def uniform_scales(w: Projection, block_n: int) -> int:
    """How many scales of 128 x 128 blocks a tile of `block_n` weight rows meets: 1, 2, or 0 for one a row."""
    per_part = block_n // w.parts
    if w.parts == 2:
        return 2 if w.n % 128 == 0 and 128 % per_part == 0 else 0
    if 128 % block_n == 0:
        return 1
    return 2 if block_n == 256 and w.n % 256 == 0 else 0


def grouped_product(
    rows: Rows, w: Projection, table: RowTable, out: Tensor, epilogue: Epilogue, config: GemmConfig, *, prefetch: bool
) -> None:
    """out[position or slot] = epilogue(rows @ w[expert].T) for every live position of `table`.

    out: [positions or slots, n], or [.., 2 n] for a gated product without activation; rows contiguous. prefetch: bring
    the weights to L2 before the inputs are ready; only where `table` is at least two kernels old.
    """
    if config.specialized:
        if not hopper.takes(rows, w, table, epilogue, out):
            raise ValueError(f"no specialized kernel computes this product ({config.text}): see LayerConfig.plain")
        hopper.launch(rows, w, table, out, epilogue, config)
        return
    if rows.kind == "wide":
        raise ValueError(f"an ordinary kernel ({config.text}) reads columns in their natural order")
    activation = epilogue.activation
    block_k = w.pack_width or config.block_k
    width = block_k // 2 if w.pack else block_k
    per_part = config.block_n // w.parts
    tma = config.tma and is_hopper_or_newer(out.device)
    source = w.descriptor(per_part, width) if tma else None
    tma = source is not None
    if w.pack == "mxfp4_words" and config.swap != (config.num_warps < 4):
        raise ValueError(f"the configuration {config.text} cannot read weights in words: see configs.candidates")
    tiles_n = triton.cdiv(w.n, per_part)
    grid = table.tiles * tiles_n
    looping = config.persistent or table.sparse
    if config.persistent:
        grid = min(grid, processors(out.device))
    elif table.sparse and table.usual is not None:
        grid = max(processors(out.device), table.usual * tiles_n)
    x_scale, x_kind = rows.scale, rows.kind
    stride_xs = 0 if x_scale is None or x_scale.numel() == 1 else x_scale.stride(0)
    launch = dependent_launch(out)
    # Programs that may be there before their inputs are, and what each asks of a row of its first tile.
    early = min(grid, 2 * processors(out.device)) if prefetch and launch["PDL"] else 0
    grouped_gemm[(grid,)](
        rows.data,
        x_scale,
        source if tma else w.data,
        w.data,
        w.scale,
        w.zero,
        w.bias,
        out.view(torch.uint8) if epilogue.quant else out,
        epilogue.scale,
        table.slots,
        epilogue.weights,
        table.ends,
        table.tile_expert,
        table.tile_start,
        1.0 if activation is None else activation.alpha,
        0.0 if activation is None else activation.beta,
        0.0 if activation is None or activation.limit is None else activation.limit,
        epilogue.factor,
        table.tiles,
        w.n,
        w.k,
        w.data.shape[2],
        rows.data.stride(0),
        stride_xs,
        out.stride(0),
        w.scale_stride,
        early_bytes(out.device) // (early * config.block_n) if early else 0,
        TOP_K=rows.divisor,
        SCATTER=epilogue.scatter,
        PARTS=w.parts,
        ACT="" if activation is None else activation.name,
        HAS_LIMIT=activation is not None and activation.limit is not None,
        HAS_BIAS=w.bias is not None,
        WEIGH=epilogue.weigh,
        X_SCALE=x_kind,
        W_SCALE=w.weight_scale,
        W_GROUP=w.group,
        PACK=w.pack,
        HAS_ZERO=w.zero is not None,
        OUT_QUANT=epilogue.quant,
        BLOCK_M=table.block_m,
        BLOCK_N=config.block_n,
        BLOCK_K=block_k,
        GROUP_M=config.group_m,
        SWAP=config.swap,
        TMA=tma,
        EVEN_K=w.k % block_k == 0,
        UNIFORM=uniform_scales(w, config.block_n) if w.weight_scale == "block" else 0,
        NATIVE=is_hopper_or_newer(out.device),
        PERSISTENT=looping,
        TILES_POW2=triton.next_power_of_2(table.tiles) if looping else 1,
        PREFETCH=2 * processors(out.device) if early else 0,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        **launch,
    )
