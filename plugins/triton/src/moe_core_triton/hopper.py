"""The warp-specialized kernels for Hopper: when a product is theirs, and their launch.

They exist for exactly sm_90 and are written in Gluon, which may change between versions of Triton. There they are the
default for the layers of `configs.specialized`, because they are the fastest from 1024 tokens on; the option
`specialized` of the runner set to false turns them off. Everybody else's configurations are ordinary ones, and
`LayerConfig.plain` serves a call that a specialized kernel does not compute.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.kernels.launching import is_exactly_hopper
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection

if TYPE_CHECKING:
    from moe_core_triton.products import Epilogue, Rows

#: The height of a tile that they have.
BLOCK_M = 128


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Their modules (16 bits, fp8), or None with this Triton."""
    try:
        from moe_core_triton.kernels import hopper_common, hopper_fp8, hopper_gemm
    except (ImportError, AttributeError, TypeError):
        return None
    return hopper_common, hopper_gemm, hopper_fp8


def available(device: torch.device) -> bool:
    """Whether they can run there."""
    return is_exactly_hopper(device) and _kernels() is not None


def reads(data: Tensor, *, gathered: bool) -> bool:
    """Whether they can read these rows: in steps of 16 bytes, and gathered ones at offsets of 32 bits."""
    aligned = data.stride(0) * data.element_size() % 16 == 0 and data.data_ptr() % 16 == 0
    return aligned and not (gathered and data.shape[0] * data.stride(0) >= 1 << 31)


def takes(rows: Rows, w: Projection, table: RowTable, epilogue: Epilogue, out: Tensor) -> bool:
    """Whether a kernel here computes this product."""
    data = rows.data
    if not is_exactly_hopper(data.device) or table.block_m != BLOCK_M or data.dtype != w.data.dtype:
        return False
    fp8 = data.dtype == torch.float8_e4m3fn
    if (not fp8 and data.dtype not in (torch.bfloat16, torch.float16)) or (w.weight_scale == "block") is not fp8:
        return False
    if w.bias is not None or w.pack or _kernels() is None or out.dtype == torch.float32:
        return False
    gathers = table.slots is not None
    if w.parts == 2:
        wanted = "group" if fp8 else ""
        fits = epilogue.activation is not None and epilogue.quant == wanted and (rows.divisor > 0) is gathers
        fits = fits and not epilogue.weigh and not epilogue.scatter
    else:
        fits = epilogue.activation is None and not epilogue.quant and epilogue.scatter is gathers and rows.divisor == 0
        fits = fits and epilogue.weigh != "in"
    sizes = (w.n % 128 == 0 and w.k % 128 == 0) if fp8 else (w.n % 8 == 0 and w.k % 8 == 0)
    return fits and sizes and reads(data, gathered=w.parts == 2 and gathers)


def launch(rows: Rows, w: Projection, table: RowTable, out: Tensor, epilogue: Epilogue, config: GemmConfig) -> None:
    """The product, in one launch of a program an SM."""
    _, sixteen, eight = _kernels()
    fp8 = rows.data.dtype == torch.float8_e4m3fn
    module = eight if fp8 else sixteen
    cut = replace(module.DEFAULT, group_m=config.group_m)
    if w.parts == 2:
        activation: Any = epilogue.activation
        options = {
            "top_k": max(rows.divisor, 1),
            "act": activation.name,
            "alpha": activation.alpha,
            "beta": activation.beta,
            "limit": activation.limit,
            "config": cut,
        }
        if fp8:
            eight.up_gemm_fp8(rows.data, rows.scale, w.data, w.scale, table, out, epilogue.scale, **options)
        else:
            sixteen.up_gemm(rows.data, w.data, table, out, **options)
        return
    weights = epilogue.weights if epilogue.weigh == "out" else None
    factor = epilogue.factor if epilogue.weigh else 1.0
    if fp8:
        eight.down_gemm_fp8(
            rows.data, rows.scale, w.data, w.scale, table, out, row_weights=weights, scale=factor, config=cut
        )
    else:
        sixteen.down_gemm(rows.data, w.data, table, out, row_weights=weights, scale=factor, config=cut)
