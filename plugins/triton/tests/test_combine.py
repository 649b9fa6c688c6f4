"""combine and weigh against a loop over slots. Without a GPU the kernels run in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moe_core_triton.kernels.combine import combine, weigh

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def case(tokens: int, top_k: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """y, local_ids and weights, where every dropped slot holds NaN."""
    torch.manual_seed(tokens * 100 + width)
    ids = torch.randint(-2, 5, (tokens, top_k), dtype=torch.int32)
    y, weights = torch.randn(tokens, top_k, width), torch.rand(tokens, top_k)
    y[ids < 0], weights[ids < 0] = float("nan"), float("nan")
    return y.to(DEVICE, dtype), ids.flatten().to(DEVICE), weights.to(DEVICE)


def slots(y: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """float32 [T, K, H], zeros where dropped."""
    rows = y.float() if weights is None else y.float() * weights.float().reshape(*y.shape[:2], 1)
    return torch.where((ids < 0).reshape(*y.shape[:2], 1), 0.0, rows)


@pytest.mark.parametrize(
    ("tokens", "top_k", "width"), [(1, 8, 2048), (7, 2, 100), (40, 3, 264), (3, 1, 1), (2, 9, 1536)]
)
@pytest.mark.parametrize("weighted", [False, True])
def test_combine(tokens: int, top_k: int, width: int, weighted: bool) -> None:
    y, ids, weights = case(tokens, top_k, width)
    out = torch.full((tokens, width), float("nan"), device=DEVICE)
    combine(y, out, local_ids=ids, weights=weights if weighted else None, scale=2.5)
    want = torch.zeros_like(out)
    for k in range(top_k):
        want += slots(y, ids, weights if weighted else None)[:, k]
    torch.testing.assert_close(out, want * 2.5, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_and_strided_rows(dtype: torch.dtype) -> None:
    y, ids, weights = case(6, 4, 96, dtype)
    wide = torch.full((6, 200), 9.0, device=DEVICE, dtype=dtype)
    combine(y.reshape(24, 96), wide[:, 16:112], local_ids=ids, weights=weights.to(dtype))
    want = slots(y, ids, weights.to(dtype)).sum(1)
    torch.testing.assert_close(wide[:, 16:112].float(), want, rtol=1e-2, atol=1e-3)
    assert (wide[:, :16] == 9).all()
    assert (wide[:, 112:] == 9).all()


def test_every_slot_dropped_gives_exact_zeros() -> None:
    y = torch.full((4, 2, 64), float("nan"), device=DEVICE)
    ids, weights = (
        torch.full((8,), -1, dtype=torch.int32, device=DEVICE),
        torch.full((4, 2), float("inf"), device=DEVICE),
    )
    out = torch.full((4, 64), 7.0, device=DEVICE)
    combine(y, out, local_ids=ids, weights=weights)
    assert torch.equal(out, torch.zeros_like(out))
    weigh(y, y, local_ids=ids, weights=weights)
    assert torch.equal(y, torch.zeros_like(y))


def test_a_nan_of_a_live_slot_is_kept() -> None:
    y, ids = torch.ones(1, 2, 16, device=DEVICE), torch.zeros(2, dtype=torch.int32, device=DEVICE)
    y[0, 1, 3] = float("nan")
    out = torch.zeros(1, 16, device=DEVICE)
    combine(y, out, local_ids=ids)
    assert out.isnan().nonzero().tolist() == [[0, 3]]


@pytest.mark.parametrize(("tokens", "top_k", "width"), [(1, 4, 512), (9, 2, 72), (50, 2, 300)])
def test_weigh(tokens: int, top_k: int, width: int) -> None:
    y, ids, weights = case(tokens, top_k, width)
    out = torch.full((tokens, top_k, width), float("nan"), device=DEVICE)
    weigh(y, out, local_ids=ids, weights=weights, scale=0.5)
    torch.testing.assert_close(out, slots(y, ids, weights) * 0.5, rtol=1e-6, atol=1e-6)
    weigh(y, out, local_ids=ids)
    assert torch.equal(out, slots(y, ids, None))


def test_nothing_to_do() -> None:
    empty = torch.empty(0, 16, device=DEVICE)
    combine(empty, empty, local_ids=torch.empty(0, dtype=torch.int32, device=DEVICE))
    weigh(empty, empty, local_ids=torch.empty(0, dtype=torch.int32, device=DEVICE))


def test_refusals() -> None:
    y, ids, weights = case(4, 2, 32)
    out = torch.empty(4, 32, device=DEVICE)
    for bad in (
        {"y": y[:, :, ::2]},
        {"y": y[:3]},
        {"out": out.t()},
        {"out": out[:3]},
        {"out": out[0]},
        {"local_ids": ids.long()},
        {"weights": weights[:3]},
        {"weights": weights.int()},
    ):
        arguments = {"y": y, "out": out, "local_ids": ids, "weights": weights, **bad}
        with pytest.raises(ValueError, match="must be"):
            combine(**arguments)
    with pytest.raises(ValueError, match="contiguous"):
        weigh(y, out, local_ids=ids)
