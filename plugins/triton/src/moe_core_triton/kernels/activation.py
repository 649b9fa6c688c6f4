"""The functions of `moe_core.Activation` in float32: for a GEMM's epilogue, and as a kernel of their own.

Comparisons instead of minimum and maximum: they keep a NaN, as torch's clamp and relu do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from moe_core.config import ACTIVATIONS, Activation
from moe_core.errors import ConfigError, did_you_mean
from moe_core_triton.kernels.launching import dependent_launch, processors, wait_for_inputs


@triton.jit
def _function(x, ACT: tl.constexpr, alpha):
    """f(x), float32. gelu_tanh is written as x * sigmoid: 0.5 * (1 + tanh(u)) = sigmoid(2 u), without cancellation."""
    if ACT == "silu":
        x = x / (1.0 + tl.exp(-x))
    elif ACT == "swiglu_oai":
        x = x / (1.0 + tl.exp(-alpha * x))
    elif ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        x = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        x = tl.where(x < 0, 0.0, x)
    elif ACT == "relu2":
        x = tl.where(x < 0, 0.0, x)
        x = x * x
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
    return x


@triton.jit
def activate_plain(x, ACT: tl.constexpr, alpha, limit, HAS_LIMIT: tl.constexpr):
    """f(min(x, limit)), of a layer without a gate. x: float32, any shape; ACT: one of moe_core.config.ACTIVATIONS."""
    if HAS_LIMIT:
        x = tl.where(x > limit, limit, x)
    return _function(x, ACT, alpha)


@triton.jit
def activate(gate, up, ACT: tl.constexpr, alpha, beta, limit, HAS_LIMIT: tl.constexpr):
    """f(gate) * up, after the clamp; for swiglu_oai gate * sigmoid(alpha * gate) * (up + beta). float32, one shape."""
    if HAS_LIMIT:
        gate = tl.where(gate > limit, limit, gate)
        up = tl.where(up > limit, limit, tl.where(up < -limit, -limit, up))
    if ACT == "swiglu_oai":
        up = up + beta
    return _function(gate, ACT, alpha) * up


@triton.jit(do_not_specialize=["rows", "blocks", "alpha", "beta", "limit"])
def _apply(
    gate_up, out, rows, width, in_stride, out_stride, blocks, alpha, beta, limit,
    ACT: tl.constexpr, GATED: tl.constexpr, HAS_LIMIT: tl.constexpr, BR: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out [rows, width] from gate_up [rows, 2 * width] (GATED) or [rows, width]: [BR, BC] a program."""
    wait_for_inputs(PDL)
    row = (tl.program_id(0) // blocks).to(tl.int64) * BR + tl.arange(0, BR)[:, None]
    column = (tl.program_id(0) % blocks) * BC + tl.arange(0, BC)[None, :]
    inside = (row < rows) & (column < width)
    x = tl.load(gate_up + row * in_stride + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(gate_up + row * in_stride + width + column, mask=inside, other=0.0).to(tl.float32)
        x = activate(x, up, ACT, alpha, beta, limit, HAS_LIMIT)
    else:
        x = activate_plain(x, ACT, alpha, limit, HAS_LIMIT)
    tl.store(out + row * out_stride + column, x.to(out.dtype.element_ty), mask=inside)


def apply_activation(gate_up: Tensor, out: Tensor, activation: Activation) -> None:
    """out = activation(gate_up), computed in float32 and rounded once; one launch.

    gate_up: floating point [P, 2I], gate in the first half ([P, I] if not gated); out: floating point [P, I]. Rows of
    any stride, columns contiguous.

    Roofline: 3 * I * itemsize a row (131072 rows, I = 768, bf16: 604 MB, 140 us at 4.3 TB/s).

    Raises ConfigError for an activation that is not in moe_core.config.ACTIVATIONS, ValueError for a shape or stride.
    """
    if activation.name not in ACTIVATIONS:
        hint = did_you_mean(activation.name, ACTIVATIONS)
        raise ConfigError(f"the Triton kernels have no activation {activation.name!r}", hint=hint)
    rows, width = out.shape
    if gate_up.shape != (rows, width * (2 if activation.gated else 1)):
        raise ValueError(f"gate_up {list(gate_up.shape)} does not fit out {list(out.shape)}, gated={activation.gated}")
    if (gate_up.stride(1), out.stride(1)) != (1, 1) and width > 1:
        raise ValueError(f"columns must be contiguous, got strides {gate_up.stride()} and {out.stride()}")
    if rows == 0 or width == 0:
        return
    # 8 columns a thread. A narrow matrix takes several rows a program, once every processor has some.
    columns = min(1024, triton.next_power_of_2(width))
    if rows * triton.cdiv(width, columns) < processors(out.device):
        columns = min(256, columns)
    busy = rows * triton.cdiv(width, columns) >= 8 * processors(out.device)
    together = min(1024 // columns, triton.next_power_of_2(rows)) if busy else 1
    blocks = triton.cdiv(width, columns)
    _apply[(triton.cdiv(rows, together) * blocks,)](
        gate_up, out, rows, width, gate_up.stride(0), out.stride(0), blocks,
        float(activation.alpha), float(activation.beta), float(activation.limit or 0.0),
        ACT=activation.name, GATED=activation.gated, HAS_LIMIT=activation.limit is not None, BR=together, BC=columns,
        num_warps=max(1, together * columns // 256), **dependent_launch(out),
    )  # fmt: skip
