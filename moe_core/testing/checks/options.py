"""Numbers of the layer's options: bias, router weight on the input, no combine, routed scaling."""

from __future__ import annotations

import torch

from moe_core.testing.case import Case
from moe_core.testing.checks.numerics import verify
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.topk import TopKOutput
from moe_core.vocabulary import Step


@check("numerics.bias", needs=("feature:bias", "run"))
def bias(case: Case) -> None:
    """Both biases are added, the second one before the router weight."""
    for setup in case.setups("bias", bias=True):
        verify(setup, 20)
        verify(setup, 21, pattern="dropped")


@check("numerics.router_weight_on_input", needs=("feature:router_weight_on_input", "run"))
def router_weight_on_input(case: Case) -> None:
    """The router weight multiplies the tokens before the first product, and nothing afterwards."""
    # Weighting on the input goes with one expert a token in every model that has it.
    top_k = None
    try:
        setups = list(case.setups("router_weight_on_input", router_weight_on_input=True))
    except CheckFailed:
        top_k = 1
        setups = list(case.setups("router_weight_on_input", router_weight_on_input=True, top_k=top_k))
    for setup in setups:
        verify(setup, 22)
        verify(setup, 23, pattern="dropped")


@check("numerics.no_combine", needs=("feature:no_combine", "run"))
def no_combine(case: Case) -> None:
    """The slots are returned weighted and not summed, [T, K, H]; dropped ones are exactly zero."""
    for setup in case.setups("no_combine", no_combine=True):
        verify(setup, 24)
        layer = setup.layer(25, pattern="dropped")
        result = setup.plan(layer.weights)(layer.hidden, layer.topk)
        if bool((result[layer.topk.topk_ids < 0] != 0).any()):
            raise CheckFailed(f"lane {setup.lane.label}: dropped slots are not exactly zero")
        setup.close(result, setup.expected(layer))


@check("numerics.routed_scaling", needs="run")
def routed_scaling(case: Case) -> None:
    """routed_scaling_factor is applied exactly once, by whom the plan says."""
    for setup in case.setups(routed_scaling_factor=2.5):
        verify(setup, 26)
        verify(setup, 27, pattern="dropped")


@check("numerics.steps_of_others", needs="run")
def steps_of_others(case: Case) -> None:
    """A step that the caller does is done by nobody else: neither the router weight nor the scaling comes twice."""
    skipped: list[str] = []
    made = 0
    for lane in case.lanes():
        for done in (Step.ROUTER_WEIGHT, Step.ROUTED_SCALING):
            try:
                setup = case.setup(lane, routed_scaling_factor=2.0, request={"caller_does": {done}})
            except CheckSkipped as error:
                skipped.append(str(error))  # the kernel always does this step, and its terms say so
                continue
            layer = setup.layer(28)
            result = setup.plan(layer.weights)(layer.hidden, layer.topk)
            ids, weights = layer.topk.topk_ids, layer.topk.topk_weights
            if done is Step.ROUTER_WEIGHT:
                expected = setup.expected(layer, topk=TopKOutput(ids, torch.ones_like(weights)))
            else:
                expected = setup.expected(layer) / setup.config.routed_scaling_factor
            setup.close(result, expected, f"the result where the caller does {done.value}")
            made += 1
    if "router_weight_on_input" in case.component.support.features:
        made += _weighted_input(case, skipped)
    if not made:
        raise CheckSkipped("; ".join(dict.fromkeys(skipped)))


def _weighted_input(case: Case, skipped: list[str]) -> int:
    """Tokens that come in weighted (one expert each): the runner must not weight them again."""
    made = 0
    for lane in case.lanes("router_weight_on_input"):
        request = {"caller_does": {Step.ROUTER_WEIGHT}}
        try:
            setup = case.setup(lane, router_weight_on_input=True, top_k=1, request=request)
        except CheckSkipped as error:
            skipped.append(str(error))
            continue
        layer = setup.layer(29)
        plain = TopKOutput(layer.topk.topk_ids, torch.ones_like(layer.topk.topk_weights))
        other = TopKOutput(layer.topk.topk_ids, torch.full_like(layer.topk.topk_weights, 0.5))
        result = setup.plan(layer.weights)(layer.hidden, other)
        setup.close(result, setup.expected(layer, topk=plain), "the result where the caller has weighted the tokens")
        made += 1
    return made
