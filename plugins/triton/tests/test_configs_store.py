"""Lookups: a person's file, this package's, a neighbour, the model; quick in a forward, said where it is a guess."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from moe_core_triton.configs import store as stores
from moe_core_triton.configs.candidates import candidates, why_not
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.device import GENERIC, known
from moe_core_triton.configs.files import Entry, Store, Where
from moe_core_triton.configs.store import Configs, configs_for, distance

import moe_core
from moe_core.errors import ConfigError
from moe_core.settings import Settings
from moe_core.vocabulary import BATCHED, STANDARD

H200 = known("NVIDIA H200")
QWEN, LFM2 = Problem(128, 8, 2048, 768), Problem(32, 4, 2048, 1792)
HERE = Where("NVIDIA H200", "sm_90", "3.6")


def tiles(block_m: int) -> LayerConfig:
    """Legal for both problems, and nobody's favourite."""
    gemm = GemmConfig(64, 64, 4, 2, True, True)
    return LayerConfig("tiles", block_m, gemm, gemm)


def tiny() -> LayerConfig:
    return LayerConfig("tiny", 1, GemmConfig(8, 256, 4, 1, False, False), GemmConfig(2, 128, 4, 1, False, False))


@pytest.fixture
def write(tmp_path):
    def make(name, *rows, where=HERE, problem=QWEN):
        path, made = tmp_path / name, Store()
        path.parent.mkdir(exist_ok=True)
        if path.exists():
            made = Store.read(path)
        for tokens, config in rows:
            made = made.with_entry(where, problem, tokens, Entry(config, 10.0 * tokens, 20.0 * tokens))
        made.write(path)
        return path

    return make


def make(problem=QWEN, device=H200, **files):
    return Configs(problem, device, triton="3.6", **({"shipped": None} | files))


def test_the_order_of_the_files(write):
    shipped = write("shipped/h200.json", (8, tiles(8)), (64, tiles(8)), (1024, tiles(64)))
    user = write("user.json", (8, tiles(16)), (64, tiles(16)))
    named = write("named.json", (8, tiles(32)))
    configs = make(named=named, user=user, shipped=shipped.parent)
    assert [(configs.choose(t).config, configs.choose(t).source) for t in (8, 64, 1024)] == [
        (tiles(32), "tuned"),
        (tiles(16), "tuned"),
        (tiles(64), "shipped"),
    ]
    assert configs.default(8).source == "shipped"
    assert str(named) in configs.choose(8).where
    assert make(shipped=shipped.parent)(8) == tiles(8)
    assert make().choose(8) == stores.Choice(candidates(QWEN, 8, H200)[0], "model")


def test_between_token_counts_the_nearer_one_counts(write):
    user = write("user.json", (1, tiny()), (8, tiles(8)), (64, tiles(16)), (4096, tiles(64)))
    configs = make(user=user)
    assert [configs(t) for t in (1, 2, 4, 12, 20, 24, 48, 100, 200)] == [
        tiny(), tiny(), tiles(8), tiles(8), tiles(16), tiles(16), tiles(16), tiles(16), tiles(16),
    ]  # fmt: skip
    assert configs.choose(512).source == "model"  # too far from both
    assert configs(1025) == tiles(64)
    assert configs(10**6) == tiles(64)  # more tokens of an expert than that change nothing
    assert configs(0) == tiny()
    assert configs(5) is configs(6)


def test_a_path_that_is_illegal_for_the_call_is_never_taken(write):
    configs = make(user=write("user.json", (6, tiny()), (64, tiles(16))))
    assert configs(6) == configs(8) == tiny()
    assert configs(9) != tiny()
    assert configs(24) == tiles(16)
    assert configs.tiles(6) != tiny()
    assert configs.tiles(64) == configs(64)
    everything = make()
    for tokens in (1, 3, 8, 9, 17, 300, 5000):
        assert why_not(QWEN, everything(tokens), H200, tokens) is None
        assert everything.tiles(tokens).path == "tiles"


