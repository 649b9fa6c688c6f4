"""Prepared weights travel between processes as plain bytes: torch cannot load a pickled float8 tensor."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor


def _packed(value: Any) -> Any:
    if isinstance(value, Tensor):
        raw = value.view(torch.uint8) if value.dtype.is_floating_point and value.element_size() == 1 else value
        return raw, value.dtype
    if isinstance(value, dict):
        return {name: _packed(item) for name, item in value.items()}
    return [_packed(item) for item in value] if isinstance(value, list) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, tuple):
        return value[0].view(value[1])
    if isinstance(value, dict):
        return {name: _unpacked(item) for name, item in value.items()}
    return [_unpacked(item) for item in value] if isinstance(value, list) else value


class Portable:
    """A dataclass of tensors, lists and dictionaries of tensors, and plain values that can be pickled."""

    __slots__ = ()

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: _packed(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            setattr(self, name, _unpacked(value))
