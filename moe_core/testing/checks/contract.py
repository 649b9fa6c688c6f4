"""The contract of a forward on every lane: dropped slots, legal corner cases of routing, input and output."""

from __future__ import annotations

import torch

from moe_core.config import ParallelConfig
from moe_core.protocols import RunningState
from moe_core.testing.case import Case, Setup
from moe_core.testing.layers import Layer, make_routing
from moe_core.testing.registration import CheckFailed, CheckSkipped, check
from moe_core.topk import TopKOutput


def compare(setup: Setup, layer: Layer, topk: TopKOutput | None = None, tokens: int | None = None) -> None:
    """Run one call and hold it against the formula."""
    hidden = layer.hidden if tokens is None else layer.hidden[:tokens]
    topk = topk or layer.topk
    actual = setup.plan(layer.weights)(hidden, topk)
    setup.close(actual, setup.expected(layer, hidden, topk))


def routed(ids: torch.Tensor, weights: torch.Tensor | None = None) -> TopKOutput:
    """A decision with these ids, and weights that differ from slot to slot."""
    if weights is None:
        weights = torch.linspace(0.2, 0.8, ids.numel(), device=ids.device).reshape(ids.shape)
    return TopKOutput(ids.to(torch.int32), weights)


@check("contract.negative_ids_contribute_zero", each="lane", needs="run")
def dropped_slots(case: Case) -> None:
    """A dropped slot (-1, or as the terms write it) contributes exactly zero, even where its weight is NaN."""
    setup = case.setup()
    layer = setup.layer(pattern="dropped")
    result = setup.plan(layer.weights)(layer.hidden, layer.topk)
    empty = (layer.topk.topk_ids < 0).all(dim=1)
    if bool((result[empty] != 0).any()):
        worst = float(result[empty].double().abs().nan_to_num(nan=float("inf")).max())
        raise CheckFailed(f"tokens whose slots are all dropped got up to {worst:g} instead of exactly 0")
    setup.close(result, setup.expected(layer), "the result with dropped slots")
    nothing = routed(torch.full_like(layer.topk.topk_ids, -1), torch.full_like(layer.topk.topk_weights, float("nan")))
    result = setup.plan(layer.weights)(layer.hidden, nothing)
    if bool((result != 0).any()):
        raise CheckFailed("a call in which every slot is dropped did not give exactly 0")


@check("contract.dropped_slots_are_not_read", each="lane", needs="run")
def dropped_not_read(case: Case) -> None:
    """What a token holds whose slots are all dropped does not matter: it may be NaN, as padding often is."""
    setup = case.setup()
    layer = setup.layer(pattern="dropped")
    empty = (layer.topk.topk_ids < 0).all(dim=1)
    plan = setup.plan(layer.weights)
    clean = plan(layer.hidden, layer.topk)
    spoiled = plan(layer.hidden.masked_fill(empty[:, None], float("nan")), layer.topk)
    setup.close(spoiled, clean, "the result with NaN in dropped tokens")


@check("contract.foreign_experts", each="lane", needs="run")
def foreign_experts(case: Case) -> None:
    """With expert parallelism, slots of another rank's experts contribute exactly zero on this rank."""
    low, high = case.component.support.ep_sizes
    if case.lane.runner.support.ep_sizes[0] > 1 or low > 1 or (high is not None and high < 2):
        raise CheckSkipped("it does not run with ep_size 2")
    rank = ParallelConfig(ep_size=2, reduce="caller")
    setup = case.setup(parallel=rank)
    layer = setup.layer()
    theirs = sorted(set(range(setup.config.num_experts)) - set(rank.local_experts(setup.config.num_experts)))
    ids = torch.tensor(theirs, device=layer.hidden.device)[layer.topk.topk_ids.long() % len(theirs)]
    result = setup.plan(layer.weights)(layer.hidden, routed(ids))
    if bool((result != 0).any()):
        raise CheckFailed(f"tokens of another rank's experts got up to {float(result.double().abs().max()):g}, not 0")


@check("contract.zero_tokens", each="lane", needs="run")
def zero_tokens(case: Case) -> None:
    """A call without tokens is legal and gives a result without rows."""
    setup = case.setup()
    layer = setup.layer(tokens=0)
    result = setup.plan(layer.weights)(layer.hidden, layer.topk)
    if tuple(result.shape) != (0, setup.config.hidden_size) or result.dtype != layer.hidden.dtype:
        raise CheckFailed(f"got {result.dtype} {tuple(result.shape)}")


@check("contract.one_token", each="lane", needs="run")
def one_token(case: Case) -> None:
    """One token is legal, and so is one token of which a slot is dropped."""
    setup = case.setup()
    layer = setup.layer(tokens=1)
    compare(setup, layer)
    if setup.config.top_k > 1:
        ids = layer.topk.topk_ids.clone()
        ids[0, 0] = -1
        compare(setup, layer, routed(ids))


@check("contract.one_expert", each="lane", needs="run")
def one_expert(case: Case) -> None:
    """All tokens may go to one expert, while all others get none."""
    setup = case.setup()
    layer = setup.layer(pattern="one_hot")
    compare(setup, layer)
    for expert in (0, setup.config.num_experts - 1):
        compare(setup, layer, routed(torch.full_like(layer.topk.topk_ids, expert)))


