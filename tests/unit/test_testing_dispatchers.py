"""The kit's dispatchers are as awkward as they promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import moe_core
from moe_core.config import MoeConfig
from moe_core.dispatchers.standard import expert_map
from moe_core.formats import BatchedCombineInput, GroupedCombineInput, StandardCombineInput
from moe_core.protocols import RunningState
from moe_core.registry import Registry
from moe_core.testing import make_layer
from moe_core.testing.dispatchers import TESTING_BATCHED, plugin
from moe_core.testing.dispatching import ALIGNMENT, spread
from moe_core.testing.layers import Layer
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Step

CONFIG = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")
REGISTRY = Registry(plugins=[plugin], autoload=False)
COMBINE: dict[str, Any] = {
    "standard": StandardCombineInput,
    "batched": BatchedCombineInput,
    "grouped": GroupedCombineInput,
}


def dispatched(format_id: str, config: MoeConfig = CONFIG, **request: Any) -> tuple[Any, Layer, Any]:
    layer = make_layer(config, tokens=6, pattern="dropped")
    plan = moe_core.plan(
        config,
        layer.weights,
        registry=REGISTRY,
        runner="reference",
        dispatcher=f"testing_{format_id}",
        **request,
    )
    return plan.dispatcher.dispatch(layer.hidden, layer.topk, RunningState()), layer, plan


def test_standard_has_padding_rows_of_garbage() -> None:
    d, layer, _ = dispatched("standard", options={"testing_standard": {"padding": 5}})
    assert d.hidden_states.shape[0] == 11
    assert int(d.num_valid) == 6
    assert torch.equal(d.hidden_states[:6], layer.hidden)
    assert d.hidden_states[6:].isnan().all()
    assert d.topk_weights[6:].isnan().all()
    assert (d.topk_ids[6:] > CONFIG.num_experts).all()


def test_batched_has_garbage_above_masked_m() -> None:
    d, layer, plan = dispatched("batched")
    ids = layer.topk.topk_ids
    assert plan.terms["batched"].runner_does(Step.ROUTER_WEIGHT)
    for expert in range(4):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        count = int(d.masked_m[expert])
        assert count == len(token)
        assert torch.equal(d.hidden_states[expert, :count], layer.hidden[token])
        assert torch.equal(d.row_weights[expert, :count], layer.topk.topk_weights[token, slot])
        assert d.hidden_states[expert, count:].isnan().all()
        assert d.row_weights[expert, count:].isnan().all()
        assert d.hidden_states.shape[1] > count


def test_grouped_is_aligned_and_padded() -> None:
    d, layer, _ = dispatched("grouped")
    offsets, ids = d.offsets.tolist(), layer.topk.topk_ids.flatten()
    assert d.alignment == ALIGNMENT
    assert all(offset % ALIGNMENT == 0 for offset in offsets)
    assert d.hidden_states.shape[0] > offsets[-1]
    assert (d.row_ids[offsets[-1] :] == -1).all()
    for expert in range(4):
        rows = d.row_ids[offsets[expert] : offsets[expert + 1]]
        live = rows[rows >= 0].long()
        assert sorted(live.tolist()) == (ids == expert).nonzero().flatten().tolist()
        assert len(live) < len(rows)
        assert torch.equal(d.hidden_states[offsets[expert] :][: len(live)], layer.hidden[live // 2])
        assert d.hidden_states[offsets[expert] + len(live) : offsets[expert + 1]].isnan().all()


@pytest.mark.parametrize("format_id", ["standard", "batched", "grouped"])
def test_no_row_weights_where_the_caller_weights(format_id: str) -> None:
    d, _, plan = dispatched(format_id, caller_does={Step.ROUTER_WEIGHT})
    assert not plan.terms[format_id].runner_does(Step.ROUTER_WEIGHT)
    if format_id != "standard":
        assert d.row_weights is None


@pytest.mark.parametrize("format_id", ["batched", "grouped"])
def test_output_tensor_travels_with_the_handle(format_id: str) -> None:
    layer = make_layer(CONFIG)
    plan = moe_core.plan(
        CONFIG, layer.weights, registry=REGISTRY, runner="reference", dispatcher=f"testing_{format_id}"
    )
    buffer = torch.empty_like(layer.hidden)
    state = RunningState(output=buffer)
    assert plan(layer.hidden, layer.topk, state=state) is buffer
    assert torch.equal(buffer, plan(layer.hidden, TopKOutput(layer.topk.topk_ids, layer.topk.topk_weights)))


class NothingFromTheHost(TorchDispatchMode):
    """Refuses every tensor that is not on the device `meta`, which has no values to wait for either.

    A graph that captures on a GPU refuses the same: a copy from the host, and whatever reads a value.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, result)):
            assert not isinstance(tensor, torch.Tensor) or tensor.device.type == "meta", func
        return result


PAYLOADS = sorted(TESTING_BATCHED.offers["batched"].payloads)


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("format_id", ["standard", "batched", "grouped"])
def test_a_dispatch_can_be_captured(format_id: str, payload: str) -> None:
    d, layer, plan = dispatched(format_id, CONFIG.replace(hidden_size=128))
    given = plan.dispatcher._binding
    terms = replace(given.terms, payload=payload, extras=given.terms.extras - {"host_counts"})
    binding = replace(given, device=torch.device("meta"), terms=terms)
    dispatcher, hidden = type(plan.dispatcher)(binding), layer.hidden.to("meta")
    topk = TopKOutput(layer.topk.topk_ids.to("meta"), layer.topk.topk_weights.to("meta"))
    rows = torch.empty(d.hidden_states.shape, dtype=layer.hidden.dtype, device="meta")
    with NothingFromTheHost():
        found = dispatcher.dispatch(hidden, topk, RunningState())
        result = dispatcher.combine(COMBINE[format_id](rows, handle=found.handle), RunningState())
    assert result.shape == layer.hidden.shape


def test_a_copy_from_the_host_would_be_noticed() -> None:
    given = dispatched("batched")[2].dispatcher._binding
    with NothingFromTheHost(), pytest.raises(AssertionError):
        expert_map(replace(given, device=torch.device("meta")))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint8, torch.int32, torch.bfloat16])
def test_spread_puts_rows_in_place_and_garbage_elsewhere(dtype: torch.dtype) -> None:
    rows = torch.tensor([[1, 2], [3, 4], [5, 6]]).to(dtype)
    out = spread(rows, torch.tensor([3, 5, 0]), 5)
    assert out.dtype is dtype
    assert out.shape == (5, 2)
    raw = out.float()
    assert raw[0].tolist() == [5, 6]
    assert raw[3].tolist() == [1, 2]
    assert not torch.isin(raw[1], torch.tensor([1.0, 2, 3, 4, 5, 6])).any()
