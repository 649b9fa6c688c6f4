"""`allgather` between its phases, without other ranks."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_core
from moe_core import MoeConfig, ParallelConfig, RunningState
from moe_core.dispatchers.torch_distributed import allgather
from moe_core.dispatchers.torch_distributed.groups import Groups
from moe_core.formats import StandardCombineInput
from moe_core.specs import Terms
from moe_core.testing import make_layer
from moe_core.vocabulary import DroppedSlot, IdSpace


def test_what_travels_is_held_until_it_has_arrived(monkeypatch: pytest.MonkeyPatch) -> None:
    """Collectives read it on a stream of their own: its memory must not be somebody else's before they end."""
    travelling: list[Any] = []

    def gather(into: list[torch.Tensor], parts: list[torch.Tensor], group: Any) -> list[Any]:
        travelling.extend(weakref.ref(part) for part in parts)
        return []

    def reduce_scatter(into: torch.Tensor, part: torch.Tensor, **_: Any) -> Any:
        travelling.append(weakref.ref(part))

    monkeypatch.setattr(allgather, "make_groups", lambda binding: Groups(None, None, (0, 1)))
    monkeypatch.setattr(allgather, "gather", gather)
    monkeypatch.setattr(allgather, "reduce_scatter", reduce_scatter)
    config = MoeConfig(num_experts=4, top_k=2, hidden_size=128, intermediate_size=32, dtype="float32")
    layout = ParallelConfig(ep_size=2, ep_rank=0, reduce="caller")
    layer = make_layer(config, 1, tokens=3)
    plan = moe_core.plan(config, layer.weights.shard(config, layout), layout, runner="reference")
    terms = Terms(
        id_space=IdSpace.LOCAL, dropped=DroppedSlot.NEGATIVE, payload="fp8_group128", ids_dtype="int32",
        extras=frozenset(), steps={},
    )  # fmt: skip
    made = allgather.AllGatherDispatcher(replace(plan._binding, terms=terms, max_tokens=4))
    begun: Any = made.dispatch_begin(layer.hidden, layer.topk, RunningState())
    assert len(travelling) == 3  # ids with weights, tokens, scales
    assert all(one() is not None for one in travelling)
    handle = allgather.Handle(3, 4, begun.parts[0], begun.parts[0], None)
    del begun
    assert all(one() is None for one in travelling)
    travelling.clear()
    columns = torch.zeros(128, 8).t()  # what is sent is a copy
    returned = made.combine_begin(StandardCombineInput(columns, handle), RunningState())
    assert returned.handle is handle
    assert travelling[0]() is not None
