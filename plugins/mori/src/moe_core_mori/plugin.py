"""What this plugin offers to moe_core, as data. Never imports torch or mori.

MoRI sends a token once to each rank that owns one of its experts, with all its ids and weights, and combine adds up one
row a rank: experts weight and sum their part. Received rows have no order; a device scalar says how many are valid.
The dispatcher writes the received ids as the terms say, in rows past the scalar too.
"""

from __future__ import annotations

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.doctor import DoctorCheck
from moe_core.request import PlanRequest
from moe_core.resolution import Candidate, PriorityNote
from moe_core.specs import DispatcherSpec, Offers, PluginInfo
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

_DEVICES = {"rocm": ("gfx942", "gfx950")}
# Evidence: tests/test_mori_layers.py, test_mori_facts.py.
_SEEN = {"gfx942": Maturity.CONTRACT, "gfx950": Maturity.CONTRACT}
_HINT = "pip install amd-mori (wheels for Python 3.10 and 3.12 on ROCm), or build github.com/ROCm/mori"
_MORI = Requires(module="mori", submodule="ops", distribution="amd-mori", min_version="1.1.1", hint=_HINT)
_MORI_V2 = Requires(
    module="mori",
    submodule="ops.dispatch_combine_v2",
    distribution="amd-mori",
    min_version="1.2.2",
    hint=f"a MoRI of 1.2.2 or newer: {_HINT}",
)
_FORMATS = {Phase.PREFILL: STANDARD, Phase.DECODE: STANDARD}
#: A wave of 64 threads holds the experts of a token, and one more.
_TOP_K = 63
_OFFERS = {
    STANDARD: Offers(
        id_spaces=frozenset({IdSpace.GLOBAL, IdSpace.LOCAL}),
        dropped=frozenset(DroppedSlot),
        payloads=frozenset({"bf16", "fp8_group128", "mxfp4"}),
        ids_dtypes=frozenset({"int32", "int64"}),
        extras=frozenset({"expert_map", "expert_mask", "num_valid"}),
        can=frozenset({Step.ROUTED_SCALING}),
        always=frozenset({Step.EP_REDUCE}),
    )
}
_MICRO_BATCHES = {
    "micro_batches": "how many results of dispatch may wait for their combine, each with buffers of its own (2)"
}
_LAUNCH = {
    **_MICRO_BATCHES,
    "gpus_per_node": "GPUs that reach each other over XGMI: 1, 2, 4 or 8 (8)",
    "warps": "warps of a block, at most 16; a rule chooses where it is not given",
    "blocks": "blocks of a launch, at most one a compute unit; a rule chooses where it is not given",
    "rdma_blocks": "blocks among them that drive RDMA; a rule chooses where it is not given",
}

NORMAL = DispatcherSpec(
    name="mori",
    summary="MoRI within a node and across nodes, the kernel chosen by ranks and tokens",
    factory="moe_core_mori.normal:NormalDispatcher",
    formats=_FORMATS,
    offers=_OFFERS,
    priority=150,
    maturity=_SEEN,
    why_not="moe_core_mori.rules:why_not",
    options={
        **_LAUNCH,
        "kernel": "a member of EpDispatchCombineKernelType by name; a rule chooses where it is not given",
    },
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16", "float32"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=128,
        max_top_k=_TOP_K,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, None),
        placements=frozenset({"linear"}),
        even_experts=True,
        requires=(_MORI,),
    ),
)

LOW_LATENCY = DispatcherSpec(
    name="mori_ll",
    summary="MoRI's asynchronous low-latency kernels",
    factory="moe_core_mori.low_latency:LowLatencyDispatcher",
    formats=_FORMATS,
    offers=_OFFERS,
    priority=140,
    split_phases=True,
    maturity=_SEEN,
    why_not="moe_core_mori.rules:why_not",
    options=_LAUNCH,
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16", "float32"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=128,
        max_top_k=_TOP_K,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, None),
        placements=frozenset({"linear"}),
        even_experts=True,
        requires=(_MORI,),
    ),
)

V2 = DispatcherSpec(
    name="mori_v2",
    summary="MoRI's second interface, within a node",
    factory="moe_core_mori.v2:V2Dispatcher",
    formats=_FORMATS,
    offers=_OFFERS,
    priority=130,
    maturity=_SEEN,
    why_not="moe_core_mori.rules:why_not",
    options={
        **_MICRO_BATCHES,
        "backend": "MoRI's kernel backend, flydsl or hip, where the installed one has the choice",
    },
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16"}),
        graph_capture=frozenset(Phase),
        # Rows travel in words of 16 bytes, those of mxfp4 too.
        hidden_multiple=32,
        max_top_k=_TOP_K,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, 8),
        placements=frozenset({"linear"}),
        even_experts=True,
        requires=(_MORI_V2,),
    ),
)


class MoriPlugin:
    """The hooks of the entry point `mori`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="mori", summary="AMD's MoRI dispatch and combine", url="https://github.com/ROCm/mori")

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """All its forms."""
        return (NORMAL, LOW_LATENCY, V2)

    @hookimpl
    def moe_core_adjust_priority(self, request: PlanRequest, candidate: Candidate) -> PriorityNote | None:
        """Which kernel would run, and why: said beside the candidate, and no change."""
        from moe_core_mori.rules import note

        return note(request, candidate)

    @hookimpl
    def moe_core_doubles(self) -> dict[str, str]:
        """A strict double of MoRI: `moe_core.testing.double("mori", arch="gfx942")`."""
        return {"mori": "moe_core_mori.testing:double"}

    @hookimpl
    def moe_core_doctor(self) -> tuple[DoctorCheck, ...]:
        """Whether the installed MoRI has the interface that the dispatchers call."""
        from moe_core_mori.diagnosis import checks

        return checks((_MORI, _MORI_V2))


plugin = MoriPlugin()
