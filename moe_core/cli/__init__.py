"""The `moe-core` command. Importing this imports no command and no torch."""

from __future__ import annotations


def main() -> None:
    """Entry point of `moe-core` and of `python -m moe_core`."""
    from moe_core.cli._app import app

    app(prog_name="moe-core")


__all__ = ["main"]
