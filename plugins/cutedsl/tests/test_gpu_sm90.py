"""`cutedsl_sm90` on a Hopper GPU, with FlashInfer itself: whole layers against the core's reference, graphs, updates.

MOE_CORE_TEST_SHARD=1/4   run the second of four parts: several processes on one GPU
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import pytest
import torch
from moe_core_cutedsl.sm90_tactics import GEMM1_COLUMNS, GEMM2_COLUMNS, TILE_ROWS, Tactic
from torch import Tensor

import moe_core
from moe_core import Activation, CanonicalWeights, MoeConfig, ParallelConfig
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing import assert_close, make_routing
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Phase


def _here() -> str | None:
    """Why these tests cannot run; None where they can."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        return "needs a Hopper GPU (sm_90)"
    missing = [name for name in ("flashinfer", "cutlass", "triton") if importlib.util.find_spec(name) is None]
    return f"needs {', '.join(missing)}" if missing else None


_SHARD = os.environ.get("MOE_CORE_TEST_SHARD")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(_here() is not None, reason=str(_here())),
    pytest.mark.filterwarnings("ignore"),  # a vendor's deprecations are not ours
]
SIZES: dict[str, Any] = {"num_experts": 64, "top_k": 8, "hidden_size": 2048, "intermediate_size": 768}
LAYERS: dict[str, dict[str, Any]] = {
    "qwen": SIZES,
    "mixtral": {"num_experts": 8, "top_k": 2, "hidden_size": 4096, "intermediate_size": 3584},
    "oai": {
        "num_experts": 32, "top_k": 4, "hidden_size": 2880, "intermediate_size": 2880,
        "activation": Activation.swiglu_oai(),
    },
    "odd": {"num_experts": 7, "top_k": 3, "hidden_size": 200, "intermediate_size": 96, "routed_scaling_factor": 2.5},
}  # fmt: skip
ACTIVATIONS = {
    "silu": Activation(),
    "clamped": Activation(limit=0.7),
    "oai": Activation.swiglu_oai(limit=1.5),
    "gelu": Activation(name="gelu_tanh"),
    "relu2": Activation(name="relu2", gated=False),
}
ROUTINGS = ("uniform", "one_hot", "skewed", "dropped", "duplicate", "none")
FINALIZE = pytest.mark.parametrize("options", [{}, {"fused_finalize": True}], ids=["ordered", "fused"])


@pytest.fixture(autouse=True)
def _part(request: pytest.FixtureRequest) -> Iterator[None]:
    """Only this process's part; and what a test took goes back to the device."""
    if _SHARD:
        part, _, parts = _SHARD.partition("/")
        if zlib.crc32(request.node.nodeid.encode()) % int(parts) != int(part):
            pytest.skip("another part's")
    yield
    torch.cuda.empty_cache()


@lru_cache(maxsize=1)
def registry() -> Registry:
    """The core, this plugin and the kit's dispatchers."""
    from moe_core_cutedsl.plugin import plugin

    return Registry(plugins=[plugin, testing_plugin], autoload=False, settings=Settings())


@lru_cache(maxsize=4)
def weights_of(config: MoeConfig, seed: int = 0) -> CanonicalWeights:
    """Random weights of all experts, on the GPU."""
    random = torch.Generator("cuda").manual_seed(seed)
    experts, hidden, inner = config.num_experts, config.hidden_size, config.intermediate_size
    dtype = getattr(torch, config.dtype)

    def normal(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=random, device="cuda") * shape[-1] ** -0.5).to(dtype)

    return CanonicalWeights(
        w13=normal(experts, config.gate_up_factor * inner, hidden), w2=normal(experts, hidden, inner)
    )


def call_of(config: MoeConfig, tokens: int, seed: int = 0, pattern: str = "uniform") -> tuple[Tensor, TopKOutput]:
    """Tokens and a routing; "none" drops every slot and leaves NaN as weights."""
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, config.hidden_size, generator=random).to(getattr(torch, config.dtype))
    chosen = "uniform" if pattern == "none" else pattern
    topk = make_routing(chosen, tokens, config.num_experts, config.top_k, seed + 1, device="cuda")
    if pattern == "none":
        topk.topk_ids.fill_(-1)
        topk.topk_weights.fill_(float("nan"))
    return hidden.cuda(), topk


def planned(
    config: MoeConfig,
    weights: CanonicalWeights,
    options: dict[str, Any] | None = None,
    parallel: ParallelConfig | None = None,
    *,
    dispatcher: str = "standard",
    runner: str = "cutedsl_sm90",
    **request: Any,
) -> Any:
    """A plan of the runner."""
    chosen = {runner: options} if options else {}
    settings = Settings(runner=runner, dispatcher=dispatcher, options=chosen)
    return moe_core.plan(config, weights, parallel, registry=registry(), settings=settings, **request)


def judge(actual: Tensor, config: MoeConfig, weights: CanonicalWeights, call: Any, what: str = "the result") -> None:
    """Within the kit's tolerance of the reference runner."""
    wanted = planned(config, weights, runner="reference")(*call)
    assert actual.dtype == wanted.dtype
    assert_close(actual, wanted, config.dtype, what=what)


