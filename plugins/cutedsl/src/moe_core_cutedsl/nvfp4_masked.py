"""NVFP4 experts on the format `batched`: FlashInfer's masked grouped GEMMs, for rows that are sorted by expert already.

Quantize the rows unless they came quantized, GEMM1, silu(gate) * up quantized in one kernel, GEMM2. Router weights and
the sum over slots are the dispatcher's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from moe_core.errors import ConfigError, ContractViolation
from moe_core.formats import BatchedDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.quant import TwoLevelScale
from moe_core_cutedsl.layouts import swizzled
from moe_core_cutedsl.nvfp4_weights import QUANTIZED, NvFp4Weights
from moe_core_cutedsl.vendor import entry, has, load

_QUANTIZER = ("a", "mask", "a_global_sf")
GEMM = entry(
    "flashinfer.gemm",
    "grouped_gemm_nt_masked",
    ("lhs", "rhs", "out", "masked_m", "ab_dtype", "sf_dtype", "c_dtype", "sf_vec_size", "sm_count", "dst_signals"),
    through=("alpha", "alpha_dtype"),
)
QUANTIZE = entry("flashinfer", "scaled_fp4_grouped_quantize", _QUANTIZER, optional=("nvfp4_4over6",))
ACTIVATE = entry("flashinfer", "silu_and_mul_scaled_nvfp4_experts_quantize", _QUANTIZER, optional=("nvfp4_4over6",))
#: What `RunningState.overlap` may hold for a runner: see `MaskedExperts`.
OVERLAP = frozenset({"num_sms", "signals", "start_event"})
#: The largest value of e2m1 times the largest of e4m3: what a global scale maps the largest value to.
_TOP = 6.0 * 448.0


class MaskedExperts:
    """One layer's masked grouped GEMMs.

    `RunningState.overlap` of a call may be a mapping with: num_sms, SMs that GEMM2 takes, so that a combine can run
    beside it; signals, a tensor that GEMM2 counts up an expert at a time as its rows are written; start_event, a
    torch.cuda.Event recorded when GEMM2 begins. Not needed together.
    """

    def __init__(self, binding: Binding) -> None:
        for option, default in (("activations", QUANTIZED), ("fused_finalize", False)):
            if binding.options.get(option, default) != default:
                raise ConfigError(
                    f"the option {option!r} of 'cutedsl' is {binding.options[option]!r}, and the masked grouped GEMMs "
                    "have none",
                    hint="it is for the format `standard`: leave it out for this dispatcher",
                )
        self._gemm, self._quantize, self._activate = load(GEMM), load(QUANTIZE), load(ACTIVATE)
        # 4over6 is another search of block scales, which some releases switch on by environment variables.
        self._search = {
            wanted.name: {"nvfp4_4over6": None} if has(wanted, "nvfp4_4over6") else {}
            for wanted in (QUANTIZE, ACTIVATE)
        }
        self._kinds = {
            "ab_dtype": "float4_e2m1fn",
            "sf_dtype": "float8_e4m3fn",
            "c_dtype": str(binding.dtype).removeprefix("torch."),
            "sf_vec_size": 16,
            "alpha_dtype": "float32",
        }
        self._dtype = binding.dtype

    def __call__(self, d: BatchedDispatchOutput, q: NvFp4Weights, state: RunningState) -> Tensor:
        """[E_local, M, H]; rows at and above masked_m[e] are undefined."""
        overlap = _overlap(state.overlap)
        experts, most = d.hidden_states.shape[:2]
        hidden, wide = q.w2.shape[1], q.w1.shape[1]
        out = d.hidden_states.new_empty(experts, most, hidden, dtype=self._dtype)
        if not experts or not most:
            return out
        counts = d.masked_m.to(torch.int32)
        rows, alpha = self._rows(d, counts, q)
        between = out.new_empty(experts, most, wide)
        self._multiply(rows, (q.w1, q.w1_scale), between, counts, alpha)
        alpha, inverse = q.w2_alpha, q.inner_inverse
        if inverse is None:
            gate, up = between.float().chunk(2, dim=-1)
            step = _step(torch.nn.functional.silu(gate) * up, counts)
            alpha, inverse = q.w2_global * step, (1.0 / step).expand(experts).contiguous()
        inner = self._activate(a=between, mask=counts, a_global_sf=inverse, **self._search[ACTIVATE.name])
        event = overlap.get("start_event")
        if event is not None:
            event.record()
        self._multiply(inner, (q.w2, q.w2_scale), out, counts, alpha, overlap.get("num_sms"), overlap.get("signals"))
        return out

    def _rows(self, d: BatchedDispatchOutput, counts: Tensor, q: NvFp4Weights) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """(values [M, H / 2, E], scales as `layouts.swizzled` has them) and the factor of GEMM1."""
        hidden, scale = d.hidden_states, d.hidden_scale
        if hidden.dtype == torch.uint8:
            if not isinstance(scale, TwoLevelScale):
                raise ContractViolation(
                    f"NVFP4 rows come with a {type(scale).__name__} as their scale",
                    hint="give a moe_core.quant.TwoLevelScale: block scales [E, M, H / 16] (or swizzled, 6 dimensions) "
                    "and the global scale [1]",
                )
            blocks = swizzled(scale.block.view(torch.uint8)) if scale.block.dim() == 3 else scale.block
            return (hidden.permute(1, 2, 0), blocks.view(torch.float8_e4m3fn)), q.w1_global * scale.global_scale
        alpha, inverse = q.w1_alpha, q.input_inverse
        if inverse is None:
            step = _step(hidden, counts)
            alpha, inverse = q.w1_global * step, (1.0 / step).expand(hidden.shape[0]).contiguous()
        quantized = self._quantize(
            a=hidden.contiguous(), mask=counts, a_global_sf=inverse, **self._search[QUANTIZE.name]
        )
        return quantized, alpha

    def _multiply(
        self,
        rows: tuple[Tensor, Tensor],
        weights: tuple[Tensor, Tensor],
        out: Tensor,
        counts: Tensor,
        alpha: Tensor,
        num_sms: int | None = None,
        signals: Tensor | None = None,
    ) -> None:
        data, scale = weights
        self._gemm(
            lhs=rows,
            rhs=(data.permute(1, 2, 0), scale.view(torch.float8_e4m3fn)),
            out=out.permute(1, 2, 0),
            masked_m=counts,
            alpha=alpha.view(1, 1, -1),
            sm_count=num_sms,
            dst_signals=signals,
            **self._kinds,
        )


def _step(values: Tensor, counts: Tensor) -> Tensor:
    """float32 [1]: the global scale of all live rows, for layers that were not calibrated. Waits for nothing."""
    live = torch.arange(values.shape[1], device=values.device) < counts[:, None]
    largest = torch.where(live[..., None], values, 0).abs().amax().float().reshape(1)
    return torch.where(largest > 0, largest / _TOP, 1.0)


def _overlap(given: Mapping[str, Any] | None) -> Mapping[str, Any]:
    if given is None:
        return {}
    whatever: Any = given  # a server may hand over anything
    unknown = sorted(set(given) - OVERLAP) if isinstance(whatever, Mapping) else [type(whatever).__name__]
    if unknown:
        raise ContractViolation(
            f"state.overlap holds {', '.join(unknown)}, which the masked grouped GEMM does not know",
            hint=f"it takes a mapping with some of {', '.join(sorted(OVERLAP))}; "
            "arguments of the dispatcher's combine go into the state of that call",
        )
    return given
