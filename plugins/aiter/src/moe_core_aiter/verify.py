"""Everything that only an AMD GPU can say about this plugin, in one run and one file.

    python -m moe_core_aiter.verify --out benchmarks/results/mi300x

It writes `aiter_ARCH_DATE.json`: versions and the interface of the installed AITER, the conformance kit, layers of
every scheme at sizes where AITER changes kernels, controls that must fail, and times beside Triton's. Exit code 1:
something is wrong. docs/amd.md says what to do with the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import packages_distributions, version
from pathlib import Path
from typing import Any

import torch

import moe_core
from moe_core.config import Activation, MoeConfig
from moe_core.hardware import HardwareInfo
from moe_core.registry import Registry
from moe_core.testing import make_layer, run_checks
from moe_core.testing.tolerances import assert_close, relative_error, tolerance
from moe_core_aiter import build, contract, layouts
from moe_core_aiter.schemes import SCHEMES

#: Rows at which AITER takes other kernels: 16, 32 and 256 (docs/amd.md), and a few thousand for prefill.
ROWS = (1, 16, 17, 33, 255, 257, 2048)
MODELS = {"bf16": "qwen3-30b-a3b", "fp8_block128": "deepseek-v3", "mxfp4_w4a16": "gpt-oss-120b"}


@dataclass(frozen=True, slots=True)
class Case:
    """A layer and a number of rows. changes: of the layer. pattern: of the routing."""

    scheme: str
    rows: int
    pattern: str = "dropped"
    changes: dict[str, Any] = field(default_factory=dict)

    @property
    def config(self) -> MoeConfig:
        """Sizes of a small real layer, with few experts."""
        values: dict[str, Any] = {"num_experts": 16, "top_k": 4, "hidden_size": 2048, "intermediate_size": 768}
        if self.scheme == "int4_w4a16":
            values["group_size"] = 32
        if self.scheme == "mxfp4_w4a16":
            values |= {"activation": Activation.swiglu_oai(), "bias": True, "hidden_size": 2880}
        return MoeConfig(scheme=self.scheme, **(values | self.changes))


def cases(arch: str, rows: Sequence[int] = ROWS) -> Iterator[Case]:
    """Every scheme of the architecture at every number of rows, and what few layers have."""
    blocks32 = arch != "gfx942"
    for scheme in SCHEMES:
        if scheme.startswith("mx") and not blocks32:
            continue
        for number in rows:
            yield Case(scheme, number)
        yield Case(scheme, 33, "one_hot")
        yield Case(scheme, 5, changes={"top_k": 1, "router_weight_on_input": True})
        if "gelu" in SCHEMES[scheme].activations:
            yield Case(scheme, 33, changes={"activation": Activation(name="gelu")})
        if SCHEMES[scheme].float16:
            yield Case(scheme, 33, changes={"dtype": "float16"})


def run(case: Case, registry: Registry, hardware: HardwareInfo | None, spoil: bool = False) -> dict[str, Any]:
    """One case beside the reference runner. spoil: with weights that were not shuffled, which must fail."""
    config, started = case.config, time.perf_counter()
    row: dict[str, Any] = {"scheme": case.scheme, "rows": case.rows, "pattern": case.pattern, "spoiled": spoil}
    row["changes"] = {name: str(value) for name, value in case.changes.items()}
    try:
        device = hardware.torch_device_type if hardware is not None else "cpu"
        layer = make_layer(config, 11, tokens=case.rows, pattern=case.pattern, device=device)
        asked: dict[str, Any] = {"hardware": hardware, "registry": registry, "max_tokens": max(case.rows, 1)}
        with torch.no_grad(), _unshuffled(spoil):
            plan = moe_core.plan(config, layer.weights, runner="aiter", **asked)
            result = plan(layer.hidden, layer.topk)
            expected = moe_core.plan(config, layer.weights, runner="reference", **asked)(layer.hidden, layer.topk)
        arch = plan.resolution.request.hardware.arch
        row |= {"error": relative_error(result, expected), "allowed": tolerance(config.dtype, case.scheme, None, arch)}
        assert_close(result, expected, config.dtype, case.scheme, arch=arch)
        row["ok"] = not spoil
    except Exception as problem:  # a kernel may raise anything; here that is an answer
        spotted = spoil and isinstance(problem, AssertionError)
        row |= {"ok": spotted, "detail": f"{type(problem).__name__}: {problem}"[:500]}
    row["seconds"] = round(time.perf_counter() - started, 2)
    return row


class _unshuffled:
    """Within it, weights keep their order; `active` False changes nothing."""

    def __init__(self, active: bool) -> None:
        self._active, self._kept = active, (layouts.shuffled, layouts.interleaved)

    def __enter__(self) -> None:
        if self._active:
            plain: Callable[..., Any] = lambda data, parts=1: data.clone()  # noqa: E731
            layouts.shuffled = layouts.interleaved = plain

    def __exit__(self, *_: object) -> None:
        layouts.shuffled, layouts.interleaved = self._kept


def environment(hardware: HardwareInfo) -> dict[str, Any]:
    """What ran, and on what."""
    made = build.load()
    names = packages_distributions()
    versions = {name: version(name) for top in ("aiter", "torch", "triton", "flydsl") for name in names.get(top, ())}
    return {
        "date": datetime.date.today().isoformat(),
        "hardware": str(hardware),
        "arch": hardware.arch,
        "python": platform.python_version(),
        "versions": versions,
        "hip": torch.version.hip,
        "moe-core": moe_core.__version__,
        "aiter_arguments_as_in": contract.like(made.parameters, made.stages),
        "aiter_differences": contract.differences(made.parameters),
        "aiter_fp8": str(made.fp8),
        "flydsl": made.flydsl,
    }


def kit(registry: Registry, device: str | None) -> dict[str, Any]:
    """The conformance kit: counts, and what did not pass."""
    results = list(run_checks("aiter", registry=registry, device=device))
    failed = [r.to_json() for r in results if not r.ok]
    return {"counts": dict(Counter(r.outcome for r in results)), "failed": failed, "ok": not failed}


def times(tokens: str) -> list[dict[str, Any]]:
    """`moe-core bench` for a model of each kind, beside Triton."""
    rows = []
    for scheme, model in MODELS.items():
        command = [sys.executable, "-m", "moe_core", "bench", "--model", model, "--quant", scheme, "--tokens", tokens]
        command += ["--ep", "8", "--runner", "aiter", "--runner", "triton", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        try:
            found = json.loads(done.stdout)
        except ValueError:
            found = {"error": done.stderr.strip()[-1000:]}
        rows.append({"model": model, "scheme": scheme, "code": done.returncode, **found})
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    parser = argparse.ArgumentParser(prog="python -m moe_core_aiter.verify", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a folder for the result file")
    parser.add_argument("--tokens", default="1,8,64,512,4096", help="numbers of tokens to time; empty: time nothing")
    given = parser.parse_args(arguments)
    registry, hardware = moe_core.default_registry(), moe_core.detect_hardware()
    report: dict[str, Any] = {"environment": environment(hardware)}
    report["kit"] = kit(registry, hardware.torch_device_type)
    report["layers"] = [run(case, registry, hardware) for case in cases(hardware.arch)]
    report["controls"] = [run(Case(scheme, 33), registry, hardware, spoil=True) for scheme in ("bf16", "fp8_block128")]
    report["times"] = times(given.tokens) if given.tokens else []
    rows = [*report["layers"], *report["controls"]]
    report["ok"] = report["kit"]["ok"] and all(row["ok"] for row in rows)
    given.out.mkdir(parents=True, exist_ok=True)
    place = given.out / f"aiter_{hardware.arch}_{report['environment']['date']}.json"
    place.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(f"kit: {report['kit']['counts']}; layers and controls: {sum(r['ok'] for r in rows)} of {len(rows)} right")
    for row in (r for r in rows if not r["ok"]):
        print(f"  WRONG {row['scheme']} rows={row['rows']} {row['changes']}: {row.get('detail', 'it passed')}")
    print(f"written: {place}")
    return 0 if report["ok"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
