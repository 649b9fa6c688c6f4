"""A whole EP layer by each dispatcher on torch.distributed equals the layer of one rank, whatever the ranks bring."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

LAYER = """
from moe_core import CanonicalWeights, MoeConfig, ParallelConfig, RunningState, TopKOutput
from moe_core.testing import make_layer

MOST = 9

def tokens_of(layer, counts, r):
    start = sum(counts[:r])
    rows = slice(start, start + counts[r])
    return layer.hidden[rows], TopKOutput(layer.topk.topk_ids[rows], layer.topk.topk_weights[rows])

def compare(counts, *, placement="linear", tp=1, told=False, repeat=1, config=None, replicas=None, **options):
    "The largest difference from one rank's plan, relative to its largest value."
    config = config or MoeConfig(num_experts=10, top_k=3, hidden_size=64, intermediate_size=32, dtype="float32",
                                 routed_scaling_factor=1.5)
    ep = ranks // tp
    parallel = ParallelConfig(ep_size=ep, ep_rank=rank // tp, tp_size=tp, tp_rank=rank % tp, placement=placement,
                              tokens="sharded")
    layer = make_layer(config, 5, tokens=sum(counts))
    layer.topk.topk_ids[::4, 0] = -1
    whole = moe_core.plan(config, layer.weights, runner="reference")(layer.hidden, layer.topk)
    settings = moe_core.Settings(runner="reference", dispatcher=NAME, options={NAME: options} if options else {})
    mine, weights = parallel.ep_rank, layer.weights
    hidden, topk = tokens_of(layer, counts, mine)
    if replicas is not None:
        copies = moe_core.ExpertReplicas(replicas)
        config, weights, topk = copies.config(config), copies.weights(weights), copies.physical(topk, offset=mine)
    plan = moe_core.plan(config, weights.shard(config, parallel), parallel, group=group, max_tokens=MOST,
                         settings=settings)
    start = sum(counts[:mine])
    expected = whole[start : start + counts[mine]]
    worst = 0.0
    for _ in range(repeat):
        state = RunningState(tokens_per_rank=counts) if told else None
        result = plan(hidden, topk, state=state)
        assert result.shape == expected.shape and result.dtype == expected.dtype
        if len(result):
            worst = max(worst, float((result - expected).abs().max() / whole.abs().max()))
    return worst
"""

MORE = """
from moe_core.specs import Wants
from moe_core.testing import probe
from moe_core.testing.layers import make_routing
from moe_core.vocabulary import GROUPED, STANDARD, DroppedSlot, IdSpace, Step

FORMAT = GROUPED if NAME == "alltoall_grouped" else STANDARD

def probed(payload="bf16", id_space=IdSpace.LOCAL, dropped=DroppedSlot.NEGATIVE, can=None, flights=1):
    "Experts that multiply: the weighted sum, on any terms, with several calls in flight."
    counts = (3, 5, 0, 2)
    config = MoeConfig(num_experts=10, top_k=3, hidden_size=256, intermediate_size=32, dtype="float32",
                       scheme="fp8_block128" if payload != "bf16" else "bf16", routed_scaling_factor=0.5)
    if can is None:
        can = {Step.ROUTER_WEIGHT, Step.ROUTED_SCALING} | ({Step.TOPK_SUM} if FORMAT == STANDARD else set())
    wants = Wants(payloads=(payload,), id_spaces=(id_space,), dropped=(dropped,), can=frozenset(can),
                  extras=frozenset({"expert_map"} if FORMAT == STANDARD else ()))
    registry = moe_core.registry.Registry([probe.probe_plugin(FORMAT, wants)])
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded", placement="round_robin")
    weights = make_layer(config, 5, tokens=1).weights.shard(config, parallel)
    plan = moe_core.plan(config, weights, parallel, group=group, max_tokens=MOST, registry=registry,
                         settings=moe_core.Settings(runner=probe.NAME, dispatcher=NAME))
    assert plan.terms[FORMAT].payload == payload, plan.terms
    calls, worst = [], 0.0
    for i in range(flights):
        made = make_layer(config, 100 * i + rank, tokens=counts[rank])
        output = torch.full_like(made.hidden, float("nan")) if i % 2 else None
        calls.append((made, RunningState(output=output), output))
    begun = [plan.dispatch_begin(made.hidden, made.topk, state) for made, state, _ in calls]
    done = [plan.run(plan.dispatch_finish(one, state), state) for one, (_, state, _) in zip(begun, calls)]
    back = [plan.combine_begin(one, state) for one, (_, state, _) in zip(done, calls)]
    for one, (made, state, output) in zip(back, calls):
        result = plan.combine_finish(one, state)
        assert output is None or result is output
        seen = made.hidden if payload == "bf16" else moe_core.quant.roundtrip_activation(made.hidden, payload)
        wanted = probe.expected(config, seen, made.topk)
        if len(wanted):
            worst = max(worst, float((result.double() - wanted).abs().max() / wanted.abs().max()))
    return worst

def groups_of(layers):
    "The TP and EP groups of several layers: how many there are."
    made = [layered(seed).dispatcher._groups for seed in range(layers)]
    return len({(id(groups.ep), id(groups.tp)) for groups in made})

