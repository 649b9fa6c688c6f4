"""Dispatchers between ranks, in real processes: over NCCL where this machine has two GPUs, over gloo on a CPU."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any, Final

import torch

from moe_core.plugins import CORE
from moe_core.testing.case import Case
from moe_core.testing.processes import run_ranks
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.testing.stage import any_config
from moe_core.vocabulary import Phase, Step

RANKS: Final = 2
#: Tokens of the two ranks -> what it is called. The most are `_MOST`.
COUNTS: Final = {"uneven": (5, 8), "one without tokens": (8, 0), "nobody": (0, 0)}
_MOST: Final = 8
#: Relative to the largest value: results travel in the layer's dtype, payloads are not quantized here.
ALLOWED: Final = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 3e-2}

_SCRIPT = """
import importlib
from moe_core import MoeConfig, Phase
from moe_core.registry import Registry
from moe_core.testing.expert_parallel import Ranks
told = json.loads({told!r})
plugins = []
if told["plugin"]:
    module, _, name = told["plugin"].partition(":")
    plugins.append(getattr(importlib.import_module(module), name))
here = Ranks(group, device, Registry(plugins), keep=True)
config = MoeConfig(**told["config"])
more = {{"config": config, "phase": Phase(told["phase"]), "most": told["most"]}}
for name, call in told["calls"].items():
    say(name, lambda: here.error(told["dispatcher"], **call, **more))
here.close()
"""


@check("dispatcher.ranks", kind="dispatcher", each="phase", needs="run")
def ranks(case: Case) -> None:
    """Two ranks with their own tokens, uneven ones and none too, get what one rank gets for all of them."""
    spec, support, phase = case.component.spec, case.component.support, Phase(case.param)
    if phase not in spec.formats:
        raise CheckSkipped(f"it gives nothing in {phase}")
    if "sharded" not in support.tokens or not any(Step.EP_REDUCE in o.always for o in spec.offers.values()):
        raise CheckSkipped("it leaves the sum over ranks to others")
    low, high = support.ep_sizes
    if not low <= RANKS <= (high or RANKS):
        raise CheckSkipped(f"it does not run on {RANKS} ranks")
    device = case.site.device.partition(":")[0]
    if device == "cuda" and torch.cuda.device_count() < RANKS:
        raise CheckSkipped(f"needs {RANKS} GPUs, torch sees {torch.cuda.device_count()}")
    calls: dict[str, dict[str, Any]] = {name: {"counts": counts} for name, counts in COUNTS.items()}
    calls["with the counts told"] = {"counts": COUNTS["uneven"], "told": True}
    if spec.split_phases:
        calls["two calls in flight"] = {"counts": COUNTS["uneven"], "flights": 2}
    if device == "cuda" and phase in support.graph_capture:
        calls["replays of a graph"] = {"counts": (_MOST, _MOST), "captured": True}
    config = any_config(case.component, scheme="bf16", dtype="bfloat16" if device == "cuda" else _narrowest(support))
    told = {
        "plugin": _where(case),
        "dispatcher": case.component.name,
        "phase": phase,
        "most": _MOST,
        "calls": calls,
        "config": {name: getattr(config, name) for name in ("num_experts", "top_k", "hidden_size", "dtype")}
        | {"intermediate_size": config.intermediate_size},
    }
    with tempfile.TemporaryDirectory() as folder:
        said = run_ranks(
            RANKS,
            _SCRIPT.format(told=json.dumps(told)),
            Path(folder),
            backend="nccl" if device == "cuda" else "gloo",
            paths=[Path(path) for path in sys.path if path],
            patience_s=60,
        )
    for name in calls:
        for rank, answers in enumerate(said):
            found = answers[name]
            if not isinstance(found, float):
                raise CheckFailed(f"{name}: rank {rank} of {RANKS} ended with {found}")
            if not found <= ALLOWED[config.dtype]:
                raise CheckFailed(
                    f"{name}: the result of rank {rank} of {RANKS} is {found:.2g} of the largest value off, "
                    f"allowed {ALLOWED[config.dtype]:g} in {config.dtype}"
                )


def _narrowest(support: Any) -> str:
    return "float32" if not support.dtypes or "float32" in support.dtypes else "bfloat16"


def _where(case: Case) -> str | None:
    """ "module:name" of the plugin object, for processes that import it; None for the core's own."""
    record = case.stage.record
    if record.name == CORE:
        return None
    plugin = record.plugin
    module = sys.modules[type(plugin).__module__]
    names = [name for name, value in vars(module).items() if value is plugin]
    if not names:
        raise CheckSkipped(f"other processes cannot import {plugin!r}: no name of {module.__name__} holds it")
    return f"{module.__name__}:{names[0]}"
