"""The three formats, with what dispatchers leave in rows that nobody may read, and tokens that arrive quantized."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import Activation
from moe_core.formats import BatchedDispatchOutput, GroupedDispatchOutput
from moe_core.protocols import RunningState
from moe_core.testing.dispatching import spread
from moe_core.testing.layers import PATTERNS
from moe_core.vocabulary import Step

EXPERT_MAJOR = ("testing_batched", "testing_grouped")
DISPATCHERS = (*EXPERT_MAJOR, "testing_standard", "testing_global")
SCHEMES = ("bf16", "fp8_tensor", "int8_w8a16", "int4_w4a16", "mxfp4_w4a16")
#: Schemes whose tokens travel quantized, and the payload that they travel in.
PAYLOADS = {"fp8_block128": "fp8_group128", "fp8_channel": "fp8_token", "int8_channel": "int8_token"}


def _terms(plan: Any) -> Any:
    return next(iter(plan.terms.values()))


@pytest.mark.parametrize(
    ("dispatcher", "pattern"),
    [*itertools.product(EXPERT_MAJOR, PATTERNS), ("testing_standard", "dropped"), ("testing_global", "duplicate")],
)
def test_pattern(lab: Any, dispatcher: str, pattern: str) -> None:
    """`one_hot` leaves all experts but one empty; the kit's padding rows hold NaN, and so do dropped weights."""
    config = lab.config(bias=True)
    lab.verify(config, lab.layer(config, 2, tokens=5, pattern=pattern), dispatcher=dispatcher)


@pytest.mark.parametrize(
    ("dispatcher", "scheme"),
    [*itertools.product(EXPERT_MAJOR, SCHEMES), ("testing_standard", "fp8_tensor"), ("testing_global", "int4_w4a16")],
)
def test_scheme(lab: Any, dispatcher: str, scheme: str) -> None:
    config = lab.config(scheme=scheme)
    lab.verify(config, lab.layer(config, pattern="dropped"), dispatcher=dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("scheme", PAYLOADS)
def test_tokens_arrive_quantized(lab: Any, dispatcher: str, scheme: str) -> None:
    config = lab.config(scheme=scheme)
    layer = lab.layer(config, pattern="dropped")
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    if lab.runner != "reference":
        assert _terms(plan).payload == PAYLOADS[scheme]
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config, dispatcher)


@pytest.mark.parametrize("dispatcher", EXPERT_MAJOR)
@pytest.mark.parametrize("changes", [{"activation": Activation(gated=False)}, {"routed_scaling_factor": 2.5}])
@pytest.mark.parametrize("dtype", [0, 1])
def test_options(lab: Any, dispatcher: str, changes: dict[str, Any], dtype: int) -> None:
    config = lab.config(bias=True, dtype=lab.dtypes[dtype], **changes)
    lab.verify(config, lab.layer(config, pattern="dropped"), dispatcher=dispatcher)


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("on_input", [False, True])
def test_no_combine(lab: Any, dispatcher: str, on_input: bool) -> None:
    config = lab.config(no_combine=True, router_weight_on_input=on_input)
    lab.verify(config, lab.layer(config, pattern="dropped"), dispatcher=dispatcher)


@pytest.mark.parametrize("dispatcher", EXPERT_MAJOR)
@pytest.mark.parametrize("on_input", [False, True])
def test_the_runner_weighs_the_rows(lab: Any, dispatcher: str, on_input: bool) -> None:
    """With weight on input it must be the runner: the row weights of padding rows are NaN here."""
    config = lab.config(router_weight_on_input=on_input, activation=Activation(name="gelu"))
    layer = lab.layer(config, pattern="dropped")
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    if on_input:
        assert _terms(plan).runner_does(Step.ROUTER_WEIGHT)
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)


