"""On a GPU: graphs, streams, memory, determinism. One plan serves from 0 to 16384 tokens."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import Activation, MoeConfig
from moe_core.errors import WeightError
from moe_core.formats import BatchedDispatchOutput, GroupedDispatchOutput
from moe_core.protocols import RunningState
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Phase

pytestmark = pytest.mark.gpu
SIZES: dict[str, Any] = {"num_experts": 64, "top_k": 8, "hidden_size": 2048, "intermediate_size": 1024}
LAYERS: dict[str, dict[str, Any]] = {
    "bf16": SIZES,
    "fp8_block128": SIZES | {"scheme": "fp8_block128"},
    "fp8_channel": SIZES | {"scheme": "fp8_channel"},
    "int8_channel": SIZES | {"scheme": "int8_channel"},
    "int4": SIZES | {"scheme": "int4_w4a16", "group_size": 64},
    "gpt_oss": {
        "num_experts": 32,
        "top_k": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "scheme": "mxfp4_w4a16",
        "bias": True,
        "activation": Activation.swiglu_oai(),
    },
}
ROUTINGS = ("uniform", "one_hot", "skewed", "dropped", "duplicate", "none")


def _capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `work`, warmed up as torch wants it, and what it returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


class Captured:
    """A plan captured for a number of tokens, with its static inputs."""

    def __init__(self, plan: Any, hidden: torch.Tensor, topk: TopKOutput) -> None:
        self.hidden, self.topk = hidden.clone(), TopKOutput(topk.topk_ids.clone(), topk.topk_weights.clone())
        self.graph, self.result = _capture(lambda: plan(self.hidden, self.topk, phase=Phase.DECODE))

    def replay(self, hidden: torch.Tensor, topk: TopKOutput) -> torch.Tensor:
        """The result for other values of the same shapes."""
        self.hidden.copy_(hidden)
        self.topk.topk_ids.copy_(topk.topk_ids)
        self.topk.topk_weights.copy_(topk.topk_weights)
        self.graph.replay()
        return self.result.clone()


def _calls(lab: Any, config: MoeConfig, tokens: int) -> list[tuple[torch.Tensor, TopKOutput]]:
    """Other tokens with every kind of routing; the last one drops every slot."""
    calls = [lab.tokens(config, tokens, seed, p if p != "none" else "uniform") for seed, p in enumerate(ROUTINGS)]
    calls[-1][1].topk_ids.fill_(-1)
    calls[-1][1].topk_weights.fill_(float("nan"))
    return calls


@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize("layer", LAYERS)
def test_replay_equals_eager(lab: Any, layer: str, path: str) -> None:
    """Bit for bit, with a routing that has nothing in common with the captured one."""
    config = lab.config(**LAYERS[layer])
    weights = lab.layer(config, tokens=1).weights
    plan = lab.plan(config, weights, path, graph_capture={Phase.DECODE})
    oracle = lab.plan(config, weights, "split", runner="reference")
    for tokens in (1, 7, 64, 300) if path == "fused" else (8,):
        calls = _calls(lab, config, tokens)
        captured = Captured(plan, *calls[-1])  # captured while nothing was routed
        for call, routing in zip(calls, ROUTINGS, strict=True):
            replayed, eager = captured.replay(*call), plan(*call, phase=Phase.DECODE)
            assert torch.equal(replayed, eager), f"{tokens} tokens, {routing}"
            lab.close(replayed, oracle(*call), config, f"the replay of {tokens} tokens, {routing},")
        assert not replayed.any()


def _static(given: Any) -> Any:
    """The same dispatch output in tensors of its own, which a graph may be captured with."""
    tensors = {f.name: getattr(given, f.name) for f in fields(given)}
    return replace(given, **{name: value.clone() for name, value in tensors.items() if isinstance(value, Tensor)})


def _fill(static: Any, given: Any) -> None:
    """The values of a dispatch output of the same shapes."""
    for f in fields(static):
        value = getattr(static, f.name)
        if isinstance(value, Tensor):
            value.copy_(getattr(given, f.name))


def _live(d: Any) -> Tensor:
    """Which rows of the result count: [E, M] or [rows]."""
    if isinstance(d, BatchedDispatchOutput):
        return torch.arange(d.hidden_states.shape[1], device=d.masked_m.device) < d.masked_m[:, None]
    if isinstance(d, GroupedDispatchOutput):
        return d.row_ids >= 0
    return torch.arange(d.hidden_states.shape[0], device=d.hidden_states.device) < d.num_valid


@pytest.mark.parametrize("dispatcher", ["testing_batched", "testing_grouped", "testing_standard", "testing_global"])
def test_replay_of_other_formats(lab: Any, dispatcher: str) -> None:
    """The runner alone, on dispatch outputs that are made outside the graph."""
    config = lab.config(**LAYERS["fp8_block128"])
    weights = lab.layer(config, tokens=1).weights
    plan = lab.plan(config, weights, dispatcher=dispatcher)
    oracle = lab.plan(config, weights, "split", runner="reference")
    calls, state = _calls(lab, config, 40), RunningState(Phase.DECODE)
    outputs = [plan.dispatch(*call, RunningState(Phase.DECODE)) for call in calls]
    static = _static(outputs[-1])  # captured while nothing was routed
    graph, captured = _capture(lambda: plan.run(static, state))
    for call, given, routing in zip(calls, outputs, ROUTINGS, strict=True):
        _fill(static, given)
        graph.replay()
        live, eager = _live(given), plan.run(given, RunningState(Phase.DECODE))
        assert torch.equal(captured.hidden_states[live], eager.hidden_states[live]), routing
        result = plan.combine(replace(eager, hidden_states=captured.hidden_states), RunningState(Phase.DECODE))
        lab.close(result, oracle(*call), config, f"the replay of {dispatcher}, {routing},")


def test_graphs_of_several_sizes_share_a_pool(lab: Any) -> None:
    """As a server captures them: largest first, replayed in any order."""
    config = lab.config(**SIZES)
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused", graph_capture={Phase.DECODE})
    calls = {tokens: lab.tokens(config, tokens, tokens) for tokens in (256, 64, 16, 4, 1)}
    graphs = {tokens: Captured(plan, *call) for tokens, call in calls.items()}
    for tokens in (4, 256, 1, 64, 16, 4):
        hidden, topk = lab.tokens(config, tokens, 99 + tokens, "skewed")
        assert torch.equal(graphs[tokens].replay(hidden, topk), plan(hidden, topk, phase=Phase.DECODE))


def test_a_graph_sees_updated_weights(lab: Any) -> None:
    config = lab.config(**LAYERS["fp8_block128"])
    plan = lab.plan(config, lab.layer(config, 1, tokens=1).weights, "fused", graph_capture={Phase.DECODE})
    call = lab.tokens(config, 16, 3)
    captured = Captured(plan, *call)
    old = captured.replay(*call)
    weights = lab.layer(config, 2, tokens=1).weights
    plan.update_weights(weights)
    new = captured.replay(*call)
    assert not torch.equal(old, new)
    lab.close(new, lab.expected(config, weights, *call), config)


def test_a_graph_sees_static_scales_of_other_values(lab: Any) -> None:
    """As long as all experts share one: tokens quantized once, as the graph does it, cannot serve several."""
    config = lab.config(**SIZES, scheme="fp8_tensor")
    weights = lab.layer(config, 1, tokens=1).weights
    equal = torch.full((64,), 0.01, device=lab.device)
    plan = lab.plan(config, _scaled(weights, equal), "fused", graph_capture={Phase.DECODE})
    call = lab.tokens(config, 16, 3)
    captured = Captured(plan, *call)
    first = captured.replay(*call)
    # So small that values saturate: another scale that does not would give nearly the same result.
    other = _scaled(weights, equal / 16)
    plan.update_weights(other)
    result, wanted = captured.replay(*call), lab.expected(config, other, *call)
    assert torch.equal(result, plan(*call, phase=Phase.DECODE))
    lab.close(result, wanted, config)
    lab.nearer(result, wanted, first)
    spread = torch.linspace(0.25, 2.0, 64, device=lab.device)
    with pytest.raises(WeightError, match="static input scales"):
        plan.update_weights(_scaled(lab.layer(config, 2, tokens=1).weights, equal * spread))
    assert torch.equal(captured.replay(*call), result), "a refused update changed something"


def _scaled(weights: Any, scale: Tensor) -> Any:
    """The weights with static input scales of their own: an update writes into them."""
    return replace(weights, w13_input_scale=scale.clone(), w2_input_scale=scale.clone())


def test_two_plans_on_two_streams(lab: Any) -> None:
    """Interleaved without waiting for each other: they share no workspace."""
    configs = [lab.config(**LAYERS["bf16"]), lab.config(**LAYERS["fp8_block128"])]
    layers = [lab.layer(config, seed, tokens=200) for seed, config in enumerate(configs)]
    plans = [lab.plan(c, layer.weights, "fused") for c, layer in zip(configs, layers, strict=True)]
    wanted = [plan(layer.hidden, layer.topk) for plan, layer in zip(plans, layers, strict=True)]
    streams = [torch.cuda.Stream() for _ in plans]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(plans[index](layers[index].hidden, layers[index].topk))
    torch.cuda.synchronize()
    for index, rows in enumerate(results):
        assert all(torch.equal(row, wanted[index]) for row in rows), f"plan {index}"


def test_one_plan_on_two_streams(lab: Any) -> None:
    """Two micro-batches of one layer in flight."""
    config = lab.config(**SIZES)
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused")
    calls = [lab.tokens(config, tokens, tokens) for tokens in (190, 210)]
    wanted = [plan(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[torch.Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(plan(*calls[index]))
    torch.cuda.synchronize()
    for index, rows in enumerate(results):
        assert all(torch.equal(row, wanted[index]) for row in rows), f"micro-batch {index}"


@pytest.mark.parametrize("layer", ["bf16", "gpt_oss"])
def test_memory_does_not_grow(lab: Any, layer: str) -> None:
    config = lab.config(**LAYERS[layer])
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused")
    calls = [lab.tokens(config, tokens, tokens) for tokens in (1, 64, 2000)]
    for call in calls:
        plan(*call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    for _ in range(100):
        for call in calls:
            plan(*call)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("layer", LAYERS)
def test_from_zero_to_16384_tokens(lab: Any, layer: str) -> None:
    """One plan, up and down again; every size is judged by the oracle once."""
    config = lab.config(**LAYERS[layer])
    weights = lab.layer(config, tokens=1).weights
    plan, oracle = lab.plan(config, weights, "fused"), lab.plan(config, weights, "split", runner="reference")
    seen = {}
    for tokens in (0, 1, 3, 16, 17, 128, 1000, 4096, 16384):
        call = lab.tokens(config, tokens, tokens, "skewed")
        seen[tokens] = call, plan(*call)
        lab.close(seen[tokens][1], oracle(*call), config, f"{tokens} tokens")
    for tokens in reversed(seen):
        call, first = seen[tokens]
        assert torch.equal(plan(*call), first), f"{tokens} tokens the second time"


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("tokens", [1, 32, 500, 4096])
def test_deterministic(lab: Any, layer: str, tokens: int) -> None:
    """Twenty times the same bits: no atomic decides an order of summation."""
    config = lab.config(**LAYERS[layer])
    call = lab.tokens(config, tokens, 1, "skewed")
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused", features={"deterministic"})
    first = plan(*call)
    assert all(torch.equal(plan(*call), first) for _ in range(20))


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    """torch itself raises where something waits for the device. It warns that it does not know every such place."""

    def mode(name: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.cuda.set_sync_debug_mode(name)

    try:
        mode("error")
        yield
    finally:
        mode("default")


@pytest.mark.parametrize("layer", ["bf16", "fp8_block128"])
def test_a_forward_does_not_wait_for_the_device(lab: Any, layer: str) -> None:
    """No copy to the host and none from it."""
    config = lab.config(**LAYERS[layer])
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused")
    calls = [lab.tokens(config, tokens, 1) for tokens in (4, 700)]
    for call in calls:
        plan(*call)
    with _waiting_is_an_error():
        for call in calls:
            plan(*call)
