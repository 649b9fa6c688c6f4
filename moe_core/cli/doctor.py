"""`moe-core doctor`: what this machine has, whether it fits together, and whether every usable backend really runs."""

from __future__ import annotations

import dataclasses
import os
from typing import Any

import click
from rich.console import RenderableType

from moe_core.api import detect_hardware
from moe_core.cli._machine import (
    core_dependencies,
    metadata_problems,
    settings_in_force,
    software,
    unknown_variables,
    vendor_dependencies,
)
from moe_core.cli._report import Report, facts, hanging, heading, outline, reports
from moe_core.cli._smoke import Forward, forwards
from moe_core.cli.plugins import STATE_HEADERS, faulty, state_rows, visible_registry
from moe_core.doctor import DoctorCheck, DoctorResult
from moe_core.registry import Registry
from moe_core.request import plain


@click.command()
@reports
def doctor() -> Report:
    """Check this machine: versions, settings, plugins, dependencies, and a small real forward for every backend.

    Exit code 1 where a forward or a check fails, or a plugin is broken, a duplicate or incompatible.
    """
    registry = visible_registry()
    hardware = detect_hardware(registry)
    versions, settings = software(), settings_in_force()
    warnings = [*unknown_variables(os.environ), *metadata_problems()]
    dependencies = [*core_dependencies(), *vendor_dependencies(registry)]
    checks, results = _plugin_checks(registry), forwards(hardware, registry)
    broken = faulty(registry)
    problems = [f"plugin {record.name} is {record.state.value}: {record.detail}" for record in broken]
    problems += [f"{c['plugin']}: {c['name']}: {c['detail']}" for c in checks if not c["ok"]]
    problems += [f"{r.candidate} in {r.layer}: {r.detail}" for r in results if not r.ok]
    problems += [f"moe-core needs {d['problem']}" for d in dependencies if d["for"] == "moe-core" and d["problem"]]
    if not results:
        problems.append(f"nothing that is installed can run a layer on {hardware}")
    show: list[RenderableType] = [
        facts([("hardware", hardware), *((k.replace("_", "-"), v) for k, v in versions.items() if v is not None)]),
        heading("plugins"),
        outline(STATE_HEADERS, state_rows(registry)),
        heading("settings in force"),
        facts((row["name"], f"{_value(row['value'])}  ({row['source']})") for row in settings),
        heading(
            "dependencies (of backends for other devices too: missing ones matter only where you want that backend)"
        ),
        outline(("state", "module", "version"), _dependency_rows(dependencies))
        if dependencies
        else hanging("- none is declared"),
        heading("plugins' own checks"),
        *_check_table(checks),
        heading(f"a small layer on {hardware.product}, against its formula in float64"),
        outline(("result", "combination", "layer", "error", "limit", "s"), [_forward_row(r) for r in results]),
        heading("to get one of them everywhere in this environment, set"),
        facts({r.candidate: r.force for r in results}.items()),
    ]
    show += [heading("warnings"), *(hanging(f"- {w}") for w in warnings)] if warnings else []
    show += [heading("problems"), *(hanging(f"- {p}") for p in problems)] if problems else [heading("all is well")]
    data = {
        "ok": not problems,
        "hardware": plain(hardware),
        "software": versions,
        "plugins": [record.to_json() for record in registry.records],
        "settings": settings,
        "dependencies": dependencies,
        "checks": checks,
        "forwards": [dataclasses.asdict(result) for result in results],
        "warnings": warnings,
        "problems": problems,
    }
    return Report(data, show, code=1 if problems else 0)


def _plugin_checks(registry: Registry) -> list[dict[str, Any]]:
    rows = []
    for record in registry.records:
        if record.plugin is None:
            continue
        try:
            # Plugin by plugin: one that raises must not hide the checks of the others.
            answers = registry._plugins.call(record, "moe_core_doctor")
            found: list[DoctorCheck] = [check for answer in answers for check in answer]
        except Exception as error:  # a plugin may raise anything
            rows.append(_check_row(record.name, "moe_core_doctor", DoctorResult(False, _say(error))))
            continue
        for check in found:
            try:
                result = check.run()
            except Exception as error:  # raising counts as failing
                result = DoctorResult(False, _say(error))
            rows.append(_check_row(record.name, check.name, result))
    return rows


def _say(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {error}"


def _check_row(plugin: str, name: str, result: DoctorResult) -> dict[str, Any]:
    return {"plugin": plugin, "name": name, "ok": result.ok, "detail": result.detail, "hint": result.hint}


def _check_table(checks: list[dict[str, Any]]) -> list[RenderableType]:
    if not checks:
        return [hanging("- no plugin brings any")]
    rows = []
    for check in checks:
        details = [check["detail"], *([f"-> {check['hint']}"] if check["hint"] else [])]
        rows.append((("PASS" if check["ok"] else "FAIL", check["plugin"], check["name"]), details))
    return [outline(("result", "plugin", "check"), rows)]


def _dependency_rows(dependencies: list[dict[str, Any]]) -> list[tuple[tuple[object, ...], list[str]]]:
    """What several components need in the same way is said once."""
    users: dict[tuple[str, str, str, str], list[str]] = {}
    for d in dependencies:
        key = (d["state"], d["module"], d["version"] or "-", f"{d['problem'] or ''}\0{d['hint'] or ''}")
        users.setdefault(key, []).append(d["for"])
    rows: list[tuple[tuple[object, ...], list[str]]] = []
    for (state, module, version, why), names in users.items():
        problem, _, hint = why.partition("\0")
        details = [f"for {', '.join(names)}"]
        if problem:
            details += [f"- {problem}", *([f"-> {hint}"] if hint else [])]
        rows.append(((state, module, version), details))
    return rows


def _forward_row(result: Forward) -> tuple[tuple[object, ...], list[str]]:
    error = "-" if result.error is None else f"{result.error:.1e}"
    mark = "PASS" if result.ok else "FAIL"
    cells = (mark, result.candidate, result.layer, error, f"{result.tolerance:.0e}", f"{result.seconds:.2f}")
    return cells, [f"- {result.detail}"] if result.detail else []


def _value(value: Any) -> str:
    if value is None or value == [] or value == {}:
        return "-"
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