def test_another_tritons_numbers_come_after_this_ones(write):
    write("user.json", (8, tiles(32)), where=HERE._replace(triton="3.5"))
    user = write("user.json", (64, tiles(16)))
    configs = make(user=user)
    assert configs(64) == tiles(16)
    assert configs(16) == tiles(16)  # in reach, and of this version
    assert configs.choose(4).config == tiles(32)
    assert "Triton 3.5" in configs.choose(4).where


def test_a_neighbor_is_taken_where_the_model_does_not_object(write):
    best = candidates(QWEN, 256, H200)[0]
    user = write("user.json", (256, best), (16, tiles(64)))
    configs = make(problem=LFM2, user=user)
    # 256 tokens of QWEN give an expert 16 rows, as 128 of LFM2 do.
    choice = configs.choose(128)
    assert (choice.config, choice.source) == (best, "neighbor")
    assert QWEN.key in choice.where
    assert configs.choose(4096).source == "model"
    assert make(problem=replace(LFM2, gated=False), user=user).choose(128).source == "model"
    assert make(problem=replace(LFM2, scheme="fp8_block128"), user=user).choose(128).source == "model"
    assert make(problem=replace(LFM2, hidden=16384), user=user).choose(128).source == "model"
    assert make(problem=LFM2, device=known("NVIDIA H100"), user=user).choose(128).source == "neighbor"
    assert make(problem=LFM2, device=known("NVIDIA A100"), user=user).choose(128).source == "model"
    slow = make(problem=LFM2, user=write("slow.json", (4096, tiles(8))))
    assert slow.choose(2048).source == "model"


def test_distance():
    assert distance(QWEN, QWEN) == 0
    assert distance(QWEN, replace(QWEN, hidden=4096)) == 1
    assert distance(QWEN, replace(QWEN, experts=32)) == 1
    assert distance(QWEN, replace(QWEN, dtype="float16")) == 0
    assert distance(QWEN, replace(QWEN, dtype="float32")) == float("inf")
    assert distance(replace(QWEN, scheme="fp8_tensor"), replace(QWEN, scheme="fp8_channel")) == 0
    int4 = replace(QWEN, scheme="int4_w4a16")
    assert distance(replace(int4, group_size=32), replace(int4, group_size=128)) == 0


def test_a_named_file_must_be_in_order_and_this_users_need_not(write, tmp_path, caplog):
    bad = tmp_path / "bad.json"
    bad.write_text("{")
    with pytest.raises(ConfigError, match="is not valid JSON"):
        make(named=bad)
    with pytest.raises(ConfigError, match="cannot be read"):
        make(named=tmp_path / "missing.json")
    with caplog.at_level(logging.WARNING, "moe_core.triton"):
        for _ in range(2):
            assert make(user=bad).choose(8).source == "model"
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert str(bad) in caplog.text
    assert make(user=tmp_path / "missing.json").choose(8).source == "model"


def test_a_guess_is_said_once(write, caplog):
    problem = replace(QWEN, hidden=2048 + 128)
    with caplog.at_level(logging.INFO, "moe_core.triton"):
        for _ in range(2):
            make(problem=problem).warm(100)
        make(user=write("user.json", (1, tiles(8)), (4, tiles(8)))).warm(8)
    (record,) = caplog.records
    assert "model (up to 128 tokens)" in record.getMessage()
    assert "moe-core tune --model ... --runner triton" in record.getMessage()
    assert problem.key in record.getMessage()


def test_a_forward_looks_up_and_no_more(monkeypatch):
    configs = make()
    configs.warm(64)
    assert configs(40) is configs(48)
    configs.tiles(40)
    monkeypatch.setattr(configs, "choose", None)
    assert configs(40) is configs(48)
    assert configs.tiles(40)


def test_a_part_of_the_experts_has_a_part_of_the_tokens(write):
    user = write("user.json", (8, tiles(32)))
    assert make(user=user, all_experts=1024)(64) == tiles(32)
    assert make(user=user, all_experts=1024).choose(8 * 512).source == "model"
    # Eight of its tokens are here, but all slots of 64 are looked at.
    assert all(make(all_experts=1024).choose(t).config.path == "tiles" for t in (9, 16, 64))


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    stores._shared.cache_clear()
    yield tmp_path / "moe_core" / "tuning" / "triton.json"
    stores._shared.cache_clear()


