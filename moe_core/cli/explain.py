"""`moe-core explain`: what would run a layer on some hardware, and every reason against the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from moe_core.api import resolve
from moe_core.cli._explanation import show_resolution
from moe_core.cli._layer import layer_options, parallel_options, read_layer, read_parallel
from moe_core.cli._report import Report, reports
from moe_core.errors import ConfigError, did_you_mean
from moe_core.explanation import to_json
from moe_core.registry import Registry, default_registry
from moe_core.vocabulary import Phase


@click.command()
@layer_options
@click.option(
    "--tokens",
    type=click.Choice(("replicated", "sharded")),
    default="replicated",
    show_default=True,
    help="With --ep: every rank brings all tokens, or each its own.",
)
@click.option(
    "--hardware",
    default="detect",
    show_default=True,
    help="A profile (cpu, a100, h100, h200, b200, gb200, mi300x, mi355x), or this machine. Profiles need no torch.",
)
@parallel_options
@click.option("--phase", type=click.Choice(["prefill", "decode", "both"]), default="both", show_default=True)
@click.option("--feature", "features", multiple=True, metavar="NAME", help="A must-have, such as lora (repeatable).")
@click.option("--hook", "hooks", multiple=True, metavar="NAME", help="A hook point that is used (repeatable).")
@click.option("--graph", is_flag=True, help="Decode must be capturable in a device graph.")
@click.option("--no-host-sync", is_flag=True, help="No synchronization with the host.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="The most tokens of one call.")
@click.option("--runner", help="Ask for a runner by name.")
@click.option("--dispatcher", help="Ask for a dispatcher by name.")
@click.option("--path", type=click.Choice(["fused", "split", "whole"]), help="Ask for a kind of path.")
@click.option(
    "--assume-installed",
    is_flag=True,
    help="Take vendor packages for granted: those of this machine say nothing about another one.",
)
@click.option("--all", "everything", is_flag=True, help="Every reason against backends for other devices too.")
@reports
def explain(
    model: str,
    quant: str | None,
    group_size: int | None,
    dtype: str | None,
    hardware: str,
    ep: int,
    tp: int,
    placement: str,
    tokens: str,
    phase: str,
    features: tuple[str, ...],
    hooks: tuple[str, ...],
    graph: bool,
    no_host_sync: bool,
    max_tokens: int | None,
    runner: str | None,
    dispatcher: str | None,
    path: str | None,
    assume_installed: bool,
    everything: bool,
) -> Report:
    """Explain what would run MODEL's layer on some hardware, and why nothing else would.

    Exit code 0 where something can run it, 3 where nothing can, 2 where the question makes no sense.
    """
    registry = default_registry()
    layer = read_layer(registry, model, quant, group_size, dtype)
    phases = tuple(Phase) if phase == "both" else (Phase(phase),)
    if graph and Phase.DECODE not in phases:
        raise ConfigError("--graph is about decode, and --phase prefill leaves that out", hint="use --phase decode")
    # A setting that is not given here stays with the environment; None would override it.
    forced = {"runner": runner, "dispatcher": dispatcher, "path": path}
    resolution = resolve(
        layer.config,
        read_parallel(ep, tp, placement, tokens=tokens),
        None if hardware == "detect" else hardware,
        registry=registry,
        phases=phases,
        features=features,
        hooks=hooks,
        graph_capture=(Phase.DECODE,) if graph else (),
        no_host_sync=phases if no_host_sync else (),
        max_tokens=max_tokens,
        assume=("dependencies",) if assume_installed else (),
        **{name: value for name, value in forced.items() if value is not None},
    )
    warnings = list(_unknown(registry, features, hooks))
    if not assume_installed and not resolution.request.hardware.present and _lacks_dependencies(resolution):
        warnings.append("vendor packages were looked for on this machine; --assume-installed takes them for granted")
    data = {"model": layer.name, **to_json(resolution), "warnings": warnings}
    code = 0 if resolution.chosen is not None else 3
    return Report(data, show_resolution(layer.name, resolution, warnings, everything=everything), code)


def _lacks_dependencies(resolution: Any) -> bool:
    return any(reason.code.startswith("dep.") for verdict in resolution.verdicts for reason in verdict.reasons)


def _unknown(registry: Registry, features: Iterable[str], hooks: Iterable[str]) -> Iterable[str]:
    """Names are open, so a typing error refuses everything: say so."""
    supports = [spec.support for spec in registry.runners.values()]
    for kind, asked, known in (
        ("feature", features, {name for s in supports for name in s.features}),
        ("hook", hooks, {name for s in supports for name in s.hooks}),
    ):
        for name in sorted(set(asked) - known):
            yield f"no installed runner declares the {kind} {name!r}; {did_you_mean(name, known)}"
