"""NVFP4 experts on the format `standard`: FlashInfer's fused MoE for Blackwell.

Tokens are quantized here and multiplied in NVFP4 (w4a4), or stay in bfloat16 (w4a16, the option activations="bf16").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_core.errors import ContractViolation
from moe_core.formats import StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import Step
from moe_core_cutedsl.activations import PASSED, keywords
from moe_core_cutedsl.nvfp4_weights import PLAIN, QUANTIZED, NvFp4Weights
from moe_core_cutedsl.options import choice
from moe_core_cutedsl.vendor import entry, has, load

MAKE = entry(
    "flashinfer.fused_moe",
    "CuteDslMoEWrapper",
    (
        "num_experts", "top_k", "hidden_size", "intermediate_size", "use_cuda_graph", "num_local_experts",
        "local_expert_offset", "output_dtype", "device", "use_fused_finalize", "quant_mode", *PASSED,
    ),
)  # fmt: skip
RUN = entry(
    "flashinfer.fused_moe",
    "CuteDslMoEWrapper.run",
    (
        "x", "x_sf", "token_selected_experts", "token_final_scales", "w1_weight", "w1_weight_sf", "w1_alpha",
        "fc2_input_scale", "w2_weight", "w2_weight_sf", "w2_alpha",
    ),
)  # fmt: skip
QUANTIZE = entry(
    "flashinfer",
    "fp4_quantize",
    ("input", "global_scale", "sf_vec_size", "is_sf_swizzled_layout"),
    optional=("nvfp4_4over6",),
)
_TOP = 6.0 * 448.0


class WholeExperts:
    """One layer's fused MoE."""

    def __init__(self, binding: Binding) -> None:
        config, terms = binding.config, binding.terms
        self._plain = choice(binding.options, "cutedsl", "activations", (QUANTIZED, PLAIN)) == PLAIN
        fused = choice(binding.options, "cutedsl", "fused_finalize", (False, True))
        make = load(MAKE)
        load(RUN)
        if not self._plain:
            self._quantize = load(QUANTIZE)
            self._search: dict[str, Any] = {"nvfp4_4over6": None} if has(QUANTIZE, "nvfp4_4over6") else {}
        owned = binding.parallel.local_experts(config.num_experts)
        self._experts, self._dtype = binding.num_local_experts, binding.dtype
        self._factor = config.routed_scaling_factor if terms is None or terms.runner_does(Step.ROUTED_SCALING) else 1.0
        self._layer: Any = None
        if owned:
            self._layer = make(
                num_experts=config.num_experts,
                top_k=config.top_k,
                hidden_size=config.hidden_size,
                intermediate_size=binding.local_intermediate_size,
                use_cuda_graph=bool(binding.request.graph_capture),
                num_local_experts=len(owned),
                local_expert_offset=owned[0],
                output_dtype=binding.dtype,
                device=str(binding.device),
                use_fused_finalize=fused,
                quant_mode="w4a16" if self._plain else "w4a4",
                **keywords(config.activation),
            )

    def __call__(self, d: StandardDispatchOutput, q: NvFp4Weights, state: RunningState) -> Tensor:
        """[T, H]: the experts of this rank, weighted and summed."""
        if state.overlap is not None:
            raise ContractViolation(
                "state.overlap was given, and the fused MoE has nothing to overlap with",
                hint="overlap arguments are for the format `batched`",
            )
        if d.topk_ids is None or d.topk_weights is None:
            raise ContractViolation("cutedsl needs top-k ids and weights, but the dispatch output carries none")
        hidden = d.hidden_states
        if hidden.shape[0] == 0 or self._layer is None:
            result = torch.zeros_like(hidden)
        else:
            ids = d.topk_ids.to(torch.int32)
            if d.num_valid is not None:
                ids = torch.where((torch.arange(ids.shape[0], device=ids.device) < d.num_valid)[:, None], ids, -1)
            result = self._compute(hidden.contiguous(), ids, d.topk_weights, q)
        return result if state.output is None else state.output.copy_(result)

    def _compute(self, hidden: Tensor, ids: Tensor, weights: Tensor, q: NvFp4Weights) -> Tensor:
        # A dropped slot may carry any weight, NaN too, and its token may be garbage.
        live = ids >= 0
        weights = torch.where(live, weights.float(), 0.0) * self._factor
        x, scales, alpha, inner = hidden, None, q.w1_alpha, None
        if not self._plain:
            inverse = None if q.input_inverse is None else q.input_inverse[:1]
            if inverse is None:
                step = _step(hidden, live)
                alpha, inverse = q.w1_global * step, 1.0 / step
            x, scales = self._quantize(
                input=hidden, global_scale=inverse, sf_vec_size=16, is_sf_swizzled_layout=False, **self._search
            )
            scales = scales.view(torch.uint8).reshape(hidden.shape[0], -1)
            inner = None if q.inner_inverse is None else q.inner_inverse[:1]
        result: Tensor = self._layer.run(
            x=x,
            x_sf=scales,
            token_selected_experts=ids.contiguous(),
            token_final_scales=weights,
            w1_weight=q.w1,
            w1_weight_sf=q.w1_scale,
            w1_alpha=alpha,
            fc2_input_scale=inner,
            w2_weight=q.w2,
            w2_weight_sf=q.w2_scale,
            w2_alpha=q.w2_alpha,
        )
        return result


def _step(hidden: Tensor, live: Tensor) -> Tensor:
    """float32 [1]: the global scale of the tokens that go anywhere, for layers that were not calibrated."""
    largest = torch.where(live.any(dim=1)[:, None], hidden, 0).abs().amax().float().reshape(1)
    return torch.where(largest > 0, largest / _TOP, 1.0)
