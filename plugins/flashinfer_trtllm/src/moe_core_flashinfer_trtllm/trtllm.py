"""`flashinfer_trtllm`: FlashInfer's `trtllm_*_moe`, with the router's choice or with the router in the kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_core.config import MoeConfig
from moe_core.errors import BindError, ContractViolation
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.protocols import Binding, RunningState
from moe_core.vocabulary import TOPK_BYPASSED, IdSpace, Step
from moe_core_flashinfer_trtllm.layer import activation_type, experts_of, finish, result
from moe_core_flashinfer_trtllm.library import bind_call, member
from moe_core_flashinfer_trtllm.routing import pack_topk, topk_reader
from moe_core_flashinfer_trtllm.rules import routing_method, scales_in_kernel, trtllm_sizes
from moe_core_flashinfer_trtllm.trtllm_store import load
from moe_core_flashinfer_trtllm.trtllm_tokens import tokens_reader
from moe_core_flashinfer_trtllm.trtllm_weights import TrtllmWeights

_FP4 = (
    "gemm1_weights",
    "gemm1_weights_scale",
    "gemm1_bias",
    "gemm1_alpha",
    "gemm1_beta",
    "gemm1_clamp_limit",
    "gemm2_weights",
    "gemm2_weights_scale",
    "gemm2_bias",
    "output1_scale_scalar",
    "output1_scale_gate_scalar",
    "output2_scale_scalar",
)
_GATE = ("gemm1_alpha", "gemm1_beta", "gemm1_clamp_limit")
_BLOCK = ("gemm1_weights", "gemm1_weights_scale", "gemm2_weights", "gemm2_weights_scale")
_FP8 = (
    "gemm1_weights",
    "gemm2_weights",
    "output1_scales_scalar",
    "output1_scales_gate_scalar",
    "output2_scales_scalar",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """FlashInfer's functions for a scheme. name: with its place for "_routed". tensors: what weights may bring."""

    name: str
    tensors: tuple[str, ...]
    scaled_tokens: bool = False

    def function(self, *, routed: bool) -> str:
        """The function that takes the router's choice, or the one that routes itself."""
        return self.name.format("_routed" if routed else "")


ENTRIES = {
    "bf16": Entry(name="trtllm_bf16{}_moe", tensors=("gemm1_weights", "gemm2_weights", *_GATE)),
    "fp8_block128": Entry(name="trtllm_fp8_block_scale{}_moe", tensors=(*_BLOCK, *_GATE), scaled_tokens=True),
    "mxfp8": Entry(name="trtllm_fp8_block_scale{}_moe", tensors=(*_BLOCK, *_GATE), scaled_tokens=True),
    "fp8_tensor": Entry(name="trtllm_fp8_per_tensor_scale{}_moe", tensors=_FP8),
    "nvfp4": Entry(name="trtllm_fp4_block_scale{}_moe", tensors=_FP4, scaled_tokens=True),
    "mxfp4_w4a16": Entry(name="trtllm_fp4_block_scale{}_moe", tensors=_FP4, scaled_tokens=True),
    "int4_w4a16": Entry(name="trtllm_mxint4_block_scale{}_moe", tensors=(*_BLOCK, *_GATE)),
}


@dataclass(slots=True)
class TrtllmInput:
    """One call's tokens and routing: by the names of the arguments."""

    tokens: dict[str, Tensor | None]
    routing: dict[str, Tensor | None]

    @property
    def hidden(self) -> Tensor:
        """[T, ...]."""
        found = self.tokens["hidden_states"]
        if found is None:
            raise ContractViolation("a call without tokens")
        return found


class TrtllmRunner:
    """What a plan fixes: the checked call."""

    def __init__(self, binding: Binding) -> None:
        config, scheme = binding.config, binding.scheme.id
        entry, self.routes = ENTRIES[scheme], binding.request.topk_format == TOPK_BYPASSED
        sizes = trtllm_sizes(binding.request)
        self._hidden, self._dtype = config.hidden_size, binding.dtype
        function = entry.function(routed=not self.routes)
        # What a layer has not is passed as None where the function asks for it.
        self._fixed: dict[str, Any] = _experts(binding, self.routes) | _routing(binding, self.routes)
        self._fixed |= _scheme(binding, padded=sizes.hidden_size != config.hidden_size, inner=sizes.intermediate_size)
        routing = ("routing_logits", "routing_bias") if self.routes else ("topk_ids",)
        tokens = ("hidden_states", "hidden_states_scale") if entry.scaled_tokens else ("hidden_states",)
        self._tensors = entry.tensors
        self._call: Callable[..., Any] = bind_call(
            function, self._fixed, (*routing, *tokens, *_passed(entry, binding), "output")
        )
        self._after = 1.0
        scaling = binding.terms is not None and binding.terms.runner_does(Step.ROUTED_SCALING)
        if self.routes and scaling and not scales_in_kernel(config):
            self._after = config.routed_scaling_factor
        load(binding)

    def run(self, runner_input: TrtllmInput, quant_info: TrtllmWeights, state: RunningState) -> Tensor:
        """[T, H]: the weighted sum over the experts of this rank, in `state.output` where the call brings one."""
        computed = result(state, runner_input.hidden, self._hidden, self._dtype)
        if runner_input.hidden.shape[0] > 0:
            self._call(**runner_input.tokens, **runner_input.routing, **quant_info.tensors, output=computed)
            if self._after != 1.0:
                computed.mul_(self._after)
        return finish(computed, state, self._hidden)


