"""The command's other end: real layers in the interpreter (or on the GPU), timed, checked and stored."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_core_triton.configs import tuning
from moe_core_triton.configs.candidates import specialized
from moe_core_triton.configs.checking import dequantized, expected, sample
from moe_core_triton.configs.compiling import Compilers, Outlined, brief, is_compilers, recipe, small
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.files import Store
from moe_core_triton.configs.tuning import Variant, single
from moe_core_triton.packing import halves
from moe_core_triton.tune import LayerBench, tune
from moe_core_triton.weights import Projection

from moe_core import Activation, ParallelConfig
from moe_core.cli._timing import random_inputs, random_weights
from moe_core.errors import MoeCoreError
from moe_core.protocols import RunningState, TuningJob

TINY = GemmConfig(64, 64, 4, 1, False, False)  # few programs: the interpreter runs one after the other
TILE = GemmConfig(32, 32, 4, 2, False, False)
SMALL = {"num_experts": 4, "hidden_size": 64, "intermediate_size": 48}
SCHEMES = ("bf16", "int8_channel", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16", "fp8_block128", "fp8_channel")


@pytest.fixture
def make_job(lab: Any, tmp_path: Any) -> Any:
    def make(tokens: tuple[int, ...] = (1, 4), *, budget: float = 20.0, parallel: Any = None, **changes: Any) -> Any:
        config = lab.config(**changes)
        device = torch.device(lab.device)
        weights = random_weights(config, parallel or ParallelConfig(), device)
        plan = lab.plan(config, weights, "fused", parallel=parallel, max_tokens=max(tokens))
        told: list[str] = []
        job = TuningJob(
            plan=plan,
            binding=plan._binding,
            quant_info=plan.quant_info,
            tokens=tokens,
            budget_s=budget,
            inputs=lambda count, seed: random_inputs(config, count, device, seed),
            store=tmp_path / "triton.json",
            progress=told.append,
        )
        return job, told

    return make


@pytest.fixture
def short(monkeypatch: Any) -> None:
    """Few variants: the interpreter is slow."""
    for name, value in {"FIRST": 2, "STEPS": 1, "ROUNDS": 1, "BLOCKS": 1, "REPEATS": 1}.items():
        monkeypatch.setattr(tuning, name, value)


@pytest.fixture
def untimed(lab: Any, monkeypatch: Any) -> None:
    """In the interpreter, where a clock tells nothing, every variant runs once: to be checked."""
    if not lab.on_gpu:
        monkeypatch.setattr(LayerBench, "_clocked", lambda *given: 1.0)


def _key(job: Any) -> str:
    return Problem.of(job.binding).key


def test_a_whole_job(make_job: Any, short: None) -> None:
    job, told = make_job(budget=60.0, **SMALL)
    rows = tune(job)
    assert [row.tokens for row in rows] == [1, 4]
    assert all(0 < row.tuned_us <= row.default_us and row.tried > 3 and row.source == "model" for row in rows)
    (table,) = Store.read(job.store).sections.values()
    assert sorted(table[_key(job)]) == [1, 4]
    assert [table[_key(job)][row.tokens].config.text for row in rows] == [row.tuned for row in rows]
    assert any(text.startswith("4 tokens: ") for text in told)
    assert not any(text.startswith("failed") for text in told), told


def test_expert_parallel_layers(make_job: Any, short: None) -> None:
    job, told = make_job((3,), parallel=ParallelConfig(ep_size=2, reduce="caller"), **SMALL)
    (row,) = tune(job)
    assert row.tokens == 3
    assert not any(text.startswith("failed") for text in told), told


def test_input_sets_rotate_the_weights(make_job: Any) -> None:
    bench = LayerBench(make_job((1, 600))[0])
    bench._cuda = True
    assert len(bench._inputs(1)) == 16  # never 240 MB
    assert len(bench._inputs(600)) == 1
    assert len({rows.ids.sum().item() for rows, _ in bench._inputs(1)}) > 3


def test_a_budget_of_nothing(make_job: Any) -> None:
    job, _ = make_job(budget=1e-9)
    assert tune(job) == []
    assert not job.store.exists()


def legal(gemm: GemmConfig, job: Any) -> GemmConfig:
    """Where four-bit weights are words, the number of warps decides on the side of the weights."""
    words = job.quant_info.up.pack == "mxfp4_words"
    return replace(gemm, swap=gemm.num_warps < 4) if words else gemm


@pytest.mark.parametrize("scheme", SCHEMES)
def test_variants_of_every_scheme_are_right(make_job: Any, untimed: None, scheme: str) -> None:
    job, told = make_job((3,), scheme=scheme, num_experts=3)
    packed, block = "4" in scheme.split("_")[0], {"fp8_block128": 128, "int4_w4a16": 64}.get(scheme, 32)
    tile = replace(TILE, block_k=128 if packed else block, swap=packed, block_n=64)
    tiny = replace(TINY, block_k=128)
    bench = LayerBench(job)
    wide = replace(tile, block_n=256 if scheme == "fp8_block128" else 128)
    low = replace(tile, swap=True, num_warps=2 if packed else 4)
    variants = [
        Variant("layer", LayerConfig("tiles", 64, legal(tile, job), legal(tile, job))),
        single("up", 64, legal(wide, job)),
        single("up", 16, legal(low, job)),
        single("down", 64, legal(replace(tile, num_warps=8), job)),
        single("down", 16, legal(low, job)),
    ]
    if job.quant_info.up.pack != "mxfp4_words":
        variants.insert(1, Variant("layer", LayerConfig("tiny", 1, tiny, tiny)))
    for variant in variants:
        us = bench.time(3, variant, float("inf"))
        assert us is not None, (variant.text, told)
        assert us > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"bias": True, "activation": Activation.swiglu_oai()},
        {"router_weight_on_input": True},
        {"no_combine": True},
        {"routed_scaling_factor": 2.5},
        {"top_k": 1},
        {"activation": Activation(name="relu2", gated=False)},
    ],
    ids=str,
)
def test_options_are_right(make_job: Any, untimed: None, changes: dict[str, Any]) -> None:
    job, told = make_job((3,), num_experts=3, **changes)
    bench = LayerBench(job)
    for variant in (
        Variant("layer", LayerConfig("tiny", 1, TINY, TINY)),
        Variant("layer", LayerConfig("tiles", 64, TILE, TILE)),
        single("up", 16, TILE),
        single("down", 16, TILE),
    ):
        assert bench.time(3, variant, 0.0) is not None, told


def test_what_would_run_as_something_else_is_not_timed(make_job: Any) -> None:
    """A specialised configuration here, where only ordinary kernels run: its time would be theirs."""
    job, told = make_job((3,))
    tile = specialized(Problem.of(job.binding), 128)
    assert LayerBench(job).time(3, Variant("layer", LayerConfig("tiles", 128, tile, tile)), 0.0) is None
    assert "do not take this layer" in told[-1]


def test_what_is_wrong_or_fails_is_not_timed(make_job: Any, monkeypatch: Any) -> None:
    job, told = make_job((3,))
    bench = LayerBench(job)
    tiles = LayerConfig("tiles", 16, TILE, TILE)
    down = type(bench._layer)._down

    def broken(self: Any, call: Any, *rest: Any) -> None:
        down(self, call, *rest)
        if call.config.down.num_warps == 8:
            call.result[0] *= 3.0

    monkeypatch.setattr(type(bench._layer), "_down", broken)
    wrong = replace(tiles, down=replace(TILE, num_warps=8))
    assert bench.time(3, Variant("layer", wrong), 0.0) is None
    assert "wrong by" in told[-1]
    assert bench.time(3, Variant("layer", tiles), 0.0) is not None
    assert bench.time(3, single("down", 16, wrong.down), 0.0) is None
    assert "wrong by" in told[-1]
    monkeypatch.setattr(type(bench._layer), "_up", lambda *given: 1 / 0)
    assert bench.time(3, Variant("layer", tiles), 0.0) is None
    assert "ZeroDivisionError" in told[-1]


def test_what_a_kernel_does_not_write_is_seen(make_job: Any, monkeypatch: Any) -> None:
    job, told = make_job((3,))
    bench = LayerBench(job)
    assert bench.time(3, Variant("layer", LayerConfig("tiles", 16, TILE, TILE)), 0.0) is not None
    monkeypatch.setattr("moe_core_triton.sequence.combine", lambda *given, **more: None)
    assert bench.time(3, Variant("layer", LayerConfig("tiles", 16, TILE, TILE)), 0.0) is None
    assert "nan" in told[-1]


def test_layers_that_the_tiny_path_does_not_take(make_job: Any, monkeypatch: Any) -> None:
    job, told = make_job((3,))
    monkeypatch.setattr("moe_core_triton.sequence.decodes", lambda *given: False)
    assert LayerBench(job).time(3, Variant("layer", LayerConfig("tiny", 1, TINY, TINY)), 0.0) is None
    assert "tiny path does not take" in told[-1]


def test_another_format_is_refused(make_job: Any) -> None:
    job, _ = make_job((3,))
    with pytest.raises(MoeCoreError, match="only the format"):
        LayerBench(replace(job, binding=replace(job.binding, format="batched")))


@pytest.mark.parametrize("scheme", ["bf16", "int4_w4a16", "mxfp4_w4a16", "int8_channel", "fp8_block128"])
def test_workers_launch_everything_without_the_weights(make_job: Any, lab: Any, scheme: str) -> None:
    job, _ = make_job((3,), scheme=scheme, bias=True)
    bench = LayerBench(job)
    rows = bench._inputs(3)[0][0]
    made = Outlined(pickle.loads(recipe(job.binding, job.quant_info, rows)))
    for part in ("up", "down"):
        mine, theirs = getattr(made.weights, part), getattr(job.quant_info, part)
        assert mine.data.shape[1:] == theirs.data.shape[1:]
        assert (mine.n, mine.k, mine.pack, mine.scale_stride) == (theirs.n, theirs.k, theirs.pack, theirs.scale_stride)
    packed = "4" in scheme.split("_")[0]
    tile = replace(TILE, block_k=128, swap=packed, block_n=64)
    tiny = replace(TINY, block_k=128)
    low = legal(replace(tile, num_warps=2 if packed else 4), job)
    variants = [
        (40, Variant("layer", LayerConfig("tiles", 16, low, low))),
        (40, single("up", 16, low)),
        (40, single("down", 16, replace(low, persistent=True))),
    ]
    if job.quant_info.up.pack != "mxfp4_words":
        variants.append((3, Variant("layer", LayerConfig("tiny", 1, tiny, tiny))))
    for tokens, variant in variants:
        made.launch(tokens, variant)


class Recorder:
    """In a kernel's place, and without running it: what Triton would specialise a launch for."""

    def __init__(self, kernel: Any, seen: list[Any]) -> None:
        self._kernel, self._seen = kernel, seen

    def __getitem__(self, grid: Any) -> Any:
        free = {"alpha", "beta", "limit", "factor", "tiles", "early_bytes"}

        def launch(*arguments: Any, **named: Any) -> None:
            values = dict(zip(self._kernel.arg_names, arguments, strict=False))
            kinds = {name: self._kind(value) for name, value in values.items() if name not in free}
            self._seen.append((self._kernel.arg_names[:3], kinds, named))

        return launch

    @staticmethod
    def _kind(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype, value.data_ptr() % 16
        return (value == 1, value % 16 == 0) if isinstance(value, int) else value


@pytest.mark.parametrize(
    ("scheme", "tokens"),
    [("bf16", 1), ("bf16", 32), ("int4_w4a16", 3), ("int8_channel", 1), ("fp8_block128", 2), ("fp8_tensor", 3)],
)
def test_workers_compile_what_will_run(
    make_job: Any, untimed: None, monkeypatch: Any, scheme: str, tokens: int
) -> None:
    job, told = make_job((tokens,), scheme=scheme, num_experts=3)
    bench = LayerBench(job)
    made = Outlined(pickle.loads(recipe(job.binding, job.quant_info, bench._inputs(tokens)[0][0])))
    packed = "4" in scheme.split("_")[0]
    tile = replace(TILE, block_k=128 if packed or "block" in scheme else 64, swap=packed, block_n=64)
    tiny = replace(TINY, block_k=128)
    variants = [single("up", 64, replace(tile, persistent=True)), single("down", 64, tile), single("down", 16, tile)]
    variants += [Variant("layer", LayerConfig("tiny", 1, tiny, tiny))] if scheme != "fp8_tensor" else []
    assert bench.time(tokens, Variant("layer", LayerConfig("tiles", 64, tile, tile)), 0.0) is not None, told
    bench._gemm_calls(variants[0])  # the results to compare with are there
    seen: list[Any] = []
    from moe_core_triton import decoding, products

    for module, name in ((products, "grouped_gemm"), (decoding, "decode_up"), (decoding, "decode_down")):
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), seen))
    for variant in variants:
        bench._prepared(variant.config.block_m)
        seen.clear()
        for call in (bench._layer_calls if variant.part == "layer" else bench._gemm_calls)(variant)[:1]:
            call()
        real = list(seen)
        seen.clear()
        made.launch(tokens, variant)
        assert len(real) == (2 if variant.part == "layer" else 1)
        assert seen == real


