"""mxfp4 weights as the register operand of Hopper's tensor cores, and the order of K that this asks of activations.

A step is 128 of K: a byte of the weights holds an element of its first and one of its second half (`packing.halves`), a
word of four bytes eight of them. The tensor-core instruction wants from a thread the columns 2q, 2q + 1, 2q + 8 and
2q + 9 of sixteen, and a word holds 4q to 4q + 3. Sums over K do not mind another order, so activations are stored in
that one (`wide_order`): x by a kernel of its own, h by the first GEMM, for nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from moe_core_triton.kernels.hopper_common import acc_layout
from moe_core_triton.kernels.unpack import e2m1_assembly

#: K elements of half a step, and bytes of a row of weights in a step.
HALF = gl.constexpr(64)


@triton.jit
def _wide_order(x, out, pairs, stride, BLOCK: tl.constexpr):
    row, at = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    # Place b * 4 + q of eight pairs holds pair q * 2 + b.
    source = (at & ~7) + (at & 3) * 2 + ((at >> 2) & 1)
    value = tl.load(x + row * stride + source, mask=at < pairs)
    tl.store(out + row * pairs + at, value, mask=at < pairs)


def wide_order(x: Tensor) -> Tensor:
    """x [T, K], 16 bits, K a multiple of 16 -> the same with each sixteen columns as 0 1 4 5 8 9 12 13 2 3 6 7 ..."""
    tokens, width = x.shape
    out = x.new_empty(tokens, width)
    grid = (tokens, triton.cdiv(width // 2, 1024))
    _wide_order[grid](x.view(torch.int32), out.view(torch.int32), width // 2, x.stride(0) // 2, BLOCK=1024, num_warps=4)
    return out


#: A tile of scales in 32 bits, each there twice, has four equal registers a word and half.
TWICE: gl.constexpr = e2m1_assembly("$5", "$5", "$9", "$9")


@gluon.constexpr_function
def code_layout(rows):
    """Bytes [rows, 64] of weights as a warpgroup feeds them to the tensor cores: 64 rows, or 32 each of two tiles."""
    registers = [[0, 1], [0, 2], [0, 16], [0, 32]] + ([[8, 0]] if rows == 64 else [])
    warps = [[16, 0], [32, 0]] if rows == 64 else [[8, 0], [16, 0]]
    return gl.DistributedLinearLayout(registers, [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], warps, [], [rows, 64])


@gluon.jit
def _unpacked(codes, low_power, high_power):
    """Words of bytes [64, 64] and bfloat16x2 scales of the same shape -> (low, high) bfloat16 [64, 64].

    The unpacking of `unpack.e2m1_words`, over E2M1_WORDS_FACTOR; a scale comes twice in 32 bits.
    """
    return gl.inline_asm_elementwise(
        TWICE,
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [codes, low_power, high_power],
        dtype=(gl.bfloat16, gl.bfloat16),
        is_pure=True,
        pack=4,
    )


@gluon.jit
def _power(scales, GROUP: gl.constexpr):
    """Scale byte GROUP of each int32 -> that power of two as two bfloat16, biased as `e8m0_for_words` does."""
    return ((scales >> (8 * GROUP)) & 255) * 0x00800080 + 0x1F001F00


@gluon.jit
def _operand(tile):
    """Half a step of weights [64, 64], in the order of their words -> as a wgmma's first operand."""
    tile = tile.reshape([64, 4, 4, 2, 2]).permute(0, 1, 3, 2, 4).reshape([64, 64])
    return gl.convert_layout(tile, gl.DotOperandLayout(0, acc_layout(8, 16), 2))


@gluon.jit
def operands(w_ring, stage, scales, PART: gl.constexpr, GATED: gl.constexpr):
    """A consumer's rows of a slot -> (low, high) operands; GATED: in eights, rows of gate and the same ones of up."""
    layout: gl.constexpr = code_layout(64)
    BOX: gl.constexpr = w_ring.shape[1]
    if GATED:
        half: gl.constexpr = code_layout(32)
        gate = w_ring.index(stage * 2).slice(PART * 32, 32).load(half)
        up = w_ring.index(stage * 2 + 1).slice(PART * 32, 32).load(half)
        codes = gl.join(gate, up).reshape([4, 8, 64, 2]).permute(0, 3, 1, 2).reshape([64, 64])
        codes = gl.convert_layout(codes, layout)
    else:
        codes = w_ring.index(stage * 2 + PART * 64 // BOX).slice(PART * 64 % BOX, 64).load(layout)
    second = (gl.arange(0, 64, layout=gl.SliceLayout(0, layout)) >= 32)[None, :]
    low = gl.where(second, _power(scales, 1)[:, None], _power(scales, 0)[:, None])
    high = gl.where(second, _power(scales, 3)[:, None], _power(scales, 2)[:, None])
    low, high = _unpacked(codes, low, high)
    return _operand(low), _operand(high)
