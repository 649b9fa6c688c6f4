"""Graphs: a plan traced by torch.compile, and captured in a device graph, gives what it gives eagerly."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moe_core.testing.case import Case
from moe_core.testing.layers import make_routing
from moe_core.testing.registration import check
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Phase


@check("graph.compile", needs=("feature:compile", "run"))
def compile_(case: Case) -> None:
    """torch.compile(fullgraph=True) traces a plan without a break, and gives the eager result."""
    for setup in case.setups("compile", request={"features": {"compile"}}):
        layer = setup.layer(60)
        plan = setup.plan(layer.weights)

        def call(hidden: Tensor, ids: Tensor, weights: Tensor, plan=plan) -> Tensor:  # type: ignore[no-untyped-def]
            result: Tensor = plan(hidden, TopKOutput(ids, weights))
            return result

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own, in every one of these calls
            torch._dynamo.reset()
            compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
            result = compiled(layer.hidden, layer.topk.topk_ids, layer.topk.topk_weights)
            torch._dynamo.reset()
        setup.close(result, plan(layer.hidden, layer.topk), "the compiled result")


@check("graph.capture", each="phase", needs=("graph:{}", "run", "cuda"))
def capture(case: Case) -> None:
    """Captured once and replayed with other tokens and another routing, a plan gives the eager result."""
    phase = Phase(case.param)
    for setup in case.setups(request={"graph_capture": {phase}, "phases": (phase,)}):
        layer = setup.layer(61)
        plan = setup.plan(layer.weights)
        hidden, topk = layer.hidden.clone(), TopKOutput(layer.topk.topk_ids.clone(), layer.topk.topk_weights.clone())
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                plan(hidden, topk, phase=phase)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = plan(hidden, topk, phase=phase)
        for seed, pattern in ((62, "uniform"), (63, "dropped"), (64, "one_hot")):
            experts, top_k = setup.config.num_experts, setup.config.top_k
            other = make_routing(pattern, hidden.shape[0], experts, top_k, seed, device=hidden.device)
            tokens = setup.layer(seed).hidden
            hidden.copy_(tokens)
            topk.topk_ids.copy_(other.topk_ids)
            topk.topk_weights.copy_(other.topk_weights)
            graph.replay()
            torch.cuda.synchronize()
            setup.close(result, plan(tokens, other, phase=phase), f"the replay with routing {pattern!r}")
