"""Streams of the host's calls: whose kernel waits for other GPUs first, and what another stream must wait for."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Turns:
    """Kernels that wait for other ranks run one after the other, in the order of the host's calls: that of all ranks.

    On two streams, two kernels that each fill a GPU would wait for ever: one GPU runs the first and waits for its like
    on another, where the second has all processors and waits for its own like.

    An event lies between two calls; in a capture, where one of an earlier capture must not be waited for, all that the
    other stream has got so far.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._event: torch.cuda.Event | None = None
        self._eager: torch.cuda.Stream | None = None
        self._captured: torch.cuda.Stream | None = None

    def wait(self) -> None:
        """Before a launch: the current stream waits for the last turn, where another stream had it."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            if self._captured not in (None, stream) and _capturing(self._captured):
                stream.wait_stream(self._captured)
        elif self._event is not None and self._eager != stream:
            stream.wait_event(self._event)

    def end(self) -> None:
        """After the launch of a kernel that waits."""
        if self._device.type != "cuda":
            return
        stream = torch.cuda.current_stream(self._device)
        if torch.cuda.is_current_stream_capturing():
            self._captured = stream
            return
        if self._event is None:
            self._event = torch.cuda.Event()
        self._event.record(stream)
        self._eager = stream


class Mark:
    """A place in the current stream, for a later call that may be on another one."""

    def __init__(self, device: torch.device) -> None:
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.current_stream(device)
            self._event = self._stream.record_event()

    def follow(self, *read: Tensor) -> None:
        """The current stream comes after it. read: tensors of its stream that the current one will read."""
        if self._stream is None:
            return
        stream = torch.cuda.current_stream(self._stream.device)
        if stream != self._stream:
            stream.wait_event(self._event)
            for tensor in read:
                tensor.record_stream(stream)


def _capturing(stream: Any) -> bool:
    with torch.cuda.stream(stream):
        return torch.cuda.is_current_stream_capturing()
