"""What a kernel configuration is, and what it is for: frozen, hashable, without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from functools import cached_property
from typing import Any, Final, Self

from moe_core_triton.configs.specialized import chosen_for

#: Ways to run a layer: "tiny" has a program a (token, slot, weight block) and sorts nothing; "tiles" sorts by expert.
PATHS: Final = ("tiny", "tiles")
#: Positions (tokens x top_k) up to which "tiny" may run.
TINY_POSITIONS: Final = 64


@dataclass(frozen=True, slots=True)
class GemmConfig:
    """One GEMM of a layer.

    block_n: weight rows of a tile (gated GEMM1: gate and up rows together); block_k: reduction elements of a step.
    swap: weights on the M side of the tensor-core instruction. tma: weights by tensor descriptor. group_m: token tiles
    that share the weight tiles in the L2 cache. persistent: one program a slot of the device, looping over tiles.
    specialized: the warp-specialized kernel for Hopper.
    """

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    swap: bool
    tma: bool
    group_m: int = 1
    persistent: bool = False
    specialized: bool = False

    @property
    def text(self) -> str:
        """For people: "128x64 w4 s3 swap tma"."""
        words = [f"{self.block_n}x{self.block_k}", f"w{self.num_warps}", f"s{self.num_stages}"]
        words += [name for name in ("swap", "tma", "persistent", "specialized") if getattr(self, name)]
        words += [f"group{self.group_m}"] if self.group_m > 1 else []
        return " ".join(words)

    def to_json(self) -> dict[str, Any]:
        """The fields, without those that have their default."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises ValueError for anything but what `to_json` gives."""
        return cls(**_checked(cls, value))


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """A whole layer. path: one of `PATHS`; block_m: tokens of a tile; up, down: GEMM1, GEMM2.

    The tiny path has no tiles of tokens and no tensor cores: block_m is 1, swap and tma are False.
    """

    path: str
    block_m: int
    up: GemmConfig
    down: GemmConfig

    @property
    def plain(self) -> Self:
        """With ordinary kernels in the place of specialized ones."""
        if not (self.up.specialized or self.down.specialized):
            return self
        if self.up.specialized and self.up.swap:
            part = GemmConfig(64, 128, 4, 5, False, True)
            return replace(self, block_m=64, up=part, down=part)
        if 128 in [part.block_k for part in (self.up, self.down) if part.specialized]:
            # Two accumulators a tile, because scales change every 128 of K: lower tiles, three programs a processor.
            part = GemmConfig(128, 128, 4, 3, False, True, 8)
            return replace(self, block_m=64, up=part, down=part)
        part = GemmConfig(256, 64, 8, 4, False, True, 8)
        up, down = (part if one.specialized else one for one in (self.up, self.down))
        return replace(self, block_m=128, up=up, down=down)

    @property
    def text(self) -> str:
        """For people: "tiles m16 | 128x64 w4 s3 swap tma | 64x128 w4 s3 swap"."""
        return f"{self.path} m{self.block_m} | {self.up.text} | {self.down.text}"

    def to_json(self) -> dict[str, Any]:
        """In JSON types."""
        return {"path": self.path, "block_m": self.block_m, "up": self.up.to_json(), "down": self.down.to_json()}

    @classmethod
    def from_json(cls, value: object) -> Self:
        """Raises ValueError for anything but what `to_json` gives."""
        values = _checked(cls, value)
        if values["path"] not in PATHS:
            raise ValueError(f"unknown path {values['path']!r}")
        return cls(**values | {part: GemmConfig.from_json(values[part]) for part in ("up", "down")})


