"""Strict doubles of FlashInfer's Hopper entry points, on CPU tensors: they take what the kernels take and nothing else,
leave garbage where the kernels do, and compute from the prepared weights, so a wrong order of rows shows.

Signatures are FlashInfer 0.7.2's; test_signatures.py holds them against the installed one.
"""

from __future__ import annotations

import enum
from typing import Any

import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.testing.oracle import activate

DEFAULT_LIMIT = 3.4028234663852886e38


class ActivationType(enum.IntEnum):
    """The members that this plugin uses, and some others."""

    Gelu = 0
    Relu = 1
    Silu = 2
    Swiglu = 3
    Geglu = 4
    SwigluBias = 5
    Relu2 = 6
    SwigluStep = 7
    GegluTanh = 8
    Identity = 9


class DoubleError(AssertionError):
    """The kernels would not survive this call, or compute something else."""


def need(holds: bool, message: str) -> None:
    """Raise DoubleError unless it holds."""
    if not holds:
        raise DoubleError(message)


def tensor(name: str, given: Any, dtypes: Any, shape: tuple[int | None, ...]) -> Tensor:
    """A contiguous tensor of one of the dtypes and of the shape (None: any)."""
    wanted = dtypes if isinstance(dtypes, tuple) else (dtypes,)
    need(isinstance(given, Tensor), f"{name} is a {type(given).__name__}")
    need(given.dtype in wanted, f"{name} is {given.dtype}, not {' or '.join(map(str, wanted))}")
    fits = given.dim() == len(shape) and all(b in (None, a) for a, b in zip(given.shape, shape, strict=True))
    need(fits, f"{name} is {list(given.shape)}, not {list(shape)}")
    need(given.is_contiguous(), f"{name} is not contiguous")
    return given


_FLOATS, _I32 = (torch.bfloat16, torch.float16), torch.int32


def _tiles(experts: Tensor, limits: Tensor, slots: Tensor, used: Tensor, rows: int, local: int, most_slot: int) -> list:
    """[(local expert, positions, slots)] of the live tiles."""
    tensor("num_non_exiting_tiles", used, _I32, (1,))
    tensor("tile_idx_to_expert_idx", experts, _I32, (None,))
    tensor("tile_idx_to_mn_limit", limits, _I32, tuple(experts.shape))
    tensor("the slots of the positions", slots, _I32, (experts.numel() * rows,))
    need(0 <= int(used) <= experts.numel(), f"{int(used)} tiles, of at most {experts.numel()}")
    found, before = [], -1
    for i in range(int(used)):
        expert, end = int(experts[i]), int(limits[i])
        need(0 <= expert < local, f"tile {i} is of expert {expert} of {local}")
        need(expert >= before, "tiles are not in the order of experts")
        before = expert
        need(i * rows < end <= (i + 1) * rows, f"tile {i} ends at {end}")
        positions = torch.arange(i * rows, end)
        mine = slots[positions].long()
        need(bool(((mine >= 0) & (mine < most_slot)).all()), f"tile {i} holds a slot that is not there")
        found.append((expert, positions, mine))
    every = torch.cat([mine for *_, mine in found]) if found else torch.empty(0)
    need(every.unique().numel() == every.numel(), "a slot has two positions")
    return found


def _activation(kind: int, alpha: float, beta: float, limit: float) -> Activation:
    need(type(kind) is int and type(alpha) is type(beta) is type(limit) is float, "constants are Python numbers")
    bound = None if limit == DEFAULT_LIMIT else limit
    if kind == ActivationType.Swiglu:
        return Activation(name="swiglu_oai", alpha=alpha, beta=beta, limit=bound)
    need((alpha, beta, bound) == (1.0, 0.0, None), "constants of Swiglu with another activation")
    names = {ActivationType.GegluTanh: ("gelu_tanh", True), ActivationType.Relu2: ("relu2", False)}
    need(kind in names, f"activation {kind}")
    name, gated = names[ActivationType(kind)]
    return Activation(name=name, gated=gated)


