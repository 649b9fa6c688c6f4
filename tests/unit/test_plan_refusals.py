"""What a person reads when a plan is given something that it cannot take."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import (
    BindError,
    BypassedTopK,
    CanonicalWeights,
    ConfigError,
    ContractViolation,
    DroppedSlot,
    MoeConfig,
    MoePlan,
    ParallelConfig,
    Registry,
    RunnerHooks,
    RunningState,
    Settings,
    TopKOutput,
    UnsupportedOverride,
    WeightError,
)

E, K, H, INNER = 6, 2, 32, 48
LAYER = MoeConfig(num_experts=E, top_k=K, hidden_size=H, intermediate_size=INNER, dtype="float32")
REGISTRY = Registry(autoload=False, settings=Settings())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def weights(config: MoeConfig = LAYER) -> CanonicalWeights:
    generator = torch.Generator().manual_seed(0)
    rows = config.gate_up_factor * INNER
    w13, w2 = torch.randn(E, rows, H, generator=generator), torch.randn(E, H, INNER, generator=generator)
    return CanonicalWeights.quantize(w13, w2, config)


def make(config: MoeConfig = LAYER, given: CanonicalWeights | None = None, **changes: Any) -> MoePlan:
    changes.setdefault("settings", Settings(**{k: changes.pop(k) for k in list(changes) if k in SETTINGS}))
    return moe_core.plan(config, given or weights(config), registry=REGISTRY, **changes)


SETTINGS = ("runner", "path", "dispatcher", "check", "options")
PLAN = make()


def tokens(count: int = 3) -> Tensor:
    return torch.randn(count, H, generator=torch.Generator().manual_seed(1))


def topk(count: int = 3) -> TopKOutput:
    ids = torch.arange(count * K, dtype=torch.int32).reshape(count, K) % E
    return TopKOutput(ids, torch.full((count, K), 0.5))


@pytest.mark.parametrize(
    ("hidden", "message"),
    [
        (lambda: tokens()[:, :16], "hidden_states has shape (3, 16), expected [tokens, 32]"),
        (lambda: tokens().reshape(1, 3, H), "hidden_states has shape (1, 3, 32), expected [tokens, 32]"),
        (lambda: tokens()[0], "hidden_states has shape (32,), expected [tokens, 32]"),
        (lambda: tokens().bfloat16(), "hidden_states is torch.bfloat16, the plan was made for torch.float32"),
        (lambda: tokens().to("meta"), "hidden_states is on meta, the weights are on cpu"),
        (lambda: tokens().requires_grad_(), "wants a gradient, and moe_core runs inference only"),
    ],
)
def test_tokens_that_do_not_fit_are_named(hidden: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ContractViolation, match=re.escape(message)):
        PLAN(hidden(), topk())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"topk_ids": torch.zeros(3, 3, dtype=torch.int32)},
            "topk_ids has shape (3, 3), expected (3, 2) ([tokens, top_k])",
        ),
        ({"topk_weights": torch.zeros(2, 2)}, "topk_weights has shape (2, 2), expected (3, 2)"),
        ({"topk_ids": torch.zeros(6, dtype=torch.int32)}, "topk_ids has shape (6,), expected (3, 2)"),
        ({"topk_ids": torch.zeros(3, 2)}, "topk_ids is torch.float32, expected int32 or int64"),
        ({"topk_ids": torch.zeros(3, 2, dtype=torch.int16)}, "topk_ids is torch.int16, expected int32 or int64"),
        ({"topk_weights": torch.zeros(3, 2, dtype=torch.int32)}, "topk_weights is torch.int32, expected float32"),
        (
            {"topk_ids": torch.zeros(3, 2, dtype=torch.int32, device="meta")},
            "topk_ids is on meta, hidden_states on cpu",
        ),
        ({"topk_weights": torch.zeros(3, 2, device="meta")}, "topk_weights is on meta, hidden_states on cpu"),
    ],
)
def test_a_router_decision_that_does_not_fit_is_named(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ContractViolation, match=re.escape(message)):
        PLAN(tokens(), replace(topk(), **change))


def test_everything_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(ContractViolation) as caught:
        PLAN(torch.zeros(1, 3, 16, dtype=torch.float64), BypassedTopK(torch.zeros(3, E)))
    text = str(caught.value)
    assert text.count("\n    ") == 3
    assert "the router's decision is 'bypassed', the plan was made for 'standard'" in text
    with pytest.raises(ContractViolation) as caught:
        PLAN(tokens(), TopKOutput(torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64)))
    assert str(caught.value).count("\n    ") == 4


def test_a_gradient_does_not_matter_where_none_is_recorded() -> None:
    with torch.no_grad():
        assert torch.equal(PLAN(tokens().requires_grad_(), topk()), PLAN(tokens(), topk()))


def test_hooks_that_the_plan_was_not_made_for_are_refused() -> None:
    state = RunningState(hooks=RunnerHooks(after_down=lambda rows, info: None))
    with pytest.raises(
        ContractViolation, match=r"(?s)brings the hooks \['after_down'\], .* for none.*hooks=\['after_down"
    ):
        PLAN(tokens(), topk(), state=state)
    bound = make(hooks=("after_down",))
    assert torch.equal(bound(tokens(), topk(), state=state), PLAN(tokens(), topk()))
    both = RunningState(hooks=RunnerHooks(after_gate_up=lambda r, i: None, after_down=lambda r, i: None))
    with pytest.raises(ContractViolation, match=r"'after_down', 'after_gate_up'.* made for \['after_down'\]"):
        bound(tokens(), topk(), state=both)


def test_a_format_that_was_not_bound_is_refused() -> None:
    from moe_core.formats import GroupedDispatchOutput

    other = GroupedDispatchOutput(tokens(), torch.zeros(E + 1, dtype=torch.int32))
    with pytest.raises(ContractViolation, match=r"bound for the formats \['standard'\], got 'grouped'"):
        PLAN.run(other)


def with_weights(config: MoeConfig = LAYER, **changes: Any) -> MoePlan:
    return make(config, replace(weights(config), **changes))


FP8 = replace(LAYER, scheme="fp8_tensor")


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (LAYER, {"w13": torch.zeros(E, INNER, H)}, "w13 has shape (6, 48, 32), expected (6, 96, 32)"),
        (LAYER, {"w2": torch.zeros(E, INNER, H)}, "w2 has shape (6, 48, 32), expected (6, 32, 48)"),
        (LAYER, {"w13": torch.zeros(E, 2 * INNER, H).half()}, "w13 is torch.float16, expected float32"),
        (
            LAYER,
            {"w13": torch.zeros(E, H, 2 * INNER).transpose(1, 2)},
            "w13 is not contiguous (strides (3072, 1, 96)); call",
        ),
        (LAYER, {"w2": torch.zeros(E, H, INNER, device="meta")}, "w2 is on meta, but w13 is on cpu"),
        (LAYER, {"w13_bias": torch.zeros(E, 2 * INNER)}, "biases were given, but MoeConfig.bias is False"),
        (
            replace(LAYER, bias=True),
            {"w13_bias": torch.zeros(E, INNER)},
            "w13_bias has shape (6, 48), expected (6, 96) (MoeConfig.bias is set)",
        ),
        (replace(LAYER, bias=True), {}, "w2_bias is missing: expected shape (6, 32) of bfloat16 or float16"),
        (FP8, {"w2_scale": None}, "w2_scale is missing: scheme 'fp8_tensor' needs [(6,), (6, 1)]"),
        (FP8, {"w13_scale": torch.ones(E, 3)}, "w13_scale has shape (6, 3), expected [(6,), (6, 1), (6, 2)]"),
        (FP8, {"w13": torch.zeros(E, 2 * INNER, H)}, "w13 is torch.float32, expected float8_e4m3fn"),
        (FP8, {"w13_zero": torch.zeros(E, 1)}, "w13_zero was given, but scheme 'fp8_tensor' has no zero points"),
    ],
)
def test_weights_that_do_not_fit_are_named(config: MoeConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=re.escape(message)) as caught:
        with_weights(config, **changes)
    assert "CanonicalWeights.shard()" in str(caught.value)
    assert f"in scheme {config.scheme!r}" in str(caught.value)


def test_all_that_is_wrong_with_the_weights_is_said_at_once() -> None:
    with pytest.raises(WeightError) as caught:
        with_weights(w13=torch.zeros(1, 2, 3).half(), w2=torch.zeros(4).double(), w2_bias=torch.zeros(1))
    assert str(caught.value).count("\n    ") == 5


def test_a_whole_models_weights_are_not_a_ranks() -> None:
    with pytest.raises(WeightError, match=r"rank ep 1/2, tp 0/1 .*\n    w13 has shape \(6, 96, 32\), expected \(3,"):
        make(parallel=ParallelConfig(ep_size=2, ep_rank=1, reduce="caller"))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"options": {"cpu": {"pak_weights": False}}},
            ConfigError,
            r"(?s)'cpu' has no option 'pak_weights'.*'pack_weights'",
        ),
        (
            {"options": {"cpu": {"pack_weights": 3}}},
            ConfigError,
            "pack_weights of runner 'cpu' must be 'auto', True or False, got 3",
        ),
        (
            {"runner": "cpu", "hardware": "h200"},
            UnsupportedOverride,
            "(?s)runner 'cpu' was asked for by name.*this is cuda",
        ),
        ({"runner": "cpuu"}, ConfigError, "(?s)no runner is called 'cpuu'.*did you mean 'cpu'"),
        ({"hardware": "h200"}, BindError, "made for NVIDIA H200 .*, but the weights are on cpu"),
        ({"assume": ("targets",)}, BindError, "a plan can take nothing for granted"),
        ({"fases": ()}, ConfigError, "unknown setting 'fases'"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(changes: dict[str, Any], error: type[Exception], message: str) -> None:
    if "fases" in changes:
        with pytest.raises(error, match=message):
            moe_core.plan(LAYER, weights(), registry=REGISTRY, **changes)
    else:
        with pytest.raises(error, match=message):
            make(**changes)


def test_weights_on_meta_are_not_on_this_machine() -> None:
    with pytest.raises(BindError, match="the weights are on meta"):
        make(given=weights().to("meta"))


@pytest.mark.parametrize("parallel", [{"ep_size": 2}, {"tp_size": 2}])
def test_ranks_that_must_sum_need_a_group(parallel: dict[str, int]) -> None:
    ranks = ParallelConfig(**parallel)
    with pytest.raises(BindError, match=r"(?s)no process group was given.*ParallelConfig\(reduce='caller'\)") as caught:
        make(given=weights().shard(LAYER, ranks), parallel=ranks)
    assert ("ep_reduce" if "ep_size" in parallel else "tp_reduce") in str(caught.value)


def checked(**changes: Any) -> MoePlan:
    return make(check=True, **changes)


@pytest.mark.parametrize(
    ("value", "incoming", "message"),
    [
        (E, DroppedSlot.NEGATIVE, "topk_ids[1, 0] is 6: expert ids are 0 to 5, dropped slots are -1 (1 such slots)"),
        (-2, DroppedSlot.NEGATIVE, "topk_ids[1, 0] is -2"),
        (-1, DroppedSlot.NEVER, "topk_ids[1, 0] is -1: expert ids are 0 to 5, and no slot may be dropped"),
        (-1, DroppedSlot.SINK, "topk_ids[1, 0] is -1: expert ids are 0 to 5, dropped slots are 6"),
        (7, DroppedSlot.SINK, "topk_ids[1, 0] is 7"),
    ],
)
def test_checked_mode_refuses_ids_out_of_range(value: int, incoming: DroppedSlot, message: str) -> None:
    decision = topk()
    decision.topk_ids[1, 0] = value
    with pytest.raises(ContractViolation, match=re.escape(message)):
        checked(incoming=incoming)(tokens(), decision)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_checked_mode_refuses_values_that_are_not_finite(bad: float) -> None:
    plan, decision, hidden = checked(), topk(), tokens()
    assert torch.equal(plan(hidden, decision), PLAN(hidden, decision))
    decision.topk_weights[2, 1] = bad
    with pytest.raises(ContractViolation, match=re.escape(f"topk_weights[2, 1] is {bad}, and its slot is not dropped")):
        plan(hidden, decision)
    decision.topk_ids[2, 1] = -1  # now it does not matter
    assert plan(hidden, decision).isfinite().all()
    hidden[1, 3] = bad
    with pytest.raises(ContractViolation, match="hidden_states has values that are not finite, first in row 1"):
        plan(hidden, decision)


def test_the_environment_turns_checks_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decision = topk()
    decision.topk_ids[0, 0] = 99
    monkeypatch.setenv("MOE_CORE_CHECK", "1")
    with pytest.raises(ContractViolation, match="is 99"):
        moe_core.plan(LAYER, weights(), registry=REGISTRY)(tokens(), decision)