def _checked(cls: type[GemmConfig] | type[LayerConfig], value: object) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{value!r} is not a {cls.__name__}")
    known = {f.name: f for f in fields(cls)}
    unknown = sorted(set(value) - set(known))
    missing = sorted(name for name, f in known.items() if f.default is MISSING and name not in value)
    if unknown or missing:
        raise ValueError(f"a {cls.__name__} with the unknown {unknown} and without {missing}")
    for name, given in value.items():
        kind = known[name].type
        if (kind in ("int", "bool", "str") and type(given).__name__ != kind) or (kind == "int" and given < 1):
            raise ValueError(f"{cls.__name__}.{name} is {given!r}")
    return dict(value)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a quant scheme means to a GEMM. Bytes are per element; operations those of the vector units.

    weight_bytes, token_bytes: 0 for the layer's dtype; math: whose tensor-core rate counts, "" for the dtype's.
    two_level: a second accumulator, because scales change along K. dequant:
    operations a weight element to make it an operand. block_ks: the only steps of K.
    """

    weight_bytes: float = 0.0
    token_bytes: float = 0.0
    math: str = ""
    two_level: bool = False
    dequant: float = 0.0
    swap_only: bool = False
    block_ks: tuple[int, ...] = ()


_SCHEMES: Final[Mapping[str, Traits]] = {
    "bf16": Traits(),
    "fp8_tensor": Traits(1, 1, "fp8"),
    "fp8_channel": Traits(1, 1, "fp8"),
    "fp8_block128": Traits(1, 1, "fp8", two_level=True, block_ks=(128,)),
    "int8_channel": Traits(1, 1, "int8"),
    "int8_w8a16": Traits(1, dequant=2.0),
    "int4_w4a16": Traits(0.5, dequant=3.0, two_level=True, swap_only=True, block_ks=(128,)),
    "mxfp4_w4a16": Traits(0.5, dequant=3.0, two_level=True, swap_only=True, block_ks=(128,)),
}
_ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}
_KEY = re.compile(r"E(\d+)k(\d+)H(\d+)I(\d+)-(gated|plain)-([a-z]+\d+)-([a-z]\w*?)(?:\.g(\d+))?(\+specialized)?")


@dataclass(frozen=True)
class Problem:
    """A layer as its kernels see it: this rank's experts and intermediate size.

    specialized: whether the warp-specialized kernels may be chosen (see `configs.specialized`).

    tokens, wherever they go with a problem, are those whose top_k experts are all here: positions / top_k. With expert
    parallelism over replicated tokens that is a share of a call's tokens (see `local_tokens`).
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    gated: bool = True
    dtype: str = "bfloat16"
    scheme: str = "bf16"
    group_size: int | None = None
    specialized: bool = False

    @classmethod
    def of(cls, binding: Any) -> Self:
        """The problem of a `moe_core.protocols.Binding`."""
        config = binding.config
        return cls(
            experts=binding.num_local_experts,
            top_k=config.top_k,
            hidden=config.hidden_size,
            intermediate=binding.local_intermediate_size,
            gated=config.activation.gated,
            dtype=config.dtype,
            scheme=config.scheme,
            group_size=config.group_size,
            specialized=chosen_for(binding),
        )

    @cached_property
    def key(self) -> str:
        """ "E128k8H2048I768-gated-bfloat16-fp8_block128", with ".g32" behind a scheme with groups of 32.

        "+specialized" at the end keeps what was tuned with those kernels apart from what every plan can use.
        """
        group = f".g{self.group_size}" if self.group_size else ""
        sizes = f"E{self.experts}k{self.top_k}H{self.hidden}I{self.intermediate}"
        kernels = "+specialized" if self.specialized else ""
        return f"{sizes}-{'gated' if self.gated else 'plain'}-{self.dtype}-{self.scheme}{group}{kernels}"

    @classmethod
    def parse(cls, key: str) -> Self:
        """The problem with this key. Raises ValueError."""
        found = _KEY.fullmatch(key)
        if found is None:
            raise ValueError(f"{key!r} is not the key of a problem")
        experts, top_k, hidden, intermediate = (int(text) for text in found.groups()[:4])
        group = int(found[8]) if found[8] else None
        if not 1 <= min(experts, top_k, hidden, intermediate) <= max(experts, top_k, hidden, intermediate) < 1 << 31:
            raise ValueError(f"{key!r} has sizes that no layer has")
        return cls(experts, top_k, hidden, intermediate, found[5] == "gated", found[6], found[7], group, bool(found[9]))

    @cached_property
    def traits(self) -> Traits:
        """What the scheme means, with bytes and math filled in from the dtype. An unknown scheme is as unquantized."""
        raw, item = _SCHEMES.get(self.scheme, Traits()), _ITEM_BYTES.get(self.dtype, 2)
        steps = raw.block_ks
        # Packed weights come in blocks of this width (moe_core_triton.packing.pack_width).
        if (self.scheme == "int4_w4a16" and self.group_size == 32) or (raw.swap_only and self.dtype == "float16"):
            steps = (64,) if self.scheme == "mxfp4_w4a16" or self.group_size == 32 else steps
        return replace(
            raw,
            weight_bytes=raw.weight_bytes or item,
            token_bytes=raw.token_bytes or item,
            math=raw.math or self.dtype,
            block_ks=steps,
        )

    def matrix(self, part: str) -> tuple[int, int]:
        """[rows, K] of one expert's weights of "up" (gate and up rows) or "down"."""
        if part == "up":
            return (2 if self.gated else 1) * self.intermediate, self.hidden
        return self.hidden, self.intermediate


def local_tokens(tokens: int, experts: int, local_experts: int) -> int:
    """The `tokens` of a `Problem` for a call where a rank holds `local_experts` of `experts`, uniformly routed."""
    return max(1, -(-tokens * local_experts // experts))


def bucket(tokens: int) -> int:
    """`tokens` rounded up to a power of two or one and a half of one: 1, 2, 3, 4, 6, 8, 12, 16, ..."""
    if tokens <= 2:
        return max(tokens, 1)
    above = 1 << (tokens - 1).bit_length()
    return above * 3 // 4 if tokens <= above * 3 // 4 else above
