"""`cutedsl` (NVFP4) on strict doubles of FlashInfer: both formats, both modes, overlap, refusals, mistakes that must
show."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import double_nvfp4
import pytest
import torch
from doubling import planned
from moe_core_cutedsl import layouts, nvfp4_masked, nvfp4_weights
from torch import Tensor

from moe_core import CanonicalWeights, MoeConfig, ParallelConfig
from moe_core.errors import BindError, ConfigError, ContractViolation, LayoutMismatch, UnsupportedOverride, WeightError
from moe_core.formats import BatchedDispatchOutput
from moe_core.protocols import RunningState
from moe_core.quant import TwoLevelScale, builtin_scheme, dequantize, quantize, quantize_activation
from moe_core.quant.codec import QuantizedTensor
from moe_core.testing import assert_close, make_layer
from moe_core.testing.oracle import dense
from moe_core.testing.tolerances import relative_error
from moe_core.topk import TopKOutput

pytestmark = pytest.mark.usefixtures("patch")
SIZES: dict[str, Any] = {
    "num_experts": 4, "top_k": 2, "hidden_size": 128, "intermediate_size": 192, "scheme": "nvfp4",
}  # fmt: skip
BATCHED = {"dispatcher": "testing_batched"}


@pytest.fixture(autouse=True)
def _no_calls() -> None:
    double_nvfp4.CALLS.clear()


def layer_of(seed: int = 0, tokens: int = 9, pattern: str = "uniform", **changes: Any) -> tuple[MoeConfig, Any]:
    config = MoeConfig(**(SIZES | changes))
    return config, make_layer(config, seed, tokens=tokens, pattern=pattern)


def calibrated(layer: Any, *, each: bool = False) -> Any:
    """The layer with input scales that fit it, all of an expert's own where `each` says so."""
    experts = layer.weights.w13.shape[0]
    spread = 1.0 + torch.arange(experts) / 4 if each else torch.ones(experts)
    scales = {"w13_input_scale": spread * 4.5 / 2688, "w2_input_scale": spread * 3.0 / 2688}
    return layer._replace(weights=replace(layer.weights, **scales))


def close(actual: Tensor, config: MoeConfig, layer: Any, weights: Any = None) -> None:
    """Both sides quantize alike, so only a value at the middle between two others may fall apart."""
    wanted = dense(config, weights or layer.weights, layer.hidden, layer.topk)
    assert_close(actual, wanted.to(actual.dtype), config.dtype, config.scheme)


def unquantized(config: MoeConfig, layer: Any) -> Tensor:
    """The layer with its weights as they decode, and activations that nobody rounds."""
    scheme, w = builtin_scheme("nvfp4"), layer.weights
    w13 = dequantize(QuantizedTensor(w.w13, w.w13_scale, None, w.w13_global_scale), scheme)
    w2 = dequantize(QuantizedTensor(w.w2, w.w2_scale, None, w.w2_global_scale), scheme)
    plain = CanonicalWeights(w13=w13, w2=w2)
    return dense(replace(config, scheme="bf16"), plain, layer.hidden, layer.topk)


@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "dropped", "duplicate"])
@pytest.mark.parametrize("tokens", [0, 1, 140])
@pytest.mark.parametrize("scales", ["calibrated", "each", "dynamic"])
def test_masked(scales: str, tokens: int, pattern: str) -> None:
    config, layer = layer_of(tokens=tokens, pattern=pattern, routed_scaling_factor=1.5)
    if scales != "dynamic":
        layer = calibrated(layer, each=scales == "each")
    plan = planned("cutedsl", config, layer.weights, **BATCHED)
    assert plan.quant_info.layout == nvfp4_weights.MASKED
    close(plan(layer.hidden, layer.topk), config, layer)


