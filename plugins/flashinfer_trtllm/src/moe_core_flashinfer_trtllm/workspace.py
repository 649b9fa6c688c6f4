"""Scratch memory of `cutlass_fused_moe`: sized when a plan is bound, one buffer for each stream that calls it.

It grows with tokens times top-k times sizes, up to gigabytes, so the layers of a model, which run one after another,
share it: plans with equal needs hold one `Workspace`, and it goes with the last of them. Two micro-batches on two
streams get two buffers. A stream that is new gets its buffer at its first call; under graph capture that comes out of
the graph's own pool, so warm a stream up before it is captured.
"""

from __future__ import annotations

import weakref

import torch
from torch import Tensor

from moe_core.errors import BindError


class Workspace:
    """Buffers of `size` bytes on a device. Use `shared`."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.size, self._device = size, device
        self._buffers: dict[int, Tensor] = {}
        self.buffer()

    def buffer(self) -> Tensor:
        """uint8 [size], that of the current stream."""
        stream = torch.cuda.current_stream(self._device).cuda_stream if self._device.type == "cuda" else 0
        found = self._buffers.get(stream)
        if found is None:
            found = self._buffers[stream] = self._make()
        return found

    def _make(self) -> Tensor:
        try:
            return torch.empty(self.size, dtype=torch.uint8, device=self._device)
        except torch.OutOfMemoryError as error:
            raise BindError(
                f"the workspace of flashinfer_cutlass takes {self.size >> 20} MiB, and that is not free: {error}",
                hint="lower max_tokens: the workspace grows with it",
            ) from error


#: Holds nothing alive: only plans do.
_SHARED: weakref.WeakValueDictionary[tuple[int, str], Workspace] = weakref.WeakValueDictionary()


def shared(size: int, device: torch.device) -> Workspace:
    """The workspace of all plans that need `size` bytes on `device`."""
    key = (size, str(device))
    found = _SHARED.get(key)
    if found is None:
        found = _SHARED[key] = Workspace(size, device)
    return found
