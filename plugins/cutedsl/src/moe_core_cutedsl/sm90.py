"""`cutedsl_sm90`: FlashInfer's CuTe DSL experts for Hopper, unquantized, on the format `standard`.

Four steps: sort the slots (ours), GEMM1 with the gather and the activation in it, GEMM2, and the sum over a token's
slots, which is ours too and always the same, or with the option `fused_finalize` part of GEMM2, by atomics. With
`sort="flashinfer"` the whole of it is FlashInfer's `cute_dsl_fused_moe_bf16`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.errors import ContractViolation
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import IdSpace, Step
from moe_core_cutedsl.activations import PASSED, keywords
from moe_core_cutedsl.kernels.combine import combine
from moe_core_cutedsl.kernels.sort import ONE_LAUNCH, Tiles, sort
from moe_core_cutedsl.options import choice
from moe_core_cutedsl.sm90_tactics import Shape, Tactic, Tactics, parsed
from moe_core_cutedsl.sm90_weights import Sm90Weights
from moe_core_cutedsl.vendor import entry, load

_WHERE = "flashinfer.fused_moe.cute_dsl."
_TILES = ("tile_idx_to_expert_idx", "tile_idx_to_mn_limit", "num_non_exiting_tiles", "out", "topk", "tile_shape_mn")
GEMM1 = entry(
    _WHERE + "sm90_contiguous_gather_grouped_gemm_act_fusion",
    "sm90_contiguous_gather_grouped_gemm_act_fusion",
    (*_TILES, "x", "w1_weight", "token_id_mapping", "permuted_m", "swizzle_size", "enable_pdl", *PASSED),
)
GEMM2 = entry(
    _WHERE + "sm90_contiguous_grouped_gemm_finalize_fusion",
    "sm90_contiguous_grouped_gemm_finalize_fusion",
    (
        *_TILES, "a", "w2_weight", "permuted_idx_to_expanded_idx", "token_final_scales", "use_fused_finalize",
        "enable_pdl",
    ),
)  # fmt: skip
WHOLE = entry(
    "flashinfer.fused_moe",
    "cute_dsl_fused_moe_bf16",
    (
        "x", "token_selected_experts", "token_final_scales", "w1_weight", "w2_weight", "num_experts", "top_k",
        "num_local_experts", "local_expert_offset", "use_fused_finalize", "moe_output", "tactic", "enable_pdl", *PASSED,
    ),
)  # fmt: skip


@dataclass(slots=True)
class Call:
    """The tokens of a call: hidden [T, H], ids and float32 weights [T, K], expert_map for global ids, num_valid."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor
    expert_map: Tensor | None = None
    num_valid: Tensor | None = None


