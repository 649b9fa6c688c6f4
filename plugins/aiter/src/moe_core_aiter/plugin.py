"""What this plugin offers to moe_core, as data. Never imports torch or aiter."""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.doctor import DoctorCheck, DoctorResult
from moe_core.specs import AdapterSpec, PluginInfo, RunnerSpec, Wants
from moe_core.testing.profile import ConformanceProfile
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step
from moe_core_aiter.schemes import SCHEMES

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
    requirements="moe_core_aiter.rules:requirements",
    layouts=frozenset(scheme.layout for scheme in SCHEMES.values()),
    priority=200,
    why_not="moe_core_aiter.rules:why_not",
    # Evidence: docs/amd.md.
    maturity={"gfx942": Maturity.CONTRACT, "gfx950": Maturity.CONTRACT},
    options={
        "round_tokens": "true: calls of 256 rows and more quantize the tokens of mxfp4_w4a16 layers to fp8, in one "
        "call; false: they are cut into smaller ones, which are exact and slower (default: false)",
        "block_size_m": "16, 32, 64 or 128: rows of a tile of sorted tokens (default: AITER's choice; its issue 4032 "
        "is a NaN with 16)",
    },
    support=Support(
        devices={"rocm": ("gfx942", "gfx950")},
        schemes=frozenset(SCHEMES),
        # AITER builds its kernels for blocks of 32 for gfx950 only, but for those of int4.
        scheme_archs={name: ("gfx950",) for name in ("mxfp4", "mxfp4_w4a16", "mxfp8")},
        dtypes=frozenset({"bfloat16", "float16"}),
        activations=frozenset({"silu", "gelu", "swiglu_oai"}),
        gated=frozenset({True}),
        activation_limit=True,
        features=frozenset({"bias", "router_weight_on_input"}),
        graph_capture=frozenset(Phase),
        group_sizes=frozenset({32}),
        hidden_multiple=32,
        # A sorted id packs the slot into 8 bits and the token into 24; one slot may be added.
        max_top_k=254,
        max_tokens=2**24 - 1,
        requires=(_AITER,),
    ),
)

# A negative id writes out of bounds in most of its sorting kernels: dropped slots go to a masked expert.
_MASKED = Wants(
    id_spaces=(IdSpace.GLOBAL, IdSpace.LOCAL),
    dropped=(DroppedSlot.NEVER, DroppedSlot.SINK),
    payloads=("fp8_group128", "fp8_token", "mxfp4", "bf16"),
    extras=frozenset({"expert_mask"}),
    optional=frozenset({"num_valid"}),
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


def _examine() -> DoctorResult:
    missing = _AITER.why_not(RUNNER.subject)
    if missing:
        # Not having it is no fault where nothing else of AMD's is.
        return DoctorResult(missing[0].code == "dep.missing", str(missing[0].message), missing[0].hint)
    from moe_core_aiter.build import examine

    return examine()


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

    @hookimpl
    def moe_core_conformance(self) -> ConformanceProfile:
        """What the kit asks for and its kernels cannot do."""
        return ConformanceProfile(
            expected_failures={
                "runner:aiter/numerics.activation_limit": "never: its kernels clamp at 7, and for swiglu_oai only"
            }
        )

    @hookimpl
    def moe_core_doubles(self) -> dict[str, str]:
        """A strict double of AITER: `moe_core.testing.double("aiter", arch="gfx942")`."""
        return {"aiter": "moe_core_aiter.testing:double"}

    @hookimpl
    def moe_core_doctor(self) -> tuple[DoctorCheck, ...]:
        """Whether the installed build is one whose interface was recorded."""

        return (DoctorCheck("the interface of the installed AITER", _examine),)


plugin = AiterPlugin()
