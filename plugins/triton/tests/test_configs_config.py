"""Configurations, problems and devices as values: text, JSON, keys, tables."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from moe_core_triton.configs import device as devices
from moe_core_triton.configs.config import GemmConfig, LayerConfig, Problem, bucket, local_tokens

from moe_core.request import plain

GEMM = GemmConfig(128, 64, 4, 3, True, True)
LAYER = LayerConfig("tiles", 16, GEMM, replace(GEMM, swap=False, group_m=8, persistent=True))


def test_json_and_text():
    assert LayerConfig.from_json(plain(LAYER.to_json())) == LAYER
    assert "specialized" not in LAYER.up.to_json()
    assert LAYER.text == "tiles m16 | 128x64 w4 s3 swap tma | 128x64 w4 s3 tma persistent group8"
    assert replace(GEMM, group_m=4, tma=False).text == "128x64 w4 s3 swap group4"


@pytest.mark.parametrize(
    "change",
    [{"path": "huge"}, {"block_m": "16"}, {"block_m": 0}, {"up": 3}, {"up": {}}, {"more": 1}, {"block_m": True}],
    ids=str,
)
def test_json_of_something_else_is_refused(change):
    with pytest.raises(ValueError, match=r"\w"):
        LayerConfig.from_json(LAYER.to_json() | change)
    with pytest.raises(ValueError, match="swap"):
        GemmConfig.from_json(GEMM.to_json() | {"swap": 1})


@pytest.mark.parametrize(
    ("problem", "key"),
    [
        (Problem(128, 8, 2048, 768, scheme="fp8_block128"), "E128k8H2048I768-gated-bfloat16-fp8_block128"),
        (Problem(4, 2, 64, 32, gated=False, dtype="float16"), "E4k2H64I32-plain-float16-bf16"),
        (Problem(4, 2, 64, 32, scheme="int4_w4a16", group_size=32), "E4k2H64I32-gated-bfloat16-int4_w4a16.g32"),
    ],
)
def test_keys(problem, key):
    assert problem.key == key
    assert Problem.parse(key) == problem
    with pytest.raises(ValueError, match="not the key"):
        Problem.parse(key + "!")


def test_traits():
    assert Problem(8, 2, 64, 64, dtype="float32").traits.weight_bytes == 4
    fp8 = Problem(8, 2, 64, 64, scheme="fp8_block128").traits
    assert (fp8.weight_bytes, fp8.token_bytes, fp8.math, fp8.two_level, fp8.block_ks) == (1, 1, "fp8", True, (128,))
    int4 = Problem(8, 2, 64, 64, scheme="int4_w4a16", group_size=64).traits
    assert (int4.weight_bytes, int4.token_bytes, int4.math, int4.block_ks) == (0.5, 2, "bfloat16", (128,))
    assert Problem(8, 2, 64, 64, scheme="int4_w4a16", group_size=32).traits.block_ks == (64,)
    assert Problem(8, 2, 64, 64, scheme="mxfp4_w4a16", group_size=32).traits.block_ks == (128,)
    assert Problem(8, 2, 64, 64, dtype="float16", scheme="mxfp4_w4a16").traits.block_ks == (64,)
    assert Problem(8, 2, 64, 64, scheme="someone_elses").traits.weight_bytes == 2
    assert Problem(8, 2, 64, 96).matrix("up") == (192, 64)
    assert Problem(8, 2, 64, 96, gated=False).matrix("up") == (96, 64)
    assert Problem(8, 2, 64, 96).matrix("down") == (64, 96)


def test_buckets_are_powers_of_two_and_one_and_a_half():
    assert [bucket(t) for t in range(14)] == [1, 1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 12, 12, 16]
    assert (bucket(16384), bucket(16385), bucket(1025)) == (16384, 24576, 1536)
    assert all(t <= bucket(t) <= 1.5 * t + 1 for t in range(1, 3000))


def test_a_rank_with_a_part_of_the_experts():
    assert local_tokens(64, 256, 32) == 8
    assert (local_tokens(1, 256, 32), local_tokens(9, 256, 32), local_tokens(7, 8, 8)) == (1, 2, 7)


def test_known_products_are_found_by_the_drivers_name():
    h200 = devices.known("NVIDIA H200")
    assert (h200.processors, h200.shared_bytes, h200.bandwidth) == (132, 227 * 1024, 4.3e12)
    assert (h200.rate("bfloat16"), h200.rate("fp8")) == (790e12, 1388e12)
    assert devices.known("NVIDIA H100 80GB HBM3").arch == "sm_90"
    assert devices.known("NVIDIA A100-SXM4-80GB").rate("fp8") == devices.known("NVIDIA A100-SXM4-80GB").rate("bfloat16")
    assert devices.known("NVIDIA GB200").arch == "sm_100"
    assert devices.known("AMD Instinct MI300X").amd
    assert devices.known("NVIDIA L40S") is None


def test_an_unknown_device_is_what_its_driver_says():
    properties = SimpleNamespace(
        name="NVIDIA L40S",
        multi_processor_count=142,
        shared_memory_per_block_optin=101376,
        L2_cache_size=96 << 20,
        clock_rate=2_520_000,
        memory_clock_rate=9_001_000,
        memory_bus_width=384,
    )
    found = devices.described(properties, "sm_89")
    assert (found.processors, found.shared_bytes, found.wide, found.descriptors) == (142, 101376, False, False)
    assert found.bandwidth == pytest.approx(0.9 * 864e9, rel=0.01)
    assert 1e14 < found.rate("bfloat16") < 5e14
    bare = devices.described(SimpleNamespace(name="?", multi_processor_count=10), "sm_120")
    assert bare.bandwidth > 0
    cut = devices.described(SimpleNamespace(name="NVIDIA H200", multi_processor_count=66), "sm_90")
    assert (cut.processors, cut.bandwidth) == (66, 4.3e12)
    assert devices.this_device(torch.device("cpu")) is devices.GENERIC