def test_small_calls_are_like_large_ones() -> None:
    assert [small(t) for t in (1, 8, 16, 64, 1024, 40)] == [1, 8, 16, 16, 16, 24]


class Pool:
    """Compiles at once, in this process."""

    def __init__(self, monkeypatch: Any, problems: dict[Variant, str]) -> None:
        self.asked: list[tuple[int, Variant]] = []

        def compile_(made_from: bytes, tokens: int, variant: Variant) -> str | None:
            self.asked.append((tokens, variant))
            return problems.get(variant)

        monkeypatch.setattr("moe_core_triton.configs.compiling._compile", compile_)
        monkeypatch.setattr("moe_core_triton.configs.compiling.ProcessPoolExecutor", lambda *given, **more: self)

    def submit(self, function: Any, *arguments: Any) -> Any:
        from concurrent.futures import Future

        future: Any = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **given: Any) -> None:
        self.asked.append((0, single("up", 1, TILE)))


def test_a_batch_is_compiled_once(monkeypatch: Any) -> None:
    bad = single("up", 32, replace(TILE, num_stages=5))
    pool, failed = Pool(monkeypatch, {bad: "OutOfResources: shared memory"}), []
    wanted = [(64, single("up", 16, TILE)), (1024, single("up", 16, TILE)), (8, single("up", 16, TILE)), (64, bad)]
    with Compilers(torch.device("cpu"), 2) as compilers:
        arguments: tuple[Any, ...] = (5.0, lambda tokens, variant: tokens, lambda *problem: failed.append(problem))
        assert compilers.compile(b"layer", wanted, *arguments) == set(wanted[:3])
        assert compilers.compile(b"layer", wanted, *arguments) == set(wanted[:3])
        assert failed == [(bad, "OutOfResources: shared memory")]
        assert [tokens for tokens, _ in pool.asked] == [64, 8, 64]
        persistent = single("up", 16, replace(TILE, persistent=True))
        compilers.compile(b"layer", [(64, persistent), (1024, persistent)], *arguments)
        assert len(pool.asked) == 5
        monkeypatch.setattr(pool, "submit", lambda *given: _raise())
        assert compilers.compile(b"other", wanted, *arguments) == set(wanted)
        assert compilers.broken
    assert len(pool.asked) == 6


