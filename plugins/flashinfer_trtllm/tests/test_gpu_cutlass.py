"""`flashinfer_cutlass` on a Hopper GPU with FlashInfer itself: whole layers against the formula in float64.

FlashInfer's module must be there, or its first use compiles it for more than an hour. Build the part that is tested:

    python -m moe_core_flashinfer_trtllm.build_cutlass --schemes bf16,fp8_block128 --install
    export MOE_CORE_TEST_SCHEMES=bf16,fp8_block128 TRTLLM_DG_ENABLED=0
    pytest plugins/flashinfer_trtllm/tests/test_gpu_cutlass.py

MOE_CORE_TEST_SCHEMES: the schemes of the build (default: all). Without TRTLLM_DG_ENABLED=0 the fp8 block kernels are
DeepGEMM's, which nvcc compiles once for each shape, at its first call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import Activation, MoeConfig, ParallelConfig, RunningState, TopKOutput
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing import assert_close, make_layer, make_routing
from moe_core.testing.layers import Layer
from moe_core.testing.oracle import dense
from moe_core.vocabulary import Phase

ON_HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [
    pytest.mark.skipif(not ON_HOPPER, reason="needs a Hopper GPU"),
    pytest.mark.skipif(importlib.util.find_spec("flashinfer") is None, reason="needs FlashInfer"),
]
RUNNER = "flashinfer_cutlass"
ALL = ("bf16", "fp8_block128", "fp8_tensor", "mxfp4_w4a16")
BUILT = tuple(os.environ.get("MOE_CORE_TEST_SCHEMES", ",".join(ALL)).split(","))
MOST = 1100
OAI = Activation.swiglu_oai()


def each(*schemes: str) -> Any:
    """A test for each scheme; those that the build has not are skipped, and say so."""
    marks = [
        pytest.param(s, marks=[] if s in BUILT else pytest.mark.skip(reason=f"{s} is not in MOE_CORE_TEST_SCHEMES"))
        for s in schemes or ALL
    ]
    return pytest.mark.parametrize("scheme", marks)


@pytest.fixture(scope="module")
def registry() -> Registry:
    from moe_core_flashinfer_trtllm.plugin import plugin as flashinfer

    return Registry(plugins=[flashinfer], autoload=False, settings=Settings())


@pytest.fixture(autouse=True)
def _memory() -> Iterator[None]:
    yield
    if ON_HOPPER:
        torch.cuda.empty_cache()


def config(scheme: str, **changes: Any) -> MoeConfig:
    """A layer of some size: 16 experts, sizes that are unequal and no power of two."""
    sizes = {"num_experts": 16, "top_k": 4, "hidden_size": 768, "intermediate_size": 384}
    return MoeConfig(**({"scheme": scheme, **sizes} | changes))


def layer_of(layer: MoeConfig, seed: int = 0, **more: Any) -> Layer:
    return make_layer(layer, seed, input_scales=True, device="cuda", **more)


def bind(
    registry: Registry, layer: MoeConfig, weights: Any, parallel: ParallelConfig | None = None, **request: Any
) -> moe_core.MoePlan:
    settings = Settings(runner=RUNNER, dispatcher="standard", options={RUNNER: request.pop("options", {})})
    asked = {"max_tokens": MOST, "registry": registry, "settings": settings, **request}
    return moe_core.plan(layer, weights, parallel, **asked)


def close(result: Tensor, layer: MoeConfig, one: Layer, what: str = "the result") -> None:
    assert_close(result, dense(layer, *one), layer.dtype, layer.scheme, what=what)


@each()
@pytest.mark.parametrize("tokens", [1, 3, 17, 64, 257, 1024])
def test_token_counts(registry: Registry, scheme: str, tokens: int) -> None:
    layer = config(scheme)
    one = layer_of(layer, tokens, tokens=tokens)
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each()
@pytest.mark.parametrize("tokens", [40, 600])
@pytest.mark.parametrize("pattern", ["one_hot", "skewed", "dropped", "duplicate"])
def test_routings(registry: Registry, scheme: str, pattern: str, tokens: int) -> None:
    """Above 256 tokens FlashInfer sorts in another way."""
    layer = config(scheme)
    one = layer_of(layer, 5, tokens=tokens, pattern=pattern)
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each()
def test_nothing_routed_is_exactly_zero_and_no_tokens_are_legal(registry: Registry, scheme: str) -> None:
    layer = config(scheme)
    one = layer_of(layer, 6, tokens=50)
    plan = bind(registry, layer, one.weights)
    nothing = TopKOutput(torch.full_like(one.topk.topk_ids, -1), torch.full_like(one.topk.topk_weights, float("nan")))
    output = torch.full_like(one.hidden, float("nan"))
    result = plan(one.hidden.fill_(float("nan")), nothing, state=RunningState(output=output))
    assert not result.count_nonzero()
    empty = layer_of(layer, 6, tokens=0)
    assert plan(empty.hidden, empty.topk).shape == (0, layer.hidden_size)


@each()
@pytest.mark.parametrize("activation", [Activation(limit=0.5), OAI], ids=["limit", "oai"])
def test_activations(registry: Registry, scheme: str, activation: Activation) -> None:
    layer = config(scheme, activation=activation)
    one = layer_of(layer, 7, tokens=33)
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each("bf16", "fp8_tensor")
def test_no_gate(registry: Registry, scheme: str) -> None:
    layer = config(scheme, activation=Activation(name="relu2", gated=False))
    one = layer_of(layer, 8, tokens=33)
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each("bf16", "mxfp4_w4a16")
@pytest.mark.parametrize("activation", [Activation(), OAI], ids=["silu", "oai"])
def test_biases(registry: Registry, scheme: str, activation: Activation) -> None:
    layer = config(scheme, bias=True, activation=activation)
    one = layer_of(layer, 9, tokens=100, pattern="dropped")
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each("mxfp4_w4a16")
def test_sizes_of_gpt_oss(registry: Registry, scheme: str) -> None:
    layer = config(scheme, hidden_size=2880, intermediate_size=2880, num_experts=8, bias=True, activation=OAI)
    one = layer_of(layer, 10, tokens=65)
    close(bind(registry, layer, one.weights)(one.hidden, one.topk), layer, one)


@each()
def test_ranks_of_expert_parallelism_sum_to_the_layer(registry: Registry, scheme: str) -> None:
    layer = config(scheme)
    one = layer_of(layer, 11, tokens=300, pattern="dropped")
    total = torch.zeros_like(one.hidden, dtype=torch.float32)
    for rank in range(4):
        parallel = ParallelConfig(ep_size=4, ep_rank=rank, reduce="caller")
        plan = bind(registry, layer, one.weights.shard(layer, parallel), parallel)
        total += plan(one.hidden, one.topk).float()
    close(total.to(one.hidden.dtype), layer, one, "the sum of the ranks")


@each()
def test_a_captured_graph_sees_new_tokens_routings_and_weights(registry: Registry, scheme: str) -> None:
    layer, patterns = config(scheme), {12: "uniform", 13: "dropped"}

    def fresh(seed: int) -> Layer:
        # Made anew each time: a plan may keep tensors that it was given, and updates write into them.
        return layer_of(layer, seed, tokens=48, pattern=patterns[seed])

    old = fresh(12)
    plan = bind(registry, layer, fresh(12).weights, graph_capture=frozenset(Phase))
    hidden, ids, weights = old.hidden.clone(), old.topk.topk_ids.clone(), old.topk.topk_weights.clone()
    output = torch.empty_like(hidden)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            plan(hidden, TopKOutput(ids, weights), state=RunningState(output=output))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            plan(hidden, TopKOutput(ids, weights), state=RunningState(output=output))
    torch.cuda.current_stream().wait_stream(stream)
    for seed in (12, 13, 12):
        plan.update_weights(fresh(seed).weights)
        one = fresh(seed)
        hidden.copy_(one.hidden)
        ids.copy_(one.topk.topk_ids)
        weights.copy_(one.topk.topk_weights)
        output.fill_(float("nan"))
        graph.replay()
        close(output, layer, one, f"the replayed graph with layer {seed}")


@each()
def test_two_micro_batches_on_two_streams(registry: Registry, scheme: str) -> None:
    layer = config(scheme)
    one = layer_of(layer, 14, tokens=512)
    plan = bind(registry, layer, one.weights)
    calls = [one, one._replace(topk=make_routing("skewed", 512, 16, 4, 3, device="cuda"))]
    wanted = [plan(call.hidden, call.topk).clone() for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for stream, call in zip(streams, calls, strict=True):
            with torch.cuda.stream(stream):
                results.append(plan(call.hidden, call.topk))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, wanted, strict=True))


@each()
def test_the_same_call_gives_the_same_bits(registry: Registry, scheme: str) -> None:
    layer = config(scheme)
    one = layer_of(layer, 15, tokens=700, pattern="skewed")
    plan = bind(registry, layer, one.weights, features={"deterministic"})
    first = plan(one.hidden, one.topk).clone()
    assert all(torch.equal(plan(one.hidden, one.topk), first) for _ in range(5))


@each("bf16")
def test_fused_finalize(registry: Registry, scheme: str) -> None:
    layer = config(scheme)
    one = layer_of(layer, 16, tokens=700)
    close(bind(registry, layer, one.weights, options={"fused_finalize": True})(one.hidden, one.topk), layer, one)


@each("bf16", "mxfp4_w4a16", "fp8_tensor")
def test_tuning_finds_kernels_that_plans_then_use(registry: Registry, scheme: str, tmp_path: Any) -> None:
    from moe_core_flashinfer_trtllm.cutlass_tune import tune

    from moe_core.protocols import TuningJob

    layer = config(scheme)
    one = layer_of(layer, 17, tokens=64)
    plan = bind(registry, layer, one.weights)
    store, said = tmp_path / "store.json", []
    job = TuningJob(
        plan=plan, binding=plan._binding, quant_info=plan.quant_info, tokens=(64,), budget_s=60.0, store=store,
        inputs=lambda tokens, seed: (one.hidden, one.topk), progress=said.append,
    )  # fmt: skip
    (row,) = tune(job)
    assert row.tuned_us <= row.default_us
    assert row.tried > 2
    settings = Settings(runner=RUNNER, dispatcher="standard", tuning=str(store))
    tuned = moe_core.plan(layer, one.weights, max_tokens=MOST, registry=registry, settings=settings)
    assert tuned.runner._tactics.tokens == (64,)
    close(tuned(one.hidden, one.topk), layer, one)


@each("fp8_block128")
@pytest.mark.parametrize("tokens", [8, 512])
def test_deepseek_sizes(registry: Registry, scheme: str, tokens: int) -> None:
    """One GPU of eight: 32 of 256 experts."""
    layer = MoeConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048, scheme=scheme)
    parallel = ParallelConfig(ep_size=8, ep_rank=3, reduce="caller")
    local = config(scheme, num_experts=32, top_k=8, hidden_size=7168, intermediate_size=2048)
    some = layer_of(local, 18, tokens=tokens)
    ids = make_routing("uniform", tokens, 256, 8, 19, device="cuda")
    result = bind(registry, layer, some.weights, parallel)(some.hidden, ids)
    mine = (ids.topk_ids >= 96) & (ids.topk_ids < 128)
    here = TopKOutput(torch.where(mine, ids.topk_ids - 96, -1), ids.topk_weights)
    close(result, local, some._replace(topk=here))
