"""Whole layers of one rank through a plan, over the double, for every quant type, option and way of arriving."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
from moe_core_aiter.adapters import pre_standard
from moe_core_aiter.schemes import SCHEMES

import moe_core
from moe_core import (
    Activation,
    BindError,
    ContractViolation,
    DroppedSlot,
    ParallelConfig,
    Phase,
    RunningState,
    TopKOutput,
    WeightError,
)
from moe_core.quant import roundtrip_activation
from moe_core.registry import Registry
from moe_core.testing import make_layer
from moe_core.vocabulary import IdSpace

ARCHS = [(arch, s) for arch in ("gfx942", "gfx950") for s in SCHEMES if arch == "gfx950" or not s.startswith("mx")]
QUANT = {name: scheme.quant_type for name, scheme in SCHEMES.items()} | {"fp8_tensor": "per_Token"}
each = pytest.mark.parametrize(("arch", "scheme"), ARCHS)


@each
@pytest.mark.parametrize("pattern", ["dropped", "skewed"])
def test_every_scheme(arch: str, scheme: str, pattern: str, bench: Any) -> None:
    here = bench(arch)
    plan = here.check(here.config(scheme, routed_scaling_factor=1.5), pattern=pattern)
    assert plan.terms["standard"].dropped is DroppedSlot.SINK
    call = here.double.calls[-1]
    assert call["quant_type"].name == QUANT[scheme]
    assert call["expert_mask"].tolist() == [1] * 8 + [0]


@pytest.mark.parametrize("version", ["0.1.14", "0.1.16", "0.1.17", "e4048607"])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("parallel", [None, ParallelConfig(ep_size=2, ep_rank=1, reduce="caller")])
def test_newer_builds_get_their_masked_slot(top_k: int, version: str, parallel: Any, bench: Any, never: Any) -> None:
    """They subtract one from the number of slots wherever there is a mask."""
    here = bench("gfx950", version)
    config = here.config("fp8_block128", top_k=top_k)
    layer = make_layer(config, 3, tokens=20)
    weights = layer.weights if parallel is None else layer.weights.shard(config, parallel)
    whole = moe_core.plan(config, weights, parallel, runner="reference", registry=Registry(autoload=False))
    for request in ({}, never):
        plan = here.plan(config, weights, parallel=parallel, **request)
        here.close(plan(layer.hidden, layer.topk), whole(layer.hidden, layer.topk), config)
        call = here.double.calls[-1]
        masked = call["expert_mask"] is not None
        assert masked is (parallel is not None or not request)
        more = masked and version != "0.1.14"
        assert call["topk_ids"].shape[1] == top_k + more
        if more:
            assert not bool(call["expert_mask"][call["topk_ids"][:, -1]].any())
            assert not bool(call["topk_weight"][:, -1].any())


def test_a_mask_that_leaves_out_nothing_is_none(bench: Any, never: Any) -> None:
    """It would be taken for one that leaves out a slot."""
    here = bench()
    layer = make_layer(here.config(top_k=1), 3, tokens=4)
    plan = here.plan(here.config(top_k=1), layer.weights, **never)
    terms = replace(plan.terms["standard"], id_space=IdSpace.GLOBAL, extras=frozenset({"expert_mask"}))
    sent = plan.dispatch(layer.hidden, layer.topk, RunningState())
    sent.expert_mask = torch.ones(8, dtype=torch.int32)
    call = pre_standard(replace(plan._binding, terms=terms))(sent, plan.quant_info, here.config(), RunningState())
    assert (call.mask, call.ids.shape[1]) == (None, 1)


@each
def test_nothing_is_masked_where_nothing_is_dropped(arch: str, scheme: str, bench: Any, never: Any) -> None:
    here = bench(arch)
    plan = here.check(here.config(scheme), **never)
    assert (plan.terms["standard"].id_space, here.double.calls[-1]["expert_mask"]) == (IdSpace.LOCAL, None)


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "fp8_channel", "fp8_tensor", "mxfp4", "mxfp8"])
def test_float16(scheme: str, bench: Any) -> None:
    here = bench()
    here.check(here.config(scheme, dtype="float16"))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "int8_channel"])
def test_gelu(scheme: str, bench: Any) -> None:
    here = bench()
    here.check(here.config(scheme, activation=Activation(name="gelu")))
    assert here.double.calls[-1]["activation"].name == "Gelu"


@each
@pytest.mark.parametrize("scale_of_input", [1.0, 1.5])
def test_router_weight_on_the_input(arch: str, scheme: str, scale_of_input: float, bench: Any) -> None:
    here = bench(arch)
    config = here.config(scheme, top_k=1, router_weight_on_input=True, routed_scaling_factor=scale_of_input)
    here.check(config, pattern="dropped")
    assert set(here.double.calls[-1]["topk_weight"][:, 0].tolist()) == {scale_of_input}


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_static_scales_go_to_the_kernels_for_whole_tensors(arch: str, bench: Any) -> None:
    here = bench(arch)
    config = here.config("fp8_tensor")
    layer = make_layer(config, 3, tokens=20, pattern="dropped")
    layer.weights.w13_input_scale = torch.full((8,), 0.01)
    layer.weights.w2_input_scale = torch.full((8, 1), 0.02)
    plan = here.plan(config, layer.weights, dispatcher="testing_standard")
    here.close(plan(layer.hidden, layer.topk), here.expected(config, layer), config)
    call = here.double.calls[-1]
    assert (call["quant_type"].name, call.get("num_local_tokens")) == ("per_Tensor", None)
    assert call["a1_scale"].tolist() == pytest.approx([0.02 if arch == "gfx942" else 0.01])


def test_static_scales_that_aiter_cannot_say_are_refused(bench: Any) -> None:
    here = bench()
    config = here.config("fp8_tensor")
    weights = make_layer(config, 3).weights
    weights.w13_input_scale = torch.full((8,), 0.01)
    with pytest.raises(WeightError, match="w13_input_scale was given alone"):
        here.plan(config, weights)
    weights.w2_input_scale = torch.linspace(0.01, 0.02, 8)
    with pytest.raises(WeightError, match="w2_input_scale differs between experts"):
        here.plan(config, weights)
    weights.w2_input_scale = weights.w13_input_scale
    weights.w13_scale = torch.linspace(0.01, 0.02, 16).view(8, 2)
    with pytest.raises(WeightError, match="gate and up have scales of their own"):
        here.plan(config, weights)


@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_gate_and_up_with_scales_of_their_own(arch: str, bench: Any) -> None:
    here = bench(arch)
    config = here.config("fp8_tensor")
    layer = make_layer(config, 3, tokens=20)
    layer.weights.w13_scale = layer.weights.w13_scale.reshape(8, -1)[:, :1] * torch.tensor([[1.0, 1.7]])
    plan = here.plan(config, layer.weights)
    here.close(plan(layer.hidden, layer.topk), here.expected(config, layer), config)


def test_zero_points_are_refused(bench: Any) -> None:
    here = bench()
    config = here.config("int4_w4a16")
    weights = make_layer(config, 3).weights
    weights.w13_zero = torch.full_like(weights.w13_scale, 8, dtype=torch.uint8)
    with pytest.raises(WeightError, match="no zero points"):
        here.plan(config, weights)


PAYLOADS = [("fp8_block128", "fp8_group128"), ("fp8_channel", "fp8_token"), ("mxfp4", "mxfp4")]


@pytest.mark.parametrize("weigh", [False, True])
@pytest.mark.parametrize(("scheme", "payload"), PAYLOADS)
@pytest.mark.parametrize("arch", ["gfx942", "gfx950"])
def test_quantized_tokens_behind_padding_rows(arch: str, scheme: str, payload: str, weigh: bool, bench: Any) -> None:
    if (arch, scheme) == ("gfx942", "mxfp4"):
        pytest.skip("fp4 kernels are built for gfx950")
    here = bench(arch)
    config = here.config(scheme, **({"top_k": 1, "router_weight_on_input": True} if weigh else {}))
    layer = make_layer(config, 3, tokens=20, pattern="dropped")
    plan = here.plan(config, layer.weights, dispatcher="testing_standard")
    assert plan.terms["standard"].payload == payload
    seen = roundtrip_activation(layer.hidden.float(), payload).bfloat16()
    here.close(plan(layer.hidden, layer.topk), here.expected(config, layer, seen), config)
    call = here.double.calls[-1]
    as_is = not (weigh and payload == "mxfp4")
    assert (call["hidden_states"].element_size() == 1) is as_is
    assert int(call["num_local_tokens"]) == 20


@pytest.mark.parametrize("build", [{"flydsl": False}, {"version": "0.1.7.post2.dev18"}])
def test_mxfp4_tokens_are_widened_where_the_build_would_quantize_their_bytes(build: Any, bench: Any) -> None:
    here = bench("gfx950", **build)
    config = here.config("mxfp4")
    layer = make_layer(config, 3, tokens=20)
    plan = here.plan(config, layer.weights, dispatcher="testing_standard")
    seen = roundtrip_activation(layer.hidden.float(), "mxfp4").bfloat16()
    here.close(plan(layer.hidden, layer.topk), here.expected(config, layer, seen), config)
    assert here.double.calls[-1]["hidden_states"].dtype is torch.bfloat16


@each
def test_padding_rows_with_and_without_a_sink(arch: str, scheme: str, bench: Any, never: Any) -> None:
    """Rows past num_valid hold NaN and ids far outside; nobody may see them."""
    here = bench(arch)
    config = here.config(scheme)
    for request in ({}, never):
        here.check(config, dispatcher="testing_standard", **request)
    assert all(int(call["num_local_tokens"]) == 20 for call in here.double.calls)


@pytest.mark.parametrize("tokens", [0, 1, 300])
def test_few_and_many_tokens(tokens: int, bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 3, tokens=tokens)
    plan = here.plan(here.config(), layer.weights)
    result = plan(layer.hidden, layer.topk)
    assert result.shape == layer.hidden.shape
    assert result.dtype == torch.bfloat16
    assert len(here.double.calls) == (tokens > 0)
    here.close(result, here.expected(here.config(), layer), here.config())


@pytest.mark.parametrize("dispatcher", ["standard", "testing_standard"])
def test_large_calls_of_four_bit_weights_are_cut(dispatcher: str, bench: Any) -> None:
    """From 256 rows on, AITER would quantize the tokens of a weight-only scheme to fp8."""
    here = bench()
    here.check(here.config("mxfp4_w4a16"), tokens=600, dispatcher=dispatcher)
    rows = [call["hidden_states"].shape[0] for call in here.double.calls]
    assert max(rows) == 255
    assert len(rows) == 3


def test_the_bound_is_aiters_own(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bench()
    config = here.config("mxfp4_w4a16")
    layer = make_layer(config, 3, tokens=100)
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", "64")
    here.plan(config, layer.weights)(layer.hidden, layer.topk)
    assert [call["hidden_states"].shape[0] for call in here.double.calls] == [63, 37]
    monkeypatch.setenv("AITER_BF16_FP8_MOE_BOUND", "0")
    with pytest.raises(BindError, match="AITER_BF16_FP8_MOE_BOUND=0 AITER quantizes the tokens of every call"):
        here.plan(config, layer.weights)
    here.plan(config, layer.weights, options={"aiter": {"round_tokens": True}})


def test_large_calls_in_one_where_rounding_is_allowed(bench: Any) -> None:
    here = bench()
    config = here.config("mxfp4_w4a16")
    layer = make_layer(config, 3, tokens=600)
    plan = here.plan(config, layer.weights, options={"aiter": {"round_tokens": True}})
    error = moe_core.testing.tolerances.relative_error(plan(layer.hidden, layer.topk), here.expected(config, layer))
    assert [call["hidden_states"].shape[0] for call in here.double.calls] == [600]
    assert 1e-2 < error < 8e-2  # mxfp8 tokens
    with pytest.raises(BindError, match="round_tokens is true or false"):
        here.plan(config, layer.weights, options={"aiter": {"round_tokens": 1}})


def test_a_tile_of_sorted_tokens_may_be_chosen(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 3, tokens=4)
    here.plan(here.config(), layer.weights, options={"aiter": {"block_size_m": 32}})(layer.hidden, layer.topk)
    assert here.double.calls[-1]["block_size_M"] == 32
    with pytest.raises(BindError, match="one of 16, 32, 64, 128, got 48"):
        here.plan(here.config(), layer.weights, options={"aiter": {"block_size_m": 48}})


@pytest.mark.parametrize("more", [(), ("output",)])
def test_the_callers_tensor_takes_the_result(more: tuple[str, ...], bench: Any) -> None:
    here = bench(more=more)
    layer = make_layer(here.config(), 3, tokens=20)
    plan = here.plan(here.config(), layer.weights)
    mine = torch.full_like(layer.hidden, float("nan"))
    result = plan(layer.hidden, layer.topk, state=RunningState(output=mine))
    assert result is mine
    assert ("output" in here.double.calls[-1]) is bool(more)
    here.close(mine, here.expected(here.config(), layer), here.config())


@each
def test_update_keeps_addresses(arch: str, scheme: str, bench: Any) -> None:
    here = bench(arch)
    config = here.config(scheme)
    old, new = make_layer(config, 1, tokens=20), make_layer(config, 2, tokens=20)
    kept = {name: tensor.clone() for name, tensor in old.weights.tensors().items()}
    plan = here.plan(config, old.weights)
    places = plan.quant_info.w1.data_ptr(), plan.quant_info.w2.data_ptr()
    plan.update_weights(new.weights)
    here.close(plan(new.hidden, new.topk), here.expected(config, new), config)
    assert places == (plan.quant_info.w1.data_ptr(), plan.quant_info.w2.data_ptr())
    for name, tensor in old.weights.tensors().items():
        assert torch.equal(tensor.view(torch.uint8), kept[name].view(torch.uint8)), name


def test_an_update_that_would_change_the_kernels_is_refused(bench: Any) -> None:
    here = bench()
    config = here.config("fp8_tensor")
    layer = make_layer(config, 1)
    plan = here.plan(config, layer.weights)
    layer.weights.w13_input_scale = layer.weights.w2_input_scale = torch.full((8,), 0.01)
    with pytest.raises(WeightError, match="more than the values"):
        plan.update_weights(layer.weights)


@each
def test_a_plan_travels(arch: str, scheme: str, bench: Any) -> None:
    here = bench(arch)
    config = here.config(scheme)
    layer = make_layer(config, 1, tokens=4)
    info = here.plan(config, layer.weights).quant_info
    again = pickle.loads(pickle.dumps(info))
    assert (again.layout, again.quant_type, again.hidden_pad) == (info.layout, info.quant_type, info.hidden_pad)
    assert again.w1.dtype is info.w1.dtype
    assert torch.equal(again.w1.view(torch.uint8), info.w1.view(torch.uint8))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "int8_channel"])
def test_two_calls_in_flight(scheme: str, bench: Any) -> None:
    here = bench()
    config = here.config(scheme)
    layers = [make_layer(config, 1, tokens=9), make_layer(config, 2, tokens=14, pattern="dropped")]
    layers[1] = layers[1]._replace(weights=layers[0].weights)
    plan = here.plan(config, layers[0].weights)
    states = [RunningState() for _ in layers]
    sent = [plan.dispatch(one.hidden, one.topk, state) for one, state in zip(layers, states, strict=True)]
    done = [plan.run(one, state) for one, state in zip(sent, states, strict=True)]
    for i in (1, 0):
        here.close(plan.combine(done[i], states[i]), here.expected(config, layers[i]), config)


def test_phases_share_a_runner(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 1, tokens=4)
    plan = here.plan(here.config(), layer.weights, phases=[Phase.PREFILL, Phase.DECODE])
    for phase in Phase:
        here.close(plan(layer.hidden, layer.topk, phase=phase), here.expected(here.config(), layer), here.config())


def test_checked_mode_looks_at_every_row(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 1, tokens=6)
    plan = here.plan(here.config(), layer.weights, check=True)
    here.close(plan(layer.hidden, layer.topk), here.expected(here.config(), layer), here.config())
    state = RunningState()
    for what, change, message in (
        ("topk_ids", lambda t: torch.where(t == t[3, 1], -1, t).int(), r"topk_ids\[.*\] is -1"),
        ("topk_ids", lambda t: t + 9, r"AITER takes ids from 0 to 8 on every row"),
        ("expert_mask", lambda t: t.roll(1), "expert_mask is"),
        ("num_valid", lambda t: torch.tensor(7), "num_valid is 7, for 6 rows"),
    ):
        sent = plan.dispatch(layer.hidden, layer.topk, state)
        setattr(sent, what, change(getattr(sent, what)))
        with pytest.raises(ContractViolation, match=message):
            plan.run(sent, state)


def test_kinds_are_compared_on_every_call(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 1, tokens=6)
    plan, state = here.plan(here.config(), layer.weights), RunningState()
    for what, change, message in (
        ("topk_ids", lambda t: t.long(), "topk_ids is torch.int64"),
        ("topk_weights", lambda t: t.bfloat16(), "topk_weights is torch.bfloat16"),
        ("expert_mask", lambda t: t.bool(), "expert_mask is contiguous torch.bool"),
        ("expert_mask", lambda t: t[:-1], r"not contiguous int32 \(9,\)"),
        ("expert_mask", lambda t: t.repeat(2)[::2], "expert_mask is strided"),
        ("expert_mask", lambda t: None, "expert_mask is missing"),
        ("topk_ids", lambda t: None, "the router was bypassed"),
    ):
        sent = plan.dispatch(layer.hidden, layer.topk, state)
        setattr(sent, what, change(getattr(sent, what)))
        with pytest.raises(ContractViolation, match=message):
            plan.run(sent, state)
    assert not here.double.calls


WRONG_TOKENS = [
    ("bf16", "hidden_states", lambda t: t.float(), r"hidden_states is torch.float32 \(.*, 256\), not torch.bfloat16"),
    ("bf16", "hidden_states", lambda t: t[:, :128], r"hidden_states is torch.bfloat16 \(.*, 128\), not torch.bfloat16"),
    ("bf16", "hidden_scale", lambda t: torch.ones(23, 2), "hidden_scale was given, and rows in bf16 have none"),
    ("fp8_block128", "hidden_states", lambda t: t.float(), "not torch.float8_e4m3fn"),
    ("fp8_block128", "hidden_scale", lambda t: None, "hidden_scale is missing"),
    ("fp8_block128", "hidden_scale", lambda t: t.double(), "hidden_scale is torch.float64"),
    ("fp8_block128", "hidden_scale", lambda t: t.t(), r"hidden_scale is torch.float32 \(2, 23\), not .* \(23, 2\)"),
    ("fp8_channel", "hidden_scale", lambda t: t[:-1], r"not torch.float32 \(23, 1\)"),
    ("mxfp4", "hidden_states", lambda t: t[:, :32], r"\(23, 32\), not torch.uint8 \(23, 160\)"),
    ("mxfp4", "hidden_scale", lambda t: t.float(), r"hidden_scale is torch.float32 \(23, 10\), not torch.uint8"),
]


@pytest.mark.parametrize(("scheme", "what", "change", "message"), WRONG_TOKENS)
def test_tokens_and_their_scales_are_compared_on_every_call(
    scheme: str, what: str, change: Any, message: str, bench: Any
) -> None:
    here = bench()
    config = here.config(scheme)
    layer = make_layer(config, 1, tokens=20)
    plan, state = here.plan(config, layer.weights, dispatcher="testing_standard"), RunningState()
    sent = plan.dispatch(layer.hidden, layer.topk, state)
    setattr(sent, what, change(getattr(sent, what)))
    with pytest.raises(ContractViolation, match=message):
        plan.run(sent, state)
    assert not here.double.calls


def test_strided_ids_and_weights(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config(), 1, tokens=6)
    ids, weights = (t.repeat(1, 2)[:, :3] for t in (layer.topk.topk_ids, layer.topk.topk_weights))
    result = here.plan(here.config(), layer.weights)(layer.hidden, TopKOutput(ids, weights))
    here.close(result, here.expected(here.config(), layer), here.config())
