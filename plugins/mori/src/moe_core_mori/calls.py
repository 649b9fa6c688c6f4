"""Every call of MoRI that this plugin makes, and nothing else: arguments by name, so that they can be held to facts.

`tests/test_mori_facts.py` reads the calls below out of this file and compares them with the recorded versions. `check`
does the same with the installed build when a plan is bound. R = rows that may be received, M = most tokens a rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any, Final

from torch import Tensor

from moe_core.errors import BindError
from moe_core_mori.facts import OLDEST, OLDEST_V2

#: What V1 and V2 dispatchers need of the installed build: dotted name -> parameters that are always given.
V1: Final[dict[str, tuple[str, ...]]] = {
    "mori.ops.EpDispatchCombineConfig": (
        "data_type",
        "rank",
        "world_size",
        "hidden_dim",
        "scale_dim",
        "scale_type_size",
        "max_token_type_size",
        "max_num_inp_token_per_rank",
        "num_experts_per_rank",
        "num_experts_per_token",
        "warp_num_per_block",
        "block_num",
        "kernel_type",
        "gpu_per_node",
        "rdma_block_num",
        "num_qp_per_pe",
    ),
    "mori.ops.EpDispatchCombineOp.__init__": ("config",),
    "mori.ops.EpDispatchCombineOp.dispatch": (
        "input",
        "weights",
        "scales",
        "indices",
        "block_num",
        "rdma_block_num",
        "warp_per_block",
    ),
    "mori.ops.EpDispatchCombineOp.combine": (
        "input",
        "weights",
        "indices",
        "block_num",
        "rdma_block_num",
        "warp_per_block",
    ),
    "mori.shmem.shmem_get_unique_id": (),
    "mori.shmem.shmem_init_attr": ("flags", "rank", "nranks", "unique_id"),
    "mori.shmem.shmem_mype": (),
    "mori.shmem.shmem_npes": (),
}
ASYNCHRONOUS: Final[dict[str, tuple[str, ...]]] = {
    "mori.ops.EpDispatchCombineOp.dispatch_send": (
        "input",
        "weights",
        "scales",
        "indices",
        "block_num",
        "warp_per_block",
    ),
    "mori.ops.EpDispatchCombineOp.dispatch_recv": ("block_num", "warp_per_block"),
    "mori.ops.EpDispatchCombineOp.combine_send": ("input", "weights", "indices", "block_num", "warp_per_block"),
    "mori.ops.EpDispatchCombineOp.combine_recv": ("block_num", "warp_per_block"),
}
V2: Final[dict[str, tuple[str, ...]]] = {
    "mori.ops.dispatch_combine_v2.EpDispatchCombineConfig": (
        "rank",
        "world_size",
        "hidden_dim",
        "max_num_inp_token_per_rank",
        "num_experts_per_rank",
        "num_experts_per_token",
        "data_type",
        "dispatch_data_type",
        "combine_data_type",
        "scale_dim",
        "scale_type_size",
    ),
    "mori.ops.dispatch_combine_v2.EpDispatchCombineOp.dispatch": (
        "input",
        "weights",
        "scales",
        "indices",
        "return_routing",
    ),
    "mori.ops.dispatch_combine_v2.EpDispatchCombineOp.combine": ("input", "routing"),
    "mori.ops.dispatch_combine_v2.EpDispatchCombineOp.reset": (),
    "mori.ops.dispatch_combine_v2.EpDispatchCombineOp.close": (),
    "mori.cco.Communicator.get_unique_id": (),
    "mori.cco.Communicator.init": ("nranks", "rank", "unique_id", "per_rank_vmm"),
    "mori.cco.Communicator.destroy": (),
}
#: Given only where the installed signature has it: dotted name -> parameters.
PROBED: Final[dict[str, tuple[str, ...]]] = {
    "mori.ops.dispatch_combine_v2.EpDispatchCombineConfig": ("kernel_backend",),
}


def module(name: str) -> ModuleType:
    """`mori.ops`, say. Raises BindError where the installed MoRI has it not, or it does not load."""
    try:
        return import_module(name)
    except (ImportError, OSError, RuntimeError, AttributeError) as error:
        raise BindError(
            f"MoRI is installed, but {name} does not load: {type(error).__name__}: {error}",
            hint="its wheels need ROCm 7 (libamdhip64.so.7), and the second interface the package flydsl; "
            "`moe-core doctor` repeats this",
        ) from error


def _find(name: str) -> Any:
    """What a dotted name stands for, or None."""
    parts, where = name.split("."), 2
    while where < len(parts) - 1 and parts[where].islower():
        where += 1
    found: Any = module(".".join(parts[:where]))
    for part in parts[where:]:
        found = getattr(found, part, None)
    return found


def takes(name: str) -> frozenset[str] | None:
    """Parameters of a callable of the installed build; None where it has none of that name."""
    found = _find(name)
    if not callable(found):
        return None
    return frozenset(inspect.signature(found).parameters)


def check(*wanted: dict[str, tuple[str, ...]]) -> None:
    """Hold our calls to the installed signatures. Raises BindError with everything that does not fit."""
    problems = []
    for name, parameters in (item for table in wanted for item in table.items()):
        has = takes(name)
        if has is None:
            problems.append(f"{name} is missing")
        elif lacking := [parameter for parameter in parameters if parameter not in has]:
            problems.append(f"{name} does not take {', '.join(lacking)}")
    if problems:
        oldest = OLDEST_V2 if V2 in wanted else OLDEST
        raise BindError(
            "the installed MoRI is not the one that this plugin calls:\n    " + "\n    ".join(problems),
            hint=f"it knows the interface of {oldest} and newer; report this with the output of pip show amd-mori",
        )


def kernel_type(name: str) -> Any:
    """A member of EpDispatchCombineKernelType, by its name. Raises BindError where the installed build lacks it."""
    kinds = module("mori.ops").EpDispatchCombineKernelType
    found = getattr(kinds, name, None)
    if found is None:
        raise BindError(
            f"the installed MoRI has no kernel {name!r}",
            hint="install a newer MoRI, or leave the option kernel out",
        )
    return found


def join_symmetric_memory(rank: int, ranks: int, share: Callable[[Any], Any]) -> None:
    """Make MoRI's symmetric heap over `ranks` processes, once a process; where there is one already, MoRI keeps it.

    share: gives every rank what rank 0 gave. Raises BindError where the heap spans other processes.
    """
    shmem = module("mori.shmem")
    unique_id = share(shmem.shmem_get_unique_id() if rank == 0 else None)
    shmem.shmem_init_attr(flags=shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, rank=rank, nranks=ranks, unique_id=unique_id)
    there = shmem.shmem_mype(), shmem.shmem_npes()
    if there != (rank, ranks):
        raise BindError(
            f"this process is number {there[0]} of {there[1]} of MoRI's symmetric heap, and EP rank {rank} of {ranks}",
            hint="a process has one heap: let whatever else uses MoRI here use the same ranks",
        )


def make_v1(
    *,
    dtype: Any,
    rank: int,
    ranks: int,
    hidden: int,
    scale_words: int,
    most: int,
    experts_a_rank: int,
    top_k: int,
    kernel: str,
    warps: int,
    blocks: int,
    rdma_blocks: int,
    gpus_per_node: int,
) -> Any:
    """An EpDispatchCombineOp of the first interface.

    It meets on torch's default group: all processes make it together.
    """
    ops = module("mori.ops")
    config = ops.EpDispatchCombineConfig(
        data_type=dtype,
        rank=rank,
        world_size=ranks,
        hidden_dim=hidden,
        scale_dim=scale_words,
        scale_type_size=4,
        max_token_type_size=dtype.itemsize,
        max_num_inp_token_per_rank=most,
        num_experts_per_rank=experts_a_rank,
        num_experts_per_token=top_k,
        warp_num_per_block=warps,
        block_num=blocks,
        kernel_type=kernel_type(kernel),
        gpu_per_node=gpus_per_node,
        rdma_block_num=rdma_blocks,
        num_qp_per_pe=2,
    )
    return ops.EpDispatchCombineOp(config=config)


def dispatch_v1(op: Any, rows: Tensor, weights: Tensor, scales: Tensor | None, ids: Tensor, launch: Any) -> Any:
    """rows [T, H], weights float32 and ids int32 [T, K] -> rows, weights, scales, ids [R, ..], received int32 [1]."""
    return op.dispatch(
        input=rows,
        weights=weights,
        scales=scales,
        indices=ids,
        block_num=launch.blocks,
        rdma_block_num=launch.rdma_blocks,
        warp_per_block=launch.warps,
    )


def combine_v1(op: Any, rows: Tensor, ids: Tensor, launch: Any) -> Tensor:
    """rows [R or fewer, H], ids as dispatched -> the sums over ranks, [M, H]; rows past this rank's are undefined.

    weights is None: MoRI would add up the weights beside the rows, and never multiply with them.
    """
    result: Tensor = op.combine(
        input=rows,
        weights=None,
        indices=ids,
        block_num=launch.blocks,
        rdma_block_num=launch.rdma_blocks,
        warp_per_block=launch.warps,
    )[0]
    return result


def dispatch_send(op: Any, rows: Tensor, weights: Tensor, scales: Tensor | None, ids: Tensor, launch: Any) -> Any:
    """As `dispatch_v1`, but what it gives is undefined before `dispatch_receive`."""
    return op.dispatch_send(
        input=rows,
        weights=weights,
        scales=scales,
        indices=ids,
        block_num=launch.blocks,
        warp_per_block=launch.warps,
    )


def dispatch_receive(op: Any, launch: Any) -> None:
    """The other half."""
    op.dispatch_recv(block_num=launch.blocks, warp_per_block=launch.warps)


def combine_send(op: Any, rows: Tensor, ids: Tensor, launch: Any) -> Tensor:
    """As `combine_v1`, but what it gives is undefined before `combine_receive`."""
    result: Tensor = op.combine_send(
        input=rows, weights=None, indices=ids, block_num=launch.blocks, warp_per_block=launch.warps
    )[0]
    return result


def combine_receive(op: Any, launch: Any) -> None:
    """The other half."""
    op.combine_recv(block_num=launch.blocks, warp_per_block=launch.warps)


def make_communicator(rank: int, ranks: int, bytes_a_rank: int, share: Callable[[Any], Any]) -> Any:
    """The second interface's own connection of the ranks. bytes_a_rank: addresses for their symmetric memory."""
    communicator = module("mori.cco").Communicator
    unique_id = share(communicator.get_unique_id() if rank == 0 else None)
    return communicator.init(nranks=ranks, rank=rank, unique_id=unique_id, per_rank_vmm=bytes_a_rank)


