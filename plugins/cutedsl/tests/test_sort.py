"""The Triton kernels against plain torch: in Triton's interpreter, in a process of its own, and on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import moe_core_cutedsl
import portable
import pytest
import torch
from torch import Tensor

import moe_core
from moe_core.testing import make_routing

# tokens, top_k, experts, local experts, rows, mapped, valid rows
CASES: list[tuple[int, int, int, int, int, bool, int | None]] = [
    (1, 1, 1, 1, 64, False, None),
    (1, 8, 128, 128, 64, False, None),
    (5, 2, 6, 6, 64, False, 3),
    (17, 3, 9, 4, 128, True, None),
    (130, 4, 33, 33, 64, False, None),
    (400, 8, 64, 16, 128, True, 300),
    (1200, 2, 8, 8, 128, False, 0),
    (513, 4, 5, 5, 64, False, None),
]
FIELDS = ("tile_expert", "tile_limit", "slots", "used", "local_ids", "weights")


def compare(case: tuple[Any, ...], pattern: str, device: str) -> None:
    """`sort` and `combine` of one routing."""
    from moe_core_cutedsl.kernels.combine import combine
    from moe_core_cutedsl.kernels.sort import sort

    tokens, top_k, experts, local, rows, mapped, valid = case
    topk = make_routing(pattern, tokens, experts, top_k, 3)
    ids = topk.topk_ids.long() if mapped else topk.topk_ids
    table = torch.full((experts,), -1, dtype=torch.int32)
    table[torch.randperm(experts, generator=torch.Generator().manual_seed(0))[:local]] = torch.arange(local).int()
    more: dict[str, Any] = {"num_experts": local, "rows": rows, "factor": 1.5}
    tensors = {
        "expert_map": table if mapped else None,
        "num_valid": None if valid is None else torch.tensor(valid, dtype=torch.int32),
    }
    wanted = portable.sort(ids, topk.topk_weights, **more, **tensors)

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    on_device = {name: there(tensor) for name, tensor in tensors.items()}
    found = sort(ids.to(device), topk.topk_weights.to(device), **more, **on_device)
    for name in FIELDS:
        mine, right = getattr(found, name).cpu(), getattr(wanted, name)
        known = right != portable.GARBAGE
        assert mine.shape == right.shape, name
        assert torch.equal(mine[known], right[known]), (case, pattern, name)
    slots = torch.randn(tokens * top_k, 40, generator=torch.Generator().manual_seed(1))
    slots[(wanted.local_ids < 0).flatten()] = float("nan")
    right, out = torch.empty(tokens, 40), torch.full((tokens, 80), float("nan"), device=device)
    portable.combine(slots, wanted.weights, wanted.local_ids, right)
    combine(slots.to(device), found.weights, found.local_ids, out[:, :40])
    torch.testing.assert_close(out[:, :40].cpu(), right, rtol=1e-6, atol=1e-6)
    assert out[:, 40:].isnan().all()


def all_cases(device: str) -> None:
    """Every case, the small ones with three routings."""
    for case in CASES:
        for pattern in ("uniform", "dropped", "one_hot") if case[0] < 400 else ("dropped",):
            compare(case, pattern, device)


def test_in_the_interpreter() -> None:
    paths = [str(Path(module.__file__).parents[1]) for module in (moe_core, moe_core_cutedsl)]
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTHONPATH": os.pathsep.join([*paths, str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", "import test_sort; test_sort.all_cases('cpu')"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.gpu
@pytest.mark.parametrize("pattern", ["uniform", "dropped", "one_hot"])
@pytest.mark.parametrize("case", [*CASES, (4096, 8, 128, 128, 128, False, None), (16384, 8, 256, 32, 128, True, None)])
def test_on_a_gpu(case: tuple[Any, ...], pattern: str) -> None:
    compare(case, pattern, "cuda")
