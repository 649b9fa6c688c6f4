"""Bounded tuning on costs that are known."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moe_core_triton.configs import model
from moe_core_triton.configs.candidates import candidates, gemm_moves, specialized, why_not
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import GENERIC, known
from moe_core_triton.configs.files import SHIPPED, Store
from moe_core_triton.configs.store import Configs
from moe_core_triton.configs.tuning import PARTS, Point, Variant, run_job, shipped_for, single, tune_all

import moe_core
from moe_core.vocabulary import STANDARD

H200, QWEN = known("NVIDIA H200"), Problem(128, 8, 2048, 768)


class Costs:
    """A bench whose every measurement takes two seconds, and compiling none."""

    def __init__(self, problem=QWEN, device=H200, fails=lambda variant: False, noise=None, quirky=True) -> None:
        self.now, self.calls, self.batches, self.seen = 0.0, 0, [], []
        self.problem, self.device, self.fails, self.noise, self.quirky = problem, device, fails, noise, quirky

    def __call__(self) -> float:
        return self.now

    def compile(self, wanted, seconds):
        self.batches.append((list(wanted), seconds))
        return set(wanted)

    def time(self, tokens, variant, enough):
        self.now, self.calls = self.now + 2.0, self.calls + 1
        self.seen.append((tokens, variant))
        if self.fails(variant):
            return None
        return self.noise() if self.noise else self.cost(tokens, variant)

    def cost(self, tokens, variant):
        """The model's, on a device that likes what the model does not know of."""
        config, total = variant.config, 0.0
        block_m = 1 if config.path == "tiny" else config.block_m
        for part in PARTS if variant.part == "layer" else (variant.part,):
            gemm = getattr(config, part)
            us = 1e6 * model.gemm_seconds(self.problem, part, gemm, block_m, tokens, self.device)
            if self.quirky:
                us *= {2: 1.3, 3: 1.1, 4: 1.0, 5: 1.15}.get(gemm.num_stages, 1.2)
                us *= {64: 1.0, 128: 0.85, 256: 1.2}.get(gemm.block_k, 1.1)
            total += us
        if variant.part == "layer":
            total += 1e6 * model.overhead_seconds(self.problem, config.path, tokens, self.device)
        return total


def configs(problem=QWEN) -> Configs:
    return Configs(problem, H200, shipped=None, triton="3.6")


def run(bench, tokens=(64,), budget=400.0, **more):
    return tune_all(configs(bench.problem), tokens, bench, budget_s=budget, clock=bench, **more)


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_it_finds_what_the_model_does_not_know(tokens):
    bench = Costs()
    (found,) = run(bench, (tokens,), 1000.0)
    assert found.us == pytest.approx(bench.cost(tokens, Variant("layer", found.config)))
    assert found.default_us == pytest.approx(bench.cost(tokens, Variant("layer", found.default.config)))
    best = min(bench.cost(tokens, Variant("layer", c)) for c in candidates(QWEN, tokens, H200, 50))
    assert found.us <= 1.01 * best
    assert why_not(QWEN, found.config, H200, tokens) is None
    assert bench.now <= 1002
    assert found.tried < bench.calls
    assert len(bench.batches) > 1


def test_the_budget_is_kept_and_the_default_comes_first():
    bench, told = Costs(), []
    (found,) = run(bench, budget=6.0, progress=told.append)
    assert bench.now <= 8
    assert found.tried <= 4
    assert bench.seen[0] == (64, Variant("layer", configs().default(64).config))
    assert found.default_us is not None
    assert found.us <= found.default_us
    assert told[0].startswith("64 tokens: ")
    assert run(Costs(), budget=0.0) == []


def test_what_fails_is_left_out():
    default = configs().default(64).config
    bench = Costs(fails=lambda v: v == Variant("layer", default) or v.config.up.tma or v.config.down.tma)
    (found,) = run(bench)
    assert found.default_us is None
    assert not found.config.up.tma
    assert not found.config.down.tma
    assert run(Costs(fails=lambda v: True)) == []


