"""The click group: commands are imported when they are called, and our own errors are one clear message."""

from __future__ import annotations

import importlib
import sys
import traceback
from typing import Any, Final

import click

from moe_core._version import __version__
from moe_core.errors import MoeCoreError, did_you_mean
from moe_core.vocabulary import PLUGIN_API

#: Set in `Context.meta` by --debug, at the group or at a command.
DEBUG: Final = "moe_core.debug"

#: name -> (target, what `moe-core --help` says). The help stands here so that listing commands imports none of them.
COMMANDS: Final[dict[str, tuple[str, str]]] = {
    "plugins": ("moe_core.cli.plugins:plugins", "What is installed, in which state, and how it was verified."),
    "explain": ("moe_core.cli.explain:explain", "What would run a layer on some hardware, and why not the rest."),
    "doctor": ("moe_core.cli.doctor:doctor", "Check this machine, with a small real forward for every backend."),
    "check": ("moe_core.cli.check:check", "Run the conformance kit on a plugin."),
    "bench": ("moe_core.cli.bench:bench", "Time every usable backend on a layer, on this machine."),
    "tune": ("moe_core.cli.tune:tune", "Let a runner find its best kernels for a layer, on this machine."),
    "run": ("moe_core.cli.run:run", "Generate text from a Hugging Face MoE checkpoint."),
    "new-plugin": ("moe_core.cli.new_plugin:new_plugin", "Write the folder of a new, working plugin."),
}


class LazyGroup(click.Group):
    """A group of `COMMANDS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """In the order in which people meet them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one command."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """An unknown command is an error with the closest names."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            ctx.fail(f"no command is called {args[0]!r}; {did_you_mean(args[0], COMMANDS)}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def invoke(self, ctx: click.Context) -> Any:
        """Run; an error of ours is a message on stderr and exit code 2, with its traceback under --debug."""
        try:
            return super().invoke(ctx)
        except MoeCoreError as error:
            if ctx.meta.get(DEBUG):
                traceback.print_exc(file=sys.stderr)
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


def _debug(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
    if value:
        ctx.meta[DEBUG] = True


debug_option = click.option(
    "--debug", is_flag=True, expose_value=False, callback=_debug, help="Show the traceback of an error."
)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, message=f"moe-core %(version)s (plugin API {PLUGIN_API[0]}.{PLUGIN_API[1]})")
@debug_option
def app() -> None:
    """Mixture-of-experts layers for LLM inference: one small core, every backend a plugin.

    Ask what is installed (plugins), what would run and why (explain), and whether it works here (doctor).
    """