@pytest.mark.parametrize("dispatcher", EXPERT_MAJOR)
@pytest.mark.parametrize("pattern", ["one_hot", "uniform"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128"])
def test_full_experts(lab: Any, dispatcher: str, pattern: str, scheme: str) -> None:
    """No padding at all: with `one_hot`, masked_m of an expert is M, and the others have no row."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config, tokens=4, pattern=pattern)
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher, options={dispatcher: {"padding": 0}})
    dispatched = plan.dispatch(layer.hidden, layer.topk, RunningState())
    if isinstance(dispatched, BatchedDispatchOutput) and pattern == "one_hot":
        assert int(dispatched.masked_m.max()) == dispatched.hidden_states.shape[1]
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)


def _steps(plan: Any, dispatched: Any, state: RunningState) -> Tensor:
    return plan.combine(plan.run(dispatched, state), state)


def _poisoned(d: Any, value: float) -> Any:
    """Other garbage in every row that belongs to nobody."""
    if isinstance(d, BatchedDispatchOutput):
        dead = torch.arange(d.hidden_states.shape[1], device=d.masked_m.device) >= d.masked_m[:, None]
    else:
        assert d.row_ids is not None
        dead = d.row_ids < 0
    hidden, weights = d.hidden_states.clone(), d.row_weights
    hidden[dead] = value
    if weights is not None:
        weights = weights.clone()
        weights[dead] = value
    return replace(d, hidden_states=hidden, row_weights=weights)


@pytest.mark.parametrize(
    ("dispatcher", "scheme"),
    [("testing_batched", "bf16"), ("testing_grouped", "bf16"), ("testing_grouped", "fp8_tensor")],
)
def test_padding_rows_may_hold_anything(lab: Any, dispatcher: str, scheme: str) -> None:
    """Bit for bit: a scale of the whole tensor (fp8_tensor) is taken from the rows that count."""
    config = lab.config(scheme=scheme, router_weight_on_input=True)
    layer = lab.layer(config, pattern="dropped")
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    results = []
    for value in (float("nan"), float("inf"), 0.0, 3e4) if lab.on_gpu else (float("nan"), 3e4):
        state = RunningState()
        results.append(_steps(plan, _poisoned(plan.dispatch(layer.hidden, layer.topk, state), value), state))
    lab.close(results[0], lab.expected(config, *layer), config)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_the_expected_count_is_only_a_hint(lab: Any) -> None:
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, dispatcher="testing_batched")
    for hint in (None, 1, 1000):
        state = RunningState()
        dispatched = replace(plan.dispatch(layer.hidden, layer.topk, state), expected_m=hint)
        lab.close(_steps(plan, dispatched, state), lab.expected(config, *layer), config, f"expected_m={hint}")


@pytest.mark.parametrize("quantized", [False, True])
def test_grouped_rows_without_padding(lab: Any, quantized: bool) -> None:
    """Alignment 1 and no row ids: every row up to the last offset counts, experts are of any size, some are empty."""
    config = lab.config(scheme="fp8_channel" if quantized else "bf16", top_k=1)
    layer = lab.layer(config, tokens=6)
    layer.topk.topk_ids[:, 0] = torch.tensor([1, 1, 1, 4, 5, 5], dtype=torch.int32, device=lab.device)
    plan = lab.plan(config, layer.weights, dispatcher="testing_grouped", options={"testing_grouped": {"padding": 0}})
    given = plan.dispatch(layer.hidden, layer.topk, RunningState())
    counts = torch.tensor([0, 0, 3, 3, 3, 4, 6], dtype=torch.int32, device=lab.device)
    rows = (given.row_ids >= 0).nonzero()[:, 0]
    rows = torch.cat([rows, rows[:2]])  # two rows more, behind the last offset
    compact = GroupedDispatchOutput(
        given.hidden_states[rows],
        counts,
        row_weights=None if given.row_weights is None else given.row_weights[rows],
        hidden_scale=None if given.hidden_scale is None else given.hidden_scale[rows],
    )
    out = plan.run(compact, RunningState()).hidden_states[:6]
    if not _terms(plan).runner_does(Step.ROUTER_WEIGHT):
        out = (out.float() * layer.topk.topk_weights).to(out.dtype)
    lab.close(out, lab.expected(config, *layer), config)


def test_batched_rows_of_a_larger_buffer(lab: Any) -> None:
    """Low-latency dispatchers hand out views of a buffer for the most tokens: rows are not next to each other."""
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, dispatcher="testing_batched")
    state = RunningState()
    given = plan.dispatch(layer.hidden, layer.topk, state)
    experts, m, width = given.hidden_states.shape
    buffer = torch.full((experts, m + 5, width + 16), float("nan"), dtype=given.hidden_states.dtype, device=lab.device)
    buffer[:, :m, :width] = given.hidden_states
    result = _steps(plan, replace(given, hidden_states=buffer[:, :m, :width]), state)
    lab.close(result, lab.expected(config, *layer), config)


@pytest.mark.parametrize("scheme", ["bf16", "int8_channel", "fp8_block128"])
def test_batches_with_room_for_many_more_rows(lab: Any, scheme: str) -> None:
    """As few rows as are expected decide how many programs there are, and rows behind an expert's own stay unread."""
    config = lab.config(scheme=scheme)
    layer = lab.layer(config, tokens=40)
    plan = lab.plan(config, layer.weights, dispatcher="testing_batched")
    state = RunningState()
    given = plan.dispatch(layer.hidden, layer.topk, state)
    m = given.hidden_states.shape[1]

    def roomy(rows: torch.Tensor | None) -> torch.Tensor | None:
        if rows is None:
            return None
        wide = torch.full((rows.shape[0], 700, *rows.shape[2:]), float("nan"), device=lab.device).to(rows.dtype)
        wide[:, :m] = rows
        return wide

    parts = ("hidden_states", "hidden_scale", "row_weights")
    many = replace(given, **{name: roomy(getattr(given, name)) for name in parts})
    for expected in (1, 30):  # far fewer than there are, and enough
        done = plan.run(replace(many, expected_m=expected), state)
        done.hidden_states = done.hidden_states[:, :m].contiguous()
        lab.close(plan.combine(done, state), lab.expected(config, *layer), config)


@pytest.mark.parametrize("experts", [1, 6])
@pytest.mark.parametrize("dispatcher", ["testing_standard", "testing_batched", "testing_grouped"])
def test_scales_that_lie_column_major(lab: Any, dispatcher: str, experts: int) -> None:
    """DeepEP's scales of groups of 128 are handed out transposed: logical shape, other strides."""
    config = lab.config(scheme="fp8_block128", num_experts=experts, top_k=min(2, experts))
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, dispatcher=dispatcher)
    if _terms(plan).payload != "fp8_group128":
        pytest.skip("tokens are not quantized here")
    state = RunningState()
    given = plan.dispatch(layer.hidden, layer.topk, state)
    turned = given.hidden_scale.transpose(-2, -1).contiguous().transpose(-2, -1)
    result = _steps(plan, replace(given, hidden_scale=turned), state)
    lab.close(result, lab.expected(config, *layer), config)


def test_standard_rows_behind_num_valid(lab: Any) -> None:
    """Ids of padding rows are numbers that no expert has; given outputs hold the tokens' rows only."""
    config = lab.config(bias=True)
    layer = lab.layer(config)
    for dispatcher in ("testing_standard", "testing_global"):
        options = {dispatcher: {"padding": 13}}
        plan = lab.plan(config, layer.weights, dispatcher=dispatcher, options=options)
        output = torch.empty_like(layer.hidden)
        result = plan(layer.hidden, layer.topk, state=RunningState(output=output))
        assert result.data_ptr() == output.data_ptr()
        lab.close(output, lab.expected(config, *layer), config, dispatcher)


def test_num_valid_may_change_between_calls(lab: Any) -> None:
    """A device scalar: the same shapes with another count, down to none."""
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, "fused", dispatcher="testing_standard")
    expected = lab.expected(config, *layer)
    for valid in (5, 2, 0):
        state = RunningState()
        given = plan.dispatch(layer.hidden, layer.topk, state)
        where = torch.arange(valid, device=lab.device)
        names = ("hidden_states", "topk_ids", "topk_weights")
        cut = {name: spread(getattr(given, name)[:valid], where, 8) for name in names}
        count = torch.full((), valid, dtype=torch.int32, device=lab.device)
        rows = plan.run(replace(given, num_valid=count, **cut), state).hidden_states
        lab.close(rows[:valid], expected[:valid], config, f"{valid} rows")


@pytest.mark.gpu
@pytest.mark.parametrize("dispatcher", EXPERT_MAJOR)
@pytest.mark.parametrize("scheme", ["bf16", *PAYLOADS, "mxfp4_w4a16"])
@pytest.mark.parametrize("tokens", [1, 33, 128, 700])
def test_large(lab: Any, dispatcher: str, scheme: str, tokens: int) -> None:
    config = lab.config(scheme=scheme, num_experts=32, top_k=4, hidden_size=2048, intermediate_size=768)
    weights = lab.layer(config, tokens=1).weights
    plan = lab.plan(config, weights, dispatcher=dispatcher)
    oracle = lab.plan(config, weights, "split", runner="reference")
    for pattern in ("uniform", "skewed", "dropped"):
        call = lab.tokens(config, tokens, 6, pattern)
        lab.close(plan(*call), oracle(*call), config, f"{tokens} tokens, {pattern}")
