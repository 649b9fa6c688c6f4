"""Servers drive the steps of a plan themselves, with phases, states and micro-batches of their own."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import CanonicalWeights, ContractViolation, MoeConfig, MoePlan, Phase, Registry, RunningState, Settings
from moe_core.dispatchers.standard import StandardDispatcher
from moe_core.formats import StandardCombineInput
from moe_core.specs import FusedPathSpec
from moe_core.testing.fakes import dispatcher_like, fake_plugin, runner_like
from moe_core.testing.targets import as_target
from moe_core.topk import BypassedTopK, TopKOutput

LAYER = MoeConfig(num_experts=6, top_k=2, hidden_size=16, intermediate_size=16, dtype="float32")


def weights() -> CanonicalWeights:
    generator = torch.Generator().manual_seed(0)
    return CanonicalWeights(
        w13=torch.randn(6, 32, 16, generator=generator), w2=torch.randn(6, 16, 16, generator=generator)
    )


def call(seed: int = 1, count: int = 4) -> tuple[Tensor, TopKOutput]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.rand(count, 6, generator=generator).topk(2).indices.to(torch.int32)
    return torch.randn(count, 16, generator=generator), TopKOutput(ids, torch.rand(count, 2, generator=generator))


def make(config: MoeConfig = LAYER, *, parts: dict[str, Any] | None = None, **changes: Any) -> MoePlan:
    plugins = [fake_plugin("acme", **parts)] if parts else []
    registry = Registry(plugins=plugins, autoload=False, settings=Settings())
    settings = Settings(**{k: changes.pop(k) for k in ("runner", "path", "dispatcher", "check") if k in changes})
    return moe_core.plan(config, weights(), registry=registry, settings=settings, **changes)


class Later:
    """An asynchronous dispatcher: nothing happens before it is waited for."""

    log: ClassVar[list[str]] = []

    def __init__(self, binding: Any) -> None:
        self._inner = StandardDispatcher(binding)

    def dispatch_begin(self, hidden_states: Tensor, topk_output: Any, state: RunningState) -> Any:
        self.log.append("dispatch begins")
        return hidden_states, topk_output

    def dispatch_finish(self, handle: Any, state: RunningState) -> Any:
        self.log.append("dispatch ends")
        return self._inner.dispatch(*handle, state)

    def combine_begin(self, combine_input: Any, state: RunningState) -> Any:
        self.log.append("combine begins")
        return (combine_input,)

    def combine_finish(self, handle: Any, state: RunningState) -> Tensor:
        self.log.append("combine ends")
        return self._inner.combine(*handle, state)

    def dispatch(self, hidden_states: Tensor, topk_output: Any, state: RunningState) -> Any:
        return self.dispatch_finish(self.dispatch_begin(hidden_states, topk_output, state), state)

    def combine(self, combine_input: Any, state: RunningState) -> Tensor:
        return self.combine_finish(self.combine_begin(combine_input, state), state)


def later(**changes: Any) -> MoePlan:
    parts = dispatcher_like("standard", "later", factory=Later, split_phases=True)
    return make(parts=parts, dispatcher="later", **changes)


@pytest.mark.parametrize("path", ["fused", "split"])
@pytest.mark.parametrize("made", [later, make], ids=["asynchronous", "at once"])
def test_two_micro_batches_in_flight_do_not_meet(made: Any, path: str) -> None:
    plan, one, two = made(path=path), call(1), call(2, count=3)
    expected = plan(*one), plan(*two)
    Later.log.clear()
    a, b = RunningState(), RunningState()
    first = plan.dispatch_begin(*one, a, phase=Phase.PREFILL)
    second = plan.dispatch_begin(*two, b, phase=Phase.DECODE)
    assert (a.phase, b.phase) == (Phase.PREFILL, Phase.DECODE)
    if made is later:
        assert Later.log == ["dispatch begins"] * 2
    y = plan.combine_begin(plan.run(plan.dispatch_finish(second, b), b), b)
    x = plan.combine_begin(plan.run(plan.dispatch_finish(first, a), a), a)
    if made is later:
        assert Later.log == ["dispatch begins"] * 2 + ["dispatch ends", "combine begins"] * 2
    assert torch.equal(plan.combine_finish(x, a), expected[0])
    assert torch.equal(plan.combine_finish(y, b), expected[1])


@pytest.mark.parametrize("made", [later, make], ids=["asynchronous", "at once"])
def test_steps_refuse_what_a_call_refuses(made: Any) -> None:
    plan, (hidden, decision) = made(check=True), call()
    for step in (plan.dispatch, plan.dispatch_begin):
        with pytest.raises(ContractViolation, match="hidden_states has shape"):
            step(hidden[:, :3], decision, RunningState())
    decision.topk_ids[0, 0] = 99
    for step in (plan.dispatch, plan.dispatch_begin):
        with pytest.raises(ContractViolation, match="is 99"):
            step(hidden, decision, RunningState())


def test_the_steps_make_the_call() -> None:
    plan, (hidden, decision), state = make(), call(), RunningState()
    place = state.output = torch.empty(4, 16)
    result = plan.combine(plan.run(plan.dispatch(hidden, decision, state), state), state)
    assert torch.equal(result, plan(hidden, decision))
    assert result.data_ptr() == place.data_ptr()


class Closing(Later):
    """Holds more than tensors."""

    closed = 0

    def close(self) -> None:
        type(self).closed += 1


@pytest.mark.parametrize("factory", [Closing, Later])
def test_a_closed_plan_runs_no_more(factory: type[Later]) -> None:
    parts = dispatcher_like("standard", "later", factory=factory, split_phases=True)
    plan, (hidden, decision) = make(parts=parts, dispatcher="later"), call()
    plan(hidden, decision)
    Closing.closed = 0
    plan.close()
    assert Closing.closed == (factory is Closing)
    for step in (
        plan,
        lambda *call: plan.dispatch(*call, RunningState()),
        lambda *call: plan.dispatch_begin(*call, RunningState()),
    ):
        with pytest.raises(ContractViolation, match="the plan was closed"):
            step(hidden, decision)
    plan.close()


def whole(binding: Any) -> Any:
    return lambda hidden_states, topk_output, quant_info, config, state: hidden_states * 2


def one_kernel(**changes: Any) -> MoePlan:
    spec = FusedPathSpec(
        name="one",
        runner="cpu",
        target=as_target(whole),
        summary="",
        support=Registry(autoload=False).runner("cpu").support,
        priority=999,
    )
    return make(parts={"fused": (spec,)}, path="whole", **changes)


def test_one_kernel_has_no_steps() -> None:
    plan, (hidden, decision) = one_kernel(), call()
    assert torch.equal(plan(hidden, decision), hidden * 2)
    for step in (plan.dispatch, plan.dispatch_begin):
        with pytest.raises(ContractViolation, match=r"(?s)has no steps to drive.*path='fused'"):
            step(hidden, decision, RunningState())
    for late in (plan.combine, plan.combine_begin, plan.run):
        with pytest.raises(ContractViolation, match="no steps"):
            late(None, RunningState())


def test_one_kernel_closes_too() -> None:
    plan, (hidden, decision) = one_kernel(), call()
    plan.close()
    with pytest.raises(ContractViolation, match="the plan was closed"):
        plan(hidden, decision)


def test_one_kernel_that_sums_over_ranks_needs_a_group_too() -> None:
    ranks = moe_core.ParallelConfig(ep_size=2)
    with pytest.raises(moe_core.BindError, match="no process group was given"):
        moe_core.plan(
            LAYER,
            weights().shard(LAYER, ranks),
            ranks,
            registry=_with_whole(),
            settings=Settings(path="whole"),
        )


def _with_whole() -> Registry:
    support = Registry(autoload=False).runner("cpu").support
    spec = FusedPathSpec(name="one", runner="cpu", target=as_target(whole), summary="", support=support)
    return Registry(plugins=[fake_plugin("acme", fused=(spec,))], autoload=False, settings=Settings())


def test_a_call_is_in_the_first_phase_of_its_plan_unless_it_says_otherwise() -> None:
    plan, (hidden, decision) = make(phases=(Phase.DECODE, Phase.PREFILL)), call()
    state = RunningState()
    assert state.phase is None
    plan(hidden, decision, state=state)
    assert state.phase is Phase.DECODE
    state = RunningState()
    plan(hidden, decision, state=state, phase=Phase.PREFILL)
    assert state.phase is Phase.PREFILL
    plan(hidden, decision, state=state, phase=Phase.PREFILL)  # they agree


@pytest.mark.parametrize(
    ("phase", "state", "message"),
    [
        (Phase.PREFILL, None, r"for phase prefill, the plan was made for decode"),
        (None, RunningState(Phase.PREFILL), r"(?s)for phase prefill, the plan was made for decode.*phases=\["),
        (Phase.DECODE, RunningState(Phase.PREFILL), "says phase decode, its running state says prefill"),
        ("decoding", None, "for phase decoding, the plan was made for decode"),
    ],
)
def test_phases_that_the_plan_was_not_made_for_are_refused(phase: Any, state: Any, message: str) -> None:
    with pytest.raises(ContractViolation, match=message):
        make(phases=(Phase.DECODE,))(*call(), phase=phase, state=state)


def test_more_tokens_than_the_plan_was_made_for_are_refused() -> None:
    plan = make(max_tokens=4)
    plan(*call(count=4))
    plan(*call(count=0))
    with pytest.raises(ContractViolation, match="there are 5 tokens, the plan was made for max_tokens=4"):
        plan(*call(count=5))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (torch.empty(3, 16), r"it has shape \(3, 16\), the result has \(4, 16\)"),
        (torch.empty(4, 2, 16), r"it has shape \(4, 2, 16\), the result has \(4, 16\)"),
        (torch.empty(4, 16, dtype=torch.float64), "it is torch.float64 on cpu, the result torch.float32"),
        (torch.empty(4, 16, device="meta"), "on meta, the result torch.float32 on cpu"),
    ],
)
def test_an_output_that_cannot_hold_the_result_is_refused(output: Tensor, message: str) -> None:
    with pytest.raises(ContractViolation, match=message):
        make()(*call(), state=RunningState(output=output))


def test_an_output_holds_every_slot_with_no_combine() -> None:
    plan, place = make(LAYER.replace(no_combine=True)), torch.empty(4, 2, 16)
    assert plan(*call(), state=RunningState(output=place)).data_ptr() == place.data_ptr()
    with pytest.raises(ContractViolation, match=r"the result has \(4, 2, 16\)"):
        plan(*call(), state=RunningState(output=torch.empty(4, 16)))


def test_the_input_is_an_output_only_where_that_was_asked_for() -> None:
    hidden, decision = call()
    expected = make()(hidden, decision)
    with pytest.raises(ContractViolation, match=r"it is the input itself, .*features=\{'inplace'\}"):
        make()(hidden, decision, state=RunningState(output=hidden))
    features = Registry(autoload=False).runner("reference").support.features | {"inplace"}
    parts = runner_like("reference", "over", support={"features": features})
    found = make(parts=parts, features="inplace")(hidden, decision, state=RunningState(output=hidden))
    assert found.data_ptr() == hidden.data_ptr()
    torch.testing.assert_close(found, expected)


def test_router_weights_that_want_a_gradient_are_refused_where_one_is_recorded() -> None:
    plan, (hidden, decision) = make(), call()
    decision.topk_weights.requires_grad_()
    with pytest.raises(ContractViolation, match="topk_weights wants a gradient"):
        plan(hidden, decision)
    with torch.no_grad():
        plan(hidden, decision)


def logits_plan() -> MoePlan:
    class Echo:
        def __init__(self, binding: Any) -> None:
            pass

        def run(self, runner_input: Any, quant_info: Any, state: Any) -> Any:
            return runner_input

    adapter = {
        "pre": lambda binding: lambda d, *rest: d.hidden_states,
        "post": lambda binding: lambda out, *rest: StandardCombineInput(out),
    }
    support = {"topk_formats": frozenset({"bypassed"})}
    parts = runner_like("reference", "routes", formats=("standard",), factory=Echo, adapter=adapter, support=support)
    return make(parts=parts, runner="routes", topk_format="bypassed")


def test_router_logits_of_a_wrong_shape_are_refused() -> None:
    plan, hidden = logits_plan(), call()[0]
    assert torch.equal(plan(hidden, BypassedTopK(torch.zeros(4, 6))), hidden)
    for shape in ((3, 6), (4, 5), (4,)):
        with pytest.raises(ContractViolation, match=r"router_logits has shape .*, expected \(4, 6\)"):
            plan(hidden, BypassedTopK(torch.zeros(shape)))


@pytest.mark.parametrize("made", [make, one_kernel], ids=["steps", "one kernel"])
def test_checked_mode_does_not_care_what_padding_rows_hold(made: Any) -> None:
    plan, (hidden, decision) = made(check=True), call()
    hidden[1] = float("nan")
    with pytest.raises(ContractViolation, match="first in row 1"):
        plan(hidden, decision)
    decision.topk_ids[1, 0] = -1
    with pytest.raises(ContractViolation, match="first in row 1"):
        plan(hidden, decision)
    decision.topk_ids[1] = -1
    assert plan(hidden, decision)[[0, 2, 3]].isfinite().all()
