"""The table of tolerances and the comparison that uses it."""

from __future__ import annotations

import re

import pytest
import torch

from moe_core.config import DTYPES
from moe_core.errors import ConfigError
from moe_core.quant import BUILTIN_SCHEMES
from moe_core.testing.tolerances import CEILINGS, assert_close, ceiling, loosened, relative_error, tolerance


def test_table_covers_every_dtype_and_scheme() -> None:
    assert set(CEILINGS) == {(dtype, scheme.id) for dtype in DTYPES for scheme in BUILTIN_SCHEMES}
    assert all(0 < value <= 0.1 for value in CEILINGS.values())


def test_rows_are_ordered_by_precision() -> None:
    row = [ceiling(dtype, "bf16") for dtype in ("float64", "float32", "float16", "bfloat16")]
    assert row == sorted(row)
    assert ceiling("float32", "int4_w4a16") == ceiling("float32", "bf16")
    assert ceiling("float32", "mxfp4") > ceiling("float32", "fp8_block128") > ceiling("bfloat16", "bf16")


def test_a_scheme_of_a_plugin_has_the_widest_ceiling_and_an_unknown_dtype_none() -> None:
    assert ceiling("bfloat16", "acme_int3") == 0.1
    with pytest.raises(ConfigError, match="no tolerance for dtype 'int8'"):
        ceiling("int8", "bf16")


def test_profiles_only_tighten() -> None:
    tight = {("bfloat16", "fp8_block128"): 0.01}
    assert tolerance("bfloat16", "fp8_block128", tight) == 0.01
    assert tolerance("float16", "fp8_block128", tight) == ceiling("float16", "fp8_block128")
    assert tolerance("bfloat16", "bf16", {("bfloat16", "bf16"): 0.9}) == ceiling("bfloat16", "bf16")
    assert loosened(tight) == []
    assert "the kit's ceiling" in loosened({("bfloat16", "bf16"): 0.9})[0]
    assert "is not in (0" in loosened({("bfloat16", "bf16"): 0.0})[0]
    assert "not a dtype" in loosened({("bfloat17", "bf16"): 0.001})[0]


def test_another_kind_of_fp8_is_another_grid() -> None:
    assert ceiling("bfloat16", "fp8_block128", "gfx942") > ceiling("bfloat16", "fp8_block128", "gfx950")
    assert ceiling("bfloat16", "fp8_block128", "gfx950") == ceiling("bfloat16", "fp8_block128")
    assert ceiling("bfloat16", "int8_channel", "gfx942") == ceiling("bfloat16", "int8_channel")
    assert tolerance("bfloat16", "fp8_channel", {("bfloat16", "fp8_channel"): 0.01}, "gfx942") == 0.01
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(x * 1.06, x, "bfloat16", "fp8_channel", arch="gfx942")
    with pytest.raises(AssertionError, match=r"tolerance 0\.04"):
        assert_close(x * 1.06, x, "bfloat16", "fp8_channel", arch="sm_90")


def test_relative_error_does_not_depend_on_scale() -> None:
    x = torch.arange(1.0, 9.0)
    assert relative_error(x * 1.01, x) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(x * 1.01e6, x * 1e6) == pytest.approx(0.01, rel=1e-4)
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0.0


def test_close_values_pass() -> None:
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    assert_close(x, x, "float64")
    assert_close(x * (1 + 5e-3), x, "bfloat16")
    assert_close(x.bfloat16(), x, "bfloat16")
    assert_close(torch.empty(0, 8), torch.empty(0, 8), "float32")


def test_message_says_how_far_where_and_what_was_allowed() -> None:
    expected = torch.ones(4, 4)
    actual = expected.clone()
    actual[2, 3] = 3.0
    with pytest.raises(AssertionError) as error:
        assert_close(actual, expected, "float32", what="the sum")
    text = str(error.value)
    assert "the sum is off by 0.5 in relative RMS" in text
    assert "tolerance 2e-05 for float32 bf16" in text
    assert "largest error is 2" in text
    assert "at [2, 3]: got 3, expected 1" in text


def test_one_far_value_fails_although_the_mean_is_fine() -> None:
    expected = torch.ones(200, 200)
    actual = expected.clone()
    actual[7, 0] = 1.5
    assert relative_error(actual, expected) < ceiling("bfloat16", "bf16")
    with pytest.raises(AssertionError, match=re.escape("at [7, 0]")):
        assert_close(actual, expected, "bfloat16")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(value: float) -> None:
    actual = torch.ones(3)
    actual[1] = value
    with pytest.raises(AssertionError, match=r"1 values that are not finite, the first at \[1\]"):
        assert_close(actual, torch.ones(3), "bfloat16")


def test_zero_must_be_exactly_zero() -> None:
    with pytest.raises(AssertionError):
        assert_close(torch.full((2, 2), 1e-30), torch.zeros(2, 2), "bfloat16")


def test_shapes_must_be_equal() -> None:
    with pytest.raises(AssertionError, match=r"has shape \(2,\), expected \(1, 2\)"):
        assert_close(torch.ones(2), torch.ones(1, 2), "float32")
