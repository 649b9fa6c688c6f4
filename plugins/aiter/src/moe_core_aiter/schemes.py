"""How AITER names and stores each quant scheme, as data. Imports no torch and no aiter."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final


@dataclass(frozen=True, slots=True, kw_only=True)
class Scheme:
    """One quant scheme.

    quant_type: the member of AITER's QuantType. layout: our name for the weights as its kernels read them. hidden,
    inner: what the hidden size and the intermediate size of a rank must be multiples of: a tile of K of the kernels.
    padded: sizes are rounded up to that, instead of refused. activations: ours, of those that AITER's enum has, for
    which there are kernels. float16: whether there are kernels for such layers.
    """

    quant_type: str
    layout: str
    hidden: int
    inner: int = 128
    padded: bool = False
    activations: tuple[str, ...] = ("silu", "gelu")
    float16: bool = True


SHUFFLED: Final = "shuffled"
MXFP4: Final = "mxfp4_shuffled"
MXFP4_INTERLEAVED: Final = "mxfp4_interleaved"
MXFP8_INTERLEAVED: Final = "mxfp8_interleaved"
INT4: Final = "int4_shuffled"

#: Layouts whose rows of gate and up take turns; AITER must be told.
INTERLEAVED: Final = frozenset({MXFP4_INTERLEAVED, MXFP8_INTERLEAVED})

#: A tile of K is 128 bytes in the kernels for 16 and 8 bits, 256 elements in those for mxfp4 and mxfp8.
SCHEMES: Final[Mapping[str, Scheme]] = MappingProxyType(
    {
        "bf16": Scheme(quant_type="No", layout=SHUFFLED, hidden=64),
        "fp8_tensor": Scheme(quant_type="per_Tensor", layout=SHUFFLED, hidden=128),
        "fp8_channel": Scheme(quant_type="per_Token", layout=SHUFFLED, hidden=128),
        "fp8_block128": Scheme(quant_type="per_128x128", layout=SHUFFLED, hidden=128),
        # The assembly kernels that stand in for missing ones read and write bfloat16, whatever the layer's dtype is.
        "int8_channel": Scheme(quant_type="per_Token", layout=SHUFFLED, hidden=128, float16=False),
        # For 1x32 the kernels take gelu for silu, without a word.
        "mxfp4": Scheme(quant_type="per_1x32", layout=MXFP4, hidden=256, inner=256, padded=True, activations=("silu",)),
        "mxfp4_w4a16": Scheme(
            quant_type="per_1x32",
            layout=MXFP4_INTERLEAVED,
            hidden=256,
            inner=256,
            padded=True,
            activations=("swiglu_oai",),
            float16=False,
        ),
        "mxfp8": Scheme(
            quant_type="per_1x32",
            layout=MXFP8_INTERLEAVED,
            hidden=256,
            inner=256,
            padded=True,
            activations=("silu",),
        ),
        "int4_w4a16": Scheme(quant_type="per_1x32", layout=INT4, hidden=128, activations=("silu",), float16=False),
    }
)

#: Calls of at least so many rows quantize the tokens of `mxfp4_w4a16` to fp8, by default.
ROUNDED_ROWS: Final = 256
#: Rows of a tile of sorted tokens, where AITER is not to choose.
BLOCK_SIZES: Final = (16, 32, 64, 128)
#: Ours -> the member of AITER's ActivationType.
ACTIVATIONS: Final[Mapping[str, str]] = MappingProxyType({"silu": "Silu", "gelu": "Gelu", "swiglu_oai": "Swiglu"})


def rounded(size: int, multiple: int) -> int:
    """`size`, rounded up to a multiple."""
    return -(-size // multiple) * multiple
