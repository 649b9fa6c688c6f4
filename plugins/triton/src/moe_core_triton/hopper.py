"""The warp-specialized kernels for Hopper: when a product is theirs, and their launch.

They exist for exactly sm_90 and are written in Gluon, which changes between versions of Triton: these are for 3.6 and
later. There they are the default for the layers of `configs.specialized`: a configuration names them where they are the
fastest, from some hundred tokens a call on. The option `specialized` of the runner set to false turns them off.
Everybody else's configurations are ordinary ones, and `LayerConfig.plain` serves a call that a specialized kernel does
not compute.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.configs.files import triton_version
from moe_core_triton.configs.specialized import HEIGHTS, STEPS
from moe_core_triton.kernels.launching import is_exactly_hopper
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection

if TYPE_CHECKING:
    from moe_core_triton.products import Epilogue, Rows

#: Before it, `gl.warp_specialize` took other arguments.
LEAST_TRITON = (3, 6)
#: How weights may be packed for them.
PACKS = ("", "mxfp4_words")


def _new_enough() -> bool:
    """Whether Triton's version is one that they are written for."""
    parts = triton_version().split(".")
    return all(part.isdecimal() for part in parts) and tuple(map(int, parts)) >= LEAST_TRITON


@lru_cache(maxsize=1)
def _kernels() -> Any:
    """Their modules (16 bits, fp8, mxfp4), or None with this Triton."""
    if not _new_enough():
        return None
    try:
        from moe_core_triton.kernels import hopper_fp8, hopper_gemm, hopper_mxfp4
    except (ImportError, AttributeError, TypeError):
        return None
    return hopper_gemm, hopper_fp8, hopper_mxfp4


def available(device: torch.device) -> bool:
    """Whether they can run there."""
    return is_exactly_hopper(device) and _kernels() is not None


def reads(data: Tensor, *, gathered: bool) -> bool:
    """Whether they can read these rows: in steps of 16 bytes; gathered ones at 32-bit offsets, others one by one."""
    aligned = data.stride(0) * data.element_size() % 16 == 0 and data.data_ptr() % 16 == 0
    return aligned and (data.shape[0] * data.stride(0) < 1 << 31 if gathered else data.stride(0) >= data.shape[1])


@lru_cache(maxsize=1)
def _ordering() -> Any:
    """What `wide` calls; imported once, since modules import this one."""
    from moe_core_triton.kernels.hopper_unpack import wide_order
    from moe_core_triton.products import Rows

    return wide_order, Rows


def wide(data: Tensor) -> Rows:
    """Rows [.., K] in the order of K that the kernels for packed weights read."""
    wide_order, rows = _ordering()
    made: Rows = rows(wide_order(data), kind="wide")
    return made


def natural(data: Tensor) -> Tensor:
    """The inverse of `wide`, of its data."""
    return data.unflatten(-1, (-1, 2, 4, 2)).transpose(-3, -2).flatten(-4)


def _scheme(rows: Rows, w: Projection) -> str | None:
    """Whose kernels compute a product of these operands, or None."""
    data = rows.data
    if w.pack == "mxfp4_words":
        return "mxfp4_w4a16" if data.dtype == torch.bfloat16 and w.group == 32 and w.pack_width == 128 else None
    if w.pack or data.dtype != w.data.dtype:
        return None
    if data.dtype == torch.float8_e4m3fn:
        return "fp8_block128" if w.weight_scale == "block" and w.bias is None else None
    return "bf16" if data.dtype in (torch.bfloat16, torch.float16) and not w.weight_scale else None


def takes(rows: Rows, w: Projection, table: RowTable, epilogue: Epilogue, out: Tensor) -> bool:
    """Whether a kernel here computes this product."""
    scheme = _scheme(rows, w)
    if scheme is None or not available(rows.data.device) or out.dtype == torch.float32:
        return False
    fp8, packed, gathers = scheme == "fp8_block128", scheme == "mxfp4_w4a16", table.slots is not None
    if w.parts == 2:
        wanted = "group" if fp8 else ""
        fits = epilogue.activation is not None and epilogue.quant == wanted and (rows.divisor > 0) is gathers
        fits = fits and not epilogue.weigh and not epilogue.scatter and rows.kind == wanted
    else:
        fits = epilogue.activation is None and not epilogue.quant and epilogue.scatter is gathers and rows.divisor == 0
        fits = fits and epilogue.weigh != "in" and (rows.kind == "wide") is packed
    sizes = not (w.n % STEPS[scheme] or w.k % STEPS[scheme]) and table.block_m in HEIGHTS[scheme]
    return fits and sizes and reads(rows.data, gathered=w.parts == 2 and gathers)


def launch(rows: Rows, w: Projection, table: RowTable, out: Tensor, epilogue: Epilogue, config: GemmConfig) -> None:
    """The product, in one launch of a program an SM (and, for packed weights, one that orders the columns of x)."""
    sixteen, eight, four = _kernels()
    scheme, data = _scheme(rows, w), rows.data
    cut: dict[str, Any] = {"group_m": config.group_m}
    if w.parts == 2:
        activation: Any = epilogue.activation
        options = {
            "top_k": max(rows.divisor, 1),
            "act": activation.name,
            "alpha": activation.alpha,
            "beta": activation.beta,
            "limit": activation.limit,
            **cut,
        }
        if scheme == "fp8_block128":
            eight.up_gemm_fp8(data, rows.scale, w.data, w.scale, table, out, epilogue.scale, **options)
        elif scheme == "mxfp4_w4a16":
            four.up_gemm_mxfp4(wide(data).data, w.data, w.scale, table, out, bias=w.bias, **options)
        else:
            sixteen.up_gemm(data, w.data, table, out, bias=w.bias, **options)
        return
    options = {
        "row_weights": epilogue.weights if epilogue.weigh == "out" else None,
        "factor": epilogue.factor if epilogue.weigh else 1.0,
        **cut,
    }
    if scheme == "fp8_block128":
        eight.down_gemm_fp8(data, rows.scale, w.data, w.scale, table, out, **options)
    elif scheme == "mxfp4_w4a16":
        four.down_gemm_mxfp4(data, w.data, w.scale, table, out, bias=w.bias, **options)
    else:
        sixteen.down_gemm(data, w.data, table, out, bias=w.bias, **options)
