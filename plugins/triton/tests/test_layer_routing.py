"""Every routing that is legal, through `moe_core.plan`: none, all on one, dropped, repeated, padded."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_core import Activation
from moe_core.protocols import RunningState
from moe_core.testing import make_routing
from moe_core.testing.layers import PATTERNS
from moe_core.topk import TopKOutput

PATHS = ("fused", "split")
DISPATCHERS = ("standard", "testing_standard", "testing_global", "testing_batched", "testing_grouped")
NAN = float("nan")


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_pattern(lab: Any, pattern: str, path: str) -> None:
    config = lab.config(bias=True)
    lab.verify(config, lab.layer(config, 3, tokens=7, pattern=pattern), path)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_zero_tokens(lab: Any, dispatcher: str, scheme: str) -> None:
    """Before and after a call with tokens: nothing of it may be left over."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    empty = TopKOutput(layer.topk.topk_ids[:0], layer.topk.topk_weights[:0])
    for _ in range(2 if lab.on_gpu else 1):
        result = plan(layer.hidden[:0], empty)
        assert result.shape == (0, config.hidden_size)
        assert result.dtype == layer.hidden.dtype
        lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)


@pytest.mark.parametrize("path", PATHS)
def test_zero_tokens_without_combine(lab: Any, path: str) -> None:
    config = lab.config(no_combine=True)
    layer = lab.layer(config, tokens=0)
    assert lab.plan(config, layer.weights, path)(layer.hidden, layer.topk).shape == (0, 2, config.hidden_size)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_tensor"])
def test_all_slots_dropped(lab: Any, scheme: str, dispatcher: str) -> None:
    """Exactly zero, in a given output too, whatever the weights and the tokens hold."""
    config = lab.config(scheme=scheme, bias=True)
    layer = lab.layer(config)
    topk = TopKOutput(torch.full_like(layer.topk.topk_ids, -1), torch.full_like(layer.topk.topk_weights, NAN))
    output = torch.full_like(layer.hidden, NAN)
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    assert not plan(layer.hidden, topk, state=RunningState(output=output)).any()
    assert not output.any()
    assert not plan(torch.full_like(layer.hidden, NAN), topk).any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("scheme", ["bf16", "fp8_tensor", "fp8_channel", "fp8_block128", "int8_channel"])
