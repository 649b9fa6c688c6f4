"""Whole EP layers on several GPUs equal the layer of one: every dispatcher with every runner, over NCCL and DeepEP.

Needs two GPUs or more. What is not installed (moe-core-triton, moe-core-deepep, DeepEP) is skipped.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.testing import run_ranks

COUNTS = [n for n in (2, 4, 8) if n <= torch.cuda.device_count()]
pytestmark = pytest.mark.skipif(not COUNTS, reason="needs two GPUs")

SCRIPT = """
from moe_core import MoeConfig, Phase
from moe_core.registry import Registry
from moe_core.testing.expert_parallel import Ranks

plugins = []
for name in ("triton", "deepep"):
    try:
        plugins.append(__import__(f"moe_core_{name}.plugin", fromlist=["plugin"]).plugin)
    except ImportError:
        pass
here = Ranks(group, device, Registry(plugins), keep=True)

def error(dispatcher, counts, runner, scheme="bf16", phase="prefill", **more):
    config = MoeConfig(num_experts=16, top_k=4, hidden_size=2048, intermediate_size=512, scheme=scheme,
                       routed_scaling_factor=1.5)
    most = 128 if phase == "decode" else 512
    with torch.no_grad():
        return here.error(dispatcher, counts, runner, config=config, phase=Phase(phase), most=most, **more)