@pytest.mark.parametrize("options", [{}, {"fused_finalize": True}], ids=["ordered", "fused"])
@pytest.mark.parametrize("pattern", ["uniform", "one_hot", "dropped", "duplicate"])
@pytest.mark.parametrize("tokens", [0, 1, 70])
def test_whole(tokens: int, pattern: str, options: dict[str, Any]) -> None:
    config, layer = layer_of(tokens=tokens, pattern=pattern, routed_scaling_factor=1.5)
    layer = calibrated(layer)
    plan = planned("cutedsl", config, layer.weights, options=options)
    assert plan.quant_info.layout == nvfp4_weights.MMA
    result = plan(layer.hidden, layer.topk)
    close(result, config, layer)
    nobody = TopKOutput(torch.full_like(layer.topk.topk_ids, -1), torch.full_like(layer.topk.topk_weights, torch.nan))
    assert not plan(layer.hidden, nobody).any()


def test_whole_with_a_measured_input_scale() -> None:
    """GEMM1's input may be measured as it comes; a token that goes nowhere does not count, whatever it holds."""
    config, layer = layer_of(pattern="dropped")
    layer = calibrated(layer)
    weights = replace(layer.weights, w13_input_scale=None)
    nowhere = (layer.topk.topk_ids < 0).all(1)
    assert nowhere.any()
    layer = layer._replace(hidden=torch.where(nowhere[:, None], torch.nan, layer.hidden), weights=weights)
    result = planned("cutedsl", config, weights)(layer.hidden, layer.topk)
    close(result, config, layer._replace(hidden=layer.hidden.nan_to_num()))


def test_whole_in_bfloat16() -> None:
    """w4a16: nearer to the unrounded layer than any quantized tokens are, and no calibration is asked for."""
    config, layer = layer_of(tokens=40)
    plan = planned("cutedsl", config, layer.weights, options={"activations": "bf16"})
    wanted = unquantized(config, layer)
    assert relative_error(plan(layer.hidden, layer.topk), wanted) < 0.01
    rounded = dense(config, layer.weights, layer.hidden, layer.topk)
    assert relative_error(rounded, wanted) > 0.03


@pytest.mark.parametrize("dispatcher", ["standard", "testing_batched"])
def test_expert_parallel(dispatcher: str) -> None:
    config, layer = layer_of(tokens=30, pattern="dropped")
    layer = calibrated(layer)
    total = torch.zeros(layer.hidden.shape, dtype=torch.float64)
    for rank in range(3):
        parallel = ParallelConfig(ep_size=3, ep_rank=rank, reduce="caller")
        shard = layer.weights.shard(config, parallel)
        plan = planned("cutedsl", config, shard, parallel, dispatcher=dispatcher)
        total += plan(layer.hidden, layer.topk).double()
    assert_close(total, dense(config, layer.weights, layer.hidden, layer.topk), config.dtype, config.scheme)


