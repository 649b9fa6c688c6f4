"""Every candidate is legal by the rules of the hardware, written here once more and differently."""

from __future__ import annotations

from dataclasses import replace

import pytest
from moe_core_triton.configs import device as devices
from moe_core_triton.configs.candidates import blocks, candidates, gemm_candidates, gemms, specialized, why_not
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem
from moe_core_triton.configs.specialized import HEIGHTS

from moe_core.errors import ConfigError

DEVICES = {
    "h200": devices.known("NVIDIA H200"),
    "a100": devices.known("NVIDIA A100"),
    "b200": devices.known("NVIDIA B200"),
    "mi300x": devices.known("AMD Instinct MI300X"),
    "mi355x": devices.known("AMD Instinct MI355X"),
    "interpreter": devices.GENERIC,
}
SHAPES = {
    "mixtral": Problem(8, 2, 4096, 14336),
    "qwen": Problem(128, 8, 2048, 768),
    "lfm2": Problem(32, 4, 2048, 1792),
    "gpt-oss": Problem(128, 4, 2880, 2880),
    "deepseek-tp8": Problem(256, 8, 7168, 256),
    "tiny": Problem(4, 2, 64, 32),
    "odd": Problem(3, 3, 96, 40, gated=False),
}
SCHEMES = ("bf16", "fp8_tensor", "fp8_block128", "int8_channel", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16")
H200, QWEN = DEVICES["h200"], SHAPES["qwen"]


def rules(problem: Problem, config: LayerConfig, device: devices.Device, tokens: int) -> None:
    """What every configuration keeps to."""
    wide, lanes = device.arch in ("sm_90", "sm_100"), 64 if device.arch.startswith("gfx") else 32
    weight = {"int4_w4a16": 0.5, "mxfp4_w4a16": 0.5, "bf16": {"float32": 4}.get(problem.dtype, 2)}.get(
        problem.scheme, 1
    )
    token = 1 if problem.scheme.startswith(("fp8", "int8_c")) else {"float32": 4}.get(problem.dtype, 2)
    if config.path == "tiny":
        assert config.block_m == 1
        assert tokens * problem.top_k <= 64
        assert not any((config.up.swap, config.up.tma, config.down.swap, config.down.tma))
    words = problem.scheme == "mxfp4_w4a16" and problem.dtype == "bfloat16" and device.arch.startswith("sm_")
    assert not (words and config.path == "tiny")
    for part, gemm in (("up", config.up), ("down", config.down)):
        if gemm.specialized:
            assert device.arch == "sm_90"
            assert config.block_m in HEIGHTS[problem.scheme]
            assert gemm == specialized(problem, config.block_m, gemm.group_m)
            continue
        gated = part == "up" and problem.gated
        rows = gemm.block_n // 2 if gated else gemm.block_n
        if gated:
            assert gemm.block_n % 2 == 0
            assert rows <= max(problem.intermediate, 32)
        if problem.scheme == "fp8_block128":
            assert 128 % rows == 0 or (rows == 256 and not gated and problem.matrix(part)[0] % 256 == 0)
            assert gemm.block_k % 128 == 0
        if problem.scheme in ("int4_w4a16", "mxfp4_w4a16"):
            assert gemm.swap is ((gemm.num_warps < 4) if words else config.path == "tiles")
            assert gemm.block_k % 64 == 0
        if gemm.tma:
            assert device.arch in ("sm_90", "sm_100")
        if config.path == "tiny":
            slots = 1 << (problem.top_k - 1).bit_length() if part == "down" else 1
            items = gemm.block_k // 2 if problem.scheme in ("int4_w4a16", "mxfp4_w4a16") else gemm.block_k
            assert 4 <= slots * gemm.block_n * items / (lanes * gemm.num_warps) <= (32 if part == "down" else 64)
            continue
        assert config.block_m & (config.block_m - 1) == 0
        packed = problem.scheme in ("int4_w4a16", "mxfp4_w4a16")
        assert gemm.num_warps in ((1, 2, 4, 8) if packed else (4, 8))
        assert (gemm.block_n if gemm.swap else config.block_m) >= (64 if wide and gemm.num_warps >= 4 else 16)
        assert not (packed and gemm.num_warps < 4) or gemm.block_n * gemm.block_k / 4 <= 64 * lanes * gemm.num_warps
        assert config.block_m >= (8 if wide else 16)
        assert not gemm.swap or config.block_m <= 64
        stages = max(1, gemm.num_stages - 1) if lanes == 64 else gemm.num_stages
        assert (config.block_m * token + gemm.block_n * weight) * gemm.block_k * stages <= device.shared_bytes
        levels = 2 if problem.scheme in ("fp8_block128", "int4_w4a16", "mxfp4_w4a16") else 1
        assert config.block_m * gemm.block_n * levels / (gemm.num_warps * lanes) <= 200


@pytest.mark.parametrize("machine", DEVICES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_candidate_is_legal(shape, machine):
    device = DEVICES[machine]
    for scheme in SCHEMES:
        problem = replace(SHAPES[shape], scheme=scheme)
        for tokens in (1, 8, 64, 1024, 16384):
            found = candidates(problem, tokens, device)
            assert 1 <= len(found) <= 8
            assert len(set(found)) == len(found)
            for config in found:
                assert why_not(problem, config, device, tokens) is None
                rules(problem, config, device, tokens)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_other_dtypes(dtype):
    for tokens in (1, 256):
        problem = replace(SHAPES["tiny"], dtype=dtype)
        for config in candidates(problem, tokens, H200):
            rules(problem, config, H200, tokens)


def test_the_short_list_is_various():
    found = candidates(QWEN, 64, H200)
    assert len(found) == 8
    assert len({c.block_m for c in found}) > 1
    assert len({(c.up.block_n, c.up.block_k) for c in found}) > 2
    assert candidates(QWEN, 64, H200, limit=2) == found[:2]
    assert candidates(QWEN, 0, H200) == candidates(QWEN, 1, H200)


def test_few_tokens_here_of_a_large_call_are_not_tiny():
    assert any(c.path == "tiny" for c in candidates(QWEN, 1, H200))
    assert not any(c.path == "tiny" for c in candidates(QWEN, 1, H200, call_tokens=9))
    assert not any(c.path == "tiny" for c in candidates(QWEN, 9, H200))


GEMM = GemmConfig(64, 64, 4, 3, True, True)


@pytest.mark.parametrize(
    ("layer", "up", "reason"),
    [
        ({"path": "none"}, {}, "no path"),
        ({"path": "tiny"}, {}, "one token"),
        ({"block_m": 24}, {}, "block_m is one of"),
        ({}, {"block_n": 96}, "block_n is one of"),
        ({}, {"num_warps": 3}, "num_warps is one of"),
        ({}, {"block_n": 32}, "64 rows"),
        ({"block_m": 32}, {"swap": False}, "64 rows"),
        ({"path": "tiny", "block_m": 1}, {"block_n": 8, "num_stages": 1, "tma": False}, "no tensor cores"),
        ({"block_m": 128}, {"block_n": 256, "num_warps": 4, "swap": False}, "accumulators"),
        (
            {"block_m": 128},
            {"block_n": 256, "num_warps": 8, "block_k": 256, "num_stages": 2, "swap": False},
            "shared memory",
        ),
        ({"block_m": 128}, {"block_n": 64}, "rows' side"),
    ],
)
def test_what_is_not_legal_has_a_reason(layer, up, reason):
    config = LayerConfig(**{"path": "tiles", "block_m": 16, "up": replace(GEMM, **up), "down": GEMM, **layer})
    assert reason in (why_not(QWEN, config, H200) or "")


def test_more_reasons():
    config = LayerConfig("tiles", 64, GEMM, GEMM)
    assert why_not(QWEN, config, H200) is None
    assert "descriptor" in (why_not(QWEN, config, DEVICES["a100"]) or "")
    assert "descriptor" in (why_not(replace(QWEN, hidden=2049), config, H200) or "")
    assert "scales want" in (why_not(replace(QWEN, scheme="fp8_block128"), config, H200) or "")
    assert "a tile of 32 rows" not in (why_not(SHAPES["tiny"], config, H200) or "")
    wide = replace(config, up=replace(GEMM, block_n=128))
    assert "a tile of 64 rows" in (why_not(SHAPES["tiny"], wide, H200) or "")
    rows = LayerConfig("tiles", 64, replace(GEMM, swap=False), GEMM)
    int4 = replace(QWEN, scheme="int4_w4a16", group_size=32)
    assert "rows' side" in (why_not(int4, rows, H200) or "")


def test_packed_weights_may_have_the_instruction_of_one_warp():
    packed = replace(QWEN, scheme="mxfp4_w4a16")
    two = GemmConfig(64, 128, 2, 4, True, True)
    assert why_not(packed, LayerConfig("tiles", 16, two, replace(two, num_warps=1)), H200) is None
    assert why_not(packed, LayerConfig("tiles", 16, replace(two, block_n=32), two), H200) is None
    assert "num_warps" in (why_not(QWEN, LayerConfig("tiles", 16, two, two), H200) or "")
    four = replace(two, block_n=32, num_warps=4)
    assert "words of four bytes" in (why_not(packed, LayerConfig("tiles", 16, four, two), H200) or "")
    assert "words of four bytes" in (
        why_not(packed, LayerConfig("tiles", 64, replace(two, swap=False), two), H200) or ""
    )
    halves = replace(packed, dtype="float16")
    short = replace(four, block_k=64)
    assert "64 rows" in (why_not(halves, LayerConfig("tiles", 16, short, replace(two, block_k=64)), H200) or "")
    large = replace(two, block_n=256, num_warps=1)
    assert "unpacked" in (why_not(packed, LayerConfig("tiles", 8, large, two), H200) or "")
    for part in ("up", "down"):
        found = gemm_candidates(packed, part, 16, 64, H200, 8)
        assert sum(g.num_warps < 4 for g in found) >= 3
        assert (64, 128, 2) in {(g.block_n, g.block_k, g.num_warps) for g in found}


def test_the_tiny_path_has_all_slots_of_a_token_in_a_program():
    up, down = GemmConfig(8, 256, 4, 1, False, False), GemmConfig(1, 512, 4, 1, False, False)
    assert why_not(QWEN, LayerConfig("tiny", 1, up, down), H200) is None
    assert "block_n is one of" in (why_not(QWEN, LayerConfig("tiny", 1, down, down), H200) or "")
    wide = replace(down, block_n=8)
    assert "256 weights a thread" in (why_not(QWEN, LayerConfig("tiny", 1, up, wide), H200) or "")
    assert why_not(replace(QWEN, top_k=1), LayerConfig("tiny", 1, up, wide), H200) is None


def test_lists_of_one_gemm_are_legal_and_various():
    ranked = blocks(QWEN, 64, H200)
    assert ranked == sorted(ranked)
    assert ranked[0][1] == candidates(QWEN, 64, H200)[0].block_m
    found = gemm_candidates(QWEN, "up", 16, 64, H200, 10)
    assert len(set(found)) == 10
    assert found[0] == next(c.up for c in candidates(QWEN, 64, H200, 50) if c.block_m == 16)
    assert len({(g.block_n, g.block_k) for g in found}) > 4
    assert {1} == {m for _, m in blocks(QWEN, 1, H200)} - {m for _, m in blocks(QWEN, 1, H200, call_tokens=64)}


def test_nothing_legal_is_an_error():
    nothing = replace(devices.GENERIC, shared_bytes=100)
    with pytest.raises(ConfigError, match="no kernel configuration can run E128"):
        candidates(QWEN, 1024, nothing)


def test_legal_spaces_are_of_a_searchable_size():
    for block_m in (1, 8, 16, 64, 128):
        assert 10 < len(list(gemms(QWEN, "up", block_m, H200))) < 800


def test_specialized_kernels_are_only_for_problems_that_have_them():
    theirs = replace(QWEN, specialized=True, scheme="fp8_block128")
    for tokens in (1024, 4096, 16384):
        for problem in (theirs, replace(theirs, specialized=False)):
            found = [gemm.specialized for one in candidates(problem, tokens, H200) for gemm in (one.up, one.down)]
            assert any(found) is problem.specialized
    one = specialized(theirs, 128)
    config = LayerConfig("tiles", 128, one, one)
    assert why_not(theirs, config, H200) is None
    assert "turned off" in (why_not(replace(theirs, specialized=False), config, H200) or "")
    assert "sm_90" in (why_not(theirs, config, DEVICES["b200"]) or "")
    assert "have (128,) rows" in (why_not(theirs, replace(config, block_m=64), H200) or "")
    for change in ({"num_stages": 3}, {"block_n": 128}, {"swap": True}, {"group_m": 3}):
        other = replace(config, up=replace(config.up, **change))
        assert "one tile of each height" in (why_not(theirs, other, H200) or "")
    int8 = replace(theirs, scheme="int8_channel")
    assert "have () rows" in (why_not(int8, config, H200) or "")
    assert why_not(replace(theirs, specialized=False), config.plain, H200) is None
    half = LayerConfig("tiles", 128, specialized(QWEN, 128), GemmConfig(256, 64, 8, 4, False, True, 8))
    assert half.plain.down == half.down
    assert why_not(QWEN, half.plain, H200) is None


def test_each_height_has_its_own_specialized_tile():
    theirs = replace(QWEN, specialized=True)
    high, low = specialized(theirs, 192), specialized(theirs, 128)
    assert high.num_stages < low.num_stages
    assert why_not(theirs, LayerConfig("tiles", 192, high, high), H200) is None
    assert "one tile of each height" in (why_not(theirs, LayerConfig("tiles", 192, low, high), H200) or "")
    assert "one tile of each height" in (why_not(theirs, LayerConfig("tiles", 128, low, high), H200) or "")


def test_ordinary_kernels_have_tiles_of_a_power_of_two():
    theirs, ordinary = replace(QWEN, specialized=True), GemmConfig(256, 64, 8, 4, False, True, 8)
    high = specialized(theirs, 192)
    assert why_not(theirs, LayerConfig("tiles", 128, ordinary, ordinary), H200) is None
    for config in (LayerConfig("tiles", 192, ordinary, ordinary), LayerConfig("tiles", 192, high, ordinary)):
        assert "power of two" in (why_not(theirs, config, H200) or "")
    assert not list(gemms(QWEN, "up", 192, H200))
    assert {g.specialized for g in gemms(theirs, "up", 192, H200)} == {True}


GPT_OSS = replace(SHAPES["gpt-oss"], scheme="mxfp4_w4a16", specialized=True)


def test_both_gemms_of_packed_weights_are_of_one_kind():
    theirs, ordinary = specialized(GPT_OSS, 64), GemmConfig(64, 128, 4, 5, False, True)
    for up, down in ((theirs, ordinary), (ordinary, theirs)):
        assert "another order of K" in (why_not(GPT_OSS, LayerConfig("tiles", 64, up, down), H200) or "")
    for one in (theirs, ordinary):
        assert why_not(GPT_OSS, LayerConfig("tiles", 64, one, one), H200) is None
    # Other layers may have one of each.
    half = LayerConfig("tiles", 128, specialized(QWEN, 128), GemmConfig(256, 64, 8, 4, False, True, 8))
    assert why_not(replace(QWEN, specialized=True), half, H200) is None
    for tokens in (1, 16, 64, 256, 1024, 4096, 16384):
        for config in candidates(GPT_OSS, tokens, H200, 50):
            assert config.up.specialized is config.down.specialized
            rules(GPT_OSS, config, H200, tokens)


@pytest.mark.parametrize("tokens", [1024, 4096, 16384])
def test_packed_layers_with_many_tokens_get_the_specialized_kernels(tokens):
    first = candidates(GPT_OSS, tokens, H200)[0]
    assert first.up.specialized
    assert first.down.specialized
    assert not any(c.up.specialized for c in candidates(replace(GPT_OSS, specialized=False), tokens, H200))
