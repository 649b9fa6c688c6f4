"""Which layers may get the warp-specialized kernels of `moe_core_triton.hopper`: all that is known before a call.

What a configuration must be is in `candidates`; what only a call shows is asked by `sequence`.
"""

from __future__ import annotations

from typing import Any, Final

from moe_core_triton.configs.device import this_device

#: What the sizes of a layer are multiples of, by scheme: 16 bytes of a row, or whole scale blocks.
STEPS: Final = {"bf16": 8, "fp8_block128": 128}
#: The smallest size that is worth a tile of theirs.
LEAST: Final = 128


def computes(config: Any, intermediate: int) -> bool:
    """Whether they compute such a layer (a `moe_core.MoeConfig`) with this rank's intermediate size."""
    if config.dtype not in ("bfloat16", "float16") or config.scheme not in STEPS or not config.activation.gated:
        return False
    if config.bias or config.router_weight_on_input:
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
