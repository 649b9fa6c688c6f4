"""Who gets the warp-specialised kernels: plans on sm_90 by themselves, for layers that they compute. Needs no GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_core_triton import hopper
from moe_core_triton.calls import ExpertRows
from moe_core_triton.configs import specialized
from moe_core_triton.configs import store as stores
from moe_core_triton.configs.candidates import specialized as their_tile
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.configs.device import GENERIC, known
from moe_core_triton.planning import Planner
from moe_core_triton.sequence import LayerSequence
from moe_core_triton.weights import TritonWeights

from moe_core import Activation, MoeConfig, ParallelConfig
from moe_core.protocols import RunnerHooks, RunningState
from moe_core.quant import builtin_scheme
from moe_core.settings import Settings
from moe_core.vocabulary import STANDARD

GPU = torch.device("cuda")
PRODUCTS = {"sm_90": "NVIDIA H200", "sm_100": "NVIDIA B200", "sm_80": "NVIDIA A100"}


def layer(**changes: Any) -> MoeConfig:
    """One that they compute."""
    values: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 2048, "intermediate_size": 1024}
    return MoeConfig(**(values | changes))


def binding(config: MoeConfig, device: torch.device = GPU, **options: Any) -> Any:
    """As much of a `Binding` as configurations and the sequence look at."""
    return SimpleNamespace(
        config=config,
        device=device,
        dtype=getattr(torch, config.dtype),
        scheme=builtin_scheme(config.scheme),
        num_local_experts=config.num_experts,
        local_intermediate_size=config.intermediate_size,
        format=STANDARD,
        parallel=ParallelConfig(),
        max_tokens=64,
        options=options,
        request=SimpleNamespace(settings=Settings()),
        terms=SimpleNamespace(runner_does=lambda step: True),
    )


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Takes every CUDA device for one of this architecture."""

    def patch(arch: str) -> None:
        def this_device(device: torch.device) -> Any:
            return known(PRODUCTS[arch]) if device.type == "cuda" else GENERIC

        for module in (specialized, stores):
            monkeypatch.setattr(module, "this_device", this_device)
        monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: this_device(device).arch == "sm_90")
        monkeypatch.setattr(hopper, "_kernels", lambda: (None, None, None))

    return patch


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_they_are_the_default_on_sm_90(on: Any, scheme: str) -> None:
    config = layer(scheme=scheme)
    on("sm_90")
    assert Problem.of(binding(config)).specialized
    assert Problem.of(binding(config)).key.endswith("+specialized")
    assert Problem.of(binding(config, specialized=True)).specialized
    assert not Problem.of(binding(config, specialized=False)).specialized
    assert not Problem.of(binding(config, torch.device("cpu"))).specialized
    for arch in ("sm_100", "sm_80"):
        on(arch)
        assert not Problem.of(binding(config)).specialized
        assert not Problem.of(binding(config, specialized=True)).specialized


def test_another_triton_or_the_interpreter(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm_90")
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_kernels", lambda: None)
        assert not Problem.of(binding(layer())).specialized
    monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: False)
    assert not Problem.of(binding(layer())).specialized


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True},
        {"router_weight_on_input": True},
        {"activation": Activation(name="relu2", gated=False)},
        {"dtype": "float32"},
        {"dtype": "float32", "scheme": "fp8_block128"},
        {"scheme": "fp8_channel"},
        {"scheme": "mxfp4_w4a16"},
        {"hidden_size": 2052},
        {"intermediate_size": 1020},
        {"scheme": "fp8_block128", "hidden_size": 2112},
        {"scheme": "fp8_block128", "intermediate_size": 960},
        {"hidden_size": 120},
        {"intermediate_size": 120},
    ],
    ids=str,
)
def test_layers_that_they_do_not_compute(on: Any, changes: dict[str, Any]) -> None:
    on("sm_90")
    problem = Problem.of(binding(layer(**changes)))
    assert not problem.specialized
    assert "specialized" not in problem.key


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"hidden_size": 2056, "intermediate_size": 136},
        {"scheme": "fp8_block128", "hidden_size": 128, "intermediate_size": 128},
        {"activation": Activation.swiglu_oai(), "routed_scaling_factor": 2.5},
        {"no_combine": True},
    ],
    ids=str,
)
def test_layers_that_they_compute(on: Any, changes: dict[str, Any]) -> None:
    on("sm_90")
    assert Problem.of(binding(layer(**changes))).specialized


def test_what_counts_is_this_ranks_intermediate_size(on: Any) -> None:
    on("sm_90")
    part = binding(layer(scheme="fp8_block128"))
    part.local_intermediate_size = 64
    assert not Problem.of(part).specialized


def test_plans_choose_them_for_many_tokens(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm_90")
    monkeypatch.setattr(stores, "default_store", lambda runner: None)
    for wanted in (True, False):
        config = stores.bound(binding(layer(scheme="fp8_block128"), specialized=wanted))(8192)
        assert any(gemm.specialized for gemm in (config.up, config.down)) is wanted


@pytest.fixture
def specializes(on: Any) -> Any:
    """Whether a layer on sm_90 keeps the tile of the specialised kernels for a call."""
    on("sm_90")

    def ask(
        data: torch.Tensor, config: MoeConfig | None = None, state: RunningState | None = None, **more: Any
    ) -> bool:
        config = config or layer()
        sequence = LayerSequence(binding(config))
        rows = ExpertRows(data, tokens=data.shape[0], **{"ids": torch.zeros(data.shape[0], 2), **more})
        none = SimpleNamespace(data=torch.empty(0))
        return sequence._specializes(rows, TritonWeights(config.scheme, none, none), state or RunningState())

    return ask


def test_what_a_call_decides(specializes: Any) -> None:
    data = torch.zeros(5, 2048, dtype=torch.bfloat16)
    assert specializes(data)
    assert not specializes(data, layer(bias=True))
    assert not specializes(data, state=RunningState(hooks=RunnerHooks()))
    strided = torch.zeros(5, 2052, dtype=torch.bfloat16)[:, :2048]
    assert not specializes(strided)
    assert not specializes(torch.zeros(5 * 2048 + 1, dtype=torch.bfloat16)[1:].view(5, 2048))


def test_offsets_of_rows_fit_32_bits(specializes: Any) -> None:
    many = torch.empty(1 << 20, 2048, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(1 << 20, 2, device="meta")
    assert not specializes(many, ids=ids)
    assert specializes(many[1:], ids=ids)
    assert specializes(many, ids=None)  # a tensor descriptor reads them


def test_a_call_that_they_do_not_compute_gets_the_ordinary_kernels(on: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    on("sm_90")
    tile = their_tile(Problem(8, 2, 2048, 1024))
    fixed = LayerConfig("tiles", 128, tile, tile)
    monkeypatch.setattr(Planner, "__call__", lambda self, tokens: fixed)
    sequence = LayerSequence(binding(layer()))
    weights = TritonWeights("bf16", SimpleNamespace(data=torch.empty(0)), SimpleNamespace(data=torch.empty(0)))
    monkeypatch.setattr(sequence, "_table", lambda rows, block_m: SimpleNamespace(slots=None))
    rows = ExpertRows(torch.zeros(5, 2048, dtype=torch.bfloat16), tokens=5, ids=torch.zeros(5, 2))
    assert sequence.prepare(rows, weights, RunningState()).config == fixed
    assert sequence.prepare(rows, weights, RunningState(hooks=RunnerHooks())).config == fixed.plain
