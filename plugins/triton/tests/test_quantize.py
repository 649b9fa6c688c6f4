"""quantize_rows against moe_core.quant, bit for bit. Without a GPU the kernels run in Triton's interpreter."""

# ruff: noqa: E402
from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
triton = pytest.importorskip("triton")
import triton.language as tl
from moe_core_triton.inputs import quantizer
from moe_core_triton.kernels.launching import is_hopper_or_newer
from moe_core_triton.kernels.quantize import encode_e4m3, quantize_rows

from moe_core.quant import quantize_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAYLOADS = ("fp8_group128", "fp8_token", "int8_token", "fp8_tensor")
# The interpreter computes with numpy, which warns about infinities and NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def matrix(rows: int, width: int) -> torch.Tensor:
    """Rows of very different magnitudes, with a row of zeros and a zero group."""
    torch.manual_seed(rows + width)
    x = torch.randn(rows, width) * torch.logspace(-6, 4, rows)[:, None]
    x[:, : min(128, width // 2)] *= 1e-3
    if rows > 2:
        x[1] = 0
        x[2, :128] = 0
    return x.to(DEVICE)


def same(got: tuple[torch.Tensor, torch.Tensor], x: torch.Tensor, payload: str, **static: torch.Tensor) -> None:
    """On the CPU: there the division that defines the bits is never a multiplication by a reciprocal."""
    q, s = quantize_activation(x.cpu(), payload, **{k: v.cpu() for k, v in static.items()})
    assert got[0].dtype == q.dtype
    assert isinstance(s, torch.Tensor)
    assert got[1].dtype == s.dtype
    assert torch.equal(got[1].cpu(), s)
    assert torch.equal(got[0].cpu().view(torch.uint8), q.view(torch.uint8))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (5, 128), (4, 8), (3, 200), (37, 392), (2, 1352)])
def test_bits(payload: str, rows: int, width: int) -> None:
    x = matrix(rows, width)
    same(quantize_rows(x, payload), x, payload)


@pytest.mark.parametrize("payload", ["fp8_group128", "fp8_token", "int8_token"])
def test_rows_behind_an_experts_own_are_left_out(payload: str) -> None:
    x = matrix(24, 256)
    ends = torch.tensor([3, 8, 16 + 1], dtype=torch.int32, device=DEVICE)  # three experts with room for eight rows
    q, s = quantize_rows(x, payload, ends=ends, rows_per_expert=8)
    live = [0, 1, 2, 16]
    same((q[live], s[live]), x[live], payload)


@pytest.mark.parametrize(("rows", "width"), [(0, 256), (3, 256), (3, 12)])
@pytest.mark.parametrize("payload", ["fp8_group128", "fp8_token", "int8_token", "mxfp8"])
def test_dispatchers_get_the_same_bits(payload: str, rows: int, width: int) -> None:
    """By the kernel what it takes, by the core what it does not."""
    if payload == "mxfp8" and width % 32:
        pytest.skip("not a width of this payload")
    x = matrix(rows, width)
    same(quantizer(None)(x, payload), x, payload)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_halves(payload: str) -> None:
    x = matrix(6, 256).clamp(-3e4, 3e4).half()
    same(quantize_rows(x, payload), x, payload)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_strided_rows(payload: str) -> None:
    x = matrix(6, 400)[:, 64:320]
    same(quantize_rows(x, payload), x, payload)


@pytest.mark.parametrize("payload", PAYLOADS)
def test_tiny_and_ordinary_values(payload: str) -> None:
    x = torch.zeros(4, 128, device=DEVICE)
    x[0, 5], x[1, 6], x[2, 7], x[3, :3] = 1e-38, -1e-30, 3e38, torch.tensor([1.0, -1.0, 0.5])
    for rows in (x[:1], x[1:2], x[2:3], x):
        same(quantize_rows(rows, payload), rows, payload)


def test_every_e4m3_tie_and_neighbour() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    codes = codes[codes.isfinite()].sort().values
    ties = (codes[1:] + codes[:-1]) / 2
    far = torch.tensor([448.0, -448.0, 447.9999, 449.0, 1e30, -1e30, float("inf"), float("-inf"), 1e-40])
    x = torch.cat([codes, ties, ties * (1 + 2**-22), ties * (1 - 2**-22), far])
    x = torch.cat([x, x.new_zeros(-len(x) % 8)])[None].to(DEVICE)
    # A static scale of one leaves the values as they are: only the encoding is at work.
    one = torch.ones(1, device=DEVICE)
    same(quantize_rows(x, "fp8_tensor", scale=one), x, "fp8_tensor", scale=one)


