"""What the double raises. Imports nothing."""

from __future__ import annotations


class DoubleError(AssertionError):
    """MoRI would not survive this call, or would give wrong rows."""
