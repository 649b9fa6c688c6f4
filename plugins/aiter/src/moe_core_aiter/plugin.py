"""What this plugin offers to moe_core, as data. Never imports torch or aiter."""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import AdapterSpec, PluginInfo, RunnerSpec, Wants
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace, Phase, Step

_AITER = Requires(
    module="aiter",
    submodule="fused_moe",
    hint="install AMD's AITER from source (github.com/ROCm/aiter) or use a ROCm image; "
    "PyPI's 'aiter' is another project",
)

RUNNER = RunnerSpec(
    name="aiter",
    summary="AMD's AITER fused MoE for Instinct MI300 and MI350",
    factory="moe_core_aiter.runner:AiterRunner",
    prepare="moe_core_aiter.weights:prepare",
    update="moe_core_aiter.weights:update",
    layouts=frozenset({"shuffled", "mxfp4_shuffled", "mxfp4_interleaved", "mxfp8_shuffled", "int4_shuffled"}),
    priority=200,
    why_not="moe_core_aiter.rules:why_not",
    support=Support(
        devices={"rocm": ("gfx942", "gfx950")},
        schemes=frozenset(
            {
                "bf16",
                "fp8_tensor",
                "fp8_channel",
                "fp8_block128",
                "int8_channel",
                "int4_w4a16",
                "mxfp4_w4a16",
                "mxfp4",
                "mxfp8",
            }
        ),
        scheme_archs={"int4_w4a16": ("gfx942",), "mxfp4": ("gfx950",), "mxfp8": ("gfx950",)},
        dtypes=frozenset({"bfloat16", "float16"}),
        activations=frozenset({"silu", "gelu", "swiglu_oai"}),
        gated=frozenset({True}),
        activation_limit=True,
        features=frozenset({"bias", "router_weight_on_input"}),
        graph_capture=frozenset(Phase),
        group_sizes=frozenset({32}),
        hidden_multiple=32,
        # A sorted id packs the slot into 8 bits and the token into 24.
        max_top_k=255,
        max_tokens=2**24 - 1,
        requires=(_AITER,),
    ),
)

# A negative id writes out of bounds in most of its sorting kernels: dropped slots go to a masked expert.
_MASKED = Wants(
    id_spaces=(IdSpace.GLOBAL, IdSpace.LOCAL),
    dropped=(DroppedSlot.NEVER, DroppedSlot.SINK),
    # mxfp8 is missing: fused_moe quantizes such tokens again and ignores their scales.
    payloads=("fp8_group128", "fp8_token", "mxfp4", "bf16"),
    extras=frozenset({"expert_mask"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM}),
)
# With all experts on this rank and no slot dropped, there is nothing to mask. Local ids say so: among several ranks,
# NEVER is agreed for global ids only.
_UNMASKED = replace(_MASKED, id_spaces=(IdSpace.LOCAL,), dropped=(DroppedSlot.NEVER,), extras=frozenset())

ADAPTERS = (
    AdapterSpec(
        runner="aiter",
        format=STANDARD,
        pre="moe_core_aiter.adapters:pre_standard",
        post="moe_core_aiter.adapters:post_standard",
        wants=(_UNMASKED, _MASKED),
    ),
)


class AiterPlugin:
    """The hooks of the entry point `aiter`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="aiter", summary="AMD's AITER fused MoE kernels", url="https://github.com/ROCm/aiter")

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """The runner."""
        return (RUNNER,)

    @hookimpl
    def moe_core_adapters(self) -> tuple[AdapterSpec, ...]:
        """Its adapters. There is none for `batched`: AITER takes token-major rows only."""
        return ADAPTERS


plugin = AiterPlugin()
