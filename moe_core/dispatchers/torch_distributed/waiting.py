"""Collectives that fail say what the layer was doing, and with whom."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist

from moe_core.errors import CommunicationError


@contextmanager
def together(what: str, group: Any) -> Iterator[None]:
    """A failure of torch.distributed in here, also of a wait, becomes a CommunicationError.

    How long a wait lasts is the process group's business: its timeout, which init_process_group and new_group take.
    """
    try:
        yield
    except RuntimeError as error:  # DistBackendError, DistNetworkError and gloo's own are
        me, ranks = dist.get_rank(group), dist.get_world_size(group)
        raise CommunicationError(
            f"{what} failed on rank {me} of {ranks}; another rank is dead, late, or not in this call: {error}",
            hint="see what the other ranks say; the process group's timeout (init_process_group(timeout=...)) says how "
            "long a rank waits, and the group cannot be used again",
        ) from error
