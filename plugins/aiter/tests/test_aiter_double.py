"""The double itself: it refuses what AITER would not survive, and reads weights where AITER's kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from moe_core_aiter import contract, layouts
from moe_core_aiter.plugin import AiterPlugin
from moe_core_aiter.testing import AiterDouble, DoubleError, double, unshuffle

import moe_core
from moe_core import MoeConfig
from moe_core.registry import Registry
from moe_core.testing import make_layer

LAYER = MoeConfig(num_experts=4, top_k=2, hidden_size=128, intermediate_size=128)
Mutate = Callable[[dict[str, Any]], dict[str, Any]]


def legal(bench: Any, scheme: str = "bf16", arch: str = "gfx950", **more: Any) -> tuple[Any, dict[str, Any]]:
    """A double, and arguments that it takes."""
    here = bench(arch, **more)
    config = here.config(scheme)
    layer = make_layer(config, 3, tokens=20, pattern="dropped")
    here.plan(config, layer.weights, dispatcher="testing_standard")(layer.hidden, layer.topk)
    return here.double.modules["aiter.fused_moe"].fused_moe, dict(here.double.calls[-1])


def changed(name: str, change: Callable[[Any], Any]) -> Mutate:
    return lambda given: {**given, name: change(given[name])}


def tail(ids: torch.Tensor) -> torch.Tensor:
    """A bad id on the last row, which does not count."""
    ids = ids.clone()
    ids[-1, -1] = 2**30
    return ids


BAD: dict[str, tuple[str, Mutate, str]] = {
    "int64 ids": ("bf16", changed("topk_ids", lambda t: t.long()), "topk_ids is torch.int64"),
    "strided ids": ("bf16", changed("topk_ids", lambda t: t.t().contiguous().t()), "topk_ids is not contiguous"),
    "negative ids": ("bf16", changed("topk_ids", lambda t: torch.where(t == 8, -1, t)), "outside of"),
    "ids past the mask": ("bf16", changed("topk_ids", lambda t: t + 1), "outside of"),
    "a bad id on a row that does not count": ("bf16", changed("topk_ids", tail), "outside of"),
    "bfloat16 weights": ("bf16", changed("topk_weight", lambda t: t.bfloat16()), "topk_weight is torch.bfloat16"),
    "another shape": ("bf16", changed("topk_weight", lambda t: t[:, :1].contiguous()), "topk_weight is"),
    "no slots": ("bf16", lambda g: {**g, "topk_ids": g["topk_ids"][:, :0].contiguous(),
                                    "topk_weight": g["topk_weight"][:, :0].contiguous(),
                                    "expert_mask": None}, "0 slots"),
    "one slot, and a mask": ("bf16", lambda g: {**g, "topk_ids": g["topk_ids"][:, :1].contiguous(),
                                               "topk_weight": g["topk_weight"][:, :1].contiguous()}, "divide by zero"),
    "bool mask": ("bf16", changed("expert_mask", lambda t: t.bool()), "expert_mask is torch.bool"),
    "int64 mask": ("bf16", changed("expert_mask", lambda t: t.long()), "expert_mask is torch.int64"),
    "strided mask": ("bf16", changed("expert_mask", lambda t: t.repeat_interleave(2)[::2]), "not contiguous"),
    "a map for a mask": ("bf16", changed("expert_mask", lambda t: t.cumsum(0).int() - 1), "counted by it"),
    "a mask of other experts": ("bf16", changed("expert_mask", lambda t: t * 0), "0 ones, and w1 has 8"),
    "tokens of float32": ("bf16", changed("hidden_states", lambda t: t.float()), "tokens of torch.float32"),
    "tokens of float16": ("bf16", changed("hidden_states", lambda t: t.half()), "tokens torch.float16 and weights"),
    "strided tokens": ("bf16", changed("hidden_states", lambda t: t.repeat(1, 2)[:, ::2]), "not contiguous"),
    "weights of layers without gate": ("bf16", changed("w1", lambda t: t[:, :256].contiguous()), "without gate"),
    "one valid row in 64 bits": ("bf16", changed("num_local_tokens", lambda t: t.long()), "num_local_tokens is torch"),
    "too many valid rows": ("bf16", changed("num_local_tokens", lambda t: t + 9), "of 23"),
    "scales for 16 bits": ("bf16", lambda g: {**g, "w1_scale": torch.ones(8)}, "nothing to scale"),
    "e4m3fn on gfx942": ("fp8_block128", changed("w1", lambda t: t.view(torch.float8_e4m3fn)), "w1 is torch.float8_e"),
    "scales of another order": ("fp8_block128", changed("w1_scale", lambda t: t.mT), "w1_scale is"),
    "float64 scales": ("fp8_channel", changed("w1_scale", lambda t: t.double()), "w1_scale is torch.float64"),
    "no scale of tokens": ("fp8_block128", lambda g: {**g, "a1_scale": None}, "came without a1_scale"),
    "no dtype": ("fp8_block128", lambda g: {**g, "dtype": None}, "need dtype"),
    "fp4 without its tag": ("mxfp4", changed("w1", lambda t: t.view(torch.uint8).view(t.dtype)), "is_shuffled"),
    "mxfp8 without its tag": ("mxfp8", changed("w2", lambda t: t.view(torch.uint8).view(t.dtype)), "is_shuffled"),
    "mxfp8 that is not interleaved": ("mxfp8", lambda g: {**g, "gate_mode": "separated"}, "gate_mode='interleave'"),
    "a bias that is ignored": ("bf16", lambda g: {**g, "bias1": torch.ones(8, 512)}, "bias1 is ignored"),
    "bias in bfloat16": ("mxfp4_w4a16", changed("bias1", lambda t: t.bfloat16()), "bias1 is torch.bfloat16"),
    "a limit that is ignored": ("bf16", lambda g: {**g, "swiglu_limit": 5.0}, "swiglu_limit=5.0"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_it_refuses(what: str, bench: Any) -> None:
    scheme, mutate, message = BAD[what]
    call, given = legal(bench, scheme, "gfx950" if scheme.startswith("mx") else "gfx942")
    call(**given)
    with pytest.raises(DoubleError, match=message):
        call(**mutate(given))


def test_it_has_no_arguments_that_its_version_has_not(bench: Any) -> None:
    call, given = legal(bench, version="0.1.4")
    with pytest.raises(TypeError, match="gate_mode"):
        call(**given, gate_mode="interleave")
    with pytest.raises(TypeError, match="missing a required argument"):
        call(**{name: value for name, value in given.items() if name != "w2"})


@pytest.mark.parametrize("version", contract.recorded())
def test_every_recorded_version_runs_a_layer(version: str, bench: Any) -> None:
    here = bench("gfx942", version)
    plan = here.check(here.config("fp8_block128"), pattern="dropped", dispatcher="testing_standard")
    assert contract.like(plan.runner.build.parameters) is not None


def test_a_scale_of_all_rows_needs_all_rows(bench: Any) -> None:
    """Without a static scale, the kernels for whole tensors look at intermediate rows that no kernel wrote."""
    here = bench()
    config = here.config("fp8_tensor")
    layer = make_layer(config, 3, tokens=6, pattern="dropped")
    layer.weights.w13_input_scale = layer.weights.w2_input_scale = torch.full((8,), 0.01)
    here.plan(config, layer.weights)(layer.hidden, layer.topk)
    call, given = here.double.modules["aiter.fused_moe"].fused_moe, here.double.calls[-1]
    with pytest.raises(DoubleError, match="rows that no kernel wrote"):
        call(**{**given, "a2_scale": None})
    with pytest.raises(DoubleError, match="num_rows is not supported"):
        call(**given, num_local_tokens=torch.tensor([4], dtype=torch.int32))


def test_rows_that_do_not_count_are_undefined(bench: Any) -> None:
    call, given = legal(bench)
    result = call(**given)
    assert bool(result[20:].isnan().all())
    assert bool(result[:20].isfinite().all())


def test_swiglu_without_interleaving_rounds_by_the_number_of_rows(bench: Any) -> None:
    call, given = legal(bench, "mxfp4_w4a16")
    exact = call(**given)
    with pytest.raises(DoubleError, match="float16"):
        call(**{**given, "dtype": torch.float16})
    many = {name: torch.cat([given[name]] * 12) for name in ("hidden_states", "topk_ids", "topk_weight")}
    many["num_local_tokens"] = torch.tensor([276], dtype=torch.int32)
    rounded = call(**{**given, **many})[:20]
    assert not torch.equal(exact[:20, :320], rounded[:, :320])


def test_the_modules_go_when_the_block_ends() -> None:
    import sys

    before = sys.modules.get("aiter")
    with double("gfx942") as made:
        assert sys.modules["aiter"] is made.modules["aiter"]
        assert made.modules["aiter"].QuantType.No.value != 0  # only names may be relied upon
    assert sys.modules.get("aiter") is before
    assert isinstance(made, AiterDouble)


def test_it_is_offered_in_the_cores_kit() -> None:
    registry = Registry([AiterPlugin()], autoload=False)
    with moe_core.testing.double("aiter", registry=registry, arch="gfx942", version="0.1.14") as made:
        assert (made.arch, made.facts.version) == ("gfx942", "0.1.14")
        layer = make_layer(LAYER, 3, tokens=4)
        plan = moe_core.plan(LAYER, layer.weights, registry=Registry([made.plugin], autoload=False), runner="aiter")
        plan(layer.hidden, layer.topk)
        assert len(made.calls) == 1


def distinct(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    """Items of which neighbors in any direction differ."""
    count = int(torch.tensor(shape).prod())
    return ((torch.arange(count) * 2654435761 >> 7) % 251).to(dtype).view(shape)


def test_the_plugins_shuffles_and_the_doubles_addresses_agree() -> None:
    for dtype in (torch.uint8, torch.int16):
        data = distinct(2, 32, 96, dtype=dtype)
        assert torch.equal(unshuffle.weights(layouts.shuffled(data)), data)
        assert not torch.equal(layouts.shuffled(data), data)
    for parts in (1, 2):
        data = distinct(2, 64, 128)
        assert torch.equal(unshuffle.guinterleaved(layouts.interleaved(data, parts=parts), parts), data)
        scale = distinct(2, 64, 16)
        placed = layouts.interleaved_scales(scale, parts=parts)
        assert torch.equal(unshuffle.guinterleaved_scales(placed, 2, parts), scale)
    for rows, columns in ((256, 8), (512, 24), (300, 10)):
        scale = distinct(rows, columns)
        assert torch.equal(unshuffle.scales(layouts.shuffled_scales(scale), rows, columns), scale)
    values = (distinct(2, 32, 64) % 16).to(torch.int8) - 8
    assert torch.equal(unshuffle.int4(layouts.packed_int4(layouts.shuffled(values))), values)
    scale = distinct(2, 32, 4).float()
    assert torch.equal(unshuffle.int4_scales(layouts.int4_scales(scale).reshape(-1), 2, 32, 4), scale)


def test_some_addresses_by_hand() -> None:
    """Row 1 starts 16 bytes behind row 0, the second 16 bytes of row 0 behind those of row 15."""
    placed = layouts.shuffled(torch.arange(16 * 32, dtype=torch.int16).view(1, 16, 32).to(torch.uint8)).flatten()
    assert placed[:16].tolist() == list(range(16))
    assert placed[16:32].tolist() == list(range(32, 48))
    assert placed[256:272].tolist() == list(range(16, 32))
    gate_up = torch.arange(32).repeat_interleave(64).view(1, 32, 64).to(torch.uint8)
    rows = layouts.interleaved(gate_up.repeat(1, 2, 1), parts=2).flatten()[::16][:32].tolist()
    assert rows[:16] == list(range(16))
    assert rows[16:] == list(range(16))


def test_fnuz_is_half_of_fn_in_every_code() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    fn, fnuz = codes.view(torch.float8_e4m3fn).float(), layouts.to_fnuz(codes.view(torch.float8_e4m3fn)).float()
    assert torch.equal(fn.isnan(), fnuz.isnan())
    assert int(fn.isnan().sum()) == 2
    assert torch.equal(fn.nan_to_num(), (fnuz * 2).nan_to_num())