def test_what_is_not_compiled_is_not_timed():
    bench = Costs()
    bench.compile = lambda wanted, seconds: {item for item in wanted if item[1].config.up.num_warps == 4}
    run(bench)
    assert bench.seen
    pairs = [v for _, v in bench.seen if v.part != "layer"]
    assert all(v.config.up.num_warps == 4 for v in pairs)


def test_noise_does_not_change_the_default():
    noise = random.Random(0)
    (found,) = run(Costs(noise=lambda: 100 * noise.uniform(0.998, 1.002)), budget=300)
    assert found.config == configs().default(64).config


def test_one_batch_for_all_token_counts_which_learn_from_each_other():
    bench, kept = Costs(), []
    outcomes = run(bench, (64, 96), 2000.0, found=kept.append)
    assert [o.tokens for o in outcomes] == [64, 96]
    assert {o.tokens for o in kept[:2]} == {64, 96}
    assert kept[-2:] == outcomes
    first, seconds = bench.batches[0]
    assert {tokens for tokens, _ in first} == {64, 96}
    assert seconds == pytest.approx(0.6 * 0.9 * 2000)
    assert [tokens for tokens, _ in first[:2]] == [64, 96]
    assert bench.now <= 2004
    half = Costs(fails=lambda v: False)
    half.time = lambda tokens, variant, enough: None if tokens == 96 else Costs.time(half, tokens, variant, enough)
    assert [o.tokens for o in run(half, (64, 96), 200.0)] == [64]


def test_what_is_given_is_tried():
    gemm = GemmConfig(64, 64, 4, 2, True, False)
    given = LayerConfig("tiles", 32, gemm, gemm)
    bench = Costs()
    run(bench, starts=lambda tokens: [given])
    assert bench.seen[1] == (64, Variant("layer", given))
    assert (64, single("up", 32, gemm)) in bench.seen


def test_the_tiny_path_is_searched_where_it_is_legal():
    bench = Costs()
    (found,) = run(bench, (1,))
    assert found.config.path == "tiny"
    assert not any(v.config.path == "tiny" for _, v in (lambda b: (run(b), b.seen)[1])(Costs()))
    assert {v.config.path for _, v in bench.seen} == {"tiny", "tiles"}


def test_moves_change_one_thing():
    gemm = GemmConfig(64, 64, 4, 3, True, True)
    moves = list(gemm_moves(gemm))
    assert replace(gemm, num_warps=2) in moves
    assert replace(gemm, block_n=32, num_warps=2) in moves
    assert replace(gemm, swap=False) in moves
    assert replace(gemm, tma=False) in moves


GPT_OSS = Problem(128, 4, 2880, 2880, scheme="mxfp4_w4a16", specialized=True)


def pairs(problem, block_m, times):
    """The layers that are timed after these GEMMs, as (up, down). times: {(part, gemm): microseconds}."""
    point = Point(configs(problem), 1024, Costs(problem), lambda: 0.0)
    point.times = {single(part, block_m, gemm): [us] for (part, gemm), us in times.items()}
    return [(v.config.up, v.config.down) for v in point.pairs()]


def test_the_best_pair_is_one_that_may_be_together():
    theirs, ours = specialized(GPT_OSS, 64), GemmConfig(64, 128, 4, 5, False, True)
    slow, both = replace(ours, num_stages=4), {("up", theirs): 10.0, ("down", ours): 10.0}
    # Alone the best of each: packed weights want both of one kind.
    every = both | {("up", ours): 30.0, ("down", theirs): 12.0}
    assert pairs(GPT_OSS, 64, every) == [(theirs, theirs), (ours, ours)]
    assert pairs(GPT_OSS, 64, both | {("up", slow): 40.0, ("up", ours): 30.0}) == [(ours, ours)]
    assert pairs(GPT_OSS, 64, both) == []
    same = {("up", ours): 10.0, ("up", theirs): 20.0, ("down", ours): 10.0, ("down", theirs): 11.0}
    assert pairs(GPT_OSS, 64, same) == [(ours, ours)]
    # Other layers may mix them.
    problem, wide = replace(QWEN, specialized=True), GemmConfig(256, 64, 8, 4, False, True, 8)
    half = specialized(problem, 128)
    mixed = {("up", half): 10.0, ("up", wide): 11.0, ("down", half): 11.0, ("down", wide): 10.0}
    assert pairs(problem, 128, mixed) == [(half, wide)]


