"""The options that describe a layer, shared by `explain`, `bench` and `tune`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, did_you_mean
from moe_core.presets import PRESETS, load_model
from moe_core.registry import Registry

F = TypeVar("F", bound=Callable[..., Any])

#: What people write for a dtype.
_SHORT = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32", "float": "float32"}


@dataclass(frozen=True, slots=True)
class Layer:
    """What the options said."""

    name: str
    config: MoeConfig


class Sizes(click.ParamType[tuple[int, ...]]):
    """Token counts, comma separated."""

    name = "tokens"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """ "1,8,64" -> (1, 8, 64)."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(dict.fromkeys(int(part) for part in str(value).split(",") if part.strip()))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 1,8,64", param, ctx)
        if not sizes or min(sizes) < 1:
            self.fail("name at least one number of tokens, 1 or more", param, ctx)
        return sizes


def layer_options(function: F) -> F:
    """Add --model, --quant, --group-size and --dtype."""
    options = (
        click.option(
            "--model",
            required=True,
            metavar="MODEL",
            help=f"A checkpoint folder, a config.json, or a preset: {', '.join(PRESETS)}.",
        ),
        click.option("--quant", metavar="SCHEME", help="Another quant scheme than the model's own."),
        click.option("--group-size", type=click.IntRange(min=1), help="The K group size of the scheme."),
        click.option("--dtype", help="Another dtype than the model's own (bfloat16, float16, float32)."),
    )
    for option in reversed(options):
        function = option(function)
    return function


def parallel_options(function: F) -> F:
    """Add --ep, --tp and --placement."""
    options = (
        click.option("--ep", default=1, show_default=True, type=click.IntRange(min=1), help="Expert-parallel ranks."),
        click.option("--tp", default=1, show_default=True, type=click.IntRange(min=1), help="Tensor-parallel ranks."),
        click.option(
            "--placement",
            default="linear",
            show_default=True,
            help="Which EP rank owns which expert: linear or round_robin.",
        ),
    )
    for option in reversed(options):
        function = option(function)
    return function


def read_layer(registry: Registry, model: str, quant: str | None, group_size: int | None, dtype: str | None) -> Layer:
    """The layer. Raises ConfigError for whatever does not exist."""
    name, config = load_model(model)
    if quant is not None:
        scheme = registry.schemes.get(quant)
        if scheme is None:
            raise ConfigError(f"no quant scheme is called {quant!r}", hint=did_you_mean(quant, registry.schemes))
        # The model's group size belongs to the model's scheme.
        keep = config.group_size if config.group_size in scheme.group_sizes else None
        config = config.replace(scheme=quant, group_size=keep)
    if group_size is not None:
        registry.schemes[config.scheme].scale_layout(group_size)  # refuses sizes that the scheme does not have
        config = config.replace(group_size=group_size)
    if dtype is not None:
        config = config.replace(dtype=_SHORT.get(dtype, dtype))
    return Layer(name, config)


def read_parallel(
    ep: int, tp: int, placement: str, *, reduce: str = "dispatcher", tokens: str = "replicated"
) -> ParallelConfig:
    """The ranks; rank 0 asks."""
    return ParallelConfig(ep_size=ep, tp_size=tp, placement=placement, reduce=reduce, tokens=tokens)
