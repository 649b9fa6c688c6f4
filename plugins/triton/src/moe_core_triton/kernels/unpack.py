"""Weights narrower than a byte, from storage to numbers, in registers. Device functions only.

The K order in storage is ours (`moe_core_triton.packing`): byte j of a block of PACK / 2 bytes holds element j in its
low nibble and element j + PACK / 2 in its high one. Both nibbles of a loaded tile are then tiles of consecutive K: no
shuffle, join or transpose is needed, and a tile stays in the registers that the tensor core reads.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def int4(code, DTYPE: tl.constexpr):
    """Codes 0..15 (uint8) less 8 in DTYPE, exactly.

    The bits go into the mantissa of a power of two whose last place is 1, and that power plus 8 is subtracted. The
    conversion instruction runs at a quarter of the rate, and takes three times the permutations around it.
    """
    if tl.bfloat16 == DTYPE:
        return (code.to(tl.uint16) | 0x4300).to(tl.bfloat16, bitcast=True) - tl.full((), 136, tl.bfloat16)
    elif tl.float16 == DTYPE:
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - tl.full((), 1032, tl.float16)
    else:
        return (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - tl.full((), 8388616, tl.float32)


@triton.jit
def int8(code, DTYPE: tl.constexpr):
    """int8 numbers in DTYPE, exactly; in the way of `int4`. bfloat16's mantissa is too short: by float32."""
    code = code.to(tl.uint8, bitcast=True) ^ 0x80
    if tl.float16 == DTYPE:
        return (code.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - tl.full((), 1152, tl.float16)
    else:
        value = (code.to(tl.uint32) | 0x4B000000).to(tl.float32, bitcast=True) - tl.full((), 8388736, tl.float32)
        return value.to(DTYPE)


@triton.jit
def e2m1(code, DTYPE: tl.constexpr):
    """Codes 0..15 (uint8) -> their values in DTYPE, exactly.

    The three magnitude bits are an exponent and mantissa already: moved to those of DTYPE they are the value times a
    power of two (subnormal numbers included), which one multiplication undoes.
    """
    if tl.bfloat16 == DTYPE:
        bits = ((code & 8).to(tl.uint16) << 12) | ((code & 7).to(tl.uint16) << 6)
        return bits.to(tl.bfloat16, bitcast=True) * 8.507059173023462e37  # 2**126
    elif tl.float16 == DTYPE:
        bits = ((code & 8).to(tl.uint16) << 12) | ((code & 7).to(tl.uint16) << 9)
        return bits.to(tl.float16, bitcast=True) * 16384.0  # 2**14
    else:
        # float32 flushes subnormal numbers on some devices: 0 and 0.5 are set apart.
        magnitude = (code & 7).to(tl.int32)
        bits = ((magnitude + 252) << 22).to(tl.float32, bitcast=True)
        small = magnitude.to(tl.float32) * 0.5
        value = tl.where(magnitude < 2, small, bits)
        return tl.where((code & 8) != 0, -value, value)


@triton.jit
def e8m0(byte, DTYPE: tl.constexpr):
    """Scale bytes (uint8, bias 127) -> powers of two in DTYPE. 0 is 2**-127, 255 is NaN."""
    exponent = byte.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    bits = tl.where(exponent == 255, 0x7FC00000, bits)
    return bits.to(tl.float32, bitcast=True).to(DTYPE)


def e2m1_assembly(*scales: str) -> tl.constexpr:
    """PTX that makes four registers ($0 to $3) of two bfloat16 each of a word ($4), times one of `scales` each."""
    products = "\n".join(f"fma.rn.bf16x2 ${i}, {'abcd'[i]}, {scale}, z;" for i, scale in enumerate(scales))
    return tl.constexpr(
        f"""
        {{
        .reg .b32 a, b, c, d, t, z;
        and.b32 a, $4, 0x81C081C0;
        shl.b32 b, $4, 3;
        and.b32 b, b, 0x81C081C0;
        shl.b32 c, $4, 6;
        and.b32 c, c, 0x01C001C0;
        shl.b32 t, $4, 1;
        lop3.b32 c, t, 0x80008000, c, 0xEA;
        shr.u32 d, $4, 3;
        and.b32 d, d, 0x01C001C0;
        shl.b32 t, $4, 2;
        lop3.b32 d, t, 0x80008000, d, 0xEA;
        mov.b32 z, 0x80008000;
        {products}
        }}
        """
    )


#: A tile of bfloat16 scales has two registers a word for the low half, and two for the high one.
E2M1_WORDS: tl.constexpr = e2m1_assembly("$5", "$6", "$7", "$8")
#: `e2m1_words` leaves its results this factor too small: the bits' 2**-126 and the scale's bias make 2**64 together.
E2M1_WORDS_FACTOR: tl.constexpr = tl.constexpr(1.8446744073709552e19)


@triton.jit
def e8m0_for_words(byte):
    """Scale bytes up to 192, which is 2**65 -> bfloat16 powers of two, as `e2m1_words` wants them."""
    return ((byte.to(tl.int16) + 62) << 7).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def e2m1_words(tile, low_scale, high_scale):
    """uint8 tile and bfloat16 scales of the same shape -> (low, high) bfloat16 tiles, over E2M1_WORDS_FACTOR.

    NVIDIA only, and only where a thread holds four neighboring bytes: they are a word (`packing._words`), with bits so
    placed that a shift and a mask bring two numbers at once to where a bfloat16x2 has sign, exponent and mantissa. 1.4
    integer operations and half a multiplication an element; spreading nibbles over 16-bit lanes would take 2.
    """
    return tl.inline_asm_elementwise(
        E2M1_WORDS,
        "=&r,=&r,=&r,=&r,r,r,r,r,r",
        [tile, low_scale, high_scale],
        dtype=(tl.bfloat16, tl.bfloat16),
        is_pure=True,
        pack=4,
    )
