"""What is left once a rank has the sum of its tokens over the EP ranks."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor

from moe_core.dispatchers.torch_distributed.groups import Groups
from moe_core.dispatchers.torch_distributed.waiting import together


def finish(result: Tensor, groups: Groups, scale: float, output: Tensor | None) -> Tensor:
    """Summed over TP ranks where there are some (in place), times `scale`, in `output` where the caller gave one."""
    if groups.tp is not None:
        with together("summing results of TP ranks", groups.tp):
            dist.all_reduce(result, group=groups.tp)
    if scale != 1.0:
        result = result * scale
    return result if output is None else output.copy_(result)
