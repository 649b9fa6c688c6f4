"""What the doubles of DeepEP's two interfaces share: checks, events, and ranks that are in the same call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

FP8, BF16, F32, I32, I64 = torch.float8_e4m3fn, torch.bfloat16, torch.float32, torch.int32, torch.int64


class DoubleError(AssertionError):
    """DeepEP would not survive this call."""


def need(holds: bool, message: str) -> None:
    if not holds:
        raise DoubleError(message)


def is_tensor(name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int | None, ...], *, dense: bool = True) -> None:
    """An argument's dtype, shape (None: any) and contiguity."""
    is_ = getattr(tensor, "dtype", type(tensor).__name__)
    need(is_ == dtype, f"{name} is {is_}, not {dtype}")
    fits = len(tensor.shape) == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    need(fits, f"{name} is {list(tensor.shape)}, not {list(shape)}")
    need(tensor.is_contiguous() or not dense, f"{name} is not contiguous")


def garbage(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)


class EventOverlap:
    """What the calls return; `event` is None unless the call had async_finish=True."""

    def __init__(self, event: Callable[[], None] | None = None) -> None:
        self.event = event

    def current_stream_wait(self) -> None:
        """Only of a call with async_finish=True, or of `Buffer.capture()`."""
        if self.event is None:
            raise DoubleError("there is no event to wait for: the call had async_finish=False")
        self.event()


class Collective:
    """A buffer of the ranks of a gloo group. All make the same calls in the same order, which is checked."""

    def __init__(self, group: dist.ProcessGroup, explicitly_destroy: bool) -> None:
        self.group, self.rank, self.group_size = group, group.rank(), group.size()
        self.explicitly_destroy, self._destroyed = explicitly_destroy, False
        self._deferred: list[Callable[[], None]] = []  # what the communication stream has to do, in order
        self._hooked: Callable[[], None] | None = None  # what the hook that was not called yet has to do

    def destroy(self) -> None:
        """Needs explicitly_destroy=True; nothing works afterwards."""
        need(self.explicitly_destroy, "destroy() needs explicitly_destroy=True")
        self._agree("destroy")
        self._destroyed = True

    @staticmethod
    def capture() -> EventOverlap:
        """An event of the current stream."""
        return EventOverlap(lambda: None)

    def _later(
        self, values: list[Tensor], async_finish: bool, hooked: bool = False, into: Tensor | None = None
    ) -> tuple[list[Tensor], EventOverlap, Callable[[], None] | None]:
        """Results, undefined until their event is waited for or their hook called."""
        targets = [torch.full_like(one, float("nan") if one.is_floating_point() else -1) for one in values]
        targets = targets if into is None else [into.copy_(targets[0])]

        def fill() -> None:
            for target, value in zip(targets, values, strict=True):
                target.copy_(value)

        def hook() -> None:
            need(self._hooked is fill, "the hook was called already")
            self._hooked = None
            fill()

        def arrive() -> None:
            while fill in self._deferred:
                self._deferred.pop(0)()

        if hooked:
            self._hooked = fill
            return targets, EventOverlap(), hook
        self._deferred.append(fill)
        if not async_finish:
            arrive()
        return targets, EventOverlap(arrive if async_finish else None), None

    def _agree(self, call: str, *values: int) -> None:
        """All ranks are in the same call with the same values."""
        need(not self._destroyed, "the buffer is destroyed")
        calls: list[Any] = [None] * self.group_size
        dist.all_gather_object(calls, (call, values), group=self.group)
        need(calls == calls[:1] * self.group_size, f"ranks differ: {calls}")

    def _exchange(self, rows: Tensor, sent: list[int], received: list[int], order: Tensor | None = None) -> Tensor:
        """rows: [S, W] of any dtype, or picked by order: int64 [S] -> the rows for this rank, by source rank."""
        payload = rows.contiguous().view(torch.uint8)
        payload = payload if order is None else payload[order]
        got = payload.new_empty(sum(received), payload.shape[1])
        dist.all_to_all_single(got, payload, received, sent, group=self.group)
        return got.view(rows.dtype)
