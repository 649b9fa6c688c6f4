"""Dispatchers of one process for every format of the core, so that runners meet each of them without a network.

Tokens are replicated: with `ParallelConfig(reduce="caller")` every rank sees all of them and gives its experts' share.
They are made to be awkward: rows that nobody should read hold NaN, `grouped` is padded to an alignment, `standard` has
padding rows behind `num_valid`. The code is in `moe_core.testing.dispatching`; this module never imports torch.
"""

from __future__ import annotations

from typing import Final

from moe_core.capability import Support
from moe_core.hookspecs import hookimpl
from moe_core.quant import ACTIVATION_PAYLOADS
from moe_core.specs import DispatcherSpec, Offers, PluginInfo
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

# A scale a row can travel with its row; one for the whole tensor would mix tokens.
_PAYLOADS: Final = frozenset(
    {"bf16", *(p.id for p in ACTIVATION_PAYLOADS.values() if p.scale.granularity != "tensor" and not p.global_scale)}
)
_CAN: Final = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.ROUTED_SCALING})


def _spec(format_id: str, factory: str, summary: str, extras: frozenset[str]) -> DispatcherSpec:
    return DispatcherSpec(
        name=f"testing_{format_id}",
        summary=summary,
        factory=f"moe_core.testing.dispatching:{factory}",
        formats=dict.fromkeys(Phase, format_id),
        offers={
            format_id: Offers(
                id_spaces=frozenset(IdSpace),
                dropped=frozenset(DroppedSlot),
                payloads=_PAYLOADS,
                ids_dtypes=frozenset({"int32", "int64"}),
                extras=extras,
                can=_CAN,
            )
        },
        support=Support(
            devices={"*": ("*",)},
            tokens=frozenset({"replicated"}),
            features=frozenset({"no_combine", "deterministic"}),
            # Counts on the host cannot be had without waiting for the device.
            graph_capture=frozenset() if "host_counts" in extras else frozenset(Phase),
            host_sync=frozenset(Phase) if "host_counts" in extras else frozenset(),
        ),
        priority=1,
        maturity={"x86_64": Maturity.EXECUTED},
        options={"padding": "rows of garbage to add (an expert, for batched and grouped)"},
    )


TESTING_STANDARD: Final = _spec(
    STANDARD,
    "PaddedDispatcher",
    "token-major rows with padding rows behind num_valid",
    frozenset({"expert_map", "expert_mask", "host_counts", "num_valid"}),
)
TESTING_BATCHED: Final = _spec(BATCHED, "BatchedDispatcher", "expert-major rows, with NaN above masked_m", frozenset())
TESTING_GROUPED: Final = _spec(
    GROUPED, "GroupedDispatcher", "sorted rows, padded to an alignment with NaN", frozenset({"host_counts"})
)
TESTING_DISPATCHERS: Final = (TESTING_STANDARD, TESTING_BATCHED, TESTING_GROUPED)


class TestingPlugin:
    """The kit's dispatchers as a plugin: `Registry(plugins=[plugin])`."""

    __test__ = False  # not a test class for pytest
    __name__ = "testing"

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="testing", summary="dispatchers of one process for tests")

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """One a format."""
        return TESTING_DISPATCHERS


plugin = TestingPlugin()