@pytest.mark.parametrize("tokens", [256, 1024])
def test_packed_layers_are_tuned_with_both_gemms_of_one_kind(tokens):
    class Split(Costs):
        """Specialized kernels are fast for GEMM1 alone."""

        def cost(self, tokens, variant):
            gemms = {part: getattr(variant.config, part) for part in PARTS}
            worse = gemms["down"].specialized if variant.part in ("down", "layer") else False
            better = gemms["up"].specialized if variant.part in ("up", "layer") else False
            return super().cost(tokens, variant) * (1.5 if worse else 1.0) * (0.7 if better else 1.0)

    bench = Split(GPT_OSS)
    (found,) = run(bench, (tokens,), 1000.0)
    assert why_not(GPT_OSS, found.config, H200, tokens) is None
    layers = [v.config for _, v in bench.seen if v.part == "layer"]
    assert layers
    assert all(c.up.specialized is c.down.specialized for c in layers)
    kinds = {v.config.up.specialized for _, v in bench.seen if v.part != "layer"}
    assert kinds == {True, False}


def test_heights_that_are_no_power_of_two_are_tuned():
    """A specialized tile of 192 rows is tried; no ordinary one is."""
    bench = Costs(replace(QWEN, specialized=True))
    (found,) = run(bench, (16384,), 1000.0)
    assert why_not(bench.problem, found.config, H200, 16384) is None
    high = [v for _, v in bench.seen if v.config.block_m == 192]
    assert high
    assert all(v.config.up.specialized and v.config.down.specialized for v in high)


def job(store: Path, **changes) -> SimpleNamespace:
    config = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")
    binding = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        num_local_experts=4,
        local_intermediate_size=32,
        format=STANDARD,
        parallel=moe_core.ParallelConfig(ep_size=2),
        options={},
    )
    values = {"binding": binding, "tokens": (1, 64), "budget_s": 5.0, "store": store, "progress": lambda text: None}
    return SimpleNamespace(**values | changes)


class Plain:
    """Whatever the configuration, a call takes so long."""

    def __init__(self, us) -> None:
        self._us = us

    def compile(self, wanted, seconds):
        return set(wanted)

    def time(self, tokens, variant, enough):
        return self._us(tokens, variant.config)


def test_a_job_of_the_core(tmp_path):
    path = tmp_path / "triton.json"
    rows = run_job(job(path), Plain(lambda tokens, config: tokens * 10.0 + config.block_m), shipped=None)
    assert [(row.tokens, row.tuned_us) for row in rows] == [(1, 11.0), (64, 656.0)]
    assert all(row.default_us >= row.tuned_us and row.source == "model" for row in rows)
    (section,) = Store.read(path).sections.items()
    assert section[0].device == GENERIC.name
    # 64 tokens of a call of which half is here.
    assert sorted(section[1]["E4k2H64I32-gated-float32-bf16"]) == [1, 32]
    # What the store says is tried again, and is no default.
    again = run_job(job(path), Plain(lambda tokens, config: 5.0), shipped=None)
    assert [row.source for row in again] == ["model", "model"]


def test_shipped_files_say_what_the_model_alone_would_do(tmp_path):
    assert shipped_for(SHIPPED / "x.json") is None
    assert shipped_for(tmp_path / "x.json") == SHIPPED


def test_a_default_that_failed_is_no_number(tmp_path):
    first = Configs(Problem(4, 2, 64, 32, dtype="float32"), GENERIC, shipped=None, all_experts=8).default(1).config
    bench = Plain(lambda tokens, config: None if config == first else 5.0)
    (row,) = run_job(job(tmp_path / "x.json", tokens=(1,)), bench, shipped=None)
    assert math.isnan(row.default_us)
    assert row.tuned_us == 5.0
