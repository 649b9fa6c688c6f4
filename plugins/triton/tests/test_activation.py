"""apply_activation against moe_core's torch functions. Without a GPU the kernel runs in Triton's interpreter."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")

from moe_core_triton.kernels.activation import apply_activation

from moe_core.config import ACTIVATIONS, Activation
from moe_core.errors import ConfigError
from moe_core.runners.activation import apply_activation as reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# The interpreter computes with numpy, which warns where a kernel means to overflow to infinity.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def check(x: torch.Tensor, activation: Activation, rtol: float = 2e-6, atol: float = 3e-6) -> None:
    width = x.shape[1] // (2 if activation.gated else 1)
    out = torch.full((x.shape[0], width), float("nan"), device=DEVICE, dtype=x.dtype)
    apply_activation(x, out, activation)
    torch.testing.assert_close(out.float(), reference(x.float(), activation), rtol=rtol, atol=atol, equal_nan=True)


def settings(name: str, gated: bool) -> list[Activation]:
    if name == "swiglu_oai":
        return [Activation.swiglu_oai(), Activation.swiglu_oai(alpha=0.9, beta=0.25, limit=None)] if gated else []
    return [Activation(name=name, gated=gated), Activation(name=name, gated=gated, limit=0.75)]


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gated", [True, False])
def test_every_activation(name: str, gated: bool) -> None:
    torch.manual_seed(0)
    for activation in settings(name, gated):
        check(torch.randn(5, 96, device=DEVICE) * 4, activation)
        check(torch.tensor([[0.0, -0.0, 1e-20, 30.0, -30.0, 200.0, -200.0, 1e4, -1e4, 3.0]], device=DEVICE), activation)


@pytest.mark.parametrize("name", sorted(ACTIVATIONS))
def test_nan_stays_nan(name: str) -> None:
    x = torch.tensor([[float("nan"), 1.0, 2.0, 1.0, float("nan"), 2.0]], device=DEVICE)
    for activation in settings(name, True):
        check(x, activation)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_halves_round_once(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    # One unit in the last place, because the interpreter cuts bfloat16 off instead of rounding it.
    ulp = torch.finfo(dtype).eps
    check(torch.randn(4, 256, device=DEVICE).to(dtype), Activation(), rtol=ulp, atol=1e-6)


@pytest.mark.parametrize(("rows", "width"), [(1, 4096), (70, 24), (9, 1100), (130, 64)])
def test_shapes(rows: int, width: int) -> None:
    torch.manual_seed(2)
    check(torch.randn(rows, 2 * width, device=DEVICE), Activation())


def test_strided_rows() -> None:
    torch.manual_seed(3)
    wide, out = torch.randn(6, 150, device=DEVICE), torch.full((6, 90), 9.0, device=DEVICE)
    apply_activation(wide[:, 8:136], out[:, 16:80], Activation(name="gelu"))
    torch.testing.assert_close(out[:, 16:80], reference(wide[:, 8:136], Activation(name="gelu")))
    assert (out[:, :16] == 9).all()
    assert (out[:, 80:] == 9).all()


def test_empty_and_refusals() -> None:
    apply_activation(torch.empty(0, 32, device=DEVICE), torch.empty(0, 16, device=DEVICE), Activation())
    x, out = torch.empty(2, 32, device=DEVICE), torch.empty(2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="does not fit"):
        apply_activation(x, out, Activation(gated=False))
    with pytest.raises(ValueError, match="contiguous"):
        apply_activation(torch.empty(32, 2, device=DEVICE).t(), out, Activation())
    with pytest.raises(ConfigError, match="softsign"):
        apply_activation(x, out, Activation(name="softsign"))
