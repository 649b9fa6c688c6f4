"""Which layers may get the warp-specialized kernels of `moe_core_triton.hopper`: all that is known before a call.

What a configuration must be is in `candidates`; what only a call shows is asked by `sequence`.
"""

from __future__ import annotations

from typing import Any, Final

from moe_core_triton.configs.device import this_device

#: What the sizes of a layer are multiples of, by scheme: 16 bytes of a row, whole scale blocks, or sixteens of columns.
STEPS: Final = {"bf16": 8, "fp8_block128": 128, "mxfp4_w4a16": 16}
#: Their tiles, by scheme and height (tokens): rows of weights, K of a step, slots of the ring.
TILES: Final[dict[str, dict[int, tuple[int, int, int]]]] = {
    "bf16": {128: (256, 64, 4), 192: (256, 64, 3)},
    "fp8_block128": {128: (256, 128, 4)},
    "mxfp4_w4a16": {32: (256, 128, 8), 64: (256, 128, 6), 192: (128, 128, 3)},
}
HEIGHTS: Final = {scheme: tuple(tiles) for scheme, tiles in TILES.items()}
#: The smallest size that is worth a tile of theirs.
LEAST: Final = 256


def computes(config: Any, intermediate: int) -> bool:
    """Whether they compute such a layer (a `moe_core.MoeConfig`) with this rank's intermediate size."""
    dtypes = ("bfloat16",) if config.scheme == "mxfp4_w4a16" else ("bfloat16", "float16")
    if config.dtype not in dtypes or config.scheme not in STEPS or not config.activation.gated:
        return False
    if (config.bias and config.scheme == "fp8_block128") or config.router_weight_on_input:
        return False
    sizes = (config.hidden_size, intermediate)
    return min(sizes) >= LEAST and not any(size % STEPS[config.scheme] for size in sizes)


def chosen_for(binding: Any) -> bool:
    """Whether a plan (a `moe_core.protocols.Binding`) may choose them: by option, device, layer and Triton."""
    if not binding.options.get("specialized", True) or this_device(binding.device).arch != "sm_90":
        return False
    if not computes(binding.config, binding.local_intermediate_size):
        return False
    # Here, because it imports torch and Triton.
    from moe_core_triton import hopper

    return hopper.available(binding.device)