@FINALIZE
@pytest.mark.parametrize("layer", LAYERS)
def test_from_zero_to_4096_tokens(layer: str, options: dict[str, Any]) -> None:
    """One plan, up and, where the order of sums is fixed, down again with the same bits."""
    config = MoeConfig(**LAYERS[layer])
    weights = weights_of(config)
    plan, seen = planned(config, weights, options), {}
    for tokens in (0, 1, 2, 3, 16, 17, 64, 128, 257, 1000, 4096):
        call = call_of(config, tokens, tokens, "skewed")
        seen[tokens] = call, plan(*call)
        judge(seen[tokens][1], config, weights, call, f"{tokens} tokens")
    for tokens in reversed(seen) if not options else ():
        call, first = seen[tokens]
        assert torch.equal(plan(*call), first), f"{tokens} tokens the second time"


@FINALIZE
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations(activation: str, dtype: str, options: dict[str, Any]) -> None:
    config = MoeConfig(**SIZES | {"activation": ACTIVATIONS[activation], "dtype": dtype})
    weights = weights_of(config)
    plan = planned(config, weights, options)
    for tokens in (5, 700):
        call = call_of(config, tokens, tokens)
        judge(plan(*call), config, weights, call)


@FINALIZE
@pytest.mark.parametrize("pattern", ROUTINGS)
@pytest.mark.parametrize("tokens", [1, 40, 1500])
def test_routings(pattern: str, tokens: int, options: dict[str, Any]) -> None:
    config = MoeConfig(**SIZES | {"routed_scaling_factor": 2.5})
    weights = weights_of(config)
    call = call_of(config, tokens, 7, pattern)
    result = planned(config, weights, options)(*call)
    judge(result, config, weights, call)
    if pattern == "none":
        assert not result.any()


@pytest.mark.parametrize("dispatcher", ["standard", "testing_standard"])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
def test_expert_parallel(placement: str, dispatcher: str) -> None:
    """Each rank's own result, and their sum; the testing dispatcher's padding rows hold NaN."""
    config = MoeConfig(**SIZES)
    weights = weights_of(config)
    for tokens, pattern in ((3, "uniform"), (300, "dropped"), (2000, "skewed")):
        call, total = call_of(config, tokens, tokens, pattern), 0.0
        for rank in range(4):
            parallel = ParallelConfig(ep_size=4, ep_rank=rank, reduce="caller", placement=placement)
            shard = weights.shard(config, parallel)
            result = planned(config, shard, None, parallel, dispatcher=dispatcher)(*call)
            wanted = planned(config, shard, None, parallel, runner="reference")(*call)
            assert_close(result, wanted, config.dtype, what=f"rank {rank}")
            total = total + result.double()
        assert_close(total.to(call[0].dtype), planned(config, weights, runner="reference")(*call), config.dtype)


@pytest.mark.parametrize("gemm", [1, 2])
@pytest.mark.parametrize("rows", TILE_ROWS)
def test_every_tile(rows: int, gemm: int) -> None:
    """Tiles that the model of the device may never choose."""
    config = MoeConfig(**LAYERS["odd"])
    weights = weights_of(config)
    plan = planned(config, weights)
    call = call_of(config, 900, 1, "skewed")
    for columns in (GEMM1_COLUMNS if gemm == 1 else GEMM2_COLUMNS)[rows]:
        for swizzle in (1, 8) if gemm == 1 else (1,):
            tactic = Tactic(rows, columns, swizzle, 64) if gemm == 1 else Tactic(rows, 64, 1, columns)
            plan.runner._tactics = lambda tokens, tactic=tactic: tactic
            judge(plan(*call), config, weights, call, str(tactic))


