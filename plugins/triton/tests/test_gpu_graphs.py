"""On a GPU: graphs, streams, memory, determinism. One plan serves from 0 to 16384 tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from moe_core import Activation, MoeConfig
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


class Captured:
    """A plan captured for a number of tokens, with its static inputs."""

    def __init__(self, plan: Any, hidden: torch.Tensor, topk: TopKOutput) -> None:
        self.hidden, self.topk = hidden.clone(), TopKOutput(topk.topk_ids.clone(), topk.topk_weights.clone())
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                plan(self.hidden, self.topk, phase=Phase.DECODE)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.result = plan(self.hidden, self.topk, phase=Phase.DECODE)

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


@pytest.mark.parametrize("dispatcher", ["testing_batched", "testing_grouped", "testing_standard", "testing_global"])
def test_replay_of_other_formats(lab: Any, dispatcher: str) -> None:
    config = lab.config(**LAYERS["fp8_block128"])
    weights = lab.layer(config, tokens=1).weights
    plan = lab.plan(config, weights, dispatcher=dispatcher, graph_capture={Phase.DECODE})
    calls = _calls(lab, config, 40)
    captured = Captured(plan, *calls[0])
    for call, routing in zip(calls, ROUTINGS, strict=True):
        assert torch.equal(captured.replay(*call), plan(*call, phase=Phase.DECODE)), routing


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


def test_a_graph_sees_static_scales_that_become_different(lab: Any) -> None:
    """Captured while all experts shared one input scale: the update must not need another kernel than the graph has."""
    config = lab.config(**SIZES, scheme="fp8_tensor")
    weights = lab.layer(config, 1, tokens=1).weights
    equal = torch.full((64,), 0.01, device=lab.device)
    both = {"w13_input_scale": equal, "w2_input_scale": equal}
    plan = lab.plan(config, replace(weights, **both), "fused", graph_capture={Phase.DECODE})
    call = lab.tokens(config, 16, 3)
    captured = Captured(plan, *call)
    spread = torch.linspace(0.25, 2.0, 64, device=lab.device)
    other = replace(weights, **{name: scale * spread for name, scale in both.items()})
    plan.update_weights(other)
    assert torch.equal(captured.replay(*call), plan(*call, phase=Phase.DECODE))
    lab.close(captured.replay(*call), lab.expected(config, other, *call), config)


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


@pytest.mark.parametrize("layer", ["bf16", "fp8_block128"])
def test_a_forward_does_not_wait_for_the_device(lab: Any, layer: str) -> None:
    """No copy to the host: torch itself raises where something waits."""
    config = lab.config(**LAYERS[layer])
    plan = lab.plan(config, lab.layer(config, tokens=1).weights, "fused")
    calls = [lab.tokens(config, tokens, 1) for tokens in (4, 700)]
    for call in calls:
        plan(*call)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for call in calls:
            plan(*call)
    finally:
        torch.cuda.set_sync_debug_mode("default")