class Sm90Runner:
    """A layer bound to FlashInfer's kernels, all of them compiled: no call compiles, imports or allocates lazily."""

    def __init__(self, binding: Binding) -> None:
        config = binding.config
        self._config, self._device, self._dtype = config, binding.device, binding.dtype
        self._experts = binding.num_local_experts
        self._fused = choice(binding.options, "cutedsl_sm90", "fused_finalize", (False, True))
        whole = choice(binding.options, "cutedsl_sm90", "sort", ("own", "flashinfer")) == "flashinfer"
        self._activation = keywords(config.activation)
        terms = binding.terms
        self._factor = config.routed_scaling_factor if terms is None or terms.runner_does(Step.ROUTED_SCALING) else 1.0
        fixed = None if binding.options.get("tactic") is None else parsed(binding.options["tactic"])
        pick = None if fixed is None else lambda tokens: fixed
        self._tactics = Tactics(shape_of(binding), binding.max_tokens, pick)
        self._whole: Callable[..., Tensor] | None = None
        is_global = terms is None or terms.id_space is IdSpace.GLOBAL
        #: Whether the sort looks ids up in the dispatcher's map. On one rank global ids are the local ones.
        self.mapped = is_global and binding.parallel.ep_size > 1 and not whole
        if whole:
            self._whole = load(WHOLE)
            owned = binding.parallel.local_experts(config.num_experts)
            self._ids = (config.num_experts, owned[0] if owned else 0) if is_global else (self._experts, 0)
        else:
            self._gemm1, self._gemm2 = load(GEMM1), load(GEMM2)
        if self._device.type == "cuda" and self._experts:
            self._warm_up(binding)

    def run(self, runner_input: Call, quant_info: Sm90Weights, state: RunningState) -> Tensor:
        """[T, H]: the experts of this rank, weighted and summed."""
        hidden = runner_input.hidden
        tokens = hidden.shape[0]
        given = state.output
        out = (
            given
            if given is not None and _fits(given)
            else torch.empty(hidden.shape, dtype=hidden.dtype, device=hidden.device)
        )
        if tokens == 0 or self._experts == 0:
            out.zero_()
        else:
            self._compute(runner_input, quant_info.w1, quant_info.w2, out, self._tactics(tokens))
        return out if given is None or given is out else given.copy_(out)

    def _compute(self, call: Call, w1: Tensor, w2: Tensor, out: Tensor, tactic: Tactic) -> None:
        if self._whole is not None:
            self._by_flashinfer(call, w1, w2, out, tactic)
            return
        tiles = sort(
            call.ids,
            call.weights,
            num_experts=self._experts,
            rows=tactic.rows,
            factor=self._factor,
            expert_map=call.expert_map,
            num_valid=call.num_valid,
        )
        positions = tiles.slots.shape[0]
        inner = call.hidden.new_empty(positions, w2.shape[2])
        common = self._common(tiles, tactic)
        self._gemm1(
            x=call.hidden if _fits(call.hidden) else call.hidden.clone(memory_format=torch.contiguous_format),
            w1_weight=w1,
            token_id_mapping=tiles.slots,
            out=inner,
            permuted_m=positions,
            tile_shape_mn=(tactic.rows, tactic.columns1),
            swizzle_size=tactic.swizzle,
            **common,
            **self._activation,
        )
        # Fused, GEMM2 adds to the result; else it leaves a row a slot.
        rows = out.zero_() if self._fused else out.new_empty(call.ids.numel(), out.shape[1])
        self._gemm2(
            a=inner,
            w2_weight=w2,
            permuted_idx_to_expanded_idx=tiles.slots,
            token_final_scales=tiles.weights,
            out=rows,
            use_fused_finalize=self._fused,
            tile_shape_mn=(tactic.rows, tactic.columns2),
            **common,
        )
        if not self._fused:
            combine(rows, tiles.weights, tiles.local_ids, out)

    def _common(self, tiles: Tiles, tactic: Tactic) -> dict[str, Any]:
        return {
            "tile_idx_to_expert_idx": tiles.tile_expert,
            "tile_idx_to_mn_limit": tiles.tile_limit,
            "num_non_exiting_tiles": tiles.used,
            "topk": self._config.top_k,
            "enable_pdl": True,
        }

    def _by_flashinfer(self, call: Call, w1: Tensor, w2: Tensor, out: Tensor, tactic: Tactic) -> None:
        num_experts, offset = self._ids
        ids = call.ids.to(torch.int32)
        if call.num_valid is not None:
            rows = torch.arange(ids.shape[0], device=ids.device)
            ids = torch.where((rows < call.num_valid)[:, None], ids, -1)
        # A dropped slot may carry any weight, NaN too.
        weights = torch.where(ids >= 0, call.weights, 0.0) * self._factor
        self._whole(  # type: ignore[misc]
            x=call.hidden.contiguous(),
            token_selected_experts=ids.contiguous(),
            token_final_scales=weights,
            w1_weight=w1,
            w2_weight=w2,
            num_experts=num_experts,
            top_k=self._config.top_k,
            num_local_experts=self._experts,
            local_expert_offset=offset,
            use_fused_finalize=self._fused,
            moe_output=out,
            enable_pdl=True,
            tactic=tactic.vendor(),
            **self._activation,
        )

    def _warm_up(self, binding: Binding) -> None:
        """Compile every kernel that a call may need, a second or so each. The layer's sizes are arguments of the GEMMs,
        so the smallest layer will do."""
        config, terms, narrow = self._config, binding.terms, 64
        with torch.cuda.device(self._device):
            hidden = torch.zeros(1, narrow, dtype=self._dtype, device=self._device)
            w1 = hidden.new_zeros(self._experts, narrow * config.gate_up_factor, narrow)
            w2 = hidden.new_zeros(self._experts, narrow, narrow)
            many = torch.zeros(ONE_LAUNCH // config.top_k + 1, config.top_k, dtype=torch.int32, device=self._device)
            many = many if terms is None else many.to(getattr(torch, terms.ids_dtype))
            table = many.new_zeros(config.num_experts, dtype=torch.int32) if self.mapped else None
            valid = many.new_ones((), dtype=torch.int32) if terms and "num_valid" in terms.extras else None
            few = Call(hidden, many[:1], many[:1].float(), table, valid)
            for tactic in self._tactics.all():
                self._compute(few, w1, w2, torch.empty_like(hidden), tactic)
            tiles = sort(many, many.float(), num_experts=self._experts, rows=64, expert_map=table, num_valid=valid)
            rows = hidden.new_zeros(many.numel(), config.hidden_size)
            combine(rows, tiles.weights, tiles.local_ids, rows[: many.shape[0]].clone())


def _fits(tensor: Tensor) -> bool:
    """Whether the kernels can read or write it as it lies: rows one after the other, from a 16-byte boundary on."""
    return tensor.is_contiguous() and tensor.data_ptr() % 16 == 0


def shape_of(binding: Binding) -> Shape:
    """What the tactics of this layer depend on."""
    config, inner = binding.config, binding.local_intermediate_size
    return Shape(
        experts=config.num_experts,
        local=max(1, binding.num_local_experts),
        top_k=config.top_k,
        hidden=config.hidden_size,
        inner=inner,
        wide=inner * config.gate_up_factor,
        item=2,
        sms=binding.hardware.compute_units or 132,
    )


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The fused func of the format `standard`."""
    runner: Sm90Runner = binding.runner
    mapped = runner.mapped

    def fused(
        d: StandardDispatchOutput, q: Sm90Weights, config: MoeConfig, state: RunningState
    ) -> StandardCombineInput:
        if d.topk_ids is None or d.topk_weights is None:
            raise ContractViolation("cutedsl_sm90 needs top-k ids and weights, but the dispatch output carries none")
        expert_map = d.expert_map if mapped else None
        call = Call(d.hidden_states, d.topk_ids, d.topk_weights, expert_map, d.num_valid)
        return StandardCombineInput(runner.run(call, q, state), d.handle)

    return fused
