"""Numbers: every declared scheme, dtype and activation against the float64 formula and the reference runner."""

from __future__ import annotations

import torch

import moe_core
from moe_core.settings import Settings
from moe_core.testing.case import Case, Setup
from moe_core.testing.layers import Layer
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.topk import TopKOutput


def verify(setup: Setup, seed: int = 0, *, tokens: int = 24, pattern: str = "uniform") -> None:
    """One call against the formula where it knows the layer, and against the reference runner where that can run it."""
    layer = setup.layer(seed, tokens=tokens, pattern=pattern)
    actual = setup.plan(layer.weights)(layer.hidden, layer.topk)
    expected = setup.expected(layer) if setup.can_be_expected else None
    reference = None if setup.lane.runner.name == "reference" else run_reference(setup, layer)
    if expected is None and reference is None:
        raise CheckSkipped(f"neither the formula nor the reference runner knows {setup.config.activation.name!r}")
    if expected is not None:
        setup.close(actual, expected)
    if reference is not None:
        setup.close(actual, reference, "the result, against the reference runner,")


def run_reference(setup: Setup, layer: Layer) -> torch.Tensor | None:
    """The same layer on the reference runner; None where it does not know it."""
    registry, hardware = setup.case.stage.registry, setup.case.site.hardware
    settings = Settings(runner="reference", dispatcher="standard")
    resolution = moe_core.resolve(setup.config, None, hardware, registry=registry, settings=settings)
    if resolution.chosen is None:
        return None
    plan = moe_core.plan(setup.config, layer.weights, None, hardware, registry=registry, settings=settings)
    return plan(layer.hidden, layer.topk)


@check("numerics.scheme", each="scheme", needs=("scheme:{}", "run"))
def scheme(case: Case) -> None:
    """The scheme gives the right numbers on every lane, in every dtype that it goes with."""
    dtypes = sorted(case.component.support.dtypes)
    tried, made = [], 0
    for dtype in dtypes:
        try:
            for setup in case.setups(scheme=case.param, dtype=dtype):
                verify(setup)
                made += 1
        except (CheckFailed, CheckSkipped) as error:
            # A plugin's rules may tie a scheme to some dtypes; one must be left.
            tried.append(error)
    if not made:
        raise tried[0]


@check("numerics.dtype", each="dtype", needs=("dtype:{}", "run"))
def dtype(case: Case) -> None:
    """The dtype gives the right numbers on every lane, with dropped slots as well."""
    for setup in case.setups(dtype=case.param):
        verify(setup, 1)
        verify(setup, 2, pattern="dropped")


@check("numerics.activation", each="activation", needs=("activation:{}", "run"))
def activation(case: Case) -> None:
    """The activation function is the one of its name, gated and not, as far as both are declared."""
    refusals, made = [], 0
    for gated in sorted(case.component.support.gated, reverse=True):
        if case.param == "swiglu_oai" and not gated:
            continue
        try:
            for setup in case.setups(activation=case.param, gated=gated):
                verify(setup, 3)
                made += 1
        except (CheckFailed, CheckSkipped) as error:
            refusals.append(error)
    if not made:
        raise refusals[0]


@check("numerics.form", each="form", needs=("form:{}", "run"))
def form(case: Case) -> None:
    """Gated layers (gate rows, then up rows) or plain ones give the right numbers."""
    for setup in case.setups(gated=case.param == "gated"):
        verify(setup, 4)


@check("numerics.activation_limit", needs=("limit:", "run"))
def activation_limit(case: Case) -> None:
    """Gate and up are clamped at the layer's limit, with every declared form."""
    for setup in case.setups(limit=0.25):
        verify(setup, 5)
    if "swiglu_oai" in case.component.support.activations:
        for setup in case.setups(activation="swiglu_oai", limit=0.5):
            verify(setup, 6)


@check("numerics.group_size", each="group_size", needs="run")
def group_size(case: Case) -> None:
    """A scheme with this K group gives the right numbers."""
    size = int(case.param)
    support, schemes = case.component.support, case.stage.registry.schemes
    fitting = [s for s in sorted(support.schemes) if s in schemes and size in schemes[s].group_sizes]
    if not fitting:
        raise CheckFailed(f"it declares the group size {size}, and no scheme that has it")
    for name in fitting:
        for setup in case.setups(scheme=name, group_size=size):
            verify(setup, 7)


@check("numerics.routing", each="pattern", needs="run")
def routing(case: Case) -> None:
    """A few hundred tokens give the right numbers, whatever the load of the experts is like."""
    for setup in case.setups():
        verify(setup, 8, tokens=200, pattern=case.param)


@check("numerics.fused_equals_split", needs="run")
def fused_equals_split(case: Case) -> None:
    """The fused func and the adapters of one format compute the same: they share one kernel sequence."""
    lanes = {lane.label: lane for lane in case.component.lanes}
    pairs = [
        (lane, lanes[f"{lane.format}/split"])
        for lane in lanes.values()
        if lane.kind == "fused" and f"{lane.format}/split" in lanes
    ]
    if not pairs:
        raise CheckSkipped("no format has both a fused func and adapters")
    for fused, split in pairs:
        first = case.setup(fused)
        second = case.setup(split)
        if first.config != second.config:
            raise CheckSkipped(f"{fused.label} and {split.label} do not serve the same layers")
        for pattern in ("uniform", "dropped", "skewed"):
            layer = first.layer(9, tokens=50, pattern=pattern)
            one = first.plan(layer.weights)(layer.hidden, layer.topk)
            other = second.plan(layer.weights)(layer.hidden, layer.topk)
            first.close(one, other, f"{fused.label} against {split.label}")


@check("numerics.token_permutation", needs="run")
def token_permutation(case: Case) -> None:
    """Other orders of the tokens give the same rows in that order: no token sees another."""
    for setup in case.setups():
        layer = setup.layer(10, tokens=33, pattern="dropped")
        plan = setup.plan(layer.weights)
        order = torch.randperm(33, generator=torch.Generator().manual_seed(0)).to(layer.hidden.device)
        moved = TopKOutput(layer.topk.topk_ids[order], layer.topk.topk_weights[order])
        setup.close(plan(layer.hidden[order], moved), plan(layer.hidden, layer.topk)[order], "the permuted result")


@check("numerics.deterministic", needs=("feature:deterministic", "run"))
def deterministic(case: Case) -> None:
    """The same call gives the same bits, every time."""
    for setup in case.setups("deterministic", request={"features": {"deterministic"}}):
        layer = setup.layer(11, tokens=100, pattern="skewed")
        plan = setup.plan(layer.weights)
        first = plan(layer.hidden, layer.topk).clone()
        for _ in range(4):
            again = plan(layer.hidden, layer.topk)
            if not torch.equal(first, again):
                worst = float((first.double() - again.double()).abs().max())
                raise CheckFailed(f"lane {setup.lane.label} gave other bits the second time (by up to {worst:g})")
