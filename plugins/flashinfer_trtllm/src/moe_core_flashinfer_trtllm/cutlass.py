"""`flashinfer_cutlass`: FlashInfer's `cutlass_fused_moe`, from tokens and the router's choice to the summed result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.errors import BindError
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.weights import WeightRequirements
from moe_core_flashinfer_trtllm import workspace
from moe_core_flashinfer_trtllm.cutlass_store import Tactics, tactics
from moe_core_flashinfer_trtllm.cutlass_weights import CutlassWeights
from moe_core_flashinfer_trtllm.layer import (
    activation_tensors,
    activation_type,
    experts_of,
    finish,
    flag,
    most_rows,
    result,
)
from moe_core_flashinfer_trtllm.library import bind_call, module, version
from moe_core_flashinfer_trtllm.routing import topk_reader
from moe_core_flashinfer_trtllm.rules import cutlass_sizes

logger = logging.getLogger("moe_core.flashinfer_cutlass")

#: What a call brings beside what a plan fixes.
GIVEN = (
    "input",
    "token_selected_experts",
    "token_final_scales",
    "fc1_expert_weights",
    "fc2_expert_weights",
    "quant_scales",
    "fc1_expert_biases",
    "fc2_expert_biases",
    "output",
    "profile_ids",
    "workspace_buffer",
)
_FLAGS: dict[str, dict[str, bool]] = {
    "fp8_block128": {"use_deepseek_fp8_block_scale": True},
    "mxfp4_w4a16": {"use_w4_group_scaling": True},
}
_WEIGHT_DTYPES = {
    "fp8_block128": torch.float8_e4m3fn,
    "fp8_tensor": torch.float8_e4m3fn,
    "mxfp4_w4a16": torch.uint8,
    "nvfp4": torch.int64,
}


@dataclass(slots=True)
class Tokens:
    """One call's input. hidden: [T, H]; ids: int32 [T, K], global or -1; weights: float32 [T, K]."""

    hidden: Tensor
    ids: Tensor
    weights: Tensor


class CutlassRunner:
    """What a plan fixes: the checked call, its workspace, and the tuned kernels where there are some."""

    def __init__(self, binding: Binding) -> None:
        config, scheme = binding.config, binding.scheme.id
        sizes = cutlass_sizes(binding.request)
        self._hidden, self._padding = config.hidden_size, sizes.hidden_size - config.hidden_size
        self._width, self._dtype = sizes.hidden_size, binding.dtype
        fused = flag(binding, "fused_finalize")
        all_experts, first, local = experts_of(binding)
        experts = {"ep_size": all_experts // local, "ep_rank": first // local}
        kind = {"activation_type": activation_type(config.activation), "use_fused_finalize": fused}
        common = {**experts, **kind, **_FLAGS.get(scheme, {}), "output_dtype": binding.dtype}
        gate = {f"swiglu_{name}": tensor for name, tensor in activation_tensors(binding).items()}
        self._call: Callable[..., Any] = bind_call("cutlass_fused_moe", {**common, **gate}, GIVEN)
        self._workspace = workspace.shared(_workspace_bytes(binding, sizes, common), binding.device)
        self._tactics: Tactics = tactics(binding, fused_finalize=fused)

    def run(self, runner_input: Tokens, quant_info: CutlassWeights, state: RunningState) -> Tensor:
        """[T, H]: the weighted sum over the experts of this rank, in `state.output` where the call brings one."""
        return self.compute(runner_input, quant_info, state, self._tactics.at(runner_input.hidden.shape[0]))

    def compute(
        self, tokens: Tokens, quant_info: CutlassWeights, state: RunningState, profile_ids: Sequence[int] | None
    ) -> Tensor:
        """As `run`, with these kernels of GEMM1 and GEMM2 (None: FlashInfer's choice)."""
        q, hidden = quant_info, tokens.hidden
        computed = result(state, hidden, self._width, self._dtype)
        if hidden.shape[0] > 0:
            self._call(
                input=self._input(hidden, q),
                token_selected_experts=tokens.ids,
                token_final_scales=tokens.weights,
                fc1_expert_weights=q.w13,
                fc2_expert_weights=q.w2,
                quant_scales=q.scales,
                fc1_expert_biases=q.w13_bias,
                fc2_expert_biases=q.w2_bias,
                output=computed,
                profile_ids=profile_ids,
                workspace_buffer=self._workspace.buffer(),
            )
        return finish(computed, state, self._hidden)

    def _input(self, hidden: Tensor, q: CutlassWeights) -> Tensor:
        if self._padding:
            return torch.nn.functional.pad(hidden, (0, self._padding))
        if q.input_scale is not None:
            codes = hidden.contiguous().float().div_(q.input_scale)
            return codes.clamp_(-448.0, 448.0).to(torch.float8_e4m3fn)
        return hidden.contiguous()


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The fused func of the format `standard`."""
    read, runner = topk_reader(binding), binding.runner

    def fused(d: StandardDispatchOutput, q: CutlassWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        ids, weights = read(d)
        return StandardCombineInput(runner.run(Tokens(d.hidden_states, ids, weights), q, s), d.handle)

    return fused


def _workspace_bytes(binding: Binding, sizes: WeightRequirements, common: dict[str, Any]) -> int:
    """Bytes for `max_tokens`. Asking for them loads FlashInfer's module, which may have to be compiled first."""
    config, scheme = binding.config, binding.scheme.id
    asked = {
        **common,
        "max_num_tokens": most_rows(binding),
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_experts_total": experts_of(binding).total,
        "top_k": config.top_k,
        "x_dtype": torch.float8_e4m3fn if scheme == "fp8_tensor" else binding.dtype,
        "weight_dtype": _WEIGHT_DTYPES.get(scheme, binding.dtype),
        "device": binding.device,
    }
    ask = bind_call("cutlass_fused_moe_workspace_size", {}, asked)
    _warn_of_compiling(binding)
    try:
        return int(ask(**asked))
    except Exception as error:  # nvcc, ninja, the driver and the loaded module each have errors of their own
        raise BindError(
            f"FlashInfer {version()} has no CUTLASS kernels for {scheme} here: {type(error).__name__}: {error}",
            hint="it compiles them on first use, with nvcc and ninja; python -m "
            "moe_core_flashinfer_trtllm.build_cutlass builds those of single schemes beforehand",
        ) from error


def _warn_of_compiling(binding: Binding) -> None:
    """Say it where the next line compiles for an hour."""
    if binding.device.type != "cuda":
        return
    major, minor = torch.cuda.get_device_capability(binding.device)
    name = f"fused_moe_{major}{0 if major == 12 else minor}"
    try:
        env = module("flashinfer.jit.env")
        places = [env.FLASHINFER_AOT_DIR, env.FLASHINFER_JIT_DIR]
        there = any((place / name / f"{name}.so").exists() for place in places) or bool(env.get_aot_artifacts(name))
    except Exception:  # a hint only: where FlashInfer keeps its modules is its own affair
        return
    if not there:
        logger.warning(
            "FlashInfer compiles its module %s now, which can take more than an hour; python -m "
            "moe_core_flashinfer_trtllm.build_cutlass builds what single schemes need",
            name,
        )