@check("contract.idle_experts", each="lane", needs="run")
def idle_experts(case: Case) -> None:
    """Experts without a token, at the start, in the middle and at the end, do no harm."""
    setup = case.setup()
    layer = setup.layer()
    experts, ids = setup.config.num_experts, layer.topk.topk_ids
    for kept in ([1], [experts - 1], [0, experts // 2], list(range(1, experts, 2))):
        busy = torch.tensor([e % experts for e in kept], device=ids.device)
        compare(setup, layer, routed(busy[ids.long() % len(kept)]))


@check("contract.top_k_1", each="lane", needs="run")
def top_k_1(case: Case) -> None:
    """A layer with one expert a token is legal."""
    setup = case.setup(top_k=1)
    compare(setup, setup.layer())


@check("contract.duplicate_experts", each="lane", needs="run")
def duplicate_experts(case: Case) -> None:
    """A token may choose an expert twice; both slots count, each with its own weight."""
    setup = case.setup()
    compare(setup, setup.layer(pattern="duplicate"))


@check("contract.id_dtypes", each="lane", needs="run")
def id_dtypes(case: Case) -> None:
    """int32 and int64 ids, and ids and weights in strided views, give the same result."""
    setup = case.setup()
    layer = setup.layer()
    plan = setup.plan(layer.weights)
    ids, weights = layer.topk.topk_ids, layer.topk.topk_weights
    expected = plan(layer.hidden, layer.topk)
    setup.close(plan(layer.hidden, TopKOutput(ids.long(), weights)), expected, "the result with int64 ids")
    wide = TopKOutput(ids.repeat(1, 2)[:, : ids.shape[1]], weights.repeat(1, 2)[:, : ids.shape[1]])
    setup.close(plan(layer.hidden, wide), expected, "the result with strided ids and weights")


@check("contract.input_unchanged", each="lane", needs="run")
def input_unchanged(case: Case) -> None:
    """A forward changes neither the tokens nor the router's decision."""
    setup = case.setup()
    layer = setup.layer(pattern="dropped")
    given = {"hidden_states": layer.hidden, "topk_ids": layer.topk.topk_ids, "topk_weights": layer.topk.topk_weights}
    before = {name: tensor.clone() for name, tensor in given.items()}
    setup.plan(layer.weights)(layer.hidden, layer.topk)
    for name, tensor in given.items():
        if not torch.equal(tensor.nan_to_num(nan=-7.0), before[name].nan_to_num(nan=-7.0)):
            raise CheckFailed(f"{name} was changed in place")


@check("contract.output", each="lane", needs="run")
def output(case: Case) -> None:
    """The result is [T, H], contiguous, of the layer's dtype on its device, and shares no memory with the input."""
    setup = case.setup()
    layer = setup.layer()
    result = setup.plan(layer.weights)(layer.hidden, layer.topk)
    if result.shape != layer.hidden.shape or result.dtype != layer.hidden.dtype:
        raise CheckFailed(
            f"got {result.dtype} {tuple(result.shape)}, not {layer.hidden.dtype} {tuple(layer.hidden.shape)}"
        )
    if result.device != layer.hidden.device or not result.is_contiguous():
        raise CheckFailed(f"got a result on {result.device} with strides {result.stride()}")
    if result.data_ptr() == layer.hidden.data_ptr():
        raise CheckFailed("the result is the input, and nobody asked for that")


@check("contract.output_buffer", each="lane", needs="run")
def output_buffer(case: Case) -> None:
    """The result is written into `state.output` where the call brings one, and that tensor is returned."""
    setup = case.setup()
    layer = setup.layer(pattern="dropped")
    buffer = torch.full_like(layer.hidden, float("nan"))
    result = setup.plan(layer.weights)(layer.hidden, layer.topk, state=RunningState(output=buffer))
    if result.data_ptr() != buffer.data_ptr():
        raise CheckFailed("the call returned another tensor than the buffer that it was given")
    setup.close(buffer, setup.expected(layer), "the buffer")


@check("contract.inplace", each="lane", needs=("feature:inplace", "run"))
def inplace(case: Case) -> None:
    """The output buffer may be the tokens themselves."""
    setup = case.setup(request={"features": {"inplace"}})
    layer = setup.layer()
    expected = setup.expected(layer)
    result = setup.plan(layer.weights)(layer.hidden, layer.topk, state=RunningState(output=layer.hidden))
    if result.data_ptr() != layer.hidden.data_ptr():
        raise CheckFailed("the call returned another tensor than the tokens that it was to overwrite")
    setup.close(result, expected, "the tokens, overwritten")


@check("contract.many_experts", each="lane", needs="run")
def many_experts(case: Case) -> None:
    """More experts than tokens, and a number of experts that is no power of two."""
    most = case.component.support.max_experts
    setup = case.setup(num_experts=min(24, most) if most is not None else 24)
    layer = setup.layer(tokens=5)
    experts, top_k = setup.config.num_experts, setup.config.top_k
    compare(setup, layer, make_routing("uniform", 5, experts, top_k, 3, device=layer.hidden.device))
