"""Bounded tuning on costs that are known."""

from __future__ import annotations

import math
import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from moe_core_triton.configs import model, tuning
from moe_core_triton.configs.candidates import candidates, why_not
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.configs.device import GENERIC, known
from moe_core_triton.configs.files import SHIPPED, Store
from moe_core_triton.configs.store import Choice, Configs
from moe_core_triton.configs.tuning import moves, run_job, tune_all, tune_one

import moe_core
from moe_core.vocabulary import STANDARD

H200, QWEN = known("NVIDIA H200"), Problem(128, 8, 2048, 768)


class Clock:
    """Every measurement takes two seconds."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, 0

    def __call__(self) -> float:
        return self.now

    def timed(self, cost):
        def time_config(*arguments):
            self.now, self.calls = self.now + 2.0, self.calls + 1
            return cost(*arguments)

        return time_config


def quirky(tokens):
    """The model's cost, on a device that likes what the model does not know of."""

    def cost(config: LayerConfig) -> float:
        us = 1e6 * model.seconds(QWEN, config, tokens, H200)
        for gemm in (config.up, config.down):
            us *= {2: 1.3, 3: 1.1, 4: 1.0, 5: 1.15}.get(gemm.num_stages, 1.2)
            us *= {64: 1.0, 128: 0.85, 256: 1.2}.get(gemm.block_k, 1.1)
        return us

    return cost


def default(tokens: int) -> Choice:
    return Choice(candidates(QWEN, tokens, H200)[0], "model")


@pytest.mark.parametrize("tokens", [1, 64, 4096])
def test_it_finds_what_the_model_does_not_know(tokens):
    clock, cost = Clock(), quirky(tokens)
    found = tune_one(QWEN, tokens, H200, clock.timed(cost), budget_s=400, default=default(tokens), clock=clock)
    assert found.us == pytest.approx(cost(found.config))
    assert found.default_us == pytest.approx(cost(found.default.config))
    assert found.us <= min(cost(c) for c in candidates(QWEN, tokens, H200))
    for step in moves(found.config):
        if why_not(QWEN, step, H200, tokens) is None:
            assert cost(step) > 0.98 * found.us
    assert clock.now <= 402
    assert found.tried < clock.calls


def test_the_budget_is_kept_and_the_default_comes_first():
    clock, told = Clock(), []
    found = tune_one(
        QWEN, 64, H200, clock.timed(quirky(64)), budget_s=6, default=default(64), clock=clock, progress=told.append
    )
    assert clock.now <= 8
    assert found.tried <= 4
    assert found.default_us is not None
    assert found.us <= found.default_us
    assert tune_one(QWEN, 64, H200, quirky(64), budget_s=0, default=default(64), clock=clock) is None


def test_what_fails_is_left_out():
    clock, cost = Clock(), quirky(64)
    first = default(64).config
    found = tune_one(
        QWEN, 64, H200, clock.timed(lambda c: None if c == first or c.up.tma else cost(c)), budget_s=200,
        default=default(64), clock=clock,
    )  # fmt: skip
    assert found.default_us is None
    assert not found.config.up.tma
    assert tune_one(QWEN, 64, H200, clock.timed(lambda c: None), budget_s=100, default=default(64), clock=clock) is None


def test_noise_does_not_change_the_default():
    clock, noise = Clock(), random.Random(0)
    found = tune_one(
        QWEN, 64, H200, clock.timed(lambda c: 100 * noise.uniform(0.998, 1.002)), budget_s=300, default=default(64),
        clock=clock,
    )  # fmt: skip
    assert found.config == default(64).config


def test_token_counts_share_the_budget_and_learn_from_each_other():
    clock, seen, kept = Clock(), [], []
    configs = Configs(QWEN, H200, shipped=None, triton="3.6")

    def cost(tokens, config):
        seen.append((tokens, config))
        return quirky(tokens)(config)

    outcomes = tune_all(
        configs, (64, 96), clock.timed(cost), budget_s=200, found=kept.append, clock=clock, progress=lambda text: None
    )
    assert [o.tokens for o in outcomes] == [64, 96]
    assert kept == outcomes
    assert (96, outcomes[0].config) in seen
    assert clock.now <= 204
    assert tune_all(configs, (64, 96), clock.timed(cost), budget_s=0, clock=clock) == []
    half = clock.timed(lambda tokens, config: cost(tokens, config) if tokens == 64 else None)
    ended = tune_all(configs, (64, 96), half, budget_s=30, clock=clock)
    assert [o.tokens for o in ended] == [64]


def job(store: Path, **changes) -> SimpleNamespace:
    config = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")
    binding = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        num_local_experts=4,
        local_intermediate_size=32,
        format=STANDARD,
        parallel=moe_core.ParallelConfig(ep_size=2),
    )
    values = {"binding": binding, "tokens": (1, 64), "budget_s": 5.0, "store": store, "progress": lambda text: None}
    return SimpleNamespace(**values | changes)


def test_a_job_of_the_core(tmp_path):
    path = tmp_path / "triton.json"
    rows = run_job(job(path), lambda tokens, config: tokens * 10.0 + config.block_m)
    assert [(row.tokens, row.tuned_us) for row in rows] == [(1, 11.0), (64, 656.0)]
    assert all(row.default_us >= row.tuned_us and row.source == "model" for row in rows)
    (section,) = Store.read(path).sections.items()
    assert section[0].device == GENERIC.name
    # 64 tokens of a call of which half is here.
    assert sorted(section[1]["E4k2H64I32-gated-float32-bf16"]) == [1, 32]


def test_shipped_files_say_what_the_model_alone_would_do(tmp_path, monkeypatch):
    asked = []
    made = Configs(QWEN, H200, shipped=None)
    monkeypatch.setattr(tuning, "of", lambda binding, shipped: asked.append(shipped) or made)
    run_job(job(SHIPPED / "x.json", tokens=()), lambda tokens, config: None)
    run_job(job(tmp_path / "x.json", tokens=()), lambda tokens, config: None)
    assert asked == [None, SHIPPED]


def test_a_default_that_failed_is_no_number(tmp_path):
    first = Configs(Problem(4, 2, 64, 32, dtype="float32"), GENERIC, shipped=None, all_experts=8).default(1).config
    (row,) = run_job(job(tmp_path / "x.json", tokens=(1,)), lambda tokens, config: None if config == first else 5.0)
    assert math.isnan(row.default_us)
    assert row.tuned_us == 5.0