def test_this_users_file_is_read_and_read_again_when_it_changes(home, monkeypatch):
    monkeypatch.setattr(stores, "triton_version", lambda: "3.6")
    first = configs_for(QWEN, H200)
    assert configs_for(QWEN, H200) is first
    assert first.choose(8).source in ("model", "shipped", "neighbor")
    Store().with_entry(HERE, QWEN, 8, Entry(tiles(32), 1.0)).write(home)
    again = configs_for(QWEN, H200)
    assert again(8) == tiles(32)
    assert again.choose(8).source == "tuned"
    assert again.choose(1, tiny=False).config.path == "tiles"


def test_bound_to_a_plan(home, tmp_path):
    config = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")
    binding = SimpleNamespace(
        config=config,
        device=torch.device("cpu"),
        num_local_experts=4,
        local_intermediate_size=32,
        format=STANDARD,
        parallel=moe_core.ParallelConfig(ep_size=2),
        max_tokens=64,
        options={},
        request=SimpleNamespace(settings=Settings()),
    )
    found = stores.bound(binding)
    assert (found.problem, found.device) == (Problem(4, 2, 64, 32, dtype="float32"), GENERIC)
    assert found.local(64) == 32
    assert stores.bound(binding) is found
    batched = SimpleNamespace(**vars(binding) | {"format": BATCHED})
    assert stores.bound(batched).local(64) == 64


def test_what_is_shipped_serves_its_own_problems():
    for file in stores.SHIPPED.glob("*.json"):
        for section in Store.read(file).sections.values():
            for key in section:
                problem = Problem.parse(key)
                configs = Configs(problem, H200, triton="3.6")
                for tokens in (1, 8, 64, 256, 1024, 4096, 16384):
                    assert why_not(problem, configs(tokens), H200, tokens) is None


def test_what_was_tuned_with_specialized_kernels_is_kept_apart(write):
    plain = Problem.parse("E128k8H2048I768-gated-bfloat16-bf16")
    with_them = Problem.parse(f"{plain.key}+specialized")
    assert with_them == replace(plain, specialized=True)
    assert Problem.parse(with_them.key) == with_them
    mine, theirs = (Configs(problem, H200, triton="3.6").choose(4096) for problem in (plain, with_them))
    assert not any(gemm.specialized for gemm in (mine.config.up, mine.config.down))
    assert theirs.source == "shipped"
    assert any(gemm.specialized for gemm in (theirs.config.up, theirs.config.down))
    # Where nothing was tuned with them, what every plan can use is theirs too.
    user = write("user.json", (64, tiles(16)))
    assert make(problem=replace(QWEN, specialized=True), user=user).choose(64).source == "tuned"


@pytest.mark.parametrize("tokens", [1024, 16384])
def test_what_a_user_tuned_without_them_is_kept_unless_much_is_expected(write, tokens):
    """An ordinary configuration that the model thinks well of, and one that it does not."""
    problem = Problem(60, 8, 2560, 1536, specialized=True)
    plain = replace(problem, specialized=False)
    good = candidates(plain, tokens, H200)[0]
    assert any(gemm.specialized for gemm in (candidates(problem, tokens, H200)[0].up,))
    assert make(problem=problem, user=write("good.json", (tokens, good), problem=plain)).choose(tokens).config == good
    poor = write("poor.json", (tokens, tiles(16)), problem=plain)
    assert make(problem=problem, user=poor).choose(tokens).source == "model"
    # Asked for by itself, it is used all the same.
    assert make(problem=plain, user=poor).choose(tokens).source == "tuned"


def test_a_shipped_entry_far_away_is_doubted():
    """Shipped for 256 tokens at most: for 1024 the model's own choice is better."""
    found = Configs(Problem.parse("E128k8H2048I768-gated-bfloat16-bf16"), H200, triton="3.6").choose(1024)
    assert found.config.block_m >= 64
