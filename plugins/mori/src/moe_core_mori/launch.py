"""Which of MoRI's first-interface kernels a layer gets, and how large they are launched: rules with their reasons.

Arithmetic on what the request says; imports no torch and no mori, so that selection and explanation can use it.

sizes, warps x blocks (blocks for RDMA): within a node 16 x 80, as SGLang and vLLM run it; across nodes 8 x 64 (32) on
gfx950 and 16 x 32 (16) on gfx942, as vLLM runs it; asynchronous 8 x 64 (32), as SGLang runs it. Never more blocks than
the device has compute units: MoRI's blocks wait for each other, for ever where one is not resident.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from moe_core.errors import BindError
from moe_core.request import PlanRequest

#: GPUs that reach each other over XGMI, at most; MoRI's kernels within a node hold arrays of so many.
NODE: Final = 8
#: What MoRI takes for the GPUs of a node.
NODES: Final = (1, 2, 4, 8)
#: Across nodes, up to so many tokens a rank the low-latency variant is taken; the threshold that SGLang has.
FEW_TOKENS: Final = 256
WITHIN: Final = ("IntraNode", "IntraNodeLL")
ACROSS: Final = ("InterNodeV1", "InterNodeV1LL", "InterNode")
ASYNCHRONOUS: Final = "AsyncLL"
#: Kernels that were seen to put the rows received without gaps from row 0 on, so that the rest can be cut off.
COMPACT: Final = ("IntraNode", "AsyncLL")
_ACROSS_SIZES: Final = {"gfx942": (16, 32, 16), "gfx950": (8, 64, 32)}


@dataclass(frozen=True, slots=True)
class Launch:
    """kernel: a member of EpDispatchCombineKernelType. gpus_per_node: as MoRI is told. why: which rules spoke."""

    kernel: str
    warps: int
    blocks: int
    rdma_blocks: int
    gpus_per_node: int
    why: str = field(compare=False)

    @property
    def compact(self) -> bool:
        """Whether rows past the number received may be cut off."""
        return self.kernel in COMPACT


def gpus_per_node(ranks: int, options: Mapping[str, Any]) -> int:
    """Ranks of one node: the option, 8 where it is not given, never more than there are."""
    given = options.get("gpus_per_node", NODE)
    if type(given) is not int or given not in NODES:
        raise BindError(f"the option gpus_per_node is 1, 2, 4 or 8, got {given!r}")
    return min(given, ranks)


def choose(request: PlanRequest, options: Mapping[str, Any]) -> Launch:
    """For `mori`. Raises BindError for options that make no sense."""
    ranks, tokens = request.parallel.ep_size, request.max_tokens or 0
    node = gpus_per_node(ranks, options)
    fits = WITHIN if ranks <= node else ACROSS
    if ranks <= node:
        kernel, why = "IntraNode", f"{ranks} ranks of one node"
    elif tokens <= FEW_TOKENS:
        kernel, why = "InterNodeV1LL", f"{ranks} ranks on nodes of {node}, at most {tokens} tokens a rank"
    else:
        kernel, why = "InterNodeV1", f"{ranks} ranks on nodes of {node}, more than {FEW_TOKENS} tokens a rank"
    given = options.get("kernel")
    if given is not None:
        if given not in fits:
            raise BindError(
                f"the option kernel is {given!r}, and {why.split(',')[0]} run {' or '.join(fits)}",
                hint="leave it out, and a rule chooses; for AsyncLL use the dispatcher mori_ll",
            )
        kernel, why = given, "asked for by the option kernel"
    sizes = (16, 80, 0) if kernel in WITHIN else _ACROSS_SIZES.get(request.hardware.arch, (8, 64, 32))
    return _sized(kernel, sizes, node, why, request, options)


def choose_asynchronous(request: PlanRequest, options: Mapping[str, Any]) -> Launch:
    """For `mori_ll`."""
    node = gpus_per_node(request.parallel.ep_size, options)
    return _sized(ASYNCHRONOUS, (8, 64, 32), node, "the asynchronous kernels, send and receive apart", request, options)


def _sized(
    kernel: str, sizes: tuple[int, int, int], node: int, why: str, request: PlanRequest, options: Mapping[str, Any]
) -> Launch:
    warps, blocks, rdma = (
        _number(options, name, default) for name, default in zip(("warps", "blocks", "rdma_blocks"), sizes, strict=True)
    )
    units = request.hardware.compute_units
    if request.hardware.device_type == "rocm" and 0 < units < blocks:  # of a CPU they are cores
        why += f"; {blocks} blocks cut to the {units} compute units"
        blocks = units
    if warps < 1 or warps > 16 or blocks < 1:
        raise BindError(f"{kernel} is launched with 1 to 16 warps and at least one block, got {warps} and {blocks}")
    if kernel not in WITHIN and not 0 < rdma < blocks:
        if "rdma_blocks" in options or blocks < 2:
            raise BindError(f"{kernel} gives RDMA at least one of its {blocks} blocks and not all, got {rdma}")
        rdma = blocks // 2
    pinned = sorted(options.keys() & {"warps", "blocks", "rdma_blocks"})
    if pinned:
        why += f"; {', '.join(pinned)} given by options"
    return Launch(kernel, warps, blocks, rdma, node, why)


def _number(options: Mapping[str, Any], name: str, default: int) -> int:
    given = options.get(name, default)
    if not isinstance(given, int) or isinstance(given, bool) or given < 0:
        raise BindError(f"the option {name} is a number that is not negative, got {given!r}")
    return given
