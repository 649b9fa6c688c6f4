"""Expert and tensor parallelism, all ranks in one process: their results sum to that of a single rank.

With reduce="caller" a rank needs no communication, so one process can play them all. Several processes run the same
sums through `ranks`, with the dispatcher's own reduction.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import Tensor

from moe_core.config import ParallelConfig
from moe_core.testing.case import Case, Setup
from moe_core.testing.refusals import Demand, refused
from moe_core.testing.registration import CheckSkipped, Refused, check


def ranks(parallel: ParallelConfig) -> Iterator[ParallelConfig]:
    """Every rank of a layout."""
    for ep_rank in range(parallel.ep_size):
        for tp_rank in range(parallel.tp_size):
            yield replace(parallel, ep_rank=ep_rank, tp_rank=tp_rank)


def uneven_map(size: int) -> tuple[int, ...]:
    """The rank of each of eight experts, for two or four ranks: in no order, and not as many on each."""
    return (0, 1, 0, 0, 1, 0, 0, 0) if size == 2 else (0, 1, 0, 2, 3, 0, 1, 0)


def sum_of_ranks(setup: Setup, parallel: ParallelConfig, pattern: str) -> tuple[Tensor, Tensor]:
    """(the sum over all ranks, the formula for the whole layer)."""
    layer = setup.layer(30, tokens=20, pattern=pattern)
    total = None
    for rank in ranks(parallel):
        part = setup.plan(layer.weights, rank)(layer.hidden, layer.topk).double()
        total = part if total is None else total + part
    if total is None:
        raise CheckSkipped("a layout without ranks")
    return total, setup.expected(layer)


@check("numerics.expert_parallel", each="placement", needs="run")
def expert_parallel(case: Case) -> Refused | None:
    """With this placement, the results of all expert-parallel ranks sum to that of the whole layer."""
    support = case.component.support
    low, high = support.ep_sizes
    sizes = [size for size in (2, 4) if low <= size and (high is None or size <= high)]
    if not sizes:
        wanted = Demand("ep_size 2", "parallel.ep", lambda s: False)
        return refused(case, wanted, parallel=ParallelConfig(ep_size=2, reduce="caller"))
    if case.param not in support.placements:
        placement: str | tuple[int, ...] = (0, 0, 0, 0, 1, 1, 1, 1) if case.param == "map" else case.param
        wanted = Demand(f"placement {case.param}", "parallel.placement", lambda s: False, {"num_experts": 8})
        return refused(case, wanted, parallel=ParallelConfig(ep_size=2, placement=placement, reduce="caller"))
    for size in sizes:
        placement = uneven_map(size) if case.param == "map" else case.param
        layout = ParallelConfig(ep_size=size, placement=placement, reduce="caller")
        for setup in case.setups(parallel=layout, num_experts=8):
            for pattern in ("uniform", "dropped"):
                total, expected = sum_of_ranks(setup, layout, pattern)
                setup.close(total, expected, f"the sum over {size} EP ranks, placement {case.param},")
    return None


@check("numerics.tensor_parallel", needs="run")
def tensor_parallel(case: Case) -> None:
    """The results of two tensor-parallel ranks, each with half of the intermediate size, sum to that of the layer."""
    layout = ParallelConfig(tp_size=2, reduce="caller")
    for setup in case.setups(parallel=layout):
        total, expected = sum_of_ranks(setup, layout, "uniform")
        setup.close(total, expected, "the sum over 2 TP ranks")
    if "bias" in case.component.support.features:
        for setup in case.setups("bias", parallel=layout, bias=True):
            total, expected = sum_of_ranks(setup, layout, "uniform")
            setup.close(total, expected, "the sum over 2 TP ranks with biases")


@check("numerics.mixed_parallel", needs="run")
def mixed_parallel(case: Case) -> None:
    """Two expert-parallel times two tensor-parallel ranks sum to the whole layer."""
    low, high = case.component.support.ep_sizes
    if low > 2 or (high is not None and high < 2):
        raise CheckSkipped("it does not run with ep_size 2")
    layout = ParallelConfig(tp_size=2, ep_size=2, reduce="caller")
    for setup in case.setups(parallel=layout):
        total, expected = sum_of_ranks(setup, layout, "skewed")
        setup.close(total, expected, "the sum over 2 x 2 ranks")
