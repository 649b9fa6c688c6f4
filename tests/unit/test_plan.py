"""A plan: what it computes, what it keeps, how it travels, and whom it tells."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import (
    CanonicalWeights,
    ConfigError,
    DroppedSlot,
    MoeConfig,
    MoePlan,
    Owner,
    ParallelConfig,
    Phase,
    Registry,
    RunnerHooks,
    RunningState,
    Settings,
    Step,
    TopKOutput,
)
from moe_core.binding import _log_once
from moe_core.registry import forget_plugins
from moe_core.testing.fakes import dispatcher_like, fake_plugin, runner_like
from moe_core.testing.oracle import dense

LAYER = MoeConfig(num_experts=6, top_k=3, hidden_size=32, intermediate_size=48, dtype="float32")
CORE = Registry(autoload=False, settings=Settings())
RUNNERS = pytest.mark.parametrize("runner", ["cpu", "reference"])


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(config: MoeConfig = LAYER, seed: int = 0) -> CanonicalWeights:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(config.num_experts, *shape, generator=generator) / 5

    rows, inner, hidden = config.gate_up_factor * config.intermediate_size, config.intermediate_size, config.hidden_size
    biases = {"w13_bias": random(rows), "w2_bias": random(hidden)} if config.bias else {}
    return CanonicalWeights.quantize(random(rows, hidden), random(hidden, inner), config, **biases)


def call(config: MoeConfig = LAYER, count: int = 7, dropped: float = 0.0) -> tuple[Tensor, TopKOutput]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(count, config.hidden_size, generator=generator)
    scores = torch.rand(count, config.num_experts, generator=generator)
    ids = scores.topk(config.top_k).indices.to(torch.int32)
    ids[torch.rand(ids.shape, generator=generator) < dropped] = -1
    return hidden, TopKOutput(ids, torch.rand(ids.shape, generator=generator))


def make(config: MoeConfig = LAYER, registry: Registry = CORE, **changes: Any) -> MoePlan:
    names = ("runner", "path", "dispatcher", "options")
    settings = Settings(**{name: changes.pop(name) for name in names if name in changes})
    given = changes.pop("weights", None) or weights(config)
    return moe_core.plan(config, given, registry=registry, settings=settings, **changes)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("runner", "path"), [("cpu", "fused"), ("cpu", "split"), ("reference", "split")], ids=["fused", "split", "oracle"]
)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"routed_scaling_factor": 2.5},
        {"no_combine": True},
        {"no_combine": True, "routed_scaling_factor": 2.5},
        {"router_weight_on_input": True},
        {"router_weight_on_input": True, "routed_scaling_factor": 2.5},
        {"bias": True},
    ],
    ids=lambda changes: "+".join(changes) or "plain",
)
@pytest.mark.parametrize("count", [0, 1, 7])
def test_a_plan_computes_the_formula(runner: str, path: str, changes: dict[str, Any], count: int) -> None:
    config = replace(LAYER, **changes)
    hidden, decision = call(config, count, dropped=0.2)
    plan = make(config, runner=runner, path=path)
    result = plan(hidden, decision)
    assert result.shape == ((count, 3, 32) if config.no_combine else (count, 32))
    assert result.dtype == torch.float32
    close(result, dense(config, weights(config), hidden, decision))


@RUNNERS
@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf"), 1e38])
def test_a_dropped_slot_contributes_exactly_zero_whatever_its_weight(runner: str, weight: float) -> None:
    plan, (hidden, decision) = make(runner=runner), call()
    decision.topk_ids[1] = -1
    decision.topk_ids[2, 1] = -1
    expected = plan(hidden, replace(decision, topk_weights=decision.topk_weights.where(decision.topk_ids >= 0, 0.0)))
    decision.topk_weights[decision.topk_ids < 0] = weight
    found = plan(hidden, decision)
    assert torch.equal(found, expected)
    assert torch.equal(found[1], torch.zeros(32))


@RUNNERS
def test_ids_may_be_int64_and_weights_of_another_float_dtype(runner: str) -> None:
    plan, (hidden, decision) = make(runner=runner), call()
    wide = TopKOutput(decision.topk_ids.long(), decision.topk_weights.double())
    assert torch.equal(plan(hidden, wide), plan(hidden, decision))


@RUNNERS
def test_the_sink_encoding_drops_slots_too(runner: str) -> None:
    hidden, decision = call(dropped=0.4)
    expected = make(runner=runner)(hidden, decision)
    sunk = TopKOutput(decision.topk_ids.where(decision.topk_ids >= 0, 6), decision.topk_weights.clone())
    sunk.topk_weights[sunk.topk_ids == 6] = float("nan")
    assert torch.equal(make(runner=runner, incoming=DroppedSlot.SINK)(hidden, sunk), expected)


def steps(owner: Owner) -> tuple[Registry, dict[str, Any]]:
    """A registry whose only quick runner leaves every step to `owner` (the dispatcher or the caller)."""
    lazy = runner_like("reference", "lazy", last_resort=False, priority=500, adapter={"wants": {"can": frozenset()}})
    specs = {**lazy, "fused": ()}
    if owner is Owner.CALLER:
        offers = {"standard": replace(CORE.dispatchers["standard"].offers["standard"], can=frozenset({Step.TOPK_SUM}))}
        specs |= dispatcher_like("standard", "idle", offers=offers, priority=500)
    return Registry(plugins=[fake_plugin("acme", **specs)], autoload=False, settings=Settings()), {"runner": "lazy"}


@pytest.mark.parametrize("incoming", [DroppedSlot.NEGATIVE, DroppedSlot.SINK])
def test_the_dispatcher_does_what_the_runner_leaves_to_it(incoming: DroppedSlot) -> None:
    config = replace(LAYER, routed_scaling_factor=2.5)
    registry, forced = steps(Owner.DISPATCHER)
    plan = make(config, registry, incoming=incoming, **forced)
    assert {plan.step_owner(s) for s in plan.resolution.request.steps} == {Owner.DISPATCHER}
    hidden, decision = call(config, dropped=0.3)
    expected = dense(config, weights(config), hidden, decision)
    gone = decision.topk_ids < 0
    decision.topk_weights[gone] = float("nan")
    decision.topk_ids[gone] = 6 if incoming is DroppedSlot.SINK else -1
    close(plan(hidden, decision), expected)


def test_the_caller_scales_where_nobody_else_can_and_the_plan_says_so() -> None:
    config = replace(LAYER, routed_scaling_factor=2.5)
    registry, forced = steps(Owner.CALLER)
    hidden, decision = call(config)
    plan = make(config, registry, **forced, dispatcher="idle", caller_can=set(Step), caller_does={Step.ROUTER_WEIGHT})
    assert plan.step_owner(Step.ROUTED_SCALING) is Owner.CALLER
    assert plan.step_owner(Step.ROUTER_WEIGHT) is Owner.CALLER
    assert plan.step_owner(Step.TP_REDUCE) is None
    ones = replace(decision, topk_weights=torch.ones(7, 3))
    close(plan(hidden, decision), dense(LAYER, weights(), hidden, ones))
    with pytest.raises(moe_core.UnsupportedOverride, match="nobody would do routed_scaling"):
        make(config, registry, **forced, dispatcher="idle", caller_does={Step.ROUTER_WEIGHT})


@pytest.mark.parametrize("owner", [Owner.RUNNER, Owner.CALLER])
def test_routed_scaling_is_applied_once_by_its_owner(owner: Owner) -> None:
    config = replace(LAYER, routed_scaling_factor=4.0)
    hidden, decision = call()
    done = {Step.ROUTED_SCALING} if owner is Owner.CALLER else set()
    plan = make(config, caller_does=done)
    assert plan.step_owner(Step.ROUTED_SCALING) is owner
    factor = 1.0 if owner is Owner.CALLER else 4.0
    close(plan(hidden, decision), factor * dense(LAYER, weights(), hidden, decision))


@RUNNERS
def test_the_result_is_written_where_the_caller_wants_it(runner: str) -> None:
    plan, (hidden, decision) = make(runner=runner), call()
    place = torch.full((7, 32), float("nan"))
    result = plan(hidden, decision, state=RunningState(output=place))
    assert result.data_ptr() == place.data_ptr()
    assert torch.equal(result, plan(hidden, decision, phase=Phase.DECODE))


@RUNNERS
def test_inputs_are_left_as_they_were(runner: str) -> None:
    plan, (hidden, decision) = make(runner=runner), call(dropped=0.3)
    before = [t.clone() for t in (hidden, decision.topk_ids, decision.topk_weights)]
    plan(hidden, decision)
    assert all(map(torch.equal, before, (hidden, decision.topk_ids, decision.topk_weights)))


def test_a_server_may_drive_the_dispatcher_itself() -> None:
    plan, (hidden, decision) = make(), call()
    state = RunningState()
    sent = plan.dispatcher.dispatch(hidden, decision, state)
    by_hand = plan.dispatcher.combine(plan.run(sent, state), state)
    assert torch.equal(by_hand, plan(hidden, decision))
    # Two micro-batches in flight at once do not meet.
    others = hidden.flip(0), TopKOutput(decision.topk_ids.flip(0), decision.topk_weights.flip(0))
    one, two = plan.dispatcher.dispatch(hidden, decision, state), plan.dispatcher.dispatch(*others, RunningState())
    first, second = plan.run(one), plan.run(two)
    assert torch.equal(plan.dispatcher.combine(second, RunningState()).flip(0), by_hand)
    assert torch.equal(plan.dispatcher.combine(first, RunningState()), by_hand)


@RUNNERS
def test_new_weights_take_the_place_of_the_old_ones(runner: str) -> None:
    config = replace(LAYER, bias=True)
    hidden, decision = call(config)
    old, new = weights(config, 0), weights(config, 1)
    plan = make(config, weights=replace(old, w13=old.w13.clone(), w2=old.w2.clone()), runner=runner)
    before = plan(hidden, decision)
    plan.update_weights(new)
    after = plan(hidden, decision)
    close(after, dense(config, new, hidden, decision))
    assert not torch.allclose(before, after)
    with pytest.raises(moe_core.WeightError, match="w2 has shape"):
        plan.update_weights(replace(new, w2=new.w2[:, :8].contiguous()))
    assert torch.equal(plan(hidden, decision), after)


def test_an_update_keeps_every_address() -> None:
    plan = make(runner="reference")
    held = plan.quant_info.weights.tensors()
    addresses = {name: tensor.data_ptr() for name, tensor in held.items()}
    plan.update_weights(weights(seed=1))
    assert {name: t.data_ptr() for name, t in plan.quant_info.weights.tensors().items()} == addresses
    assert torch.equal(held["w13"], weights(seed=1).w13)


@RUNNERS
def test_a_plan_travels_between_processes(runner: str) -> None:
    plan, (hidden, decision) = make(runner=runner), call()
    forget_plugins()
    copy = pickle.loads(pickle.dumps(plan))
    assert copy.fingerprint == plan.fingerprint
    assert repr(copy) == repr(plan) == f"<MoePlan {plan.resolution.require().id} {plan.fingerprint}>"
    assert torch.equal(copy(hidden, decision), plan(hidden, decision))


def test_a_plan_that_cannot_travel_says_why() -> None:
    config, ranks = LAYER, ParallelConfig(ep_size=2)
    plan = make(config, weights=weights().shard(config, ranks), parallel=ranks, group=object())
    with pytest.raises(pickle.PicklingError, match=r"holds a process group, .*pickle plan.resolution and bind"):
        pickle.dumps(plan)
    assert pickle.loads(pickle.dumps(plan.resolution)).fingerprint == plan.fingerprint


def test_a_plan_of_a_plugin_that_is_not_there_says_so_when_it_arrives() -> None:
    plugin = fake_plugin("acme", **runner_like("reference", "acme", priority=900))
    plan = make(registry=Registry(plugins=[plugin], autoload=False, settings=Settings()), runner="acme")
    with pytest.raises(ConfigError, match="no runner is called 'acme'"):
        pickle.loads(pickle.dumps(plan))


@pytest.fixture
def core_log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    _log_once.cache_clear()
    with caplog.at_level(logging.INFO, "moe_core"):
        yield caplog
    _log_once.cache_clear()


def test_a_plan_is_logged_once_a_distinct_resolution(core_log: pytest.LogCaptureFixture) -> None:
    for _ in range(3):
        hidden, decision = call()
        make()(hidden, decision)
    (record,) = core_log.records
    assert (record.levelname, record.name) == ("INFO", "moe_core.binding")
    assert record.getMessage().startswith("standard+cpu/fused for 6 experts, top-3, hidden 32, ")
    assert "`moe-core explain` tells why" in record.getMessage()
    make(replace(LAYER, top_k=2))
    assert len(core_log.records) == 2


def test_a_slow_fallback_warns_unless_it_was_named(core_log: pytest.LogCaptureFixture) -> None:
    slow = replace(LAYER, scheme="int8_w8a16")
    for _ in range(2):
        make(slow)
    (record,) = core_log.records
    assert record.levelname == "WARNING"
    assert record.getMessage().startswith("slow fallback: standard+reference/split")
    make(replace(slow, top_k=2), runner="reference")
    assert core_log.records[-1].levelname == "INFO"
    assert len(core_log.records) == 2


def test_telemetry_hears_of_every_plan_that_is_bound() -> None:
    heard: list[Any] = []
    plugin = fake_plugin(
        "acme", hooks={"moe_core_plan_bound": lambda resolution, plan: heard.append((resolution, plan))}
    )
    plan = make(registry=Registry(plugins=[plugin], autoload=False, settings=Settings()))
    assert heard == [(plan.resolution, plan)]


@RUNNERS
def test_hooks_see_and_change_the_rows_of_live_slots(runner: str) -> None:
    seen: list[Tensor] = []

    def double(rows: Tensor, info: Any) -> None:
        seen.append(info.expert_ids)
        rows.mul_(2)

    hidden, decision = call(dropped=0.3)
    plain, plan = make(runner=runner), make(runner=runner, hooks=("after_down",))
    found = plan(hidden, decision, state=RunningState(hooks=RunnerHooks(after_down=double)))
    torch.testing.assert_close(found, 2 * plain(hidden, decision))
    assert sorted(torch.cat(seen).tolist()) == sorted(decision.topk_ids[decision.topk_ids >= 0].tolist())


def test_options_reach_their_runner() -> None:
    assert make().quant_info.layout == "onednn_blocked"
    assert make(options={"cpu": {"pack_weights": False}}).quant_info.layout == "rows"
