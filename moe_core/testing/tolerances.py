"""The one table of tolerances, and the comparison that uses it.

A tolerance is a relative RMS error, |actual - expected| / |expected| in the Frobenius norm. It does not depend on how
large the values are, and one wrong row in sixty-four already gives 12 %. `PEAK` bounds the largest single error.
Never imports torch at import time.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from moe_core.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

# Rounding of inputs, of the intermediate result and of the output to the layer's dtype, with room for another order
# of summation. float32 excludes TF32 on purpose.
_DTYPES: Final = {"float64": 1e-10, "float32": 2e-5, "float16": 2e-3, "bfloat16": 1e-2}
# Rounding of activations: a kernel that rounds the intermediate result first, or shares a scale among other rows, picks
# the neighboring value now and then. Weight-only schemes add nothing: their weights are exact.
_SCHEMES: Final = {
    "bf16": 0.0,
    "int8_w8a16": 0.0,
    "int4_w4a16": 0.0,
    "mxfp4_w4a16": 0.0,
    "int8_channel": 2e-2,
    "fp8_block128": 4e-2,
    "fp8_channel": 4e-2,
    "mxfp8": 4e-2,
    "fp8_tensor": 7e-2,
    "mxfp4": 1e-1,
    "nvfp4": 1e-1,
}
#: Where the hardware's fp8 is e4m3fnuz, largest value 240, a row is rounded on another grid than the formula's, which
#: ends at 448: tokens and intermediate rows differ by two roundings each (0.071 measured). fp8_tensor allows nearly as
#: much everywhere: a scale a row instead of one for all is another grid too.
_FNUZ_ARCHS: Final = ("gfx940", "gfx941", "gfx942")
_FNUZ: Final = 8e-2
#: The ceiling of schemes that only a plugin describes.
UNKNOWN_SCHEME: Final = 1e-1

#: (dtype, scheme) -> largest relative RMS error against the float64 formula or the reference runner.
CEILINGS: Final[Mapping[tuple[str, str], float]] = MappingProxyType(
    {(dtype, scheme): max(base, extra) for dtype, base in _DTYPES.items() for scheme, extra in _SCHEMES.items()}
)
#: The largest single error may be so many times the tolerance times the RMS of the expected values.
PEAK: Final = 10.0


def ceiling(dtype: str, scheme: str, arch: str = "") -> float:
    """The kit's tolerance for a dtype and scheme, on an architecture."""
    if dtype not in _DTYPES:
        raise ConfigError(f"no tolerance for dtype {dtype!r}", hint=f"known: {', '.join(_DTYPES)}")
    found = CEILINGS.get((dtype, scheme), UNKNOWN_SCHEME)
    return max(found, _FNUZ) if scheme.startswith("fp8_") and arch in _FNUZ_ARCHS else found


def tolerance(
    dtype: str, scheme: str, tightened: Mapping[tuple[str, str], float] | None = None, arch: str = ""
) -> float:
    """The tolerance in force: the ceiling, or a smaller one that a plugin's profile asks for."""
    return min(ceiling(dtype, scheme, arch), (tightened or {}).get((dtype, scheme), float("inf")))


def loosened(tightened: Mapping[tuple[str, str], float]) -> list[str]:
    """What is wrong with a profile's tolerances: entries above the ceiling, or for an unknown dtype."""
    problems = []
    for (dtype, scheme), value in tightened.items():
        if dtype not in _DTYPES:
            problems.append(f"{dtype!r} is not a dtype of the table ({', '.join(_DTYPES)})")
        elif not 0 < value <= ceiling(dtype, scheme):
            problems.append(
                f"{value:g} for {dtype} {scheme} is not in (0, {ceiling(dtype, scheme):g}], the kit's ceiling"
            )
    return problems


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected|, in float64; absolute where everything expected is zero."""
    wide, difference = expected.double(), actual.double() - expected.double()
    norm = float(wide.norm())
    return float(difference.norm()) / (norm or 1.0)


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: str,
    scheme: str = "bf16",
    *,
    what: str = "the result",
    tightened: Mapping[tuple[str, str], float] | None = None,
    arch: str = "",
) -> None:
    """Raise AssertionError, with the errors, the place and the tolerance, unless `actual` is close to `expected`.

    dtype, scheme: those of the layer; arch: where `actual` was computed. Where everything expected is zero, everything
    must be exactly zero.
    """
    import torch

    if actual.shape != expected.shape:
        raise AssertionError(f"{what} has shape {tuple(actual.shape)}, expected {tuple(expected.shape)}")
    if actual.numel() == 0:
        return
    allowed = tolerance(dtype, scheme, tightened, arch)
    wide, difference = expected.double(), (actual.double() - expected.double()).abs().reshape(-1)
    broken = ~torch.isfinite(actual.double().reshape(-1))
    worst = int(broken.int().argmax()) if bool(broken.any()) else int(difference.argmax())
    place = [int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)]
    got, wanted = float(actual.reshape(-1)[worst]), float(expected.reshape(-1)[worst])
    where = f"at {place}: got {got:.6g}, expected {wanted:.6g}"
    if bool(broken.any()):
        raise AssertionError(f"{what} has {int(broken.sum())} values that are not finite, the first {where}")
    error, largest = relative_error(actual, expected), float(difference[worst])
    rms = float(wide.square().mean().sqrt())
    if error > allowed or largest > PEAK * allowed * rms or (rms == 0.0 and largest > 0.0):
        raise AssertionError(
            f"{what} is off by {error:.3g} in relative RMS (tolerance {allowed:.3g} for {dtype} {scheme}); the largest "
            f"error is {largest:.3g} (at most {PEAK * allowed * rms:.3g} for an RMS of {rms:.3g}), {where}"
        )
