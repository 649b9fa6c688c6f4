"""Weights: prepared into the declared layout, refused where they do not fit, updated in place."""

from __future__ import annotations

import torch

from moe_core import _contract
from moe_core.api import plan as make_plan
from moe_core.errors import LayoutMismatch, WeightError
from moe_core.moe_plan import MoePlan
from moe_core.settings import Settings
from moe_core.testing.case import Case, Setup
from moe_core.testing.fakes import fake_plugin, runner_like
from moe_core.testing.registration import CheckFailed, check
from moe_core.weights import CanonicalWeights

_IMPOSTOR = "testing_impostor"


def _first(case: Case) -> Setup:
    return next(iter(case.setups()))


@check("weights.prepare", kind=("runner",), each="scheme", needs=("scheme:{}", "run"))
def prepare(case: Case) -> None:
    """`prepare` gives the scheme that it was asked for in a declared layout, and leaves the canonical weights alone."""
    for setup in case.setups(scheme=case.param):
        weights = setup.layer().weights
        before = {name: tensor.clone() for name, tensor in weights.tensors().items()}
        info = setup.plan(weights).quant_info
        runner = setup.lane.runner
        if info.scheme != case.param or info.layout not in runner.layouts:
            raise CheckFailed(
                f"prepared {info.scheme} in layout {info.layout!r}, declared are {sorted(runner.layouts)}"
            )
        for name, tensor in weights.tensors().items():
            if not torch.equal(tensor.view(torch.uint8), before[name].view(torch.uint8)):
                raise CheckFailed(f"prepare changed the caller's {name}")


@check("weights.layout_mismatch", kind=("runner",), needs="run")
def layout_mismatch(case: Case) -> None:
    """Weights in a layout that the spec does not name are refused with LayoutMismatch when the plan is bound."""
    setup = _first(case)
    name = setup.lane.runner.name
    wrong = frozenset({"testing_no_such_layout"})
    # Its lanes take any layout, so that the selection has nothing against it.
    anyone = {"adapter": {"layouts": None}, "fused": {"layouts": None}}
    copy = runner_like(name, _IMPOSTOR, registry=case.stage.registry, layouts=wrong, **anyone)
    registry = case.stage.with_plugin(fake_plugin("testing_impostor_plugin", **copy))
    settings = Settings(runner=_IMPOSTOR, dispatcher=setup.dispatcher, path=setup.lane.kind)
    try:
        make_plan(
            setup.config,
            setup.layer().weights,
            None,
            case.site.hardware,
            registry=registry,
            settings=settings,
            max_tokens=64,
        )
    except LayoutMismatch:
        return
    raise CheckFailed("a spec that declares another layout than `prepare` returns was bound all the same")


@check("weights.update", kind=("runner",), each="scheme", needs=("scheme:{}", "run"))
def update(case: Case) -> None:
    """`update_weights` makes the plan compute with the new weights, and plain tensors keep their addresses."""
    for setup in case.setups(scheme=case.param):
        old, new = setup.layer(50), setup.layer(51)
        plan = setup.plan(old.weights)
        setup.close(
            plan(new.hidden, new.topk), setup.expected(old, new.hidden, new.topk), "the result before the update"
        )
        expected = setup.expected(new)
        places = _places(plan)
        plan.update_weights(new.weights)
        setup.close(plan(new.hidden, new.topk), expected, "the result after the update")
        moved = [name for name, place in _places(plan).items() if places.get(name) != place]
        if moved:
            raise CheckFailed(f"the update moved {', '.join(moved)}: a captured graph would read the old memory")


def _places(plan: MoePlan) -> dict[str, int]:
    """Addresses of the plain tensors of a quant info, if it is a dataclass of some."""
    found = [(name, leaf) for name, leaf in _contract.leaves(plan.quant_info) if isinstance(leaf, torch.Tensor)]
    return {name: tensor.data_ptr() for name, tensor in found if tensor.layout is torch.strided and tensor.numel()}


@check("weights.wrong_shapes", kind=("runner",), needs="run")
def wrong_shapes(case: Case) -> None:
    """Weights of wrong shapes are refused with WeightError, at bind and at update, and the plan stays as it was."""
    setup = _first(case)
    layer = setup.layer()
    good = layer.weights.tensors()
    plan = setup.plan(layer.weights)
    expected = setup.expected(layer)
    wrong = {
        "an expert too few": {name: tensor[1:].contiguous() for name, tensor in good.items()},
        "w2 transposed": {**good, "w2": good["w2"].transpose(1, 2).contiguous()},
        "w13 cut short": {**good, "w13": good["w13"][:, 1:].contiguous()},
    }
    if good["w2"].shape[1] == good["w2"].shape[2]:
        del wrong["w2 transposed"]
    for what, tensors in wrong.items():
        for when, call in (("bind", setup.plan), ("update", plan.update_weights)):
            try:
                call(CanonicalWeights(**tensors))
            except WeightError:
                continue
            raise CheckFailed(f"weights with {what} were taken at {when}")
    setup.close(plan(layer.hidden, layer.topk), expected, "the result after refused updates")
