"""What this plugin offers to moe_core, as data. Never imports torch, flashinfer or the CuTe DSL."""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import FusedSpec, PluginInfo, RunnerSpec, Wants
from moe_core.vocabulary import BATCHED, STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

_CUTE = Requires(
    module="cutlass",
    submodule="cute",
    distribution="nvidia-cutlass-dsl",
    min_version="4.7",
    hint="pip install nvidia-cutlass-dsl (the module 'cutlass' of the package nvidia-cutlass is another one)",
)
# FlashInfer hides its CuTe DSL names, without a word, where Triton cannot be imported.
_TRITON = Requires(
    module="triton",
    submodule="language",
    distribution="triton",
    min_version="3.4",
    hint="FlashInfer needs Triton for its CuTe DSL kernels; CUDA builds of torch bring it",
)


def _flashinfer(version: str) -> Requires:
    return Requires(
        module="flashinfer",
        submodule="fused_moe",
        distribution="flashinfer-python",
        min_version=version,
        hint=f"pip install 'flashinfer-python>={version}'",
    )


NVFP4 = RunnerSpec(
    name="cutedsl",
    summary="FlashInfer's CuTe DSL NVFP4 kernels for Blackwell: masked grouped GEMMs, and the fused MoE",
    factory="moe_core_cutedsl.nvfp4:NvFp4Runner",
    prepare="moe_core_cutedsl.nvfp4_weights:prepare",
    # Rows [gate; up] with swizzled scales for `batched`; [up; gate] in 64-row chunks, MMA scales, for `standard`.
    layouts=frozenset({"masked_gate_up", "mma_up_gate64"}),
    priority=150,
    # Evidence: docs/maturity.md.
    maturity={"sm_100": Maturity.CONTRACT},
    why_not="moe_core_cutedsl.rules:nvfp4",
    options={
        "activations": "on `standard`: 'nvfp4', tokens are quantized and multiplied in NVFP4 (w4a4); 'bf16', they are "
        "not (w4a16) (default: 'nvfp4')",
        "fused_finalize": "on `standard`, true: the second GEMM adds a token's slots up itself, with atomics (default: "
        "false)",
    },
    support=Support(
        devices={"cuda": ("sm_100..sm_103",)},
        schemes=frozenset({"nvfp4"}),
        dtypes=frozenset({"bfloat16"}),
        activations=frozenset({"silu"}),
        gated=frozenset({True}),
        features=frozenset({"deterministic"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=128,
        intermediate_multiple=64,
        placements=frozenset({"linear"}),
        requires=(_flashinfer("0.7.1"), _CUTE, _TRITON),
    ),
)

SM90 = RunnerSpec(
    name="cutedsl_sm90",
    summary="FlashInfer's CuTe DSL experts for Hopper, unquantized, behind a sort of our own",
    factory="moe_core_cutedsl.sm90:Sm90Runner",
    prepare="moe_core_cutedsl.sm90_weights:prepare",
    update="moe_core_cutedsl.sm90_weights:update",
    layouts=frozenset({"up_gate32"}),
    priority=90,
    # Evidence: docs/maturity.md.
    maturity={"sm_90": Maturity.COMPILED},
    why_not="moe_core_cutedsl.rules:sm90",
    options={
        "fused_finalize": "true: GEMM2 adds a token's slots up itself, with atomics in the layer's dtype: less memory "
        "traffic, another rounding each slot, other bits each run (default: false)",
        "sort": "'own': our Triton kernels; 'flashinfer': FlashInfer's whole entry point, whose C++ sort is compiled "
        "by nvcc when it is first used (default: 'own')",
        "tactic": "[rows, columns of GEMM1, swizzle, columns of GEMM2]: one tile shape for calls of any size (default: "
        "by the number of tokens, from a model of the device)",
    },
    support=Support(
        devices={"cuda": ("sm_90",)},
        schemes=frozenset({"bf16"}),
        dtypes=frozenset({"bfloat16", "float16"}),
        activations=frozenset({"silu", "gelu_tanh", "relu2", "swiglu_oai"}),
        gated=frozenset({True, False}),
        activation_limit=True,
        features=frozenset({"deterministic"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=8,
        intermediate_multiple=8,
        requires=(_flashinfer("0.7.1"), _CUTE, _TRITON),
    ),
)

HOPPER = RunnerSpec(
    name="cutedsl_hopper",
    summary="our own CuTe DSL kernels for Hopper, made for prefill",
    factory="moe_core_cutedsl.hopper:HopperRunner",
    prepare="moe_core_cutedsl.hopper_weights:prepare",
    update="moe_core_cutedsl.hopper_weights:update",
    layouts=frozenset({"hopper_rows"}),
    priority=90,
    why_not="moe_core_cutedsl.rules:hopper",
    support=Support(
        devices={"cuda": ("sm_90",)},
        schemes=frozenset({"bf16", "fp8_block128"}),
        dtypes=frozenset({"bfloat16"}),
        activations=frozenset({"silu", "swiglu_oai"}),
        gated=frozenset({True}),
        activation_limit=True,
        features=frozenset({"bias"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=64,
        intermediate_multiple=32,
        requires=(_CUTE,),
    ),
)

_FLASHINFER_WANTS = Wants(
    id_spaces=(IdSpace.GLOBAL,),
    dropped=(DroppedSlot.NEGATIVE, DroppedSlot.NEVER),
    ids_dtypes=("int32", "int64"),
    optional=frozenset({"num_valid"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM}),
)
# The sort looks global ids up in the dispatcher's map, which spares the dispatcher a pass over them.
_SM90_WANTS = (
    replace(_FLASHINFER_WANTS, extras=frozenset({"expert_map"})),
    replace(_FLASHINFER_WANTS, id_spaces=(IdSpace.LOCAL,)),
)

FUSED = (
    FusedSpec(
        runner="cutedsl",
        format=BATCHED,
        target="moe_core_cutedsl.nvfp4:fused_batched",
        layouts=frozenset({"masked_gate_up"}),
        # Ids are the sender's and only pass through; weights and the sum belong to the dispatcher's combine.
        wants=Wants(
            id_spaces=(IdSpace.LOCAL, IdSpace.GLOBAL),
            dropped=(DroppedSlot.NEGATIVE, DroppedSlot.SINK, DroppedSlot.NEVER),
            payloads=("nvfp4", "bf16"),
            ids_dtypes=("int32", "int64"),
            can=frozenset(),
        ),
    ),
    FusedSpec(
        runner="cutedsl",
        format=STANDARD,
        target="moe_core_cutedsl.nvfp4:fused_standard",
        layouts=frozenset({"mma_up_gate64"}),
        wants=_FLASHINFER_WANTS,
    ),
    FusedSpec(
        runner="cutedsl_sm90",
        format=STANDARD,
        target="moe_core_cutedsl.sm90:fused_standard",
        wants=_SM90_WANTS,
    ),
    FusedSpec(
        runner="cutedsl_hopper",
        format=STANDARD,
        target="moe_core_cutedsl.hopper:fused_standard",
        wants=Wants(id_spaces=(IdSpace.LOCAL,)),
    ),
)


class CuteDslPlugin:
    """The hooks of the entry point `cutedsl`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="cutedsl", summary="CuTe DSL kernels for Hopper and Blackwell")

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """The three runners."""
        return (NVFP4, SM90, HOPPER)

    @hookimpl
    def moe_core_fused_funcs(self) -> tuple[FusedSpec, ...]:
        """The ways into them."""
        return FUSED


plugin = CuteDslPlugin()