def make_v2(
    communicator: Any,
    *,
    dtype: Any,
    sent_dtype: Any,
    rank: int,
    ranks: int,
    hidden: int,
    scale_words: int,
    most: int,
    experts_a_rank: int,
    top_k: int,
    backend: str | None,
) -> Any:
    """An EpDispatchCombineOp of the second interface; its launch sizes are MoRI's own tables'."""
    ops = module("mori.ops.dispatch_combine_v2")
    probed: dict[str, Any] = {} if backend is None else {"kernel_backend": backend}
    config = ops.EpDispatchCombineConfig(
        rank=rank,
        world_size=ranks,
        hidden_dim=hidden,
        max_num_inp_token_per_rank=most,
        num_experts_per_rank=experts_a_rank,
        num_experts_per_token=top_k,
        data_type=dtype,
        dispatch_data_type=sent_dtype,
        combine_data_type=dtype,
        scale_dim=scale_words,
        scale_type_size=4 if scale_words else 0,
        **probed,
    )
    return ops.EpDispatchCombineOp(config, communicator)


def dispatch_v2(op: Any, rows: Tensor, weights: Tensor, scales: Tensor | None, ids: Tensor) -> Any:
    """As `dispatch_v1`, with a routing for `combine_v2` behind; the words of scales may lie strided."""
    return op.dispatch(input=rows, weights=weights, scales=scales, indices=ids, return_routing=True)


def combine_v2(op: Any, rows: Tensor, routing: Any) -> Tensor:
    """rows [R or fewer, H] -> the sums over ranks, [T, H]."""
    result: Tensor = op.combine(input=rows, routing=routing)[0]
    return result
