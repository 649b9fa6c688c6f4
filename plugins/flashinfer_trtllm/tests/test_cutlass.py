"""`flashinfer_cutlass` over the strict double: whole layers of every scheme against the oracle."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import trtllm_double_cutlass
from trtllm_double import config, expected, layer_of, plan, verify

from moe_core import Activation, CanonicalWeights, MoeConfig, ParallelConfig, RunningState, TopKOutput
from moe_core.errors import BindError, UnsupportedOverride, WeightError
from moe_core.testing import assert_close
from moe_core.vocabulary import Phase

RUNNER = "flashinfer_cutlass"
SCHEMES = ("bf16", "fp8_tensor", "fp8_block128", "mxfp4_w4a16", "nvfp4")
OAI = Activation.swiglu_oai()
pytestmark = pytest.mark.usefixtures("double")


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "skewed", "dropped", "duplicate"])
def test_whole_layers(scheme: str, pattern: str) -> None:
    layer = config(scheme)
    verify(RUNNER, layer, layer_of(layer, 3, tokens=21, pattern=pattern))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", [Activation(limit=0.4), OAI, replace(OAI, limit=None)])
def test_clamped_and_oai_activations(scheme: str, activation: Activation) -> None:
    verify(RUNNER, config(scheme, activation=activation))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_tensor", "nvfp4"])
def test_layers_without_a_gate(scheme: str) -> None:
    verify(RUNNER, config(scheme, activation=Activation(name="relu2", gated=False)))


@pytest.mark.parametrize("scheme", ["bf16", "mxfp4_w4a16"])
@pytest.mark.parametrize("activation", [Activation(), OAI])
def test_biases(scheme: str, activation: Activation) -> None:
    verify(RUNNER, config(scheme, bias=True, activation=activation))


def test_float16() -> None:
    verify(RUNNER, config(dtype="float16"))
    verify(RUNNER, config("fp8_tensor", dtype="float16"))


@pytest.mark.parametrize("bias", [False, True])
def test_mxfp4_of_sizes_that_need_padding(bias: bool) -> None:
    layer = config("mxfp4_w4a16", hidden_size=160, intermediate_size=96, bias=bias, activation=OAI)
    result = verify(RUNNER, layer)
    assert result.shape[1] == 160
    assert result.is_contiguous()
    assert trtllm_double_cutlass.CALLS[-1]["input"].shape[1] == 256


@pytest.mark.parametrize("scheme", ["fp8_tensor", "nvfp4"])
def test_gate_and_up_may_have_scales_of_their_own(scheme: str) -> None:
    """The kernels have one scale for both: the rest goes through the activation, which is linear in up."""
    layer = config(scheme)
    verify(RUNNER, layer, layer_of(layer, 5, parts=2))
    clamped = config(scheme, activation=Activation(limit=1.0))
    with pytest.raises(WeightError, match="one scale for gate and up"):
        plan(RUNNER, clamped, layer_of(clamped, 5, parts=2).weights)


@pytest.mark.parametrize("scheme", ["fp8_tensor", "nvfp4"])
def test_kernels_that_quantize_by_a_known_scale_need_calibration(scheme: str) -> None:
    layer = config(scheme)
    tensors = layer_of(layer).weights.tensors()
    del tensors["w2_input_scale"]
    with pytest.raises(UnsupportedOverride, match=r"quant.input_scales"):
        plan(RUNNER, layer, CanonicalWeights(**tensors))
    bound = plan(RUNNER, layer, layer_of(layer).weights)
    with pytest.raises(WeightError, match="w2_input_scale was not given"):
        bound.update_weights(CanonicalWeights(**tensors))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_expert_parallelism_sum_to_the_layer(scheme: str) -> None:
    layer = config(scheme)
    whole = layer_of(layer, 7, tokens=13, pattern="dropped")
    total = torch.zeros(13, layer.hidden_size)
    for rank in range(3):
        parallel = ParallelConfig(ep_size=3, ep_rank=rank, reduce="caller")
        mine = plan(RUNNER, layer, whole.weights.shard(layer, parallel), parallel)
        total += mine(whole.hidden, whole.topk).float()
        assert (trtllm_double_cutlass.CALLS[-1]["ep_size"], trtllm_double_cutlass.CALLS[-1]["ep_rank"]) == (3, rank)
    assert_close(total.to(torch.bfloat16), expected(layer, whole), "bfloat16", scheme)


def test_local_ids_need_no_offset() -> None:
    """Of a dispatcher that sends rows to the ranks of their experts."""
    from moe_core.testing.dispatchers import TESTING_STANDARD
    from moe_core.testing.fakes import fake_plugin
    from moe_core.vocabulary import STANDARD, IdSpace

    offers = replace(TESTING_STANDARD.offers[STANDARD], id_spaces=frozenset({IdSpace.LOCAL}))
    spec = replace(TESTING_STANDARD, name="local_only", offers={STANDARD: offers})
    layer, parallel = config(), ParallelConfig(ep_size=2, ep_rank=1, reduce="caller")
    whole = layer_of(layer, 8, tokens=9, pattern="dropped")
    mine = whole.weights.shard(layer, parallel)
    local = plan(
        RUNNER, layer, mine, parallel, dispatcher="local_only", plugins=(fake_plugin("p", dispatchers=(spec,)),)
    )
    result = local(whole.hidden, whole.topk)
    assert (trtllm_double_cutlass.CALLS[-1]["ep_size"], trtllm_double_cutlass.CALLS[-1]["ep_rank"]) == (1, 0)
    assert_close(result, plan(RUNNER, layer, mine, parallel)(whole.hidden, whole.topk), "bfloat16")


def test_tensor_parallel_ranks_have_one_second_bias() -> None:
    layer = config("bf16", bias=True)
    whole = layer_of(layer, 9)
    total = torch.zeros_like(whole.hidden, dtype=torch.float32)
    for rank in range(2):
        parallel = ParallelConfig(tp_size=2, tp_rank=rank, reduce="caller")
        total += plan(RUNNER, layer, whole.weights.shard(layer, parallel), parallel)(whole.hidden, whole.topk).float()
    assert_close(total.to(torch.bfloat16), expected(layer, whole), "bfloat16")


def test_scaling_is_the_runners() -> None:
    verify(RUNNER, config(routed_scaling_factor=2.5))


def test_no_tokens_launch_nothing() -> None:
    layer = config()
    empty = layer_of(layer, tokens=0)
    result = plan(RUNNER, layer, empty.weights)(empty.hidden, empty.topk)
    assert result.shape == (0, 256)
    assert trtllm_double_cutlass.CALLS == []


def test_the_output_is_the_callers_tensor() -> None:
    layer = config()
    one = layer_of(layer)
    plan_ = plan(RUNNER, layer, one.weights)
    for output in (torch.full_like(one.hidden, float("nan")), torch.empty(16, 512, dtype=torch.bfloat16)[:, ::2]):
        result = plan_(one.hidden, one.topk, state=RunningState(output=output))
        assert result is output
        assert_close(output, expected(layer, one), "bfloat16")
    assert trtllm_double_cutlass.CALLS[-2]["output"].data_ptr() != output.data_ptr()


@pytest.mark.parametrize("scheme", SCHEMES)
def test_updates_keep_addresses(scheme: str) -> None:
    layer = config(scheme)
    old, new = layer_of(layer, 1), layer_of(layer, 2)
    bound = plan(RUNNER, layer, old.weights)
    before = [bound.quant_info.w13, bound.quant_info.w2, *bound.quant_info.scales]
    places = [t.data_ptr() for t in before]
    want = expected(layer, new)
    bound.update_weights(new.weights)
    after = [bound.quant_info.w13, bound.quant_info.w2, *bound.quant_info.scales]
    assert [t.data_ptr() for t in after] == places
    assert_close(bound(new.hidden, new.topk), want, "bfloat16", scheme)


@pytest.mark.parametrize("scheme", ["fp8_block128", "nvfp4", "fp8_tensor"])
def test_prepared_weights_travel_between_processes(scheme: str) -> None:
    layer = config(scheme)
    info = plan(RUNNER, layer, layer_of(layer).weights).quant_info
    copy = pickle.loads(pickle.dumps(info))
    assert (copy.scheme, copy.layout, copy.w13.dtype) == (info.scheme, info.layout, info.w13.dtype)
    assert torch.equal(copy.w13.view(torch.uint8), info.w13.view(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(copy.scales, info.scales, strict=True))


def test_the_workspace_is_shared_by_layers_and_goes_with_the_last() -> None:
    from moe_core_flashinfer_trtllm import workspace

    layer = config()
    plans = [plan(RUNNER, layer, layer_of(layer, i).weights) for i in range(2)]
    first, second = (p.runner._workspace for p in plans)
    assert first is second
    assert first.buffer().data_ptr() == first.buffer().data_ptr()
    other = plan(RUNNER, layer, layer_of(layer, 3).weights, max_tokens=600)
    assert other.runner._workspace.size > first.size
    del first, second, other
    plans.clear()
    import gc

    gc.collect()
    assert len(workspace._SHARED) == 0


def test_ranks_that_bring_their_own_tokens_may_send_them_all_to_one() -> None:
    from moe_core_flashinfer_trtllm.layer import most_rows

    layer, parallel = config(), ParallelConfig(ep_size=2, reduce="caller")
    weights = layer_of(layer).weights.shard(layer, parallel)
    binding = plan(RUNNER, layer, weights, parallel)._binding
    assert most_rows(binding) == 300
    assert most_rows(replace(binding, parallel=replace(parallel, tokens="sharded"))) == 600


@pytest.mark.parametrize(
    ("changes", "option"),
    [({}, "fused_finalize"), ({"scheme": "fp8_block128"}, "fused_finalize"), ({}, "distinct_experts")],
)
def test_options_reach_the_call(changes: dict[str, Any], option: str) -> None:
    layer = replace(config(), **changes)
    verify(RUNNER, layer, layer_of(layer, 4))
    assert trtllm_double_cutlass.CALLS[-1]["use_fused_finalize"] is False
    verify(RUNNER, layer, layer_of(layer, 4), options={option: True})
    assert trtllm_double_cutlass.CALLS[-1]["use_fused_finalize"] is (option == "fused_finalize")


@pytest.mark.parametrize("runner", [RUNNER, "flashinfer_trtllm"])
@pytest.mark.parametrize("option", ["fused_finalize", "distinct_experts"])
def test_an_option_of_another_type_is_refused(option: str, runner: str) -> None:
    """A string that says no is no false: slots would be lost without a word."""
    if (runner, option) == ("flashinfer_trtllm", "fused_finalize"):
        pytest.skip("it has no such option")
    with pytest.raises(BindError, match=f"option {option} .* is true or false, got 'no'"):
        plan(runner, config(num_experts=8), layer_of(config(num_experts=8)).weights, options={option: "no"})


def test_a_build_without_the_scheme_is_an_error_when_the_plan_is_bound() -> None:
    trtllm_double_cutlass.ABSENT.add("bf16")
    with pytest.raises(BindError, match="no CUTLASS kernels for bf16") as error:
        plan(RUNNER, config(), layer_of(config()).weights)
    assert "build_cutlass" in str(error.value)


def test_without_max_tokens_the_selection_says_so() -> None:
    with pytest.raises(UnsupportedOverride, match=r"shape.max_tokens"):
        plan(RUNNER, config(), layer_of(config()).weights, max_tokens=None)  # type: ignore[arg-type]


def test_calls_of_both_phases_and_strided_decisions() -> None:
    layer = config()
    one = layer_of(layer)
    bound = plan(RUNNER, layer, one.weights)
    wide = TopKOutput(one.topk.topk_ids.repeat(1, 2)[:, :2], one.topk.topk_weights.repeat(1, 2)[:, :2])
    for phase in (Phase.PREFILL, Phase.DECODE):
        assert_close(bound(one.hidden, wide, phase=phase), expected(layer, one), "bfloat16")


@pytest.mark.parametrize("experts", [1, 5])
def test_few_experts(experts: int) -> None:
    layer = MoeConfig(num_experts=experts, top_k=1, hidden_size=64, intermediate_size=48)
    verify(RUNNER, layer)
