"""State belongs to a call: layers and calls that are in flight together do not meet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from moe_core import _lazy
from moe_core.protocols import RunningState
from moe_core.specs import AdapterSpec
from moe_core.testing.case import Case, Setup
from moe_core.testing.layers import Layer
from moe_core.testing.registration import CheckSkipped, check


def _calls(setup: Setup) -> list[Layer]:
    """Two calls of one layer, of different sizes, with routings that have nothing in common."""
    first = setup.layer(1, tokens=9)
    second = setup.layer(2, tokens=14, pattern="dropped")
    return [first, Layer(first.weights, second.hidden, second.topk)]


@check("state.two_layers", each="lane", needs="run")
def two_layers(case: Case) -> None:
    """Two layers of one runner keep their weights and calls apart, whichever is called in between."""
    setup = case.setup()
    layers = [setup.layer(1), setup.layer(2, tokens=7)]
    plans = [setup.plan(layer.weights) for layer in layers]
    for turn in (0, 1, 0):
        setup.close(plans[turn](layers[turn].hidden, layers[turn].topk), setup.expected(layers[turn]), f"layer {turn}")


@check("state.calls_in_flight", each="lane", needs="run")
def calls_in_flight(case: Case) -> None:
    """Two calls of one plan may overlap: dispatch, dispatch, run, run, combine, combine."""
    setup = case.setup()
    if setup.lane.kind == "whole":
        raise CheckSkipped("a fused path has no steps to interleave")
    calls = _calls(setup)
    plan = setup.plan(calls[0].weights)
    states = [RunningState() for _ in calls]
    dispatched = [plan.dispatcher.dispatch(c.hidden, c.topk, s) for c, s in zip(calls, states, strict=True)]
    ran = [plan.run(d, s) for d, s in zip(dispatched, states, strict=True)]
    for index in (1, 0):
        result = plan.dispatcher.combine(ran[index], states[index])
        setup.close(result, setup.expected(calls[index]), f"call {index} of two in flight")


@check("state.steps_in_flight", each="lane", needs="run")
def steps_in_flight(case: Case) -> None:
    """The steps of two calls may alternate, pre-permute, run and post-permute included: each keeps to its own state."""
    setup = case.setup()
    spec = setup.lane.spec
    if not isinstance(spec, AdapterSpec):
        raise CheckSkipped("a fused func has no steps to interleave")
    calls = _calls(setup)
    plan = setup.plan(calls[0].weights)
    binding = replace(plan._binding, format=spec.format, terms=plan.terms[spec.format])
    pre, post = (_lazy.load(target, wanted_by=case.component.id)(binding) for target in (spec.pre, spec.post))
    states = [RunningState() for _ in calls]
    values: list[Any] = [plan.dispatcher.dispatch(c.hidden, c.topk, s) for c, s in zip(calls, states, strict=True)]
    info, config = plan.quant_info, setup.config
    values = [pre(v, info, config, s) for v, s in zip(values, states, strict=True)]
    values = [plan.runner.run(v, info, s) for v, s in zip(values, states, strict=True)]
    values = [post(v, info, config, s) for v, s in zip(values, states, strict=True)]
    for index, (value, state) in enumerate(zip(values, states, strict=True)):
        result = plan.dispatcher.combine(value, state)
        setup.close(result, setup.expected(calls[index]), f"call {index} of two that alternate")


@check("state.repeated_calls", each="lane", needs="run")
def repeated_calls(case: Case) -> None:
    """A call does not depend on the one before it: large after small, small after large, empty in between."""
    setup = case.setup()
    plan = None
    for seed, tokens in enumerate((3, 40, 0, 5)):
        layer = setup.layer(0, tokens=tokens, pattern="dropped" if seed % 2 else "uniform")
        plan = plan or setup.plan(layer.weights)
        setup.close(plan(layer.hidden, layer.topk), setup.expected(layer), f"call {seed} with {tokens} tokens")
