"""`flashinfer_trtllm` over the strict double: whole layers of every scheme with the router's choice."""

from __future__ import annotations

import pickle
from dataclasses import replace
from typing import Any

import pytest
import torch
import trtllm_double_kernels
from trtllm_double import config, expected, layer_of, plan, verify

from moe_core import Activation, MoeConfig, ParallelConfig, RunningState
from moe_core.errors import UnsupportedOverride, WeightError
from moe_core.testing import assert_close
from moe_core.testing.dispatchers import TESTING_STANDARD
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.testing.fakes import fake_plugin
from moe_core.vocabulary import STANDARD, IdSpace

RUNNER = "flashinfer_trtllm"
SCHEMES = ("bf16", "fp8_block128", "fp8_tensor", "mxfp8", "nvfp4", "mxfp4_w4a16", "int4_w4a16")
CLAMPED = tuple(s for s in SCHEMES if s != "fp8_tensor")
OAI = Activation.swiglu_oai()
NO_GATE = Activation(name="relu2", gated=False)
pytestmark = pytest.mark.usefixtures("double")


def of(scheme: str, **changes: Any) -> MoeConfig:
    """A layer that the kernels for a scheme can take."""
    sizes = {"group_size": 32, "intermediate_size": 256} if scheme == "int4_w4a16" else {}
    return config(scheme, **({"num_experts": 8, "hidden_size": 256} | sizes | changes))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "skewed", "dropped", "duplicate"])
def test_whole_layers(scheme: str, pattern: str) -> None:
    layer = of(scheme)
    verify(RUNNER, layer, layer_of(layer, 3, tokens=21, pattern=pattern))


@pytest.mark.parametrize("scheme", CLAMPED)
@pytest.mark.parametrize("activation", [Activation(limit=0.4), OAI, replace(OAI, limit=None)])
def test_clamped_and_oai_activations(scheme: str, activation: Activation) -> None:
    """nvfp4's kernels take limit and beta in terms of raw sums, all others as they are."""
    verify(RUNNER, of(scheme, activation=activation))


@pytest.mark.parametrize("scheme", ["bf16", "fp8_block128", "fp8_tensor", "mxfp8", "nvfp4"])
def test_layers_without_a_gate(scheme: str) -> None:
    verify(RUNNER, of(scheme, activation=NO_GATE))


@pytest.mark.parametrize("activation", [Activation(), OAI])
@pytest.mark.parametrize("sizes", [(256, 128), (160, 96), (320, 192)])
def test_mxfp4_with_biases_and_padding(activation: Activation, sizes: tuple[int, int]) -> None:
    hidden, inner = sizes
    layer = of("mxfp4_w4a16", bias=True, activation=activation, hidden_size=hidden, intermediate_size=inner)
    result = verify(RUNNER, layer)
    assert result.shape[1] == hidden
    assert result.is_contiguous()
    call = trtllm_double_kernels.CALLS[-1]
    padded = hidden % 128 or inner % 128
    assert call.get("valid_hidden_size") == (hidden if padded else None)
    assert call["hidden_states"].shape[1] % 128 == 0


@pytest.mark.parametrize("scheme", ["fp8_tensor", "nvfp4"])
def test_gate_and_up_may_have_scales_of_their_own(scheme: str) -> None:
    layer = of(scheme)
    verify(RUNNER, layer, layer_of(layer, 5, parts=2))
    if scheme == "nvfp4":
        clamped = of(scheme, activation=Activation(limit=1.0))
        with pytest.raises(WeightError, match="clamps raw sums"):
            plan(RUNNER, clamped, layer_of(clamped, 5, parts=2).weights)
        verify(RUNNER, of(scheme, activation=replace(OAI, limit=None)), layer_of(layer, 5, parts=2))


def test_int4_with_zero_points_is_refused() -> None:
    layer = of("int4_w4a16")
    weights = layer_of(layer).weights
    weights.w13_zero = torch.full_like(weights.w13_scale, 8).to(torch.uint8)
    with pytest.raises(WeightError, match="no zero points"):
        plan(RUNNER, layer, weights)


def test_the_router_weight_may_go_on_the_input() -> None:
    verify(RUNNER, of("fp8_tensor", top_k=1, router_weight_on_input=True))
    assert trtllm_double_kernels.CALLS[-1]["use_routing_scales_on_input"] is True


@pytest.mark.parametrize("scheme", SCHEMES)
def test_ranks_of_expert_parallelism_sum_to_the_layer(scheme: str) -> None:
    layer = of(scheme)
    whole = layer_of(layer, 7, tokens=13, pattern="dropped")
    total = torch.zeros(13, layer.hidden_size)
    for rank in range(2):
        parallel = ParallelConfig(ep_size=2, ep_rank=rank, reduce="caller")
        total += plan(RUNNER, layer, whole.weights.shard(layer, parallel), parallel)(whole.hidden, whole.topk).float()
        call = trtllm_double_kernels.CALLS[-1]
        assert (call["num_experts"], call["local_expert_offset"], call["local_num_experts"]) == (8, 4 * rank, 4)
    assert_close(total.to(torch.bfloat16), expected(layer, whole), "bfloat16", scheme)