def _capture(work: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `work`, without a warm-up: binding the plan was one."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()
    return graph, result


class Captured:
    """A plan captured for a number of tokens, with its static inputs."""

    def __init__(self, plan: Any, hidden: Tensor, topk: TopKOutput) -> None:
        self.hidden, self.topk = hidden.clone(), TopKOutput(topk.topk_ids.clone(), topk.topk_weights.clone())
        self.graph, self.result = _capture(lambda: plan(self.hidden, self.topk, phase=Phase.DECODE))

    def replay(self, hidden: Tensor, topk: TopKOutput) -> Tensor:
        """The result for other values of the same shapes."""
        self.hidden.copy_(hidden)
        self.topk.topk_ids.copy_(topk.topk_ids)
        self.topk.topk_weights.copy_(topk.topk_weights)
        self.graph.replay()
        return self.result.clone()


@FINALIZE
@pytest.mark.parametrize("tokens", [1, 7, 64, 300])
def test_replay_of_other_routings(tokens: int, options: dict[str, Any]) -> None:
    """Captured while nothing was routed, by a plan that never ran before; bit for bit where sums have an order."""
    config = MoeConfig(**SIZES)
    weights = weights_of(config)
    plan = planned(config, weights, options, graph_capture={Phase.DECODE})
    calls = [call_of(config, tokens, seed, pattern) for seed, pattern in enumerate(ROUTINGS)]
    captured = Captured(plan, *calls[-1])
    for call, routing in zip(calls, ROUTINGS, strict=True):
        replayed = captured.replay(*call)
        judge(replayed, config, weights, call, f"the replay of {tokens} tokens, {routing},")
        assert options or torch.equal(replayed, plan(*call, phase=Phase.DECODE)), routing


def test_graphs_of_several_sizes() -> None:
    """As a server captures them: largest first, replayed in any order."""
    config = MoeConfig(**SIZES)
    plan = planned(config, weights_of(config), graph_capture={Phase.DECODE})
    graphs = {tokens: Captured(plan, *call_of(config, tokens, tokens)) for tokens in (256, 64, 16, 4, 1)}
    for tokens in (4, 256, 1, 64, 16, 4):
        call = call_of(config, tokens, 9 + tokens, "skewed")
        assert torch.equal(graphs[tokens].replay(*call), plan(*call, phase=Phase.DECODE))


@pytest.mark.parametrize("activation", ["silu", "relu2"])
def test_a_graph_sees_updated_weights(activation: str) -> None:
    config = MoeConfig(**SIZES | {"activation": ACTIVATIONS[activation]})
    first = weights_of(config, 1)
    own = CanonicalWeights(w13=first.w13.clone(), w2=first.w2.clone())
    plan = planned(config, own, graph_capture={Phase.DECODE})
    call = call_of(config, 16, 3)
    captured = Captured(plan, *call)
    old = captured.replay(*call)
    other = weights_of(config, 2)
    plan.update_weights(other)
    new = captured.replay(*call)
    assert not torch.equal(old, new)
    judge(new, config, other, call)


@pytest.mark.parametrize("tokens", [1, 32, 500, 4096])
def test_deterministic(tokens: int) -> None:
    config = MoeConfig(**SIZES)
    call = call_of(config, tokens, 1, "skewed")
    plan = planned(config, weights_of(config), features={"deterministic"})
    first = plan(*call)
    assert all(torch.equal(plan(*call), first) for _ in range(20))


def test_two_micro_batches_on_two_streams() -> None:
    """One plan, interleaved without waiting: calls share no memory."""
    config = MoeConfig(**SIZES)
    plan = planned(config, weights_of(config))
    calls = [call_of(config, tokens, tokens) for tokens in (190, 210)]
    wanted = [plan(*call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for index, stream in enumerate(streams):
            with torch.cuda.stream(stream):
                results[index].append(plan(*calls[index]))
    torch.cuda.synchronize()
    for index, rows in enumerate(results):
        assert all(torch.equal(row, wanted[index]) for row in rows), f"micro-batch {index}"


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    try:
        torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@FINALIZE
def test_a_forward_compiles_nothing_and_does_not_wait(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """From its first call on, for any number of tokens; nor does its memory grow."""
    config = MoeConfig(**SIZES | {"top_k": 5})
    plan = planned(config, weights_of(config), options)
    calls = [call_of(config, tokens, 1) for tokens in (1, 4, 60, 700, 4000)]
    cute = importlib.import_module("cutlass.cute")

    def compiles(*_: Any, **__: Any) -> Any:
        raise AssertionError("a forward compiled a kernel")

    monkeypatch.setattr(cute, "compile", compiles)
    for call in calls:  # Triton compiles our own kernels for divisible and odd sizes
        plan(*call)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with _waiting_is_an_error():
        for _ in range(30):
            for call in calls:
                plan(*call)
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before


@FINALIZE
def test_flashinfers_own_sort(options: dict[str, Any]) -> None:
    """The whole of FlashInfer's entry point, where its compiled sort is at hand."""
    env = importlib.import_module("flashinfer.jit.env")
    if not (env.FLASHINFER_AOT_DIR / "moe_utils" / "moe_utils.so").exists():
        pytest.skip("FlashInfer's moe_utils is not compiled here")
    config = MoeConfig(**SIZES | {"routed_scaling_factor": 2.5})
    weights = weights_of(config)
    plan = planned(config, weights, options | {"sort": "flashinfer"}, graph_capture={Phase.DECODE})
    for tokens, pattern in ((1, "uniform"), (40, "dropped"), (64, "none"), (1500, "skewed"), (4096, "uniform")):
        call = call_of(config, tokens, tokens, pattern)
        judge(plan(*call), config, weights, call, f"{tokens} tokens, {pattern},")
    call, other = call_of(config, 64, 1), call_of(config, 64, 2, "dropped")
    captured = Captured(plan, *call)
    judge(captured.replay(*other), config, weights, other, "the replay")
    parallel = ParallelConfig(ep_size=4, ep_rank=2, reduce="caller")
    shard = weights.shard(config, parallel)
    result = planned(config, shard, options | {"sort": "flashinfer"}, parallel)(*call)
    assert_close(result, planned(config, shard, None, parallel, runner="reference")(*call), config.dtype)
