"""One layer on several ranks against the same layer on one: `Ranks.error`, for scripts of `run_ranks`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core.api import plan as make_plan
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.moe_plan import MoePlan
from moe_core.protocols import RunningState
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing.layers import Layer, make_layer
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Phase


@dataclass
class Ranks:
    """This rank among those of `group`. Every rank makes the same calls.

    keep: plans stay open until `close`, so that those with equal needs share their buffers.
    """

    group: Any
    device: torch.device | str
    registry: Registry | None = None
    keep: bool = False
    _open: list[MoePlan] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rank, self.size = dist.get_rank(self.group), dist.get_world_size(self.group)

    def plan(
        self,
        config: MoeConfig,
        layer: Layer,
        dispatcher: str,
        runner: str = "reference",
        *,
        most: int,
        phase: Phase = Phase.PREFILL,
        placement: Any = "linear",
        options: dict[str, Any] | None = None,
        captured: bool = False,
    ) -> MoePlan:
        """This rank's plan, for at most `most` tokens a rank."""
        parallel = ParallelConfig(ep_size=self.size, ep_rank=self.rank, tokens="sharded", placement=placement)
        chosen = {dispatcher: options} if options else {}
        return make_plan(
            config,
            layer.weights.shard(config, parallel),
            parallel,
            group=self.group,
            max_tokens=most,
            phases=(phase,),
            graph_capture=(phase,) if captured else (),
            registry=self.registry,
            settings=Settings(runner=runner, dispatcher=dispatcher, options=chosen),
        )

    def error(
        self,
        dispatcher: str,
        counts: Sequence[int],
        runner: str = "reference",
        *,
        config: MoeConfig | None = None,
        calls: int = 2,
        flights: int = 1,
        told: bool = False,
        captured: bool = False,
        **more: Any,
    ) -> float:
        """The largest difference from one rank's plan with the reference runner, relative to its largest value.

        counts: tokens of each rank. calls: calls with fresh tokens. flights: calls at once, in split phases. told:
        `RunningState.tokens_per_rank` says the counts. captured: the calls are replays of one CUDA graph. more: as for
        `plan`. Raises AssertionError for a wrong shape, dtype or a value that is not finite.
        """
        config = config or MoeConfig(num_experts=8, top_k=3, hidden_size=64, intermediate_size=32, dtype="float32")
        counts = list(counts)[: self.size]
        most, phase = max(*counts, 1), more.get("phase", Phase.PREFILL)
        layers = [self._layer(config, call, counts) for call in range(max(calls, flights))]
        # Tokens differ from call to call, weights do not.
        layers = [replace_weights(layer, layers[0]) for layer in layers]
        whole = make_plan(config, layers[0].weights, runner="reference")
        plan = self.plan(config, layers[0], dispatcher, runner, captured=captured, **({"most": most} | more))
        self._open.append(plan)
        mine = [self._mine(layer, counts) for layer in layers]

        def states() -> list[RunningState]:
            return [RunningState(phase, tokens_per_rank=counts if told else None) for _ in mine]

        if captured:
            results = replays(lambda hidden, topk: plan(hidden, topk, phase=phase), mine)
        elif flights > 1:
            results = in_flight(plan, mine, states(), phase)
        else:
            results = [plan(*one, phase=phase, state=state) for one, state in zip(mine, states(), strict=True)]
        worst = max(self._apart(whole, layer, counts, one) for layer, one in zip(layers, results, strict=True))
        if not self.keep:
            self.close()
        return worst

    def close(self) -> None:
        """All plans, in the order in which they were made."""
        for plan in self._open:
            plan.close()
        self._open.clear()

    def _layer(self, config: MoeConfig, call: int, counts: list[int]) -> Layer:
        layer = make_layer(config, 5 + call, tokens=sum(counts), device=self.device)
        layer.topk.topk_ids[::4, 0] = -1
        return layer

    def _rows(self, counts: list[int]) -> slice:
        return slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1]))

    def _mine(self, layer: Layer, counts: list[int]) -> tuple[Tensor, TopKOutput]:
        rows = self._rows(counts)
        return layer.hidden[rows], TopKOutput(layer.topk.topk_ids[rows], layer.topk.topk_weights[rows])

    def _apart(self, whole: MoePlan, layer: Layer, counts: list[int], result: Tensor) -> float:
        everything = whole(layer.hidden, layer.topk)
        expected = everything[self._rows(counts)]
        if result.shape != expected.shape or result.dtype != expected.dtype:
            raise AssertionError(
                f"got {result.dtype} {list(result.shape)}, not {expected.dtype} {list(expected.shape)}"
            )
        if not len(result):
            return 0.0
        if not bool(result.isfinite().all()):
            raise AssertionError(f"{int((~result.isfinite()).sum())} values are not finite")
        return float((result.float() - expected.float()).abs().max() / everything.float().abs().max())


def replace_weights(layer: Layer, other: Layer) -> Layer:
    """The tokens of `layer` with the weights of `other`."""
    return layer._replace(weights=other.weights)


def in_flight(
    plan: MoePlan, calls: list[tuple[Tensor, TopKOutput]], states: list[RunningState], phase: Phase
) -> list[Tensor]:
    """All dispatches begin before the first ends, and so do all combines; every other call brings its output tensor."""
    outputs = [torch.full_like(hidden, float("nan")) if i % 2 else None for i, (hidden, _) in enumerate(calls)]
    states = [replace(state, output=output) for state, output in zip(states, outputs, strict=True)]
    begun = [plan.dispatch_begin(*one, state, phase=phase) for one, state in zip(calls, states, strict=True)]
    done = [plan.run(plan.dispatch_finish(one, state), state) for one, state in zip(begun, states, strict=True)]
    back = [plan.combine_begin(one, state) for one, state in zip(done, states, strict=True)]
    results = [plan.combine_finish(one, state) for one, state in zip(back, states, strict=True)]
    for result, output in zip(results, outputs, strict=True):
        if output is not None and result is not output:
            raise AssertionError("the result is not the output tensor that the caller gave")
    return results


def replays(call: Callable[[Tensor, TopKOutput], Tensor], calls: list[tuple[Tensor, TopKOutput]]) -> list[Tensor]:
    """Results of one CUDA graph, made with the first call's tokens and replayed with each call's, each twice."""
    hidden = calls[0][0].clone()
    topk = TopKOutput(calls[0][1].topk_ids.clone(), calls[0][1].topk_weights.clone())
    stream: Any = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call(hidden, topk)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call(hidden, topk)
    results = []
    for tokens, routing in calls:
        hidden.copy_(tokens)
        topk.topk_ids.copy_(routing.topk_ids)
        topk.topk_weights.copy_(routing.topk_weights)
        graph.replay()
        once = output.clone()
        graph.replay()
        if not torch.equal(once, output):
            raise AssertionError("two replays with the same tokens differ")
        results.append(once)
    return results
