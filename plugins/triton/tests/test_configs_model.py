"""The performance model: exact expectations, sane monotony, and what a decode GEMM was seen to reach."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
from moe_core_triton.configs import device as devices
from moe_core_triton.configs import model
from moe_core_triton.configs.candidates import candidates
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.model import Constants, Measured
from moe_core_triton.configs.routing import active_experts, expected_tiles, padding

H200 = devices.known("NVIDIA H200")
QWEN = Problem(128, 8, 2048, 768)
QWEN_235B = Problem(128, 8, 4096, 1536)
DECODE = GemmConfig(64, 128, 4, 3, True, True)
PREFILL = GemmConfig(256, 64, 8, 4, False, True, persistent=True)


@pytest.mark.parametrize(("experts", "top_k", "tokens"), [(8, 2, 5), (128, 8, 16), (32, 4, 200), (4, 4, 9)])
def test_expectations_are_those_of_a_simulation(experts, top_k, tokens):
    generator, rounds = random.Random(0), 400
    active, tiles = 0, {16: 0, 64: 0}
    for _ in range(rounds):
        counts = [0] * experts
        for _ in range(tokens):
            for expert in generator.sample(range(experts), top_k):
                counts[expert] += 1
        active += sum(n > 0 for n in counts)
        for block_m in tiles:
            tiles[block_m] += sum(-(-n // block_m) for n in counts)
    assert active_experts(experts, top_k, tokens) == pytest.approx(active / rounds, rel=0.03)
    for block_m, total in tiles.items():
        assert expected_tiles(experts, top_k, tokens, block_m) == pytest.approx(total / rounds, rel=0.03)


@pytest.mark.parametrize(
    ("mean", "block_m", "percent"),
    [(16, 16, 43), (16, 64, 300), (64, 64, 47), (64, 128, 100), (256, 64, 12), (256, 128, 24), (1024, 64, 3)],
)
def test_padding_is_that_of_the_literature(mean, block_m, percent):
    # E128 k8, exact binomial.
    assert 100 * padding(128, 8, mean * 16, block_m) == pytest.approx(percent, abs=1.5)


def test_large_counts_are_exact_and_quick():
    assert expected_tiles(128, 8, 10**6, 1) == pytest.approx(8e6, rel=1e-6)
    assert expected_tiles(1, 1, 100, 64) == 2


MEASURED = [
    (QWEN, 1, 14.7, 8.6),
    (QWEN, 8, 77.6, 41.2),
    (QWEN, 64, 177.9, 94.4),
    (QWEN_235B, 1, 50.6, 26.5),
    (QWEN_235B, 8, 297.8, 149.6),
    (QWEN_235B, 64, 697.8, 356.1),
]
ROWS = [
    Measured(problem, LayerConfig("tiles", 16, DECODE, DECODE), tokens, us, part)
    for problem, tokens, up, down in MEASURED
    for part, us in (("up", up), ("down", down))
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.problem.key}-{row.tokens}-{row.part}")
def test_a_decode_gemm_takes_what_was_measured(row):
    # What a decode GEMM in Triton 3.6 was seen to reach on an H200
    assert model.estimate(row, H200) == pytest.approx(row.us, rel=0.08)


def test_fitting_finds_what_made_the_rows():
    truth = replace(model.CONSTANTS, ramp=6e-6, stream=0.9)
    rows = [replace(row, us=model.estimate(row, H200, truth)) for row in ROWS]
    told: list[str] = []
    found = model.fit(rows, H200, names=("ramp", "stream"), say=told.append)
    assert model.error(rows, H200) > 0.2
    assert model.error(rows, H200, found) < 0.02
    assert found.launch == Constants().launch
    assert told


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "int4_w4a16", "mxfp4_w4a16"])
def test_more_tokens_never_take_less_time(scheme):
    problem = replace(QWEN, scheme=scheme)
    times = [
        model.seconds(problem, candidates(problem, t, H200, 1)[0], t, H200) for t in (1, 8, 64, 256, 1024, 4096, 16384)
    ]
    assert times == sorted(times)
    assert 10e-6 < times[0] < 40e-6


def test_what_is_larger_or_slower_takes_longer():
    tiles = LayerConfig("tiles", 64, PREFILL, PREFILL)
    base = model.seconds(QWEN, tiles, 4096, H200)
    assert model.seconds(replace(QWEN, hidden=4096), tiles, 4096, H200) > 1.5 * base
    assert model.seconds(replace(QWEN, intermediate=1536), tiles, 4096, H200) > 1.5 * base
    slow = replace(H200, peak={"bfloat16": H200.rate("bfloat16") / 2})
    assert model.seconds(QWEN, tiles, 4096, slow) > 1.3 * base
    few = LayerConfig("tiles", 16, DECODE, DECODE)
    assert model.seconds(QWEN, few, 8, replace(H200, bandwidth=2e12)) > 1.8 * model.seconds(QWEN, few, 8, H200)
    assert model.seconds(replace(QWEN, scheme="fp8_tensor"), few, 64, H200) < 0.65 * model.seconds(QWEN, few, 64, H200)


def test_the_model_knows_the_regimes():
    few, many = (LayerConfig("tiles", m, DECODE, DECODE) for m in (16, 128))
    wide = LayerConfig("tiles", 128, PREFILL, PREFILL)
    assert model.seconds(QWEN, few, 8, H200) < model.seconds(QWEN, wide, 8, H200)
    assert model.seconds(QWEN, wide, 16384, H200) < model.seconds(QWEN, few, 16384, H200)
    assert model.seconds(QWEN, wide, 16384, H200) < model.seconds(QWEN, many, 16384, H200)
    pointers = replace(DECODE, tma=False)
    assert model.seconds(QWEN, LayerConfig("tiles", 16, pointers, pointers), 1, H200) > model.seconds(
        QWEN, few, 1, H200
    )
    assert candidates(QWEN, 1, H200)[0].path == "tiny"
    assert candidates(QWEN, 64, H200)[0].up.swap
    assert not candidates(QWEN, 16384, H200)[0].up.swap
