"""Real processes over gloo or NCCL, for tests of dispatchers: `run_ranks` runs a script on every rank."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import moe_core

_BEFORE = """
import datetime, json, os, sys, time, torch, moe_core
import torch.distributed as dist
torch.set_num_threads(1)
rank, ranks, rendezvous, backend = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
patience = {"timeout": datetime.timedelta(seconds=float(sys.argv[5]))} if len(sys.argv) > 5 else {}
if backend == "nccl":
    torch.cuda.set_device(rank)
device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=ranks, **patience)
group, said = dist.group.WORLD, {}

def say(name, work):
    try:
        said[name] = work()
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"
"""
_AFTER = """
print(json.dumps(said), flush=True)
dist.barrier()
# gloo's threads now and then end a process in std::terminate while it is torn down; what was asked is answered by now.
os._exit(0)
"""


def run_ranks(
    count: int,
    source: str,
    folder: Path,
    *,
    patience_s: float | None = None,
    limit_s: float = 120,
    paths: Sequence[Path] = (),
    backend: str = "gloo",
) -> list[dict[str, Any]]:
    """Run `source` in `count` processes of one group, in the empty `folder`; what each rank said, by rank.

    The script finds `rank`, `ranks`, `group`, `device`, torch, `dist` (torch.distributed) and moe_core, and
    `say(name, work)`, which keeps what `work()` returns (JSON) or the error that it raises, as text. patience_s:
    seconds that the group waits for a rank. limit_s: seconds that all have together. paths: folders to import from,
    beside moe_core's. backend: "gloo", on CPUs, or "nccl", where rank r has the GPU r.

    Raises AssertionError, with what the ranks wrote, where one fails or does not end in time.
    """
    script = folder / "rank.py"
    script.write_text(_BEFORE + source + _AFTER)
    more = [] if patience_s is None else [str(patience_s)]
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    searched = os.pathsep.join(map(str, (Path(moe_core.__file__).parents[1], *paths, *inherited)))
    processes, began = [], time.monotonic()
    for rank in range(count):
        with (folder / f"{rank}.out").open("w") as out, (folder / f"{rank}.err").open("w") as err:
            command = [sys.executable, "-P", *map(str, (script, rank, count, folder / "rendezvous", backend)), *more]
            environment = os.environ | {"PYTHONPATH": searched, "OMP_NUM_THREADS": "1"}
            processes.append(subprocess.Popen(command, stdout=out, stderr=err, env=environment))
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, began + limit_s - time.monotonic()))
        codes = [process.poll() for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    if any(code != 0 for code in codes):
        wrote = [(folder / f"{rank}.err").read_text() for rank in range(count)]
        raise AssertionError(f"after {limit_s} s at most, the ranks ended with {codes} (None: not): {wrote}")
    said = [(folder / f"{rank}.out").read_text().splitlines()[-1] for rank in range(count)]
    return [json.loads(line) for line in said]