def fused_standard(binding: Binding) -> Callable[..., StandardCombineInput]:
    """The fused func of the format `standard`."""
    runner, tokens = binding.runner, tokens_reader(binding)
    routing = _logits_reader(binding) if runner.routes else _choice_reader(binding)

    def fused(d: StandardDispatchOutput, q: TrtllmWeights, c: MoeConfig, s: RunningState) -> StandardCombineInput:
        given = TrtllmInput(tokens(d.hidden_states, d.hidden_scale, q), routing(d))
        return StandardCombineInput(runner.run(given, q, s), d.handle)

    return fused


def _choice_reader(binding: Binding) -> Callable[[StandardDispatchOutput], dict[str, Tensor | None]]:
    read = topk_reader(binding)
    return lambda d: {"topk_ids": pack_topk(*read(d))}


def _logits_reader(binding: Binding) -> Callable[[StandardDispatchOutput], dict[str, Tensor | None]]:
    """Logits as float32 or bfloat16: the kernels take float16 for one of these."""
    wide = routing_method(binding.config) == "DeepSeekV3"
    biased = binding.config.routing.correction_bias

    def read(d: StandardDispatchOutput) -> dict[str, Tensor | None]:
        logits, bias = d.router_logits, d.correction_bias
        if logits is None:
            raise ContractViolation("this plan routes in the kernel, and got the router's choice instead of its logits")
        if biased and bias is None:
            raise ContractViolation("the routing has a correction bias, and the call brought none")
        if wide or logits.dtype not in (torch.float32, torch.bfloat16):
            logits = logits.float()
        bias = bias.float().contiguous() if biased and bias is not None else None
        return {"routing_logits": logits.contiguous(), "routing_bias": bias}

    return read


def _passed(entry: Entry, binding: Binding) -> tuple[str, ...]:
    """Arguments that the weights of this layer bring: all that the function knows but its options."""
    config, scheme = binding.config, binding.scheme.id
    activation = config.activation
    optional = {
        "gemm1_alpha": activation.name == "swiglu_oai" or (scheme == "nvfp4" and activation.gated),
        "gemm1_beta": activation.name == "swiglu_oai",
        "gemm1_clamp_limit": activation.limit is not None,
        "gemm1_bias": config.bias,
        "gemm2_bias": config.bias,
        "output1_scale_scalar": scheme == "nvfp4",
        "output1_scale_gate_scalar": scheme == "nvfp4",
        "output2_scale_scalar": scheme == "nvfp4",
    }
    return tuple(name for name in entry.tensors if optional.get(name, True))


def _experts(binding: Binding, routes: bool) -> dict[str, Any]:
    config, experts = binding.config, experts_of(binding)
    total = experts.total
    if binding.terms is not None and binding.terms.id_space is IdSpace.LOCAL:
        if routes:
            raise BindError("the router's logits are of all experts, and this dispatcher's ids are local")
        # The kernels want more experts than slots of a token, in fours; the ids of those that are none never come.
        total = -(-max(total, config.top_k + 1) // 4) * 4
    return {
        "num_experts": total,
        "top_k": config.top_k,
        "local_expert_offset": experts.first,
        "local_num_experts": experts.local,
    }


def _routing(binding: Binding, routes: bool) -> dict[str, Any]:
    config = binding.config
    routing, name = config.routing, "TopK"  # the choice as it is given: nothing computed, nothing normalized
    groups, chosen, factor = 0, 0, 1.0
    if routes:
        name = routing_method(config) or ""
        if name == "DeepSeekV3":
            groups, chosen = routing.num_groups, routing.topk_groups
        scaling = binding.terms is not None and binding.terms.runner_does(Step.ROUTED_SCALING)
        factor = config.routed_scaling_factor if scaling and scales_in_kernel(config) else 1.0
    elif config.router_weight_on_input:
        name = "Llama4"  # the one method whose kernel weights the tokens
    return {
        "n_group": groups,
        "topk_group": chosen,
        "routed_scaling_factor": factor,
        "routing_method_type": int(member("RoutingMethodType", name)),
    }


def _scheme(binding: Binding, *, padded: bool, inner: int) -> dict[str, Any]:
    """The arguments that tell layouts and kinds of scales, and None for tensors that the layer has not."""
    config, scheme = binding.config, binding.scheme.id
    fixed: dict[str, Any] = {"intermediate_size": inner}
    if scheme != "int4_w4a16":
        fixed["activation_type"] = int(activation_type(config.activation))
    if scheme == "bf16":
        fixed |= {"use_shuffled_weight": True, "weight_layout": int(member("WeightLayout", "BlockMajorK"))}
    elif scheme in ("fp8_block128", "mxfp8"):
        kind = "DeepSeekFp8" if scheme == "fp8_block128" else "MxFp8"
        fixed |= {"use_shuffled_weight": scheme == "mxfp8", "weight_layout": int(member("WeightLayout", "MajorK"))}
        fixed["fp8_quantization_type"] = member("Fp8QuantizationType", kind)
    elif scheme == "fp8_tensor":
        fixed["use_routing_scales_on_input"] = config.router_weight_on_input
    elif scheme in ("nvfp4", "mxfp4_w4a16"):
        fixed["hidden_states_scale_layout"] = member("SfLayout", "layout_linear")
    if scheme == "mxfp4_w4a16" and (padded or inner != binding.local_intermediate_size):
        valid = {"valid_hidden_size": config.hidden_size, "valid_intermediate_size": binding.local_intermediate_size}
        fixed |= valid
    passed = _passed(ENTRIES[scheme], binding)
    asked_anyhow = {"nvfp4": _FP4, "mxfp4_w4a16": _FP4, "int4_w4a16": _GATE}.get(scheme, ())
    fixed |= {name: None for name in asked_anyhow if name not in passed}
    if scheme not in ("bf16", "int4_w4a16") and binding.request.topk_format != TOPK_BYPASSED:
        fixed["routing_bias"] = None  # asked for by most functions that do not route
    return fixed
