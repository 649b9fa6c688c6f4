"""`moe-core check`: the conformance kit on one plugin."""

from __future__ import annotations

from collections import Counter
from fnmatch import fnmatchcase
from typing import Any

import click
from rich.console import RenderableType

from moe_core.cli._report import Report, facts, hanging, heading, outline, progress, quiet_discovery, reports, table
from moe_core.errors import ConfigError, did_you_mean
from moe_core.plugins import PluginState
from moe_core.registry import Registry, default_registry

_ORDER = ("failed", "xpassed", "xfailed", "skipped", "refused", "passed")


@click.command()
@click.argument("name")
@click.option("-k", "select", metavar="EXPR", help="Only checks whose id or component holds this (* matches anything).")
@click.option("--list", "only_list", is_flag=True, help="List the checks, run none.")
@click.option("--device", help="Run on this torch device (cpu, cuda:0); default: what the plugin is made for.")
@click.option("--verbose", "-v", is_flag=True, help="Every check, not only those that need attention.")
@reports
def check(name: str, select: str | None, only_list: bool, device: str | None, verbose: bool) -> Report:
    """Run the conformance kit on the plugin NAME ("core" for moe_core's own backends).

    Exit code 1 where a check fails, or passes although the plugin expects it to fail.
    """
    with quiet_discovery():
        registry = default_registry()
    _require(registry, name)
    from moe_core.testing import iter_checks, list_checks

    patterns = None if select is None else [select, f"*{select}*"]
    known = list_checks(name, registry=registry, device=device)
    if patterns is not None:
        known = [c for c in known if any(fnmatchcase(text, patterns[1]) for text in (c.id, c.component))]
    if not known:
        raise ConfigError(
            f"no check of plugin {name!r} matches {select!r}" if select else f"plugin {name!r} has nothing to check",
            hint=f"moe-core check {name} --list",
        )
    if only_list:
        checks = [{"id": c.id, "component": c.component, "doc": c.doc} for c in known]
        rows = [((c["component"], c["id"]), [_first_line(c["doc"])]) for c in checks]
        return Report({"plugin": name, "checks": checks}, [outline(("component", "check"), rows)])
    results = []
    with progress(f"{len(known)} checks") as say:
        for result in iter_checks(name, registry=registry, select=patterns, device=device):
            results.append(result)
            say(f"{len(results)} of {len(known)} checks, last {result.component} {result.id}")
    counts = Counter(result.outcome for result in results)
    bad = counts["failed"] + counts["xpassed"]
    data = {
        "plugin": name,
        "ok": bad == 0,
        "counts": dict(counts),
        "results": [
            {"id": r.id, "component": r.component, "outcome": r.outcome, "detail": r.detail, "seconds": r.seconds}
            for r in results
        ],
    }
    return Report(data, _show(name, results, counts, verbose), code=1 if bad else 0)


def _require(registry: Registry, name: str) -> None:
    """A plugin that is not loaded cannot be checked: say why."""
    records = [record for record in registry.records if record.name == name]
    if not records:
        known = [record.name for record in registry.records]
        raise ConfigError(f"no plugin is called {name!r}", hint=did_you_mean(name, known))
    for record in records:
        if record.state is not PluginState.LOADED:
            raise ConfigError(f"plugin {name!r} ({record.where}) is {record.state.value}: {record.detail}")


def _show(name: str, results: list[Any], counts: Counter[str], verbose: bool) -> list[RenderableType]:
    attention = ("failed", "xpassed", "xfailed")
    # The kit says with a skip of this group that it could not compute anything here.
    shown = [r for r in results if verbose or r.outcome in attention or r.id.startswith("coverage.")]
    shown.sort(key=lambda r: (_ORDER.index(r.outcome) if r.outcome in _ORDER else -1, r.component, r.id))
    rows = [
        ((r.outcome, r.component, r.id, f"{r.seconds:.2f}"), [line for line in r.detail.splitlines() if line.strip()])
        for r in shown
    ]
    show: list[RenderableType] = []
    if rows:
        show.append(outline(("outcome", "component", "check", "s"), rows))
    if not verbose:
        components = sorted({r.component for r in results})
        outcomes = [o for o in _ORDER if counts[o]]
        per = [[c, *(sum(r.component == c and r.outcome == o for r in results) for o in outcomes)] for c in components]
        show.append(table(("component", *outcomes), per))
    total = ", ".join(f"{counts[o]} {o}" for o in _ORDER if counts[o])
    seconds = sum(r.seconds for r in results)
    show.append(heading(f"{name}: {total} in {seconds:.1f} s"))
    meaning = {
        "refused": "what a component does not declare, it refused as it must",
        "skipped": "does not apply, or cannot be made on this machine",
        "xfailed": "failed as the plugin expects",
        "xpassed": "passed although the plugin expects a failure: remove the expectation",
    }
    show.append(facts((outcome, text) for outcome, text in meaning.items() if counts[outcome]))
    if not verbose and counts["passed"] + counts["refused"] + counts["skipped"]:
        show.append(hanging("-> -v shows every check"))
    return show


def _first_line(doc: str) -> str:
    return doc.strip().partition("\n")[0]