@pytest.mark.parametrize("scheme", ["bf16", "mxfp8"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_local_ids_among_few_experts(scheme: str, ranks: int) -> None:
    """The kernels want more experts than slots of a token: they are told so many, and only the real ids come."""
    offers = replace(TESTING_STANDARD.offers[STANDARD], id_spaces=frozenset({IdSpace.LOCAL}))
    spec = replace(TESTING_STANDARD, name="local_only", offers={STANDARD: offers})
    layer, parallel = of(scheme, top_k=3), ParallelConfig(ep_size=ranks, ep_rank=1, reduce="caller")
    whole = layer_of(layer, 8, tokens=9, pattern="dropped")
    mine, more = whole.weights.shard(layer, parallel), (fake_plugin("p", dispatchers=(spec,)),)
    result = plan(RUNNER, layer, mine, parallel, dispatcher="local_only", plugins=more)(whole.hidden, whole.topk)
    call = trtllm_double_kernels.CALLS[-1]
    assert (call["num_experts"], call["local_expert_offset"], call["local_num_experts"]) == (4, 0, 8 // ranks)
    assert_close(result, plan(RUNNER, layer, mine, parallel)(whole.hidden, whole.topk), "bfloat16", scheme)


@pytest.mark.parametrize("scheme", ["fp8_block128", "mxfp8"])
def test_tokens_that_travelled_quantized_are_taken_as_they_are(scheme: str) -> None:
    layer = of(scheme)
    one = layer_of(layer, 11, tokens=9, pattern="dropped")
    bound = plan(RUNNER, layer, one.weights, dispatcher="testing_standard", plugins=(testing_plugin,))
    assert bound.terms[STANDARD].payload == {"fp8_block128": "fp8_group128"}.get(scheme, scheme)
    assert_close(bound(one.hidden, one.topk), expected(layer, one), "bfloat16", scheme)


def test_scaling_is_the_runners() -> None:
    verify(RUNNER, of("bf16", routed_scaling_factor=2.5))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_no_tokens_launch_nothing(scheme: str) -> None:
    layer = of(scheme)
    empty = layer_of(layer, tokens=0)
    assert plan(RUNNER, layer, empty.weights)(empty.hidden, empty.topk).shape == (0, 256)
    assert trtllm_double_kernels.CALLS == []


def test_the_output_is_the_callers_tensor() -> None:
    layer = of("bf16")
    one = layer_of(layer)
    bound = plan(RUNNER, layer, one.weights)
    for output in (torch.full_like(one.hidden, float("nan")), torch.empty(16, 512, dtype=torch.bfloat16)[:, ::2]):
        assert bound(one.hidden, one.topk, state=RunningState(output=output)) is output
        assert_close(output, expected(layer, one), "bfloat16")


@pytest.mark.parametrize("scheme", SCHEMES)
def test_updates_keep_addresses(scheme: str) -> None:
    layer = of(scheme)
    old, new = layer_of(layer, 1), layer_of(layer, 2)
    bound = plan(RUNNER, layer, old.weights)
    places = {name: tensor.data_ptr() for name, tensor in bound.quant_info.tensors.items()}
    want = expected(layer, new)
    bound.update_weights(new.weights)
    assert {name: tensor.data_ptr() for name, tensor in bound.quant_info.tensors.items()} == places
    assert_close(bound(new.hidden, new.topk), want, "bfloat16", scheme)


@pytest.mark.parametrize("scheme", ["fp8_block128", "nvfp4"])
def test_prepared_weights_travel_between_processes(scheme: str) -> None:
    info = plan(RUNNER, of(scheme), layer_of(of(scheme)).weights).quant_info
    copy = pickle.loads(pickle.dumps(info))
    assert copy.tensors.keys() == info.tensors.keys()
    for name, tensor in info.tensors.items():
        assert copy.tensors[name].dtype == tensor.dtype
        assert torch.equal(copy.tensors[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"scheme": "fp8_tensor", "activation": OAI}, "activation"),
        ({"scheme": "fp8_tensor", "activation": Activation(limit=1.0)}, "activation.limit"),
        ({"activation": replace(NO_GATE, limit=1.0)}, "activation.limit"),
        ({"activation": replace(NO_GATE, gated=True)}, "activation.gated"),
        ({"scheme": "mxfp4_w4a16", "activation": NO_GATE}, "activation"),
        ({"scheme": "int4_w4a16", "group_size": 32, "activation": NO_GATE}, "activation"),
        ({"scheme": "int4_w4a16"}, "quant.group_size"),
        ({"scheme": "int4_w4a16", "group_size": 64}, "quant.group_size"),
        ({"scheme": "int4_w4a16", "group_size": 32, "intermediate_size": 128}, "shape.intermediate"),
        ({"scheme": "fp8_block128", "num_experts": 6}, "shape.num_experts"),
        ({"scheme": "mxfp8", "num_experts": 4, "top_k": 4}, "shape.num_experts"),
        ({"bias": True}, "feature"),
        ({"router_weight_on_input": True}, "feature"),
        ({"dtype": "float16"}, "dtype"),
        ({"hidden_size": 192}, "shape.hidden"),
        ({"no_combine": True}, "feature"),
    ],
)
def test_refusals_come_with_a_reason(changes: dict[str, Any], code: str) -> None:
    layer = MoeConfig(
        **{"num_experts": 8, "top_k": 2, "hidden_size": 256, "intermediate_size": 256, "scheme": "bf16", **changes}
    )
    with pytest.raises(UnsupportedOverride) as error:
        plan(RUNNER, layer, layer_of(replace(layer, no_combine=False)).weights)
    assert code in {reason.code for reason in error.value.reasons}
