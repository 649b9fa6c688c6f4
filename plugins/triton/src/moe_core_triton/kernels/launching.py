"""What a launch needs to know about the device, in one place."""

from __future__ import annotations

import os
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor


@lru_cache(maxsize=1)
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1): decided when they are defined, so once."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    if device.type != "cuda" or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


def is_hopper_or_newer(device: torch.device) -> bool:
    """NVIDIA sm_90 and above: tensor descriptors in hardware, and programmatic dependent launch."""
    return not interpreting() and _capability(device) >= (9, 0)


def is_exactly_hopper(device: torch.device) -> bool:
    """sm_90 and nothing newer: kernels that use its own instructions (wgmma, setmaxnreg)."""
    return not interpreting() and _capability(device) == (9, 0)


def is_nvidia(device: torch.device) -> bool:
    """An NVIDIA GPU with bfloat16 arithmetic (sm_80 and above), where inline PTX may be used."""
    return not interpreting() and _capability(device) >= (8, 0)


def dependent_launch(tensor: Tensor) -> dict[str, Any]:
    """Keyword arguments of a launch that may start before its predecessor ends; the kernel takes PDL: tl.constexpr.

    A kernel boundary in a CUDA graph costs about 1.0 us, and 0.6 us this way (measured on an H200).
    """
    if is_hopper_or_newer(tensor.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """Streaming multiprocessors (NVIDIA) or compute units (AMD); a few under the interpreter."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


@lru_cache(maxsize=64)
def early_bytes(device: torch.device) -> int:
    """How many bytes of weights a kernel may ask into the L2 cache before its inputs are ready.

    What comes too early is gone again when it is used, and fetched twice: Mixtral's second product at 8 tokens took
    275 us with all of its weights asked for, and 212 us so (H200).
    """
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size) * 2 // 5


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Everything that earlier kernels wrote is visible after this. Then the next kernel may start its prologue."""
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