def sm90_contiguous_gather_grouped_gemm_act_fusion(
    x: Tensor, w1_weight: Tensor, tile_idx_to_expert_idx: Tensor, tile_idx_to_mn_limit: Tensor,
    token_id_mapping: Tensor, num_non_exiting_tiles: Tensor, out: Tensor | None = None, *, topk: int, permuted_m: int,
    tile_shape_mn: tuple[int, int] = (128, 128), cluster_shape_mn: tuple[int, int] = (1, 1), swizzle_size: int = 1,
    raster_along_m: bool = False, enable_pdl: bool = True, activation_type: int = 3, swiglu_alpha: float = 1.0,
    swiglu_beta: float = 0.0, swiglu_limit: float = DEFAULT_LIMIT, situ_beta: float | None = None,
    situ_linear_beta: float | None = None,
) -> Tensor:  # fmt: skip
    """GEMM1 with the gather and the activation: out [positions, I], garbage where no slot is."""
    tensor("x", x, _FLOATS, (None, None))
    local, wide, hidden = tensor("w1_weight", w1_weight, x.dtype, (None, None, x.shape[1])).shape
    rows, columns = tile_shape_mn
    need(rows in (64, 128) and columns % 64 == 0 and 64 <= columns <= 256, f"no tile {tile_shape_mn}")
    need(cluster_shape_mn == (1, 1) and type(swizzle_size) is int and swizzle_size >= 1, "cluster or swizzle")
    need(hidden % 8 == 0 and permuted_m % rows == 0 and permuted_m == token_id_mapping.numel(), "sizes")
    activation = _activation(activation_type, swiglu_alpha, swiglu_beta, swiglu_limit)
    need(wide % (64 if activation.gated else 8) == 0, f"{wide} rows of w1")
    inner = wide // 2 if activation.gated else wide
    need(situ_beta is None and situ_linear_beta is None, "SiTU is not here")
    if out is None:
        raise DoubleError("out is allocated by the caller here")
    tensor("out", out, x.dtype, (permuted_m, inner))
    out.fill_(float("nan"))
    slots = x.shape[0] * topk
    live = _tiles(
        tile_idx_to_expert_idx, tile_idx_to_mn_limit, token_id_mapping, num_non_exiting_tiles, rows, local, slots
    )
    for expert, positions, mine in live:
        wide_rows = x[mine // topk].double() @ w1_weight[expert].double().t()
        if activation.gated:  # columns come up, gate, up, gate, 32 at a time
            up, gate = wide_rows.unflatten(1, (-1, 2, 32)).unbind(2)
            wide_rows = torch.cat([gate.flatten(1), up.flatten(1)], 1)
        out[positions] = activate(wide_rows, activation).to(x.dtype)
    return out


def sm90_contiguous_grouped_gemm_finalize_fusion(
    a: Tensor, w2_weight: Tensor, tile_idx_to_expert_idx: Tensor, tile_idx_to_mn_limit: Tensor,
    permuted_idx_to_expanded_idx: Tensor, num_non_exiting_tiles: Tensor, token_final_scales: Tensor, out: Tensor, *,
    topk: int, use_fused_finalize: bool = True, tile_shape_mn: tuple[int, int] = (128, 128),
    cluster_shape_mn: tuple[int, int] = (1, 1), raster_along_m: bool = False, enable_pdl: bool = True,
) -> Tensor:  # fmt: skip
    """GEMM2: a row a slot, unweighted (others keep what they held), or added to out [T, H], which is zero, rounded
    each time."""
    tensor("a", a, _FLOATS, (None, None))
    local, hidden, _ = tensor("w2_weight", w2_weight, a.dtype, (None, None, a.shape[1])).shape
    rows, columns = tile_shape_mn
    need(rows in (64, 128) and columns in (64, 128, 256)[: 2 + (rows == 128)], f"no tile {tile_shape_mn}")
    need(cluster_shape_mn == (1, 1) and a.shape[0] % rows == 0 and hidden % 8 == 0 and a.shape[1] % 8 == 0, "sizes")
    tokens = tensor("token_final_scales", token_final_scales, torch.float32, (None, topk)).shape[0]
    tensor("out", out, a.dtype, (tokens if use_fused_finalize else tokens * topk, hidden))
    if use_fused_finalize:
        need(not bool((out != 0).any()), "out is not zero")
    else:
        out.fill_(float("nan"))
    live = _tiles(
        tile_idx_to_expert_idx, tile_idx_to_mn_limit, permuted_idx_to_expanded_idx, num_non_exiting_tiles, rows,
        local, tokens * topk,
    )  # fmt: skip
    for expert, positions, mine in live:
        result = a[positions].double() @ w2_weight[expert].double().t()
        if not use_fused_finalize:
            out[mine] = result.to(a.dtype)
            continue
        weighed = (result * token_final_scales.flatten()[mine].double()[:, None]).to(a.dtype)
        for token, row in zip((mine // topk).tolist(), weighed, strict=True):
            out[token] += row
    return out


def cute_dsl_fused_moe_bf16(
    x: Tensor, token_selected_experts: Tensor, token_final_scales: Tensor, w1_weight: Tensor, w2_weight: Tensor,
    num_experts: int, top_k: int, num_local_experts: int | None = None, local_expert_offset: int = 0,
    use_fused_finalize: bool = True, moe_output: Tensor | None = None, enable_pdl: bool = True,
    activation_type: int = 3, swiglu_alpha: float = 1.0, swiglu_beta: float = 0.0,
    swiglu_limit: float = DEFAULT_LIMIT, situ_beta: float | None = None, situ_linear_beta: float | None = None, *,
    intermediate_buffer: Tensor | None = None, tactic: tuple[Any, ...] | None = None,
) -> Tensor:  # fmt: skip
    """The whole of it."""
    from portable import combine, sort

    tokens = tensor("x", x, _FLOATS, (None, None)).shape[0]
    tensor("token_selected_experts", token_selected_experts, _I32, (tokens, top_k))
    tensor("token_final_scales", token_final_scales, torch.float32, (tokens, top_k))
    need(bool(token_final_scales.isfinite().all()), "a router weight is not finite")
    out = tensor("moe_output", moe_output, x.dtype, tuple(x.shape))
    local = num_local_experts or num_experts
    need(w1_weight.shape[0] == w2_weight.shape[0] == local <= num_experts - local_expert_offset, "experts")
    if tactic is None:
        raise DoubleError("the tactic is the caller's here")
    size, (tile1, swizzle), (tile2, cluster, raster) = tactic
    need(tile1[0] == tile2[0] == size and raster is False, f"tactic {tactic}")
    tiles = sort(token_selected_experts - local_expert_offset, token_final_scales, num_experts=local, rows=size)
    shared = (tiles.tile_expert, tiles.tile_limit, tiles.slots, tiles.used)
    inner = x.new_empty(tiles.slots.numel(), w2_weight.shape[2])
    sm90_contiguous_gather_grouped_gemm_act_fusion(
        x, w1_weight, *shared, inner, topk=top_k, permuted_m=tiles.slots.numel(), tile_shape_mn=tile1,
        swizzle_size=swizzle, activation_type=activation_type, swiglu_alpha=swiglu_alpha, swiglu_beta=swiglu_beta,
        swiglu_limit=swiglu_limit,
    )  # fmt: skip
    rows = out.zero_() if use_fused_finalize else x.new_empty(tokens * top_k, x.shape[1])
    sm90_contiguous_grouped_gemm_finalize_fusion(
        inner, w2_weight, *shared, tiles.weights, rows, topk=top_k, use_fused_finalize=use_fused_finalize,
        tile_shape_mn=tile2, cluster_shape_mn=cluster,
    )  # fmt: skip
    if not use_fused_finalize:
        combine(rows, tiles.weights, tiles.local_ids, out)
    return out