def layered(seed):
    config = MoeConfig(num_experts=10, top_k=3, hidden_size=64, intermediate_size=32, dtype="float32")
    parallel = ParallelConfig(ep_size=2, ep_rank=rank // 2, tp_size=2, tp_rank=rank % 2, tokens="sharded")
    weights = make_layer(config, seed, tokens=1).weights.shard(config, parallel)
    return moe_core.plan(config, weights, parallel, group=group, max_tokens=MOST,
                         settings=moe_core.Settings(runner="reference", dispatcher=NAME))

def refused(**changes):
    config = MoeConfig(num_experts=10, top_k=3, hidden_size=64, intermediate_size=32, dtype="float32")
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(config, 5, tokens=4)
    plan = moe_core.plan(config, layer.weights.shard(config, parallel), parallel, group=group, max_tokens=MOST,
                         settings=moe_core.Settings(runner="reference", dispatcher=NAME))
    plan(layer.hidden, layer.topk, state=RunningState(**changes))
"""

CASES = {
    "even": "compare([5] * ranks)",
    "uneven": "compare([5, 0, 9, 1][:ranks], repeat=2)",
    "told": "compare([5, 0, 9, 1][:ranks], told=True)",
    "nobody": "compare([0] * ranks, told=True)",
    "equal": "compare([4] * ranks, equal_tokens=True)",
    "round_robin": "compare([3, 7, 2, 4][:ranks], placement='round_robin')",
    "map": "compare([3, 7, 2, 4][:ranks], placement=tuple((e * e) % ranks for e in range(10)))",
    "replicas": "compare([3, 7, 2, 4][:ranks], replicas=(*range(10), 3, 3, 7, 0), placement='round_robin')",
    "no_combine": (
        "compare([3, 0, 2, 4][:ranks], config=MoeConfig(num_experts=10, top_k=3, hidden_size=64,"
        " intermediate_size=32, dtype='float32', no_combine=True))"
    ),
    "weight_on_input": (
        "compare([3, 0, 2, 4][:ranks], config=MoeConfig(num_experts=10, top_k=1, hidden_size=64,"
        " intermediate_size=32, dtype='float32', router_weight_on_input=True))"
    ),
    "bf16": (
        "compare([3, 6, 2, 4][:ranks], config=MoeConfig(num_experts=10, top_k=3, hidden_size=64, intermediate_size=32))"
    ),
    "fp8": (
        "compare([3, 6, 2, 4][:ranks], config=MoeConfig(num_experts=10, top_k=3, hidden_size=256,"
        " intermediate_size=128, scheme='fp8_block128'))"
    ),
}
LIMITS = {"bf16": 2e-2, "fp8": 2e-2}
PROBED = {
    "payload": "probed('fp8_group128')",
    "global": "probed(id_space=IdSpace.GLOBAL)",
    "sink": "probed(dropped=DroppedSlot.SINK)",
    "weighed here": "probed(can=())",
    "in flight": "probed(flights=3)",
    "scaled rows in flight": "probed('fp8_group128', flights=2)",
}
REFUSED = {
    "another number": ("refused(tokens_per_rank=[3] * ranks)", "tokens_per_rank is [3, 3"),
    "too few ranks": ("refused(tokens_per_rank=[4])", "tokens_per_rank is [4]"),
    "too many tokens": (
        "refused(tokens_per_rank=[4] * (ranks - 1) + [40] if rank < ranks - 1 else [40] * ranks)",
        "40",
    ),
}


#: What only rows without a sum, or a fixed number of them, have.
NOT_FOR = {
    "alltoall": {"equal", *REFUSED},
    "alltoall_grouped": {"equal", "no_combine", "global", "sink", *REFUSED},
}


@pytest.fixture(
    scope="module",
    params=[(name, n) for name in ("allgather", "alltoall", "alltoall_grouped") for n in (2, 4)],
    ids=str,
)
def said(request: pytest.FixtureRequest, ranks: Callable[..., list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """What each rank said to every call that is for this dispatcher."""
    name, count = request.param
    calls = CASES | PROBED | {refusal: call for refusal, (call, _) in REFUSED.items()}
    if count == 4:
        calls["tp"] = "compare([5, 2], tp=2)"
        calls["tp groups"] = "groups_of(3)"
    lines = (
        f"say({call!r}, lambda: {source})\n" for call, source in calls.items() if call not in NOT_FOR.get(name, ())
    )
    return ranks(count, f"NAME = {name!r}\n" + LAYER + MORE + "".join(lines))


def answers(said: list[dict[str, Any]], name: str) -> list[Any]:
    """Of all ranks."""
    if name not in said[0]:
        pytest.skip("not for this dispatcher")
    return [rank[name] for rank in said]


@pytest.mark.parametrize("name", CASES)
def test_as_one_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = answers(said, name)
    assert all(isinstance(error, float) and error <= LIMITS.get(name, 1e-5) for error in found), found


@pytest.mark.parametrize("name", PROBED)
def test_the_weighted_sum_on_any_terms(name: str, said: list[dict[str, Any]]) -> None:
    found = answers(said, name)
    assert all(isinstance(error, float) and error <= 1e-5 for error in found), found


@pytest.mark.parametrize("name", REFUSED)
def test_counts_that_cannot_be(name: str, said: list[dict[str, Any]]) -> None:
    found = answers(said, name)
    assert all(text.startswith("ContractViolation") and REFUSED[name][1] in text for text in found), found


def test_tensor_parallel_too(said: list[dict[str, Any]]) -> None:
    assert max(answers(said, "tp")) <= 1e-5


def test_layers_share_their_groups(said: list[dict[str, Any]]) -> None:
    assert set(answers(said, "tp groups")) == {1}
