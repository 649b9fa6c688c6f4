"""Four-bit weights as the kernels read them, decoded here by the layout's description and not by its code."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from moe_core_triton import weights as preparing
from moe_core_triton.kernels.unpack import int4, int8
from moe_core_triton.packing import halves, pack_width, pad_groups

from moe_core import CanonicalWeights, MoeConfig
from moe_core.errors import WeightError
from moe_core.quant import builtin_scheme

MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def random_codes(experts: int, n: int, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes 0 to 15 [E, N, K], and as schemes store them: uint8 [E, N, K / 2], the first of two in the low nibble."""
    codes = torch.randint(0, 16, (experts, n, k), dtype=torch.uint8)
    return codes, codes[..., 0::2] | (codes[..., 1::2] << 4)


def padded(codes: torch.Tensor, width: int) -> torch.Tensor:
    """[E, N, blocks, 2, width / 2]: both halves of every block, code 0 after the end of K."""
    more = -codes.shape[-1] % width
    return torch.nn.functional.pad(codes, (0, more)).unflatten(-1, (-1, 2, width // 2))


def words_of(packed: torch.Tensor) -> torch.Tensor:
    """int64 [.., bytes / 4]: four bytes from the lowest."""
    return sum(packed.unflatten(-1, (-1, 4))[..., i].long() << 8 * i for i in range(4))  # type: ignore[return-value]


SHAPES = pytest.mark.parametrize(("k", "width"), [(128, 128), (96, 128), (64, 64), (192, 64), (160, 128), (2, 8)])


@SHAPES
def test_halves(k: int, width: int) -> None:
    codes, stored = random_codes(2, 3, k)
    packed = halves(stored, width)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-k // width) * width // 2)
    blocks, both = padded(codes, width), packed.unflatten(-1, (-1, width // 2))
    assert torch.equal(both & 15, blocks[..., 0, :])
    assert torch.equal(both >> 4, blocks[..., 1, :])


@SHAPES
def test_words_bit_by_bit(k: int, width: int) -> None:
    """A 16-bit lane has, from the top, the signs of its codes 0, 2, 3 and 1 and the magnitudes of 3, 0, 1 and 2."""
    codes, stored = random_codes(2, 3, k)
    packed = halves(stored, width, words=True)
    assert packed.dtype == torch.uint8
    assert packed.shape == (2, 3, -(-k // width) * width // 2)
    words = words_of(packed.unflatten(-1, (-1, width // 2)))
    blocks = padded(codes, width).unflatten(-1, (-1, 4))  # [E, N, blocks, 2, words, 4]
    low, high = blocks[..., 0, :, :].long(), blocks[..., 1, :, :].long()
    for lane in (0, 1):
        bits = words >> 16 * lane & 0xFFFF
        held = (low[..., lane], low[..., lane + 2], high[..., lane], high[..., lane + 2])
        for code, sign, magnitude in zip(held, (15, 12, 14, 13), (6, 3, 0, 9), strict=True):
            assert torch.equal(bits >> sign & 1, code >> 3)
            assert torch.equal(bits >> magnitude & 7, code & 7)


def test_words_by_the_instructions_of_the_kernel() -> None:
    """`kernels.unpack.e2m1_words` masks and shifts; its results are bfloat16 numbers, 2**-126 times too small."""
    codes, stored = random_codes(1, 64, 128)
    words = words_of(halves(stored, 128, words=True))[0]
    pairs = (
        words & 0x81C081C0,
        words << 3 & 0x81C081C0,
        (words << 6 & 0x01C001C0) | (words << 1 & 0x80008000),
        (words >> 3 & 0x01C001C0) | (words << 2 & 0x80008000),
    )
    found = []
    for pair in pairs:
        for lane in (0, 1):
            half = pair >> 16 * lane & 0xFFFF
            value = (half - (half >> 15 << 16)).to(torch.int16).view(torch.bfloat16)
            found.append(value.double() * 2.0**126)
    table = torch.tensor(MAGNITUDES, dtype=torch.float64)
    wanted = (table[(codes & 7).long()] * (1 - 2.0 * (codes >> 3)))[0].view(64, 2, 16, 4)
    for i in range(4):
        assert torch.equal(found[i], wanted[:, 0, :, i])
        assert torch.equal(found[4 + i], wanted[:, 1, :, i])


def test_pad_groups() -> None:
    scale = torch.rand(2, 3, 3) + 1  # K = 96 in groups of 32, in blocks of 128: four groups
    wide = pad_groups(scale, 96, 128, 32)
    assert wide.shape == (2, 3, 4)
    assert torch.equal(wide[..., :3], scale)
    assert not wide[..., 3].any()
    assert torch.equal(pad_groups(scale, 96, 32, 32), scale)
    zero = torch.randint(0, 16, (1, 2, 3), dtype=torch.uint8)
    assert pad_groups(zero, 192, 128, 64).tolist() == [[[*row, 0] for row in zero[0].tolist()]]


@pytest.mark.parametrize(("group", "in_loop"), [(32, 64), (64, 128), (128, 128)])
def test_a_half_of_a_block_has_one_scale_in_the_loop(group: int, in_loop: int) -> None:
    assert pack_width(group, scale_in_loop=True) == in_loop
    assert (in_loop // 2) % group == 0 or group % (in_loop // 2) == 0
    assert pack_width(group, scale_in_loop=False) == 128


def scaled(**largest: int) -> tuple[CanonicalWeights, Any]:
    """A layer of mxfp4 weights, where a scale of w13 or w2 is that byte and no other one is over 192; its binding."""
    sizes: dict[str, Any] = {"num_experts": 2, "top_k": 1, "hidden_size": 128, "intermediate_size": 64}
    config, tensors = MoeConfig(scheme="mxfp4_w4a16", **sizes), {}
    for name, (n, k) in {"w13": (128, 128), "w2": (128, 64)}.items():
        tensors[name] = random_codes(2, n, k)[1]
        tensors[f"{name}_scale"] = torch.randint(0, 193, (2, n, k // 32), dtype=torch.uint8)
        tensors[f"{name}_scale"][1, 2, 1] = largest.get(name, 192)
    scheme = builtin_scheme("mxfp4_w4a16")
    return CanonicalWeights(**tensors), SimpleNamespace(config=config, scheme=scheme, dtype=torch.bfloat16)


@pytest.mark.parametrize("byte", [193, 254, 255])
def test_words_only_for_scales_that_they_can_have(monkeypatch: pytest.MonkeyPatch, byte: int) -> None:
    """255 is NaN, and one over 192 more than the kernels' bias leaves room for: those weights stay in halves."""
    monkeypatch.setattr(preparing, "is_nvidia", lambda device: True)
    found = preparing.prepare(*scaled())
    assert (found.up.pack, found.down.pack) == ("mxfp4_words", "mxfp4_words")
    first = preparing.prepare(*scaled(w13=byte))
    assert (first.up.pack, first.down.pack) == ("mxfp4", "mxfp4_words")
    second = preparing.prepare(*scaled(w2=byte))
    assert (second.up.pack, second.down.pack) == ("mxfp4_words", "mxfp4")
    held = second.down.scale
    assert held is not None
    assert held.max() == byte
    with pytest.raises(WeightError, match="make the plan anew"):
        preparing.update(found, *scaled(w2=byte))


def test_words_only_where_their_instructions_are(monkeypatch: pytest.MonkeyPatch) -> None:
    weights, binding = scaled()
    assert preparing.prepare(weights, binding).up.pack == "mxfp4"
    monkeypatch.setattr(preparing, "is_nvidia", lambda device: True)
    binding.dtype = torch.float16
    assert preparing.prepare(weights, binding).up.pack == "mxfp4"


@triton.jit
def _integers(codes, bytes_, four, eight, DTYPE: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(four + i, int4(tl.load(codes + i), DTYPE))
    tl.store(eight + i, int8(tl.load(bytes_ + i), DTYPE))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_integers_without_the_conversion_instruction(lab: Any, dtype: str) -> None:
    if dtype not in lab.dtypes:
        pytest.skip(f"no {dtype} in the interpreter")
    codes = (torch.arange(256) % 16).to(torch.uint8).to(lab.device)
    numbers = torch.arange(-128, 128).to(torch.int8).to(lab.device)
    four, eight = (torch.empty(256, dtype=getattr(torch, dtype), device=lab.device) for _ in range(2))
    _integers[(1,)](codes, numbers, four, eight, DTYPE=getattr(tl, dtype))
    assert torch.equal(four.float(), codes.float() - 8)
    assert torch.equal(eight.float(), numbers.float())


def test_the_bits_of_integers_in_bfloat16() -> None:
    """What `kernels.unpack.int4` does, where the interpreter has no bfloat16."""
    codes = torch.arange(16, dtype=torch.int16)
    assert torch.equal((codes | 0x4300).view(torch.bfloat16) - 136, (codes - 8).bfloat16())
