"""Compile the kernels that this plugin calls for a GPU that need not be here: compile_vendor.py sm_90a, or sm_100a.

Prints a line a kernel. Needs flashinfer-python and nvidia-cutlass-dsl; uses what FlashInfer compiles them with, which
is not its interface.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections.abc import Callable
from typing import Any

_CUTE = "flashinfer.fused_moe.cute_dsl."
SMS = {"sm_90a": 132, "sm_100a": 148}


def _timed(what: str, work: Callable[[], Any]) -> None:
    begin = time.perf_counter()
    if work() is None:
        raise RuntimeError(f"{what} gave nothing")
    print(f"{what}: {time.perf_counter() - begin:.1f} s", flush=True)


def _pointers() -> tuple[Callable[..., Any], Any, Any]:
    cutlass, cute = importlib.import_module("cutlass"), importlib.import_module("cutlass.cute")
    make = importlib.import_module("flashinfer.cute_dsl.utils").make_ptr
    driver = importlib.import_module("cuda.bindings.driver")

    def pointer(dtype: Any, align: int = 16) -> Any:
        return make(dtype, 4096, cute.AddressSpace.gmem, assumed_align=align)

    return pointer, cutlass, driver.CUstream(0)


def hopper() -> None:
    """Both GEMMs with every tile and every activation."""
    from moe_core_cutedsl.activations import keywords
    from moe_core_cutedsl.sm90_tactics import GEMM1_COLUMNS, GEMM2_COLUMNS, TILE_ROWS

    from moe_core.config import Activation

    pointer, cutlass, stream = _pointers()
    name1 = _CUTE + "sm90_contiguous_gather_grouped_gemm_act_fusion"
    name2 = _CUTE + "sm90_contiguous_grouped_gemm_finalize_fusion"
    gemm1 = importlib.import_module(name1)._get_compiled_gather_kernel
    gemm2 = importlib.import_module(name2)._get_compiled_finalize_kernel
    index, weight = pointer(cutlass.Int32, 4), pointer(cutlass.Float32, 4)
    tiles = {"tile_idx_ptr": index, "mn_limit_ptr": index, "token_id_ptr": index, "num_tiles_ptr": index}
    common = tiles | {"max_active_clusters": SMS["sm_90a"], "stream": stream, "topk": 8, "enable_pdl": True}
    common |= {"cluster_shape_mn": (1, 1), "raster_along_m": False, "permuted_m": 1024, "num_experts": 8}
    activations = {
        "silu": Activation(),
        "clamped": Activation(limit=7.0),
        "oai": Activation.swiglu_oai(),
        "gelu": Activation(name="gelu_tanh"),
        "relu2": Activation(name="relu2", gated=False),
    }

    def first(dtype: Any, activation: str, rows: int, columns: int, swizzle: int) -> None:
        p = pointer(dtype)
        kind = keywords(activations[activation]) | {"situ_beta": None, "situ_linear_beta": None}
        _timed(
            f"GEMM1 {dtype.__name__} {activation} {rows}x{columns} swizzle {swizzle}",
            lambda: gemm1(
                orig_m=64, n=1536, k=2048, a_ptr=p, b_ptr=p, c_ptr=p, ab_dtype=dtype, c_dtype=dtype,
                tile_shape_mn=(rows, columns), swizzle_size=swizzle, **common, **kind,
            ),
        )  # fmt: skip

    def second(dtype: Any, rows: int, columns: int, fused: bool) -> None:
        p = pointer(dtype)
        _timed(
            f"GEMM2 {dtype.__name__} {rows}x{columns}{' fused' if fused else ''}",
            lambda: gemm2(
                n=2048, k=768, num_tokens=64, out_rows=64 if fused else 512, a_ptr=p, b_ptr=p, out_ptr=p,
                token_scales_ptr=weight, ab_dtype=dtype, c_dtype=dtype, tile_shape_mn=(rows, columns),
                use_fused_finalize=fused, **common,
            ),
        )  # fmt: skip

    for rows in TILE_ROWS:
        for columns in GEMM1_COLUMNS[rows]:
            first(cutlass.BFloat16, "silu", rows, columns, 1 if rows == 64 else 8)
        for columns in GEMM2_COLUMNS[rows]:
            for fused in (False, True):
                second(cutlass.BFloat16, rows, columns, fused)
    for activation in activations:
        first(cutlass.Float16, activation, 128, 128, 1)
    second(cutlass.Float16, 128, 128, False)


def blackwell() -> None:
    """The masked GEMM and both GEMMs of the fused MoE, in their default tiles."""
    pointer, cutlass, stream = _pointers()
    place = importlib.import_module("flashinfer.gemm.kernels.grouped_gemm_masked_blackwell")
    place.cutlass_torch.current_stream = lambda: stream
    place.get_max_active_clusters = lambda size: SMS["sm_100a"] // size
    for signals in (False, True):
        _timed(
            f"masked GEMM{' with signals' if signals else ''}",
            lambda signals=signals: place.cute.compile(
                place.MaskedBatchedMatmulCuteDSL(
                    m=128, n=4096, k=7168, l=8, a_major="k", b_major="k", c_major="n",
                    ab_dtype=cutlass.Float4E2M1FN, sf_dtype=cutlass.Float8E4M3FN, c_dtype=cutlass.BFloat16,
                    alpha_dtype=cutlass.Float32, sf_vec_size=16, mma_tiler_mn=(128, 128), cluster_shape_mn=(1, 1),
                    sm_count=SMS["sm_100a"], sm_version="sm_100", num_ranks=0, is_combine_fusion=False,
                    is_swap_ab=False,
                ),
                *(pointer(dtype) for dtype in (
                    cutlass.Float4E2M1FN, cutlass.Float4E2M1FN, cutlass.Float8E4M3FN, cutlass.Float8E4M3FN,
                    cutlass.BFloat16, cutlass.Int32,
                )),
                pointer(cutlass.Uint32) if signals else None,
                pointer(cutlass.Float32),
                *(None,) * 6,
                stream,
            ),
        )  # fmt: skip
    gather = importlib.import_module(_CUTE + "blockscaled_contiguous_gather_grouped_gemm_act_fusion")
    finalize = importlib.import_module(_CUTE + "blockscaled_contiguous_grouped_gemm_finalize_fusion")
    fp4, e4m3, f32, i32 = (pointer(getattr(cutlass, n)) for n in ("Float4E2M1FN", "Float8E4M3FN", "Float32", "Int32"))
    common = {
        "permuted_m": 1024, "k": 2048, "num_experts": 8, "topk": 8, "a_ptr": fp4, "b_ptr": fp4, "a_sf_ptr": e4m3,
        "b_sf_ptr": e4m3, "alpha_ptr": f32, "tile_idx_ptr": i32, "mn_limit_ptr": i32, "num_tiles_ptr": i32,
        "a_per_token_scale_ptr": f32, "max_active_clusters": SMS["sm_100a"], "stream": stream, "sf_vec_size": 16,
        "tile_size": 128, "cluster_shape_mn": (1, 1), "raster_along_m": False, "mma_tiler_mn": (128, 128),
    }  # fmt: skip
    _timed(
        "fused MoE, GEMM1",
        lambda: gather._get_compiled_gather_kernel(
            orig_m=64, n=1536, c_ptr=fp4, c_sf_ptr=e4m3, token_id_ptr=i32, norm_const_ptr=f32,
            a_dtype="float4_e2m1fn", b_dtype="float4_e2m1fn", sf_dtype="float8_e4m3fn", c_dtype="float4_e2m1fn",
            quantize_output=True, vectorized_f32=True, **common,
        ),
    )  # fmt: skip
    for fused in (False, True):
        _timed(
            f"fused MoE, GEMM2{' with the sum' if fused else ''}",
            lambda fused=fused: finalize._get_compiled_finalize_kernel(
                seq_len=64, n=2048, c_ptr=pointer(cutlass.BFloat16), permuted_idx_ptr=i32, token_scales_ptr=f32,
                a_dtype=cutlass.Float4E2M1FN, b_dtype=cutlass.Float4E2M1FN, sf_dtype=cutlass.Float8E4M3FN,
                out_dtype=cutlass.BFloat16, final_scale_dtype=cutlass.Float32, use_fused_finalize=fused, **common,
            ),
        )  # fmt: skip


if __name__ == "__main__":
    os.environ["CUTE_DSL_ARCH"] = sys.argv[1]
    {"sm_90a": hopper, "sm_100a": blackwell}[sys.argv[1]]()
