"""Whole EP layers over the strict double of MoRI, in two and four real processes, equal the layer of one rank."""

from __future__ import annotations

from typing import Any

import pytest

ODD, ZERO, ONE, EVEN = [5, 0, 8, 1], [0, 0, 0, 0], [0, 3, 0, 0], [8, 8, 8, 8]
BOTH = ("prefill", "decode")
#: Ranks of two nodes, however many there are.
NODES = "gpus_per_node=ranks // 2"
LAYERS = {
    "mori": f"compare('mori', {ODD}, phases={BOTH})",
    "mori, nobody": f"compare('mori', {ZERO})",
    "mori, one rank alone": f"compare('mori', {ONE})",
    "mori, full": f"compare('mori', {EVEN}, drop=False)",
    "mori, one expert": f"compare('mori', {ODD}, pattern='one_hot', drop=False)",
    "mori, skewed": f"compare('mori', {EVEN}, pattern='skewed')",
    "mori, an expert twice": f"compare('mori', {ODD}, pattern='duplicate')",
    "mori, top 1": f"compare('mori', {ODD}, top_k=1)",
    "mori, counts told": f"compare('mori', {ODD}, told=True)",
    "mori, nobody, told": f"compare('mori', {ZERO}, told=True)",
    "mori, checked": f"compare('mori', {ODD}, told=True, drop=False, check=True)",
    "mori, fp8": f"compare('mori', {ODD}, **FP8)",
    "mori, mxfp4": f"compare('mori', {ODD}, **MXFP4)",
    "mori, float32": f"compare('mori', {ODD}, dtype='float32')",
    "mori, two in flight": f"compare('mori', {ODD}, flights=2)",
    "mori, two, backwards": f"compare('mori', {ODD}, flights=2, backwards=True, phases={BOTH})",
    "mori, three in flight": f"compare('mori', {ODD}, flights=3, micro_batches=3)",
    "mori, sizes given": f"compare('mori', {ODD}, warps=4, blocks=32)",
    "mori, IntraNodeLL": f"compare('mori', {ODD}, kernel='IntraNodeLL', told=True)",
    "across nodes, few tokens": f"compare('mori', {ODD}, {NODES})",
    "across nodes, many tokens": f"compare('mori', {ODD}, {NODES}, max_tokens=300, told=True)",
    "across nodes, the oldest": f"compare('mori', {ODD}, {NODES}, kernel='InterNode', **FP8)",
    "ll": f"compare('mori_ll', {ODD}, phases={BOTH})",
    "ll, nobody": f"compare('mori_ll', {ZERO})",
    "ll, skewed": f"compare('mori_ll', {EVEN}, pattern='skewed', told=True)",
    "ll, fp8": f"compare('mori_ll', {ODD}, **FP8)",
    "ll, mxfp4": f"compare('mori_ll', {ODD}, **MXFP4)",
    "ll, two in flight": f"compare('mori_ll', {ODD}, flights=2)",
    "ll, two, backwards": f"compare('mori_ll', {ODD}, flights=2, backwards=True)",
    "ll, across nodes": f"compare('mori_ll', {ODD}, {NODES})",
    "v2": f"compare('mori_v2', {ODD}, phases={BOTH})",
    "v2, nobody": f"compare('mori_v2', {ZERO})",
    "v2, skewed": f"compare('mori_v2', {EVEN}, pattern='skewed', told=True)",
    "v2, fp8": f"compare('mori_v2', {ODD}, **FP8)",
    "v2, mxfp4": f"compare('mori_v2', {ODD}, **MXFP4)",
    "v2, two in flight": f"compare('mori_v2', {ODD}, flights=2, backwards=True)",
    "v2, backend": f"compare('mori_v2', {ODD}, backend='hip')",
}
EXTRAS = "extras=['expert_mask', 'expert_map', 'num_valid']"
#: Name -> source, and how many rows the dispatch output has for two and for four ranks.
PROBED = {
    "global, negative": (f"probed('mori', {EXTRAS})", (16, 32)),
    "global, sink": (f"probed('mori', dropped=DroppedSlot.SINK, {EXTRAS})", (16, 32)),
    "global, never": (f"probed('mori', dropped=DroppedSlot.NEVER, incoming=DroppedSlot.NEVER, {EXTRAS})", (16, 32)),
    "local, negative": (f"probed('mori', spaces=(IdSpace.LOCAL,), {EXTRAS})", (16, 32)),
    "local, sink": (f"probed('mori', spaces=(IdSpace.LOCAL,), dropped=DroppedSlot.SINK, {EXTRAS})", (16, 32)),
    "int64": (f"probed('mori', ids_dtype='int64', {EXTRAS})", (16, 32)),
    "int64, never": (
        f"probed('mori', ids_dtype='int64', dropped=DroppedSlot.NEVER, incoming=DroppedSlot.NEVER, {EXTRAS})",
        (16, 32),
    ),
    "from the sink": (f"probed('mori', incoming=DroppedSlot.SINK, {EXTRAS})", (16, 32)),
    "without a count": ("probed('mori')", (16, 32)),
    "told": (f"probed('mori', told=True, {EXTRAS})", (5, 14)),
    "told, ll": (f"probed('mori_ll', told=True, {EXTRAS})", (5, 14)),
    "told, v2": (f"probed('mori_v2', told=True, {EXTRAS})", (5, 14)),
    "told, but the rows may have gaps": (
        f"probed('mori', told=True, gpus_per_node=ranks // 2, {EXTRAS})",
        (512, 1024),
    ),
    "fp8": (f"probed('mori', payload='fp8_group128', {EXTRAS})", (16, 32)),
    "fp8, ll, told": (f"probed('mori_ll', payload='fp8_group128', told=True, {EXTRAS})", (5, 14)),
    "fp8, v2": (f"probed('mori_v2', payload='fp8_group128', {EXTRAS})", (16, 32)),
    "mxfp4": (f"probed('mori', payload='mxfp4', {EXTRAS})", (16, 32)),
    "mxfp4, ll": (f"probed('mori_ll', payload='mxfp4', {EXTRAS})", (16, 32)),
    "mxfp4, v2, told": (f"probed('mori_v2', payload='mxfp4', told=True, {EXTRAS})", (5, 14)),
}
#: With a device that has only the other eight-bit floats. The plans are a CPU's, so the rule is told its name.
SCRIPT = """
def on_gfx942(work):
    testing.install(arch="gfx942")
    before, wire._FNUZ_ARCH = wire._FNUZ_ARCH, moe_core.hardware.detect_cpu().arch
    try:
        return work()
    finally:
        wire._FNUZ_ARCH = before
        testing.install()
"""
ON_GFX942 = {
    "fp8 there": f"on_gfx942(lambda: compare('mori', {ODD}, **FP8))",
    "mxfp4 there": f"on_gfx942(lambda: compare('mori', {ODD}, **MXFP4))",
    "fp8 there, ll": f"on_gfx942(lambda: compare('mori_ll', {ODD}, **FP8))",
    "fp8 there, v2": f"on_gfx942(lambda: compare('mori_v2', {ODD}, **FP8))",
}

SOURCES = {**LAYERS, **{name: source for name, (source, _) in PROBED.items()}, **ON_GFX942}


@pytest.mark.parametrize("name", [*LAYERS, *ON_GFX942])
def test_as_one_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


@pytest.mark.parametrize("name", PROBED)
def test_the_weighted_sum_on_any_terms(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    rows = PROBED[name][1][len(said) == 4]
    assert all(isinstance(one, list) and one[0] <= 2e-2 and one[1] == rows for one in found), found
