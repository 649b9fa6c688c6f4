"""The words of the project: open string ids, and the few closed enums.

Whatever a plugin may add (backends, formats, schemes, payloads, activations, devices) is an open string.
An enum stands only where the core itself must handle every value. Never imports torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Final, TypeAlias

BackendName: TypeAlias = str
FormatId: TypeAlias = str
SchemeId: TypeAlias = str
PayloadId: TypeAlias = str
DeviceType: TypeAlias = str

PLUGIN_API: Final = (1, 0)
"""(major, minor) of the plugin interface. A plugin needs the same major and at most this minor."""

ENTRY_POINT_GROUP: Final = "moe_core.plugins"

# Formats that the core defines (moe_core.formats); plugins may register more.
STANDARD: Final = "standard"
BATCHED: Final = "batched"
GROUPED: Final = "grouped"

# How a router's decision reaches the dispatcher.
TOPK_STANDARD: Final = "standard"
TOPK_BYPASSED: Final = "bypassed"


class IdSpace(StrEnum):
    """What an expert id counts."""

    GLOBAL = "global"  # experts of the whole model
    LOCAL = "local"  # experts of this EP rank


class DroppedSlot(StrEnum):
    """How a top-k slot that must not be computed is written."""

    NEVER = "never"  # there are none
    NEGATIVE = "negative"  # id -1
    SINK = "sink"  # id = number of experts of the id space; a mask has one more entry, 0


class Phase(StrEnum):
    """What a forward serves: a few tokens a sequence, or whole prompts."""

    PREFILL = "prefill"
    DECODE = "decode"


class Step(StrEnum):
    """A semantic step that must happen exactly once in a layer. Terms name the owner of each."""

    ROUTER_WEIGHT = "router_weight"  # multiply by the router's weight
    ROUTED_SCALING = "routed_scaling"  # multiply by routed_scaling_factor
    TOPK_SUM = "topk_sum"  # sum the top-k slots of a token (those of this rank)
    EP_REDUCE = "ep_reduce"  # sum over expert-parallel ranks
    TP_REDUCE = "tp_reduce"  # sum over tensor-parallel ranks


class Owner(StrEnum):
    """Who performs a step."""

    ROUTER = "router"
    DISPATCHER = "dispatcher"
    RUNNER = "runner"
    CALLER = "caller"


class Maturity(StrEnum):
    """How a backend was verified on an architecture, best first. See docs/maturity.md."""

    EXECUTED = "executed"  # ran on that hardware; a dated result is in the repository
    EMULATED = "emulated"  # its machine code ran in an emulator
    COMPILED = "compiled"  # its kernels compile for it
    CONTRACT = "contract"  # calls checked against the vendor's signatures and a strict double
    UNTESTED = "untested"