def test_tokens_that_nobody_computes_may_be_anything(lab: Any, scheme: str, path: str) -> None:
    """The NaN of a token whose slots are all dropped reaches nothing: not the others, not a scale that they share."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config, tokens=6)
    expected = lab.expected(config, layer.weights, layer.hidden[:4], _cut(layer.topk, 4))
    ids, weights, hidden = layer.topk.topk_ids.clone(), layer.topk.topk_weights.clone(), layer.hidden.clone()
    ids[4:], weights[4:], hidden[4], hidden[5] = -1, NAN, NAN, 3e4
    result = lab.plan(config, layer.weights, path)(hidden, TopKOutput(ids, weights))
    lab.close(result[:4], expected, config)
    assert not result[4:].any()


def _cut(topk: TopKOutput, rows: int) -> TopKOutput:
    return TopKOutput(topk.topk_ids[:rows], topk.topk_weights[:rows])


@pytest.mark.parametrize(("dispatcher", "padding"), [("standard", 1), *((name, 11) for name in DISPATCHERS)])
def test_a_padded_batch_equals_the_unpadded_one(lab: Any, dispatcher: str, padding: int) -> None:
    config = lab.config(bias=True, activation=Activation.swiglu_oai())
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    hidden = torch.cat([layer.hidden, layer.hidden.new_full((padding, config.hidden_size), NAN)])
    ids = torch.cat([layer.topk.topk_ids, layer.topk.topk_ids.new_full((padding, 2), -1)])
    weights = torch.cat([layer.topk.topk_weights, layer.topk.topk_weights.new_full((padding, 2), NAN)])
    padded, plain = plan(hidden, TopKOutput(ids, weights)), plan(layer.hidden, layer.topk)
    lab.close(padded[:5], lab.expected(config, *layer), config)
    lab.close(padded[:5], plain, config, "the padded batch")
    assert not padded[5:].any()


@pytest.mark.parametrize("expert", [0, 3, 5])
def test_one_expert_takes_all(lab: Any, expert: int) -> None:
    config = lab.config(top_k=1)
    layer = lab.layer(config, tokens=7)
    layer.topk.topk_ids.fill_(expert)
    lab.verify(config, layer, "fused")


def test_a_token_that_chooses_one_expert_twice(lab: Any) -> None:
    config = lab.config(no_combine=True)
    layer = lab.layer(config)
    layer.topk.topk_ids[:] = layer.topk.topk_ids[:, :1]
    layer.topk.topk_weights[:] = 0.5
    result = lab.verify(config, layer, "fused")
    assert torch.equal(result[:, 0], result[:, 1])


def test_weights_of_zero_negative_and_large(lab: Any) -> None:
    """A weight of 0 is no dropped slot, and weights need not sum to 1."""
    config = lab.config()
    layer = lab.layer(config)
    layer.topk.topk_weights[0] = 0.0
    layer.topk.topk_weights[1] = torch.tensor([-1.5, 8.0])
    result = lab.verify(config, layer, "fused")
    assert not result[0].any()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("dispatcher", ["standard", "testing_batched"])
def test_int64_ids(lab: Any, path: str, dispatcher: str) -> None:
    config = lab.config()
    layer = lab.layer(config, pattern="dropped")
    topk = TopKOutput(layer.topk.topk_ids.long(), layer.topk.topk_weights)
    plan = lab.plan(config, layer.weights, path if dispatcher == "standard" else None, dispatcher=dispatcher)
    assert torch.equal(plan(layer.hidden, topk), plan(layer.hidden, layer.topk))


def test_incoming_never(lab: Any) -> None:
    """A caller that promises to drop nothing."""
    config = lab.config()
    lab.verify(config, path="fused", incoming="never")


def test_incoming_sink(lab: Any) -> None:
    """A caller that writes dropped slots as the number of experts."""
    config = lab.config()
    layer = lab.layer(config, pattern="dropped")
    sink = torch.where(layer.topk.topk_ids < 0, config.num_experts, layer.topk.topk_ids)
    plan = lab.plan(config, layer.weights, "fused", incoming="sink")
    result = plan(layer.hidden, TopKOutput(sink, layer.topk.topk_weights))
    lab.close(result, lab.expected(config, *layer), config)


def test_calls_of_other_sizes_in_between(lab: Any) -> None:
    """A call depends on nothing that the last one left in a workspace."""
    config = lab.config(bias=True)
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, "fused")
    for seed, tokens in enumerate((9, 1, 6, 2)):
        hidden, topk = lab.tokens(config, tokens, seed, "dropped" if seed % 2 else "skewed")
        lab.close(plan(hidden, topk), lab.expected(config, layer.weights, hidden, topk), config, f"{tokens} tokens")


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 1000, 8192])
def test_patterns_of_many_experts(lab: Any, tokens: int, pattern: str) -> None:
    config = lab.config(num_experts=160, top_k=6, hidden_size=1024, intermediate_size=352)
    layer = lab.layer(config, tokens=tokens, pattern=pattern)
    lab.verify(config, layer, "fused")


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_all_patterns_on_one_plan(lab: Any, scheme: str) -> None:
    """The same shapes with other loads: no tile may be skipped or computed twice when experts change their share."""
    config = lab.config(scheme=scheme, num_experts=60, top_k=4, hidden_size=1024, intermediate_size=384)
    weights = lab.layer(config).weights
    plan, oracle = lab.plan(config, weights, "fused"), lab.plan(config, weights, "split", runner="reference")
    hidden, _ = lab.tokens(config, 700, 5)
    for pattern in (*PATTERNS, "uniform"):
        topk = make_routing(pattern, 700, 60, 4, 17, device=lab.device)
        lab.close(plan(hidden, topk), oracle(hidden, topk), config, pattern)
