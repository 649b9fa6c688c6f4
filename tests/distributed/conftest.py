"""Real processes over gloo: `ranks(count, source)` runs a script on each rank and gives what each one said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import moe_core

#: Before and after a rank's script: `rank`, `ranks`, `group` and `say` are there.
BEFORE = """
import datetime, json, os, sys, time, torch, moe_core
import torch.distributed as dist
torch.set_num_threads(1)
rank, ranks, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
patience = {"timeout": datetime.timedelta(seconds=float(sys.argv[4]))} if len(sys.argv) > 4 else {}
dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, **patience)
group, said = dist.group.WORLD, {}

def say(name, work):
    try:
        said[name] = work()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
"""
AFTER = """
print(json.dumps(said), flush=True)
dist.barrier()
# gloo's threads now and then end a process in std::terminate while it is torn down; what was asked is answered by now.
os._exit(0)
"""
#: Seconds that all ranks have together.
LIMIT = 120


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[dict[str, Any]]]:
    """See the module. patience: seconds that the group waits for a rank."""

    def run(count: int, source: str, patience: float | None = None) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("gloo")
        (folder / "rank.py").write_text(BEFORE + source + AFTER)
        more = [] if patience is None else [str(patience)]
        where = {"PYTHONPATH": str(Path(moe_core.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, "-P", *map(str, (folder / "rank.py", rank, count, folder / "rendezvous")), *more],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | where,
            )
            for rank in range(count)
        ]
        try:
            outcomes = [process.communicate(timeout=LIMIT) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0] * count, [err for _, err in outcomes]
        return [json.loads(out.splitlines()[-1]) for out, _ in outcomes]

    return run
