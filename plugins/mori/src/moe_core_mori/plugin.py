"""What this plugin offers to moe_core, as data. Never imports torch or mori.

MoRI sends a token once to each rank that owns one of its experts, with all its ids and weights, and combine adds up one
row a rank: experts weight and sum their part. Received rows have no order; a device scalar says how many are valid.
Where the terms ask for local ids or for a sink, the dispatcher rewrites the received ids, those past the scalar too.
"""

from __future__ import annotations

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import DispatcherSpec, Offers, PluginInfo
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace, PayloadId, Phase, Step

_DEVICES = {"rocm": ("gfx942", "gfx950")}
_HINT = "pip install amd-mori (wheels for Python 3.10 and 3.12 on ROCm), or build github.com/ROCm/mori"
_MORI = Requires(module="mori", submodule="ops", distribution="amd-mori", hint=_HINT)
_MORI_V2 = Requires(
    module="mori",
    submodule="ops.dispatch_combine_v2",
    distribution="amd-mori",
    min_version="1.2.2",
    hint=f"a MoRI of 1.2.2 or newer: {_HINT}",
)
_FORMATS = {Phase.PREFILL: STANDARD, Phase.DECODE: STANDARD}


def _offers(*payloads: PayloadId) -> dict[str, Offers]:
    return {
        STANDARD: Offers(
            id_spaces=frozenset({IdSpace.GLOBAL, IdSpace.LOCAL}),
            dropped=frozenset({DroppedSlot.NEGATIVE, DroppedSlot.SINK}),
            payloads=frozenset(payloads),
            extras=frozenset({"expert_map", "expert_mask", "num_valid"}),
            can=frozenset({Step.ROUTED_SCALING}),
            always=frozenset({Step.EP_REDUCE}),
        )
    }


NORMAL = DispatcherSpec(
    name="mori",
    summary="MoRI within a node and across nodes, the kernel chosen by ranks and tokens",
    factory="moe_core_mori.normal:NormalDispatcher",
    formats=_FORMATS,
    offers=_offers("bf16", "fp8_group128", "mxfp4"),
    priority=150,
    why_not="moe_core_mori.rules:why_not",
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16", "float32"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=128,
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
    offers=_offers("bf16", "fp8_group128", "mxfp4"),
    priority=140,
    why_not="moe_core_mori.rules:why_not",
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16", "float32"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=128,
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
    offers=_offers("bf16"),
    priority=130,
    why_not="moe_core_mori.rules:why_not",
    support=Support(
        devices=_DEVICES,
        dtypes=frozenset({"bfloat16"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=8,
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


plugin = MoriPlugin()