def _raise() -> None:
    from concurrent.futures.process import BrokenProcessPool

    raise BrokenProcessPool


def test_whose_error_it_is() -> None:
    from triton.runtime.errors import OutOfResources

    assert is_compilers(OutOfResources(300_000, 232_448, "shared memory"))
    assert is_compilers(RuntimeError("PassManager::run failed"))
    assert not is_compilers(torch.OutOfMemoryError("no memory"))
    assert brief(ValueError("one\ntwo")) == "ValueError: one"


@pytest.mark.parametrize("words", [False, True])
def test_packed_weights_are_read_as_they_were_written(lab: Any, words: bool) -> None:
    from types import SimpleNamespace

    from moe_core.quant import QuantizedTensor, builtin_scheme, dequantize

    scheme, (n, k) = builtin_scheme("mxfp4_w4a16"), (8, 96)
    data = torch.randint(0, 256, (2, n, k // 2), dtype=torch.uint8)
    scale = torch.randint(120, 130, (2, n, k // 32), dtype=torch.uint8)
    padded = torch.nn.functional.pad(scale, (0, 1))
    held = Projection(halves(data, 128, words=words), 2, n // 2, k, scale=padded, group=32, pack_width=128)
    held.pack = "mxfp4_words" if words else "mxfp4"
    binding = SimpleNamespace(scheme=scheme, config=SimpleNamespace(group_size=None))
    wanted = dequantize(QuantizedTensor(data[1], scale[1]), scheme)
    assert torch.equal(dequantized(held, 1, binding), wanted.float())


def test_the_oracle_is_the_reference_runner(make_job: Any, lab: Any) -> None:
    job, _ = make_job((9,), bias=True, routed_scaling_factor=1.5)
    config = job.binding.config
    weights = random_weights(config, ParallelConfig(), torch.device(lab.device))
    hidden, topk = job.inputs(9, 0)
    rows = LayerBench(job)._read(job.plan.dispatch(hidden, topk, RunningState()))
    which = sample(9, hidden.device)
    assert which.tolist()[0] == 0
    assert which.tolist()[-1] == 8
    found = expected(LayerBench(job)._layer, job.binding, rows, job.quant_info, which)
    lab.close(found.to(hidden.dtype), lab.expected(config, weights, hidden, topk)[which], config)
