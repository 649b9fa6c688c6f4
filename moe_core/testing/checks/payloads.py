"""Tokens that arrive quantized: a lane that takes a payload reads it with its scales."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import moe_core
from moe_core.quant import roundtrip_activation
from moe_core.settings import Settings
from moe_core.specs import AdapterSpec, FusedPathSpec, FusedSpec, Wants
from moe_core.testing.case import Case
from moe_core.testing.components import Lane
from moe_core.testing.dispatchers import TESTING_DISPATCHERS
from moe_core.testing.fakes import fake_plugin
from moe_core.testing.registration import CheckSkipped, check
from moe_core.testing.stage import MAX_TOKENS

_NAME = "testing_payload"


def _wants(lane: Lane) -> tuple[Wants, ...]:
    if isinstance(lane.spec, FusedPathSpec):
        raise CheckSkipped("a fused path takes the tokens as they are")
    return lane.spec.wants if isinstance(lane.spec.wants, tuple) else (lane.spec.wants,)


def _only(lane: Lane, payload: str) -> Any:
    """A plugin with a copy of the runner, and of the lane: it takes this payload and no other."""
    narrowed = tuple(replace(w, payloads=(payload,)) for w in _wants(lane) if payload in w.payloads)
    runners = (replace(lane.runner, name=_NAME),)
    if isinstance(lane.spec, AdapterSpec):
        adapter = replace(lane.spec, runner=_NAME, wants=narrowed)
        return fake_plugin("testing_payload_plugin", runners=runners, adapters=(adapter,))
    if isinstance(lane.spec, FusedSpec):
        func = replace(lane.spec, runner=_NAME, wants=narrowed)
        return fake_plugin("testing_payload_plugin", runners=runners, fused=(func,))
    raise TypeError(f"lane {lane.label} has no terms")


@check("contract.payloads", each="lane", needs="run")
def payloads(case: Case) -> None:
    """Tokens in every payload that the lane takes give what the same values in full precision give."""
    lane = case.lane
    dispatcher = next((d for d in TESTING_DISPATCHERS if lane.format in d.offers), None)
    taken = {payload for wants in _wants(lane) for payload in wants.payloads}
    if dispatcher is None:
        raise CheckSkipped(f"the kit has no dispatcher for the format {lane.format!r}")
    schemes = case.stage.registry.schemes
    found = [
        (schemes[s].activation or "", s)
        for s in sorted(lane.runner.support.schemes)
        if s in schemes and schemes[s].activation in taken & dispatcher.offers[lane.format].payloads
    ]
    if not found:
        raise CheckSkipped(f"it takes {', '.join(sorted(taken))}: no quantized payload that the kit's dispatcher has")
    for payload, scheme in found:
        setup = case.setup(scheme=scheme)
        layer = setup.layer(80, pattern="dropped")
        settings = Settings(runner=_NAME, dispatcher=dispatcher.name, path=lane.kind)
        registry = case.stage.with_plugin(_only(lane, payload))
        plan = moe_core.plan(
            setup.config,
            layer.weights,
            None,
            case.site.hardware,
            registry=registry,
            settings=settings,
            max_tokens=MAX_TOKENS,
        )
        seen = roundtrip_activation(layer.hidden.float(), payload).to(layer.hidden.dtype)
        setup.close(plan(layer.hidden, layer.topk), setup.expected(layer, seen), f"the result with payload {payload}")
