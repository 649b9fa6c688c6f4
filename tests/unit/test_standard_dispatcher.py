"""The standard dispatcher speaks the ids that were agreed on: space, encoding of dropped slots, dtype, map and mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_core
from moe_core import CanonicalWeights, MoeConfig, ParallelConfig, Registry, Settings, TopKOutput
from moe_core.formats import StandardCombineInput, StandardDispatchOutput
from moe_core.testing.fakes import fake_plugin, runner_like
from moe_core.vocabulary import DroppedSlot, IdSpace

LAYER = MoeConfig(num_experts=5, top_k=3, hidden_size=4, intermediate_size=4, dtype="float32")
GLOBAL, LOCAL = IdSpace.GLOBAL, IdSpace.LOCAL
NEVER, NEGATIVE, SINK = DroppedSlot.NEVER, DroppedSlot.NEGATIVE, DroppedSlot.SINK
#: Rank 1 of 2 owns the experts 1 and 3.
SECOND = ParallelConfig(ep_size=2, ep_rank=1, placement="round_robin", reduce="caller")


def sent(ids: list[list[int]], incoming: DroppedSlot, ranks: ParallelConfig, **wants: Any) -> StandardDispatchOutput:
    """What a runner with these wants is given."""
    seen: list[StandardDispatchOutput] = []

    def pre(binding: Any) -> Any:
        def keep(dispatched: StandardDispatchOutput, *rest: Any) -> torch.Tensor:
            seen.append(dispatched)
            return dispatched.hidden_states

        return keep

    class Echo:
        def __init__(self, binding: Any) -> None:
            pass

        def run(self, runner_input: Any, quant_info: Any, state: Any) -> Any:
            return runner_input

    def post(binding: Any) -> Any:
        return lambda out, *rest: StandardCombineInput(out)

    like = runner_like("reference", "spy", factory=Echo, adapter={"pre": pre, "post": post, "wants": wants})
    registry = Registry(plugins=[fake_plugin("acme", **like)], autoload=False, settings=Settings())
    local = ranks.local_experts(5)
    weights = CanonicalWeights(w13=torch.zeros(len(local), 8, 4), w2=torch.zeros(len(local), 4, 4))
    plan = moe_core.plan(
        LAYER, weights, ranks, registry=registry, settings=Settings(runner="spy", check=True), incoming=incoming
    )
    count = len(ids)
    plan(torch.zeros(count, 4), TopKOutput(torch.tensor(ids, dtype=torch.int32), torch.ones(count, 3)))
    return seen[0]


@pytest.mark.parametrize(
    ("incoming", "ids", "ranks", "space", "dropped", "expected"),
    [
        (NEGATIVE, [0, 4, -1], ParallelConfig(), LOCAL, NEGATIVE, [0, 4, -1]),
        (NEGATIVE, [0, 4, -1], ParallelConfig(), LOCAL, SINK, [0, 4, 5]),
        (SINK, [0, 4, 5], ParallelConfig(), GLOBAL, NEGATIVE, [0, 4, -1]),
        (SINK, [0, 4, 5], ParallelConfig(), LOCAL, SINK, [0, 4, 5]),
        (NEVER, [0, 4, 2], ParallelConfig(), LOCAL, NEVER, [0, 4, 2]),
        (NEGATIVE, [1, 3, -1], SECOND, LOCAL, NEGATIVE, [0, 1, -1]),
        (NEGATIVE, [3, 0, 4], SECOND, LOCAL, NEGATIVE, [1, -1, -1]),
        (NEGATIVE, [3, 0, -1], SECOND, LOCAL, SINK, [1, 2, 2]),
        (SINK, [3, 0, 5], SECOND, LOCAL, NEGATIVE, [1, -1, -1]),
        (SINK, [3, 0, 5], SECOND, LOCAL, SINK, [1, 2, 2]),
        (NEVER, [3, 0, 1], SECOND, LOCAL, NEGATIVE, [1, -1, 0]),
        (NEGATIVE, [3, 0, -1], SECOND, GLOBAL, NEGATIVE, [3, 0, -1]),
        (NEGATIVE, [3, 0, -1], SECOND, GLOBAL, SINK, [3, 0, 5]),
        (NEVER, [3, 0, 1], SECOND, GLOBAL, NEVER, [3, 0, 1]),
    ],
)
@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_ids_arrive_as_they_were_agreed_on(
    incoming: DroppedSlot,
    ids: list[int],
    ranks: ParallelConfig,
    space: IdSpace,
    dropped: DroppedSlot,
    expected: list[int],
    dtype: str,
) -> None:
    found = sent([ids, ids], incoming, ranks, id_spaces=(space,), dropped=(dropped,), ids_dtypes=(dtype,))
    assert found.topk_ids is not None
    assert found.topk_ids.tolist() == [expected, expected]
    assert found.topk_ids.dtype == getattr(torch, dtype)
    assert found.topk_weights is not None
    assert found.topk_weights.dtype == torch.float32
    assert found.expert_map is None
    assert found.expert_mask is None


@pytest.mark.parametrize(
    ("space", "dropped", "mask"),
    [
        (GLOBAL, NEGATIVE, [0, 1, 0, 1, 0]),
        (GLOBAL, SINK, [0, 1, 0, 1, 0, 0]),
        (LOCAL, NEGATIVE, [1, 1]),  # over the ids that the runner gets
        (LOCAL, SINK, [1, 1, 0]),
    ],
)
def test_map_and_mask_are_those_of_the_rank(space: IdSpace, dropped: DroppedSlot, mask: list[int]) -> None:
    extras = frozenset({"expert_map", "expert_mask"})
    found = sent([[1, 3, 0]], NEGATIVE, SECOND, id_spaces=(space,), dropped=(dropped,), extras=extras)
    assert found.expert_map is not None
    assert found.expert_map.tolist() == [-1, 0, -1, 1, -1]
    assert found.expert_mask is not None
    assert found.expert_mask.tolist() == mask
    assert found.expert_map.dtype == found.expert_mask.dtype == torch.int32