@triton.jit
def _encode(x, out, N: tl.constexpr, NATIVE: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out + i, encode_e4m3(tl.load(x + i), NATIVE))


@pytest.mark.parametrize("native", [False, True])
def test_both_encoders(native: bool) -> None:
    if native and not is_hopper_or_newer(torch.device(DEVICE)):
        pytest.skip("needs the conversion instruction")
    torch.manual_seed(7)
    x = (torch.randn(4096) * torch.logspace(-5, 3, 4096)).to(DEVICE)
    out = torch.empty(4096, dtype=torch.uint8, device=DEVICE)
    _encode[(1,)](x, out, 4096, native)
    assert torch.equal(out.cpu(), x.cpu().clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8))


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("weighted", [False, True])
def test_one_row_a_position(payload: str, weighted: bool) -> None:
    x, top_k = matrix(9, 136), 3
    slots = torch.randperm(27)[:20].to(torch.int32).to(DEVICE)
    weights = torch.rand(9, top_k, device=DEVICE) if weighted else None
    got = quantize_rows(x, payload, slots=slots, top_k=top_k, row_weights=weights)
    rows = x[slots.long() // top_k]
    if weights is not None:
        rows = rows * weights.flatten()[slots.long(), None]
    same(got, rows, payload)


def test_weights_without_slots() -> None:
    x, weights = matrix(5, 64), torch.rand(5, device=DEVICE)
    same(quantize_rows(x, "fp8_token", row_weights=weights), x * weights[:, None], "fp8_token")


def test_static_scales() -> None:
    x, one = matrix(6, 72), torch.tensor([0.37], device=DEVICE)
    same(quantize_rows(x, "fp8_tensor", scale=one), x, "fp8_tensor", scale=one)
    scales = torch.tensor([0.5, 2.0, 0.011], device=DEVICE)
    experts = torch.tensor([2, 0, -1, 1, 2, 0], dtype=torch.int32, device=DEVICE)
    q, s = quantize_rows(x, "fp8_tensor", scale=scales, row_experts=experts)
    assert torch.equal(s, scales)
    for r, e in enumerate(experts.tolist()):
        scale = scales[max(e, 0)].reshape(1)
        same((q[r : r + 1], scale), x[r : r + 1], "fp8_tensor", scale=scale)


def test_only_live_rows_count_for_the_tensor_scale() -> None:
    x = matrix(50, 40)
    x[49] = float("nan")
    live = (torch.arange(50, device=DEVICE) % 3 != 1).to(torch.int32)
    q, s = quantize_rows(x, "fp8_tensor", live=live)
    same((q[live != 0], s), x[live != 0], "fp8_tensor")
    _, s = quantize_rows(x, "fp8_tensor", live=torch.zeros_like(live))
    assert s.tolist() == [1.0]


@pytest.mark.parametrize("payload", PAYLOADS)
def test_what_is_not_finite_spoils_its_region_alone(payload: str) -> None:
    x = torch.randn(4, 256, device=DEVICE)
    x[1, 3], x[2, 200] = float("nan"), float("inf")
    q, s = quantize_rows(x, payload)
    want_q, want_s = quantize_activation(x.cpu(), payload)
    torch.testing.assert_close(s.cpu(), want_s, rtol=0, atol=0, equal_nan=True)
    assert isinstance(want_s, torch.Tensor)
    fine = want_s.isfinite().all(-1)
    if payload != "fp8_tensor":
        assert fine.tolist() == [True, False, False, True]
        assert torch.equal(q.cpu()[fine].view(torch.uint8), want_q[fine].view(torch.uint8))


@pytest.mark.parametrize("payload", PAYLOADS)
def test_no_rows(payload: str) -> None:
    x = torch.empty(0, 256, device=DEVICE)
    same(quantize_rows(x, payload), x, payload)


def test_refusals() -> None:
    x = matrix(4, 64)
    for arguments in (
        (x, "mxfp8"),
        (x.int(), "fp8_token"),
        (x.t(), "fp8_token"),
        (x[:, :12], "fp8_token"),
        (x[0], "fp8_token"),
    ):
        with pytest.raises(ValueError, match=r"payloads|must be"):
            quantize_rows(*arguments)
    with pytest.raises(ValueError, match="scale"):
        quantize_rows(x, "fp8_token", scale=torch.ones(1, device=DEVICE))
    with pytest.raises(ValueError, match="row_experts"):
        quantize_rows(x, "fp8_tensor", scale=torch.ones(3, device=DEVICE))
    with pytest.raises(ValueError, match="row_weights"):
        quantize_rows(x, "fp8_token", row_weights=torch.ones(4, device=DEVICE, dtype=torch.int32))
