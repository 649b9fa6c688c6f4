"""Copies of experts, and how busy they are."""

from __future__ import annotations

import pytest
import torch

import moe_core
from moe_core import ExpertLoad, ExpertReplicas, MoeConfig, RoutingConfig, TopKOutput
from moe_core.balancing import balanced
from moe_core.errors import ConfigError, WeightError
from moe_core.testing import make_layer

CONFIG = MoeConfig(num_experts=6, top_k=3, hidden_size=32, intermediate_size=16, dtype="float32")
TWICE = ExpertReplicas((0, 1, 2, 3, 4, 5, 1, 4, 1))


@pytest.mark.parametrize("changes", [{}, {"bias": True}, {"scheme": "fp8_block128", "hidden_size": 256}])
def test_the_same_layer(changes: dict[str, object]) -> None:
    config = CONFIG.replace(intermediate_size=128, **changes)
    layer = make_layer(config, 3, tokens=40)
    layer.topk.topk_ids[::5, 1] = -1
    plan = moe_core.plan(TWICE.config(config), TWICE.weights(layer.weights), runner="reference")
    expected = moe_core.plan(config, layer.weights, runner="reference")(layer.hidden, layer.topk)
    torch.testing.assert_close(plan(layer.hidden, TWICE.physical(layer.topk)), expected)


def test_copies_in_turn() -> None:
    ids = torch.tensor([[1, 0], [1, 4], [1, -1], [1, 4], [5, 6]], dtype=torch.int32)
    made = TWICE.physical(TopKOutput(ids, torch.ones(5, 2)))
    assert made.topk_ids.dtype is torch.int32
    assert made.topk_ids.tolist() == [[1, 0], [6, 7], [8, -1], [1, 7], [5, 6]]
    other = TWICE.physical(TopKOutput(ids, torch.ones(5, 2)), offset=1)
    assert other.topk_ids.tolist() == [[6, 0], [8, 4], [1, -1], [6, 4], [5, 6]]


def test_routing_stays_the_models() -> None:
    grouped = CONFIG.replace(routing=RoutingConfig(num_groups=3, topk_groups=2))
    assert TWICE.config(grouped).num_experts == 9
    assert TWICE.config(grouped).routing == RoutingConfig()


@pytest.mark.parametrize(
    ("logical", "text"), [((0, 2), "experts [1] are nowhere"), ((), "replicas []"), ((-1, 0), "start at 0")]
)
def test_bad_replicas(logical: tuple[int, ...], text: str) -> None:
    with pytest.raises(ConfigError) as raised:
        ExpertReplicas(logical)
    assert text in str(raised.value)


def test_of_another_model() -> None:
    with pytest.raises(ConfigError, match="7 experts"):
        TWICE.config(CONFIG.replace(num_experts=7))
    with pytest.raises(WeightError, match="have 9"):
        TWICE.weights(TWICE.weights(make_layer(CONFIG, 1, tokens=1).weights))


def test_load() -> None:
    load = ExpertLoad(4, "cpu")
    load.add(torch.tensor([[0, 3], [3, -1], [4, 3]]))
    load.add(torch.tensor([[1, 3]], dtype=torch.int32))
    load.add(torch.empty(0, 2, dtype=torch.int32))
    assert load.counts().tolist() == [1, 1, 0, 4]
    load.reset()
    assert load.counts().tolist() == [0, 0, 0, 0]


def test_balanced() -> None:
    assert balanced([10, 1, 1, 9], 7).logical == (0, 1, 2, 3, 0, 3, 0)
    assert balanced([1, 1], 2).logical == (0, 1)
    with pytest.raises(ConfigError, match="cannot hold"):
        balanced([1, 1, 1], 2)
