"""Layers that a component may be able to serve, the likeliest first. Rules of plugins are met by trying."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, Final

from moe_core.capability import Support
from moe_core.config import Activation, MoeConfig, ParallelConfig
from moe_core.quant import QuantScheme

_DTYPES: Final = ("float32", "bfloat16", "float16", "float64")
_LADDER: Final = (64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """The properties that a layer must have; None for any."""

    scheme: str | None = None
    dtype: str | None = None
    activation: str | None = None
    gated: bool | None = None
    limit: float | None = None
    group_size: int | None = None
    top_k: int | None = None
    num_experts: int | None = None
    bias: bool = False
    router_weight_on_input: bool = False
    no_combine: bool = False
    routed_scaling_factor: float = 1.0

    def __str__(self) -> str:
        set_ = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default]
        return ", ".join(set_) or "its properties"


def candidates(
    support: Support, want: Search, schemes: Mapping[str, QuantScheme], parallel: ParallelConfig | None
) -> Iterator[MoeConfig]:
    """Every combination of declared properties that `want` leaves open. float32 first: it shows errors best."""
    declared = sorted(support.schemes, key=lambda s: (s != "bf16", s))
    for scheme in [want.scheme] if want.scheme else [s for s in declared if s in schemes]:
        described = schemes[scheme]
        if want.group_size is not None and want.group_size not in described.group_sizes:
            continue
        group = _group(support, want, described)
        for dtype in [want.dtype] if want.dtype else [d for d in _DTYPES if d in support.dtypes]:
            for activation in activations(support, want):
                for hidden, inner in sizes(support, described, group, parallel):
                    yield MoeConfig(
                        num_experts=want.num_experts or min(8, support.max_experts or 8),
                        top_k=want.top_k or min(2, support.max_top_k or 2),
                        hidden_size=hidden,
                        intermediate_size=inner,
                        dtype=dtype,
                        scheme=scheme,
                        group_size=group,
                        activation=activation,
                        bias=want.bias,
                        router_weight_on_input=want.router_weight_on_input,
                        no_combine=want.no_combine,
                        routed_scaling_factor=want.routed_scaling_factor,
                    )


def _group(support: Support, want: Search, scheme: QuantScheme) -> int | None:
    """The K group: as wanted, else the scheme's default, else the first one that is declared."""
    known = scheme.group_sizes
    if want.group_size is not None or not known or known[0] in support.group_sizes:
        return want.group_size
    return next((size for size in known if size in support.group_sizes), None)


def activations(support: Support, want: Search) -> Iterator[Activation]:
    """The activations that `want` admits, silu first."""
    names = [want.activation] if want.activation else sorted(support.activations, key=lambda n: (n != "silu", n))
    forms = [want.gated] if want.gated is not None else sorted(support.gated, reverse=True)
    for name in names:
        for gated in forms:
            if name == "swiglu_oai" and not gated:
                continue
            values: dict[str, Any] = {"alpha": 1.702, "beta": 1.0} if name == "swiglu_oai" else {}
            limits = [want.limit] if want.limit else [None, 7.0] if support.activation_limit else [None]
            for limit in limits:
                yield Activation(name=name, gated=gated, limit=limit, **values)


def sizes(
    support: Support, scheme: QuantScheme, group_size: int | None, parallel: ParallelConfig | None
) -> Iterator[tuple[int, int]]:
    """(hidden, intermediate) sizes: small, unequal, with at least two scales along K where there are any."""
    layout = scheme.scale_layout(group_size)
    block = max(1, layout.columns) if layout is not None else 1
    rows = max(1, layout.rows) if layout is not None and layout.granularity == "block" else 1
    tp = parallel.tp_size if parallel is not None else 1
    hidden_step = math.lcm(support.hidden_multiple, block, scheme.values_per_item)
    inner_step = math.lcm(support.intermediate_multiple, block, rows, scheme.values_per_item)
    seen = set()
    for size in _LADDER:
        hidden = -(-max(size, 2 * block) // hidden_step) * hidden_step
        inner = -(-max(size * 3 // 4 if size == _LADDER[0] else size, block) // inner_step) * inner_step * tp
        for h in sorted(support.hidden_sizes)[:1] or [hidden]:
            if (h, inner) not in seen:
                seen.add((h, inner))
                yield h, inner
