"""Scheme and payload descriptions: shapes, sizes, reasons, and that describing needs no torch."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import pytest

from moe_core.errors import ConfigError
from moe_core.quant import (
    ACTIVATION_PAYLOADS,
    BUILTIN_SCHEMES,
    QuantScheme,
    ScaleLayout,
    activation_payload,
    builtin_scheme,
)
from moe_core.quant.schemes import dtype_bytes

ROOT = Path(__file__).resolve().parents[2]
IDS = (
    "bf16",
    "fp8_block128",
    "fp8_tensor",
    "fp8_channel",
    "int8_channel",
    "int8_w8a16",
    "int4_w4a16",
    "mxfp4_w4a16",
    "mxfp4",
    "mxfp8",
    "nvfp4",
)


def test_the_schemes_are_those_of_the_design() -> None:
    assert tuple(scheme.id for scheme in BUILTIN_SCHEMES) == IDS


@pytest.mark.parametrize("scheme", BUILTIN_SCHEMES, ids=lambda s: s.id)
def test_scheme_is_self_consistent(scheme: QuantScheme) -> None:
    assert builtin_scheme(scheme.id) is scheme
    assert scheme.summary
    if scheme.activation is not None:
        payload = activation_payload(scheme.activation)
        assert payload.static_scale is scheme.static_activation
    else:
        assert not scheme.static_activation
    if scheme.group_sizes:
        assert scheme.scale is not None
        assert scheme.group_sizes[0] == scheme.scale.columns
    with pytest.raises(FrozenInstanceError):
        scheme.id = "other"  # type: ignore[misc]


def test_unknown_names_suggest_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'fp8_blok128'\n.*did you mean 'fp8_block128'"):
        builtin_scheme("fp8_blok128")
    with pytest.raises(ConfigError, match=r"'mxpf8'\n.*'mxfp8'"):
        activation_payload("mxpf8")


# N, K chosen so that every scheme can hold it; the numbers are counted by hand.
@pytest.mark.parametrize(
    ("id", "storage", "scale", "size"),
    [
        ("bf16", (256, 384), None, 256 * 384 * 2),
        ("fp8_block128", (256, 384), (2, 3), 256 * 384 + 6 * 4),
        ("fp8_tensor", (256, 384), (1,), 256 * 384 + 4),
        ("fp8_channel", (256, 384), (256, 1), 256 * 384 + 256 * 4),
        ("int8_channel", (256, 384), (256, 1), 256 * 384 + 256 * 4),
        ("int8_w8a16", (256, 384), (256, 1), 256 * 384 + 256 * 4),
        ("int4_w4a16", (256, 192), (256, 3), 256 * 192 + 256 * 3 * 4),
        ("mxfp4_w4a16", (256, 192), (256, 12), 256 * 192 + 256 * 12),
        ("mxfp4", (256, 192), (256, 12), 256 * 192 + 256 * 12),
        ("mxfp8", (256, 384), (256, 12), 256 * 384 + 256 * 12),
        ("nvfp4", (256, 192), (256, 24), 256 * 192 + 256 * 24 + 4),
    ],
)
def test_shapes_and_bytes(id: str, storage: tuple[int, ...], scale: tuple[int, ...] | None, size: int) -> None:
    scheme = builtin_scheme(id)
    assert scheme.storage_shape(256, 384) == storage
    assert scheme.scale_shape(256, 384) == scale
    assert scheme.weight_bytes(256, 384) == size
    assert scheme.matrix_problems(256, 384) == []


def test_two_scales_for_a_w13() -> None:
    assert builtin_scheme("fp8_tensor").scale_shape(8, 4, parts=2) == (2,)
    assert builtin_scheme("fp8_tensor").weight_bytes(8, 4, parts=2) == 8 * 4 + 2 * 4
    assert builtin_scheme("nvfp4").weight_bytes(8, 16, parts=2) == 8 * 8 + 8 + 2 * 4


def test_group_sizes_and_zero_points() -> None:
    int4 = builtin_scheme("int4_w4a16")
    assert int4.scale_shape(4, 384, 32) == (4, 12)
    assert int4.weight_bytes(4, 384, 32, zero_points=True) == 4 * 192 + 48 * 4 + 48
    with pytest.raises(ConfigError, match=r"does not allow group size 48\n.*128, 32, 64"):
        int4.scale_shape(4, 384, 48)
    with pytest.raises(ConfigError, match="'mxfp4' has no group size, got 64"):
        builtin_scheme("mxfp4").scale_shape(4, 384, 64)


def test_ragged_blocks_round_up() -> None:
    assert builtin_scheme("fp8_block128").scale_shape(129, 200) == (2, 2)
    assert builtin_scheme("fp8_block128").matrix_problems(129, 200) == []


def test_problems_are_all_named() -> None:
    assert builtin_scheme("mxfp4").matrix_problems(0, 33) == [
        "N = 0 is not positive",
        "K = 33 is not a multiple of 2 (elements per stored item)",
        "K = 33 is not a multiple of 32 (elements under one scale)",
    ]
    assert builtin_scheme("nvfp4").matrix_problems(1, 24) == [
        "K = 24 is not a multiple of 16 (elements under one scale)"
    ]
    assert builtin_scheme("int4_w4a16").matrix_problems(1, 64) == [
        "K = 64 is not a multiple of 128 (elements under one scale)"
    ]
    assert builtin_scheme("int4_w4a16").matrix_problems(1, 64, 64) == []
    assert "group size 7" in builtin_scheme("int4_w4a16").matrix_problems(1, 64, 7)[0]
    assert builtin_scheme("bf16").matrix_problems(3, 0) == ["K = 0 is not positive"]


def test_a_scale_layout_refuses_negative_sizes() -> None:
    with pytest.raises(ConfigError, match="use 0 for all"):
        ScaleLayout(granularity="block", rows=-1, columns=1, dtype="float32")


@pytest.mark.parametrize(
    ("name", "size"),
    [("bfloat16", 2), ("float8_e4m3fn", 1), ("float8_e8m0", 1), ("float32", 4), ("int64", 8)],
)
def test_dtype_bytes(name: str, size: int) -> None:
    assert dtype_bytes(name) == size


@pytest.mark.parametrize("name", ["double", "int4", "uint0"])
def test_dtype_bytes_refuses(name: str) -> None:
    with pytest.raises(ConfigError, match="size of dtype"):
        dtype_bytes(name)


def test_payload_problems() -> None:
    assert activation_payload("mxfp8").problems(48) == ["K = 48 is not a multiple of 32 (elements under one scale)"]
    assert activation_payload("fp8_group128").problems(48) == []
    assert activation_payload("int8_token").problems(0) == ["K = 0 is not positive"]
    assert all(payload.id == id and payload.problems(256) == [] for id, payload in ACTIVATION_PAYLOADS.items())


def test_describing_does_not_import_torch() -> None:
    code = (
        "import sys, moe_core.quant as q\n"
        "q.builtin_scheme('nvfp4').weight_bytes(64, 64); q.activation_payload('mxfp4').problems(32)\n"
        "assert 'quantize' in dir(q)\n"
        "assert 'torch' not in sys.modules, 'torch was imported'\n"
        "q.quantize; assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    import moe_core.quant

    with pytest.raises(AttributeError, match="quantise"):
        _ = moe_core.quant.quantise


def test_the_documented_table_is_complete() -> None:
    """The table in docs/quant-schemes.md says what the descriptions say."""
    text = (ROOT / "docs" / "quant-schemes.md").read_text(encoding="utf-8")
    table = text.split("## The schemes")[1].split("\n## ")[0]
    rows = {m[1]: m[0] for m in re.finditer(r"^\| `(\w+)` \|.*$", table, re.MULTILINE)}
    assert tuple(rows) == IDS
    for scheme in BUILTIN_SCHEMES:
        cells = rows[scheme.id]
        for expected in (scheme.storage_dtype, scheme.scale.dtype if scheme.scale else "none"):
            assert expected in cells, scheme.id
        assert f"`{scheme.activation}`" in cells if scheme.activation else "none" in cells, scheme.id
