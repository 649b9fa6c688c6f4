"""What this plugin offers to moe_core, as data. Never imports torch or flashinfer.

Both runners are fused-only: FlashInfer's entry points take tokens and routing and return the summed result. They find
their experts by an offset into global ids, so only contiguous (linear) placement fits, and skip negative ids. Local ids
are global ones with an offset of 0.
"""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import FusedSpec, PluginInfo, RunnerSpec, Wants
from moe_core.vocabulary import STANDARD, TOPK_BYPASSED, TOPK_STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

_FLASHINFER = Requires(
    module="flashinfer",
    submodule="fused_moe",
    distribution="flashinfer-python",
    min_version="0.7",
    hint="pip install 'flashinfer-python>=0.7'",
)
#: GEMM1's epilogue quantizes by a scale that is known before.
_CALIBRATED = frozenset({"fp8_tensor", "nvfp4"})
_DISTINCT = "promise that no token names an expert twice: spares a few small kernels that merge such slots (off)"

TRTLLM = RunnerSpec(
    name="flashinfer_trtllm",
    summary="FlashInfer's TensorRT-LLM kernels for Blackwell, with or without the router in the kernel",
    factory="moe_core_flashinfer_trtllm.trtllm:TrtllmRunner",
    prepare="moe_core_flashinfer_trtllm.trtllm_weights:prepare",
    requirements="moe_core_flashinfer_trtllm.rules:trtllm_sizes",
    tune="moe_core_flashinfer_trtllm.trtllm_tune:tune",
    layouts=frozenset(
        {
            "bf16_block_major",
            "fp8_up_gate_rows",
            "fp8_tensor_shuffled",
            "mxfp8_shuffled",
            "nvfp4_shuffled",
            "mxfp4_shuffled",
            "mxint4_block_major",
        }
    ),
    priority=200,
    # Evidence: tests/test_trtllm.py, over a strict double.
    maturity=dict.fromkeys(("sm_100", "sm_103"), Maturity.CONTRACT),
    options={"distinct_experts": _DISTINCT},
    why_not="moe_core_flashinfer_trtllm.rules:trtllm",
    support=Support(
        devices={"cuda": ("sm_100..sm_103",)},
        schemes=frozenset({"bf16", "fp8_block128", "fp8_tensor", "mxfp8", "nvfp4", "mxfp4_w4a16", "int4_w4a16"}),
        group_sizes=frozenset({32}),
        dtypes=frozenset({"bfloat16"}),
        activations=frozenset({"silu", "relu2", "swiglu_oai"}),
        gated=frozenset({True, False}),
        activation_limit=True,
        features=frozenset({"bias", "router_weight_on_input"}),
        topk_formats=frozenset({TOPK_STANDARD, TOPK_BYPASSED}),
        graph_capture=frozenset(Phase),
        max_top_k=32,
        max_experts=512,
        placements=frozenset({"linear"}),
        needs_input_scales=_CALIBRATED,
        requires=(_FLASHINFER,),
    ),
)

CUTLASS = RunnerSpec(
    name="flashinfer_cutlass",
    summary="FlashInfer's CUTLASS fused MoE for Hopper and Blackwell",
    factory="moe_core_flashinfer_trtllm.cutlass:CutlassRunner",
    prepare="moe_core_flashinfer_trtllm.cutlass_weights:prepare",
    requirements="moe_core_flashinfer_trtllm.rules:cutlass_sizes",
    tune="moe_core_flashinfer_trtllm.cutlass_tune:tune",
    layouts=frozenset({"up_gate_rows", "mxfp4_sm90_interleaved", "nvfp4_swizzled"}),
    # Below Triton: on Hopper the published numbers go either way, and its module may take over an hour to compile.
    priority=90,
    why_not="moe_core_flashinfer_trtllm.rules:cutlass",
    # Evidence: tests/test_cutlass.py, over a strict double.
    maturity=dict.fromkeys(("sm_90", "sm_100", "sm_103", "sm_120", "sm_121"), Maturity.CONTRACT),
    options={
        "fused_finalize": "sum the top-k slots in GEMM2's epilogue with atomics: not deterministic, less exact (off)",
        "distinct_experts": _DISTINCT,
    },
    support=Support(
        devices={"cuda": ("sm_90", "sm_100..sm_103", "sm_120..sm_121")},
        schemes=frozenset({"bf16", "fp8_tensor", "fp8_block128", "mxfp4_w4a16", "nvfp4"}),
        scheme_archs={
            "fp8_block128": ("sm_90",),
            "mxfp4_w4a16": ("sm_90",),
            "nvfp4": ("sm_100..sm_103", "sm_120..sm_121"),
        },
        dtypes=frozenset({"bfloat16", "float16"}),
        activations=frozenset({"silu", "relu2", "swiglu_oai"}),
        gated=frozenset({True, False}),
        activation_limit=True,
        features=frozenset({"bias", "deterministic"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=8,
        intermediate_multiple=8,
        needs_max_tokens=True,
        placements=frozenset({"linear"}),
        even_experts=True,
        needs_input_scales=_CALIBRATED,
        requires=(_FLASHINFER,),
    ),
)

# Local ids come from dispatchers that send rows to the ranks of their experts.
_CUTLASS_WANTS = Wants(
    id_spaces=(IdSpace.GLOBAL, IdSpace.LOCAL),
    dropped=(DroppedSlot.NEGATIVE, DroppedSlot.NEVER),
    optional=frozenset({"num_valid"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM}),
)

# Tokens that travelled quantized are taken as they are.
_TRTLLM_WANTS = replace(_CUTLASS_WANTS, payloads=("fp8_group128", "mxfp8", "bf16"))

FUSED = (
    FusedSpec(
        runner="flashinfer_trtllm",
        format=STANDARD,
        target="moe_core_flashinfer_trtllm.trtllm:fused_standard",
        wants=_TRTLLM_WANTS,
    ),
    FusedSpec(
        runner="flashinfer_cutlass",
        format=STANDARD,
        target="moe_core_flashinfer_trtllm.cutlass:fused_standard",
        wants=_CUTLASS_WANTS,
    ),
)


class FlashInferTrtllmPlugin:
    """The hooks of the entry point `flashinfer_trtllm`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="flashinfer_trtllm", summary="FlashInfer's TensorRT-LLM and CUTLASS fused MoE kernels")

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """The two runners."""
        return (TRTLLM, CUTLASS)

    @hookimpl
    def moe_core_fused_funcs(self) -> tuple[FusedSpec, ...]:
        """The only way into them."""
        return FUSED


plugin = FlashInferTrtllmPlugin()