"""

EQUAL = {"equal_tokens": True}
EVEN, ODD, FEW, NOBODY = [256] * 8, [300, 0, 17, 512, 1, 0, 64, 9], [5, 0, 128, 1, 64, 0, 3, 100], [0] * 8
#: Dispatcher -> case -> (tokens of each rank, more).
CASES: dict[str, dict[str, tuple[list[int], dict[str, Any]]]] = {
    "allgather": {
        "uneven": (ODD, {}),
        "told": (ODD, {"told": True}),
        "equal": (EVEN, {"options": EQUAL}),
        "nobody": (NOBODY, {"told": True}),
        "round robin": (ODD, {"placement": "round_robin"}),
        "in flight": (ODD, {"flights": 3}),
        "graph": (EVEN, {"captured": True, "calls": 4, "options": EQUAL}),
        "decode graph": (
            [64] * 8,
            {"captured": True, "calls": 4, "phase": "decode", "options": EQUAL},
        ),
    },
    "symm_mem": {
        "uneven": (ODD, {}),
        "told": (ODD, {"told": True}),
        "equal": (EVEN, {"options": EQUAL, "calls": 4}),
        "nobody": (NOBODY, {"told": True}),
        "round robin": (ODD, {"placement": "round_robin"}),
        "in flight": (ODD, {"flights": 2}),
        "graph": (EVEN, {"captured": True, "calls": 4, "options": EQUAL}),
        "decode graph": ([64] * 8, {"captured": True, "calls": 4, "phase": "decode", "options": EQUAL}),
    },
    "alltoall": {
        "uneven": (ODD, {}),
        "nobody": (NOBODY, {}),
        "round robin": (ODD, {"placement": "round_robin"}),
        "in flight": (ODD, {"flights": 3}),
    },
    "alltoall_grouped": {"uneven": (ODD, {}), "nobody": (NOBODY, {}), "in flight": (ODD, {"flights": 3})},
    "deepep_normal": {"uneven": (ODD, {}), "nobody": (NOBODY, {}), "in flight": (ODD, {"flights": 3})},
    "deepep_normal_static": {
        "uneven": (ODD, {}),
        "in flight": (ODD, {"flights": 3}),
        "graph": (EVEN, {"captured": True, "calls": 4}),
    },
    "deepep_ll": {
        "uneven": (FEW, {"phase": "decode", "calls": 3}),
        "nobody": (NOBODY, {"phase": "decode"}),
        "in flight": (FEW, {"phase": "decode", "flights": 2}),
        "graph": ([64] * 8, {"phase": "decode", "captured": True, "calls": 4}),
    },
}
RUNNERS, SCHEMES = ("reference", "triton"), ("bf16", "fp8_block128")
#: The reference runner's operations are not made for capture.
POINTS = [
    (dispatcher, case, runner, scheme)
    for dispatcher, cases in CASES.items()
    for case in cases
    for runner in RUNNERS
    for scheme in SCHEMES
    if not (runner == "reference" and ("graph" in case or dispatcher == "alltoall_grouped"))
]


def missing(dispatcher: str) -> str | None:
    """The package that is not there."""
    wanted = ["moe_core_deepep", "deep_ep"] if dispatcher.startswith("deepep") else []
    if dispatcher == "symm_mem":
        wanted = ["moe_core_triton"]
    return next((name for name in wanted if importlib.util.find_spec(name) is None), None)


_SAID: dict[tuple[str, int], list[dict[str, Any]]] = {}


def said(dispatcher: str, count: int, folder: Path) -> list[dict[str, Any]]:
    """What each rank said to every case of that dispatcher: one set of processes for all."""
    if (dispatcher, count) not in _SAID:
        lines = []
        for mine, case, runner, scheme in POINTS:
            if mine == dispatcher and (runner != "triton" or importlib.util.find_spec("moe_core_triton")):
                counts, more = CASES[dispatcher][case]
                call = f"error({dispatcher!r}, {counts!r}, {runner!r}, {scheme!r}, **{more!r})"
                lines.append(f"say({f'{case} {runner} {scheme}'!r}, lambda: {call})\n")
        script = SCRIPT + "".join(lines) + "here.close()\n"
        _SAID[dispatcher, count] = run_ranks(count, script, folder, backend="nccl", limit_s=300, patience_s=60)
    return _SAID[dispatcher, count]


@pytest.mark.parametrize("count", COUNTS or [2])
@pytest.mark.parametrize(("dispatcher", "case", "runner", "scheme"), POINTS)
def test_as_one_rank(
    dispatcher: str, case: str, runner: str, scheme: str, count: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    lacking = missing(dispatcher)
    if lacking is None and runner == "triton" and importlib.util.find_spec("moe_core_triton") is None:
        lacking = "moe_core_triton"
    if lacking is not None:
        pytest.skip(f"{lacking} is not installed")
    found = [rank[f"{case} {runner} {scheme}"] for rank in said(dispatcher, count, tmp_path_factory.mktemp("ranks"))]
    limit = 4e-2 if scheme == "fp8_block128" else 2e-2
    assert all(isinstance(error, float) and error <= limit for error in found), found


LOST = """
config = MoeConfig(num_experts=16, top_k=4, hidden_size=2048, intermediate_size=512)
from moe_core import RunningState
from moe_core.testing import make_layer
layer = make_layer(config, 1, tokens=8, device=device)
plan = here.plan(config, layer, "symm_mem", "triton", most=8, options={"timeout_s": 2, "equal_tokens": True})
plan(layer.hidden, layer.topk)
torch.cuda.synchronize()
dist.barrier()
torch.cuda.synchronize()

def lonely():
    "A call that the other rank does not make; what it ends in, what the next call says, and after how long."
    began = time.monotonic()
    plan(layer.hidden, layer.topk)
    try:
        torch.cuda.synchronize()
        ended = "nothing"
    except RuntimeError as error:
        ended = type(error).__name__
    waited = time.monotonic() - began
    try:
        plan(layer.hidden, layer.topk)
    except moe_core.CommunicationError as error:
        return [ended, waited, str(error)]

if rank == 0:
    say("lonely", lonely)
else:
    time.sleep(6)
print(json.dumps(said), flush=True)
os._exit(0)  # its context is gone
"""


@pytest.mark.skipif(importlib.util.find_spec("moe_core_triton") is None, reason="moe_core_triton is not installed")
def test_a_rank_that_does_not_come_ends_in_an_error_that_names_it(tmp_path: Path) -> None:
    """`symm_mem` waits on the device, for `timeout_s`; the kernel then ends the process's context."""
    ended, waited, error = run_ranks(2, SCRIPT + LOST, tmp_path, backend="nccl", limit_s=120)[0]["lonely"]
    assert ended != "nothing"
    assert 1 < waited < 10
    assert "waited 2 s for EP rank 1" in error