def test_quantized_rows() -> None:
    """Rows that come in NVFP4, with linear or swizzled scales: what the same rows in bfloat16 give."""
    config, layer = layer_of(tokens=40)
    layer = calibrated(layer)
    plan = planned("cutedsl", config, layer.weights, **BATCHED)
    state = RunningState()
    plain = plan.dispatch(layer.hidden, layer.topk, state)
    wanted = plan.run(plain, state).hidden_states
    experts, most, hidden = plain.hidden_states.shape
    step = layer.weights.w13_input_scale[:1]
    data, scale = quantize_activation(plain.hidden_states.nan_to_num().flatten(0, 1), "nvfp4", scale=step)
    block = scale.block.view(experts, most, hidden // 16)
    for given in (block, layouts.swizzled(block.view(torch.uint8)).view(torch.float8_e4m3fn)):
        packed = replace(
            plain, hidden_states=data.view(experts, most, -1), hidden_scale=TwoLevelScale(given, scale.global_scale)
        )
        found = plan.run(packed, state).hidden_states
        live = torch.arange(most) < plain.masked_m[:, None]
        assert_close(found[live], wanted[live], config.dtype, config.scheme)
    with pytest.raises(ContractViolation, match="TwoLevelScale"):
        plan.run(replace(plain, hidden_states=data.view(experts, most, -1), hidden_scale=block), state)


class Event:
    """Notes how many GEMMs there were when it was recorded."""

    def __init__(self) -> None:
        self.after: list[int] = []

    def record(self) -> None:
        self.after.append(len(double_nvfp4.CALLS))


def test_overlap() -> None:
    """GEMM2, and no other, takes the SMs and the signals; the event is between the two GEMMs."""
    config, layer = layer_of()
    layer = calibrated(layer)
    plan = planned("cutedsl", config, layer.weights, **BATCHED)
    event, signals = Event(), torch.zeros(config.num_experts, dtype=torch.int32)
    state = RunningState(overlap={"num_sms": 96, "signals": signals, "start_event": event})
    plan.run(plan.dispatch(layer.hidden, layer.topk, state), state)
    first, second = double_nvfp4.CALLS
    assert first == {"sm_count": None, "dst_signals": None}
    assert second["sm_count"] == 96
    assert second["dst_signals"] is signals
    assert bool((signals == 1).all())
    assert event.after == [1]
    for wrong in ({"sms": 3}, object()):
        with pytest.raises(ContractViolation, match=r"num_sms, signals, start_event"):
            plan.run(plan.dispatch(layer.hidden, layer.topk, RunningState()), RunningState(overlap=wrong))
    whole = planned("cutedsl", config, layer.weights)
    with pytest.raises(ContractViolation, match="nothing to overlap with"):
        whole(layer.hidden, layer.topk, state=RunningState(overlap={"num_sms": 3}))


@pytest.mark.parametrize("arguments", [{}, BATCHED, {"options": {"activations": "bf16"}}], ids=["mma", "masked", "a16"])
def test_weights_are_updated_in_place(arguments: dict[str, Any]) -> None:
    config, layer = layer_of()
    layer, other = calibrated(layer), calibrated(layer_of(1)[1], each=True).weights
    plan = planned("cutedsl", config, layer.weights, **arguments)
    tensors = [t for t in vars_of(plan.quant_info) if isinstance(t, Tensor)]
    before = [t.data_ptr() for t in tensors]
    plan.update_weights(other)
    assert before == [t.data_ptr() for t in tensors]
    again = planned("cutedsl", config, other, **arguments)
    assert torch.equal(plan(layer.hidden, layer.topk), again(layer.hidden, layer.topk))
    if not arguments.get("options"):
        with pytest.raises(BindError):
            plan.update_weights(replace(other, w13_input_scale=None))


def vars_of(quant_info: Any) -> list[Any]:
    return [getattr(quant_info, name) for name in quant_info.__slots__]


def test_swizzled_scales_and_back() -> None:
    """Row r, column c of the tile (r // 128, c // 4) at byte (r % 32) * 16 + (r % 128 // 32) * 4 + c % 4."""
    for rows, columns in ((128, 4), (256, 16), (130, 5), (64, 8)):
        given = torch.randint(0, 256, (3, rows, columns), dtype=torch.uint8)
        made = layouts.swizzled(given)
        assert torch.equal(
            double_nvfp4._linear("it", made, torch.uint8, rows, columns * 16, 3).view(torch.uint8), given
        )
        assert int(made.long().sum()) == int(given.long().sum())  # the rest is zero


MISTAKES = [
    "chunks of 32",
    "rows as they are",
    "scale rows as they are",
    "linear scales",
    "alpha twice",
    "halves swapped",
]


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_shows(mistake: str, patch: pytest.MonkeyPatch) -> None:
    config, layer = layer_of(tokens=33)
    layer, arguments = calibrated(layer), BATCHED if mistake in ("linear scales", "halves swapped") else {}
    whole, prepare = nvfp4_weights.alternate, nvfp4_weights.prepare
    if mistake == "chunks of 32":
        patch.setattr(nvfp4_weights, "alternate", lambda w, out, rows: whole(w, out, 32))
    elif mistake == "rows as they are":
        patch.setattr(nvfp4_weights, "alternate", lambda w, out, rows: out.copy_(w))
    elif mistake == "scale rows as they are":
        last = config.hidden_size // 16
        patch.setattr(
            nvfp4_weights, "alternate", lambda w, o, rows: o.copy_(w) if w.shape[2] == last else whole(w, o, rows)
        )
    elif mistake == "linear scales":
        patch.setattr(nvfp4_weights, "swizzled", lambda s: linear(s))
    elif mistake == "alpha twice":
        patch.setattr(nvfp4_weights, "_global", lambda s, name: s.reshape(-1).float() ** 2)
    else:
        patch.setattr(
            nvfp4_weights, "prepare", lambda w, b: prepare(replace(w, w13=torch.cat([*w.w13.chunk(2, 1)][::-1], 1)), b)
        )
    with pytest.raises(AssertionError):
        close(planned("cutedsl", config, layer.weights, **arguments)(layer.hidden, layer.topk), config, layer)


def linear(scales: Tensor) -> Tensor:
    """The right shape, and the bytes as they were."""
    experts, rows, columns = scales.shape
    return scales.contiguous().view(experts, rows // 128, columns // 4, 32, 4, 4).permute(3, 4, 1, 5, 2, 0)


def test_refusals() -> None:
    config, layer = layer_of()
    with pytest.raises(WeightError, match="no calibrated w2_input_scale"):
        planned("cutedsl", config, layer.weights)
    apart = replace(layer.weights, w13_global_scale=layer.weights.w13_global_scale.view(-1, 1) * torch.tensor([1.0, 2]))
    with pytest.raises(WeightError, match="differs between gate and up"):
        planned("cutedsl", config, apart, **BATCHED)
    for changes, message in (
        ({"intermediate_size": 96}, "multiple of 64"),
        ({"hidden_size": 64}, "multiple of 128"),
        ({"dtype": "float16"}, "does not run float16"),
        ({"bias": True}, "'bias'"),
    ):
        other, wrong = layer_of(**changes)
        with pytest.raises(UnsupportedOverride, match=message):
            planned("cutedsl", other, wrong.weights)
    with pytest.raises(ConfigError, match="'activations' of 'cutedsl' is 'fp8'"):
        planned("cutedsl", config, layer.weights, options={"activations": "fp8"})
    with pytest.raises(UnsupportedOverride, match="atomics"):
        planned("cutedsl", config, layer.weights, options={"fused_finalize": True}, features={"deterministic"})


@pytest.mark.parametrize("option", [{"activations": "bf16"}, {"activations": "fp8"}, {"fused_finalize": True}])
def test_options_of_the_fused_moe_are_no_options_of_the_masked_gemms(option: dict[str, Any]) -> None:
    """They would do nothing there: tokens would be quantized although bf16 was asked for."""
    config, layer = layer_of()
    with pytest.raises(ConfigError, match=f"'{next(iter(option))}' of 'cutedsl'.*masked grouped GEMMs"):
        planned("cutedsl", config, calibrated(layer).weights, options=option, **BATCHED)
    planned("cutedsl", config, calibrated(layer).weights, options={"activations": "nvfp4"}, **BATCHED)


def test_the_layouts_cannot_be_mixed_up(patch: pytest.MonkeyPatch) -> None:
    config, layer = layer_of()
    layer, prepare = calibrated(layer), nvfp4_weights.prepare
    patch.setattr(
        nvfp4_weights, "prepare", lambda w, b: prepare(w, replace(b, layouts=frozenset({nvfp4_weights.MASKED})))
    )
    with pytest.raises(LayoutMismatch, match="mma_up_gate64"):
        planned("cutedsl", config, layer.weights)


def test_equal_global_scales_of_two_parts() -> None:
    config, layer = layer_of()
    layer = calibrated(layer)
    twice = layer.weights.w13_global_scale.view(-1, 1).expand(-1, 2).contiguous()
    plan = planned("cutedsl", config, replace(layer.weights, w13_global_scale=twice), **BATCHED)
    close(plan(layer.hidden, layer.topk), config, layer)
    assert quantize(torch.ones(1, 16, 16), builtin_scheme("nvfp4")).global_scale is not None


def test_an_empty_batch() -> None:
    """No room for a row, and rows that nobody sent."""
    config, layer = layer_of()
    plan = planned("cutedsl", config, calibrated(layer).weights, **BATCHED)
    for most in (0, 3):
        empty = BatchedDispatchOutput(
            torch.full((config.num_experts, most, config.hidden_size), torch.nan, dtype=torch.bfloat16),
            torch.zeros(config.num_experts, dtype=torch.int32),
        )
        assert plan.run(empty, RunningState()).hidden_states.shape == (config.num_experts, most, config.hidden_size)
    assert {"num_sms", "signals", "start_event"} == nvfp4_masked.OVERLAP
