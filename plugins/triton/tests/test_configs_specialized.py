"""Who gets the warp-specialised kernels: plans on sm_90 by themselves, for layers that they compute. Needs no GPU."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_core_triton import hopper
from moe_core_triton import sequence as sequences
from moe_core_triton.calls import ExpertRows
from moe_core_triton.configs import specialized
from moe_core_triton.configs import store as stores
from moe_core_triton.configs.candidates import specialized as their_tile
from moe_core_triton.configs.candidates import why_not
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.configs.device import GENERIC, known
from moe_core_triton.configs.specialized import HEIGHTS
from moe_core_triton.kernels import hopper_fp8, hopper_gemm, hopper_mxfp4
from moe_core_triton.kernels.hopper_common import ROWS
from moe_core_triton.kernels.hopper_unpack import HALF
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


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "mxfp4_w4a16"])
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
        {"bias": True, "scheme": "fp8_block128"},
        {"router_weight_on_input": True},
        {"activation": Activation(name="relu2", gated=False)},
        {"dtype": "float32"},
        {"dtype": "float32", "scheme": "fp8_block128"},
        {"scheme": "fp8_channel"},
        {"scheme": "int4_w4a16", "group_size": 64},
        {"scheme": "mxfp4_w4a16", "dtype": "float16"},
        {"scheme": "mxfp4_w4a16", "router_weight_on_input": True},
        {"scheme": "mxfp4_w4a16", "intermediate_size": 96},
        {"hidden_size": 2052},
        {"intermediate_size": 1020},
        {"scheme": "fp8_block128", "hidden_size": 2112},
        {"scheme": "fp8_block128", "intermediate_size": 960},
        {"hidden_size": 248},
        {"intermediate_size": 248},
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
        {"bias": True},
        {"dtype": "float16"},
        {"scheme": "mxfp4_w4a16", "hidden_size": 2880, "intermediate_size": 2880, "bias": True},
        {"hidden_size": 2056, "intermediate_size": 264},
        {"scheme": "fp8_block128", "hidden_size": 256, "intermediate_size": 256},
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
        up, down = more.pop("weights", (weights(), weights()))
        rows = ExpertRows(data, tokens=data.shape[0], **{"ids": torch.zeros(data.shape[0], 2), **more})
        return sequence._specializes(rows, TritonWeights(config.scheme, up, down), state or RunningState())

    return ask


def weights(pack: str = "") -> Any:
    """As much of a `Projection` as the sequence looks at."""
    return SimpleNamespace(data=torch.empty(0), pack=pack)


def test_what_a_call_decides(specializes: Any) -> None:
    data = torch.zeros(5, 2048, dtype=torch.bfloat16)
    assert specializes(data)
    assert specializes(data, layer(bias=True))
    assert not specializes(data, layer(bias=True, scheme="fp8_block128"))
    assert not specializes(data, state=RunningState(hooks=RunnerHooks()))
    strided = torch.zeros(5, 2052, dtype=torch.bfloat16)[:, :2048]
    assert not specializes(strided)
    assert not specializes(torch.zeros(5 * 2048 + 1, dtype=torch.bfloat16)[1:].view(5, 2048))


def test_weights_that_are_not_in_words(specializes: Any) -> None:
    """Those with a large scale."""
    data, config = torch.zeros(5, 2048, dtype=torch.bfloat16), layer(scheme="mxfp4_w4a16")
    words, other = weights("mxfp4_words"), weights("mxfp4")
    assert specializes(data, config, weights=(words, words))
    assert not specializes(data, config, weights=(other, other))
    assert not specializes(data, config, weights=(other, words))


def test_weights_of_one_gemm_that_are_not_in_words(specializes: Any) -> None:
    data, config = torch.zeros(5, 2048, dtype=torch.bfloat16), layer(scheme="mxfp4_w4a16")
    assert not specializes(data, config, weights=(weights("mxfp4_words"), weights("mxfp4")))


def test_offsets_of_rows_fit_32_bits(specializes: Any) -> None:
    many = torch.empty(1 << 20, 2048, dtype=torch.bfloat16, device="meta")
    ids = torch.empty(1 << 20, 2, device="meta")
    assert not specializes(many, ids=ids)
    assert specializes(many[1:], ids=ids)
    assert specializes(many, ids=None)  # a tensor descriptor reads them


@pytest.mark.parametrize(("scheme", "block_m"), [(s, m) for s, heights in HEIGHTS.items() for m in heights])
def test_a_call_that_they_do_not_compute_gets_the_ordinary_kernels(
    on: Any, monkeypatch: pytest.MonkeyPatch, scheme: str, block_m: int
) -> None:
    on("sm_90")
    tile = their_tile(Problem(8, 2, 2048, 1024, scheme=scheme), block_m)
    fixed = LayerConfig("tiles", block_m, tile, tile)
    monkeypatch.setattr(Planner, "__call__", lambda self, tokens: fixed)
    sequence = LayerSequence(binding(layer(scheme=scheme)))
    one = weights("mxfp4_words" if scheme == "mxfp4_w4a16" else "")
    both, heights = TritonWeights(scheme, one, one), []
    monkeypatch.setattr(sequence, "_table", lambda rows, height: heights.append(height))
    monkeypatch.setattr(sequences, "input_rows", lambda *given, **named: (None, False))
    rows = ExpertRows(torch.zeros(5, 2048, dtype=torch.bfloat16), tokens=5, ids=torch.zeros(5, 2))
    assert sequence.prepare(rows, both, RunningState()).config == fixed
    assert sequence.prepare(rows, both, RunningState(hooks=RunnerHooks())).config == fixed.plain
    assert heights == [block_m, fixed.plain.block_m]


def test_the_tiles_are_those_of_the_kernels() -> None:
    """The configurations say what the kernels' modules fix for themselves."""
    half = {height: (hopper_gemm.BLOCK_N, hopper_gemm.BLOCK_K, slots) for height, slots in hopper_gemm.STAGES.items()}
    assert specialized.TILES["bf16"] == half
    rows = hopper_fp8.PARTS.value * ROWS.value
    assert specialized.TILES["fp8_block128"] == {rows: (2 * hopper_fp8.GROUP, hopper_fp8.GROUP, hopper_fp8.STAGES)}
    packed = {
        height: (64 * consumers * blocks, 2 * HALF.value, slots)
        for height, (consumers, blocks, slots) in hopper_mxfp4.SHAPES.items()
    }
    assert specialized.TILES["mxfp4_w4a16"] == packed
    assert set(specialized.TILES) == set(specialized.STEPS)
    assert all(HEIGHTS[scheme] == tuple(tiles) for scheme, tiles in specialized.TILES.items())


@pytest.mark.parametrize(("scheme", "block_m"), [(s, m) for s, heights in HEIGHTS.items() for m in heights])
@pytest.mark.parametrize("sizes", [(128, 8, 2048, 768), (8, 2, 4096, 14336), (128, 4, 2944, 2944), (4, 2, 256, 128)])
def test_both_a_tile_and_its_ordinary_one_are_legal(scheme: str, block_m: int, sizes: tuple[int, ...]) -> None:
    h200, problem = known("NVIDIA H200"), Problem(*sizes, scheme=scheme, specialized=True)
    for group_m in (8, 16):
        tile = their_tile(problem, block_m, group_m)
        config = LayerConfig("tiles", block_m, tile, tile)
        assert why_not(problem, config, h200) is None
        assert {config.plain.up.specialized, config.plain.down.specialized} == {False}
        assert why_not(problem, config.plain, h200) is None
        assert why_not(replace(problem, specialized=False), config.plain, h200) is None
        assert config.plain.plain == config.plain
