"""`moe-core new-plugin`: the folder of a new plugin that already works."""

from __future__ import annotations

from pathlib import Path

import click

from moe_core.cli._report import Report, facts, hanging, heading, quiet_discovery, reports
from moe_core.registry import default_registry
from moe_core.scaffold import create_plugin


@click.command("new-plugin")
@click.argument("name")
@click.option("--runner", "kind", flag_value="runner", default="runner", help="A runner core (the default).")
@click.option("--dispatcher", "kind", flag_value="dispatcher", help="A dispatcher.")
@click.option(
    "--directory",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("."),
    show_default=True,
    help="Where the folder moe-core-NAME is made.",
)
@reports
def new_plugin(name: str, kind: str, directory: Path) -> Report:
    """Write the folder moe-core-NAME: a plugin that installs, runs on a CPU and passes the conformance kit.

    NAME is a Python identifier in lower case; the package will be moe_core_NAME.
    """
    with quiet_discovery():
        made = create_plugin(name, kind, directory, default_registry())
    steps = (
        f"pip install -e {made.folder}",
        f"moe-core check {name}",
        f"python -m pytest {made.folder / 'tests'}",
        f"moe-core bench --model olmoe --runner {name}" if kind == "runner" else "moe-core doctor",
    )
    show = [
        facts([("wrote", made.folder), *(("", path) for path in made.files)]),
        heading("next"),
        *(hanging(f"-> {step}") for step in steps),
    ]
    data = {"name": name, "kind": kind, "folder": str(made.folder), "files": list(made.files), "next": list(steps)}
    return Report(data, show)
