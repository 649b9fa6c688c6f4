"""Hygiene of the plugin itself: what importing it costs, and whether it says who it is."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys
from typing import Any, Final

from moe_core.plugins import PluginRecord
from moe_core.specs import FusedPathSpec, PluginInfo
from moe_core.testing.case import Case
from moe_core.testing.catalog import profile_of
from moe_core.testing.components import components
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.vocabulary import PLUGIN_API

#: What discovery must never import, beside the modules that the plugin's specs require.
HEAVY: Final = ("torch", "triton", "flashinfer", "aiter", "deep_ep", "mori", "cutlass", "transformers")

# Runs in a fresh interpreter: finds the plugin object, collects its specs, explains a layer on every profile.
_PROBE: Final = """
import importlib, importlib.util, json, sys
job = json.loads(sys.stdin.read())
sys.path[:] = job["path"]
def loaded():
    return sorted(set(job["heavy"]) & set(sys.modules))
name, _, attribute = job["target"].partition(":")
try:
    module = importlib.import_module(name)
except ImportError:
    spec = importlib.util.spec_from_file_location(name, job["file"])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
after_import = loaded()
value = getattr(module, attribute, None)
if isinstance(value, type):
    value = next((v for v in vars(module).values() if isinstance(v, value)), None)
collected = value is not None
if collected:
    import moe_core
    registry = moe_core.Registry(plugins=[] if job["core"] else [value], autoload=False)
    config = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=256, intermediate_size=256)
    for profile in job["profiles"]:
        moe_core.resolve(config, hardware=profile, registry=registry).reasons
print(json.dumps([after_import, loaded(), collected]))
"""


def _probe(case: Case) -> tuple[list[str], list[str], bool]:
    """Heavy modules after importing the plugin, after collecting and explaining, and whether that was possible."""
    stage = case.stage
    if "probe" not in stage.cache:
        stage.cache["probe"] = _run_probe(case, stage.record)
    found: tuple[list[str], list[str], bool] = stage.cache["probe"]
    return found


def _run_probe(case: Case, record: PluginRecord) -> tuple[list[str], list[str], bool]:
    from moe_core.hardware import PROFILES

    required = {
        requirement.module
        for component in components(record, case.stage.source)
        if hasattr(component.spec, "support")
        for requirement in component.spec.support.requires
    }
    plugin = record.plugin
    target = record.target or f"{type(plugin).__module__}:{type(plugin).__qualname__}"
    try:
        file = inspect.getsourcefile(sys.modules[target.partition(":")[0]])
    except (KeyError, TypeError):
        file = None
    job = {
        "target": target,
        "file": file,
        "path": [p or "." for p in sys.path],
        "core": record.name == "core",
        "heavy": sorted({*HEAVY, *required}),
        "profiles": list(PROFILES),
    }
    done = subprocess.run(
        [sys.executable, "-c", _PROBE], input=json.dumps(job), capture_output=True, text=True, timeout=120, check=False
    )
    if done.returncode:
        raise CheckFailed(f"importing {target} in a fresh interpreter failed:\n{done.stderr.strip()[-2000:]}")
    result: list[Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return result[0], result[1], result[2]


@check("hygiene.light_import", kind="plugin")
def light_import(case: Case) -> None:
    """Importing the plugin object imports neither torch nor a vendor package, so that it can be discovered anywhere."""
    after_import, _, _ = _probe(case)
    if after_import:
        raise CheckFailed(f"importing the plugin imported {', '.join(after_import)}")


@check("hygiene.light_explain", kind="plugin")
def light_explain(case: Case) -> None:
    """Collecting the specs and explaining a layer on every profile imports neither torch nor a vendor package."""
    _, after_explain, collected = _probe(case)
    if not collected:
        raise CheckSkipped("the plugin object was made in code and cannot be made again in a fresh interpreter")
    if after_explain:
        raise CheckFailed(f"collecting and explaining imported {', '.join(after_explain)}")


@check("hygiene.plugin_info", kind="plugin")
def plugin_info(case: Case) -> None:
    """The plugin says its name (that of its entry point), what it is, and a plugin API that this moe_core has."""
    record, info = case.stage.record, case.stage.record.info
    if not isinstance(info, PluginInfo):
        raise CheckFailed(f"moe_core_plugin_info returned {info!r}, not a PluginInfo")
    if record.distribution is not None and info.name != record.name:
        raise CheckFailed(f"its entry point is called {record.name!r}, its info {info.name!r}")
    if not info.summary.strip():
        raise CheckFailed("its summary is empty")
    if len(info.api) != 2 or info.api[0] != PLUGIN_API[0] or not 0 <= info.api[1] <= PLUGIN_API[1]:
        raise CheckFailed(f"it is written for plugin API {info.api}, this moe_core has {PLUGIN_API}")


@check("hygiene.names", kind="plugin")
def names(case: Case) -> None:
    """No two components share a name that settings and plans use: a fused path stands among the dispatchers."""
    registry = case.stage.source
    mine = [c for c in components(case.stage.record, registry) if isinstance(c.spec, FusedPathSpec)]
    clashes = sorted({c.name for c in mine} & set(registry.dispatchers))
    if clashes:
        raise CheckFailed(f"fused paths are called like dispatchers: {', '.join(clashes)}")


@check("hygiene.profile", kind="plugin")
def profile(case: Case) -> None:
    """The hook moe_core_conformance names existing checks only, with proper reasons, and only tightens tolerances."""
    _, problems = profile_of(case.stage)
    if problems:
        raise CheckFailed("\n".join(problems))
