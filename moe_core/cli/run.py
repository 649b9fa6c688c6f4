"""`moe-core run`: generate text from a Hugging Face MoE checkpoint."""

from __future__ import annotations

import click

from moe_core.cli._app import debug_option


@click.command()
@click.option("--model", metavar="DIR", help="A Hugging Face MoE checkpoint; without one, a small random one is made.")
@click.option("--prompt", help="The text to continue.")
@click.option("--max-new-tokens", default=16, show_default=True, type=click.IntRange(min=1))
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Default: the checkpoint's own.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, and nothing else, on stdout.")
@debug_option
@click.pass_context
def run(
    ctx: click.Context, model: str | None, prompt: str | None, max_new_tokens: int, dtype: str | None, as_json: bool
) -> None:
    """Generate text through moe_core, and compare it with transformers' own experts.

    Exit code 0 where the logits agree, 1 where they differ by more than rounding explains.
    """
    from moe_core import demo

    ctx.exit(demo.run(model, prompt=prompt, max_new_tokens=max_new_tokens, dtype=dtype, json=as_json))
