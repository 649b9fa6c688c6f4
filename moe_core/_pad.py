"""Padding of canonical weights to the sizes that a runner asked for: the added part contributes exactly zero."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_core.errors import WeightError
from moe_core.quant import QuantScheme

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.config import MoeConfig
    from moe_core.weights import CanonicalWeights, WeightRequirements

_E8M0_ONE = 127  # byte of the scale 1.0
_INT4_ZERO = 0x88  # two codes of 8, the implicit zero point


def pad(
    weights: CanonicalWeights,
    config: MoeConfig,
    local_intermediate_size: int,
    scheme: QuantScheme,
    required: WeightRequirements,
) -> CanonicalWeights:
    """A copy of `weights` with hidden and intermediate size enlarged to `required`.

    Every activation of the core maps a padded gate and up of zero to zero, and w2's padded columns are zero as well.
    Raises WeightError where a scale block would straddle old and new rows.
    """
    from moe_core.weights import CanonicalWeights

    parts, inner, hidden = config.gate_up_factor, local_intermediate_size, config.hidden_size
    new_inner, new_hidden = required.intermediate_size, required.hidden_size
    if new_inner < inner or new_hidden < hidden:
        raise WeightError(f"a runner asked for {required}, smaller than the layer's own {inner} x {hidden}")
    # (extent, enlarged extent, stacked blocks) of axis 1 and axis 2.
    axes = {
        "w13": ((inner, new_inner, parts), (hidden, new_hidden, 1)),
        "w2": ((hidden, new_hidden, 1), (inner, new_inner, 1)),
    }
    result = {}
    for name, tensor in weights.tensors().items():
        role, _, suffix = name.partition("_")
        if suffix in ("", "scale", "zero", "bias") and tensor.dim() > 1:
            for axis, (old, new, blocks) in enumerate(axes[role][: tensor.dim() - 1], start=1):
                covered = coverage(scheme, config, suffix)[axis - 1]
                if new != old and covered:
                    fill = _fill(suffix, scheme, weights, role)
                    tensor = _enlarge(tensor, axis, old, new, blocks, covered, fill, name)
        result[name] = tensor.contiguous()
    return CanonicalWeights(**result)


def _fill(suffix: str, scheme: QuantScheme, weights: CanonicalWeights, role: str) -> int:
    if suffix == "scale":
        return _E8M0_ONE if scheme.scale is not None and scheme.scale.dtype == "float8_e8m0" else 1
    if suffix == "" and scheme.weight_format == "int4" and getattr(weights, f"{role}_zero") is None:
        return _INT4_ZERO
    return 0


def coverage(scheme: QuantScheme, config: MoeConfig, suffix: str) -> tuple[int, int]:
    """Rows and columns of the matrix that one entry of a tensor stands for; 0: all of them.

    suffix: "" for the matrix itself, "scale", "zero" or "bias".
    """
    if suffix == "bias":
        return 1, 1
    if suffix in ("scale", "zero") and scheme.scale is not None:
        columns = scheme.scale.columns
        return scheme.scale.rows, (config.group_size or columns) if columns else 0
    return 1, scheme.values_per_item


def _enlarge(tensor: Tensor, axis: int, old: int, new: int, blocks: int, covered: int, fill: int, name: str) -> Tensor:
    import torch

    if old % covered or new % covered:
        raise WeightError(
            f"{name} has one entry for {covered} of {old}: padding to {new} would cut through one of them",
            hint="quantize weights that are padded already; `moe_core.weight_requirements` tells the sizes",
        )
    added = (new - old) // covered
    shape = list(tensor.shape)
    shape[axis] = added
    # float8 tensors cannot be filled on every device: bytes can.
    raw = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
    value = fill if tensor.dtype in (torch.uint8, torch.int8) or fill == 0 or tensor.dtype.itemsize > 1 else None
    if value is None:
        value = int(torch.tensor(float(fill)).to(tensor.dtype).view(torch.uint8))
    margin = torch.full(shape, value, dtype=raw.dtype, device=raw.device)
    pieces = [piece for block in raw.chunk(blocks, dim=axis) for piece in (block, margin)]
    return torch.cat(pieces, dim=axis).view(tensor.dtype)
