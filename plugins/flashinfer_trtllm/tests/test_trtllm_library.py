"""FlashInfer as it is found when a plan is bound: another version, or none, is an error that says what differs."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import trtllm_double_autotuner
import trtllm_double_kernels
from moe_core_flashinfer_trtllm import trtllm_tune
from moe_core_flashinfer_trtllm.library import bind_call, check_call, member
from trtllm_double import config, layer_of, plan, registry

import moe_core
from moe_core.errors import BindError, DependencyError
from moe_core.protocols import TuningJob

TRTLLM, CUTLASS = "flashinfer_trtllm", "flashinfer_cutlass"
pytestmark = pytest.mark.usefixtures("double")


def bound(runner: str = TRTLLM, **more: Any) -> moe_core.MoePlan:
    return plan(runner, config(), layer_of(config()).weights, **more)


def test_a_renamed_argument_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(topk_idx: Any, hidden_states: Any, gemm1_weights: Any, *, output: Any = None) -> None: ...

    monkeypatch.setattr(sys.modules["flashinfer.fused_moe"], "trtllm_bf16_routed_moe", other)
    with pytest.raises(BindError, match="another trtllm_bf16_routed_moe") as error:
        bound()
    text = str(error.value)
    assert "does not take" in text
    assert "topk_ids" in text
    assert "asks for topk_idx" in text
    assert "0.7.2.double" in text
    assert "install flashinfer-python" in text


@pytest.mark.parametrize(
    ("runner", "scheme", "place", "name"),
    [
        (TRTLLM, "bf16", "flashinfer", "shuffle_matrix_a"),
        (TRTLLM, "bf16", "flashinfer.fused_moe", "convert_to_block_layout"),
        (TRTLLM, "mxfp8", "flashinfer", "block_scale_interleave"),
        (TRTLLM, "mxfp8", "flashinfer.fused_moe", "reorder_rows_for_gated_act_gemm"),
        (CUTLASS, "nvfp4", "flashinfer", "block_scale_interleave"),
        (CUTLASS, "mxfp4_w4a16", "flashinfer.fused_moe", "interleave_moe_weights_for_sm90_mixed_gemm"),
        (CUTLASS, "mxfp4_w4a16", "flashinfer.fused_moe", "interleave_moe_scales_for_sm90_mixed_gemm"),
    ],
)
def test_preparation_is_checked_like_every_call(
    runner: str, scheme: str, place: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def other(given: Any) -> None: ...

    monkeypatch.setattr(sys.modules[place], name, other)
    layer = config(scheme, num_experts=8)
    with pytest.raises(BindError, match=f"another {name} than this plugin was written for .*asks for given"):
        plan(runner, layer, layer_of(layer).weights)


@pytest.mark.parametrize(("runner", "name"), [(TRTLLM, "trtllm_bf16_routed_moe"), (CUTLASS, "cutlass_fused_moe")])
def test_a_function_that_is_not_there_is_named(runner: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["flashinfer.fused_moe"], name)
    with pytest.raises(BindError, match=f"has no flashinfer.fused_moe.{name}"):
        bound(runner)


def test_a_member_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["flashinfer.tllm_enums"], "RoutingMethodType", object())
    with pytest.raises(BindError, match=r"has no RoutingMethodType\.TopK"):
        bound()
    with pytest.raises(BindError, match=r"has no Missing\.Anything"):
        member("Missing", "Anything")


def test_hidden_keywords_cannot_be_checked() -> None:
    def anything(**keywords: Any) -> None: ...

    with pytest.raises(BindError, match="hides the arguments"):
        check_call(anything, {"a"})
    with pytest.raises(BindError, match="cannot be read"):
        check_call(min if not hasattr(min, "__signature__") else type, {"a"})


def test_calls_are_made_by_keyword() -> None:
    call = bind_call("convert_to_block_layout", {"blockK": 128}, ("input_tensor",))
    with pytest.raises(AssertionError, match="positional"):
        call(layer_of(config()).hidden)


def test_an_import_that_fails_is_a_dependency_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "flashinfer"
    package.mkdir()
    (package / "__init__.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(DependencyError, match=r"libcuda\.so\.1"):
        bound()
    assert "flashinfer" not in sys.modules


def test_selection_and_explanation_import_nothing_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.partition(".")[0] == "flashinfer"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # importing it would raise
    for runner in (TRTLLM, CUTLASS):
        found = moe_core.resolve(config(), None, "cpu", registry=registry(), runner=runner, max_tokens=64)
        assert found.require().runner == runner


# Tuning of the TensorRT-LLM runner, which is FlashInfer's own.


def job(store: Path, budget_s: float = 60.0) -> TuningJob:
    layer, one = config(), bound()

    def inputs(count: int, seed: int) -> Any:
        made = layer_of(layer, seed, tokens=count)
        return made.hidden, made.topk

    return TuningJob(
        plan=one, binding=one._binding, quant_info=one.quant_info, tokens=(3, 8), budget_s=budget_s, inputs=inputs,
        store=store, progress=lambda text: None,
    )  # fmt: skip


def test_tuning_runs_each_token_count_in_flashinfers_tuner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    calls = trtllm_double_kernels.CALLS

    class Watching(list):  # type: ignore[type-arg]
        def append(self, given: Any) -> None:
            if trtllm_double_autotuner.TUNING:
                seen.append(given["hidden_states"].shape[0])
            super().append(given)

    monkeypatch.setattr(trtllm_double_kernels, "CALLS", Watching(calls))
    store = tmp_path / "store.json"
    rows = trtllm_tune.tune(job(store))
    assert [row.tokens for row in rows] == [3, 8] == seen
    assert store.read_text() == '{"double": 2}'
    assert trtllm_tune.tune(job(tmp_path / "none.json", budget_s=0.0)) == []


def test_plans_hand_the_file_to_flashinfer(tmp_path: Path) -> None:
    store = tmp_path / f"{TRTLLM}.json"
    trtllm_tune.tune(job(store))
    settings = moe_core.Settings(runner=TRTLLM, tuning=str(tmp_path))
    layer = config()
    moe_core.plan(layer, layer_of(layer).weights, registry=registry(), settings=settings, max_tokens=64)
    assert [str(store)] == trtllm_double_autotuner.LOADED


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_named_file_that_flashinfer_does_not_take_is_an_error(content: str | None, tmp_path: Path) -> None:
    store = tmp_path / "named.json"
    if content is not None:
        store.write_text(content)
    settings, layer = moe_core.Settings(runner=TRTLLM, tuning=str(store)), config()
    with pytest.raises(BindError, match=r"tuner does not take .*named\.json"):
        moe_core.plan(layer, layer_of(layer).weights, registry=registry(), settings=settings, max_tokens=64)


def test_this_users_file_may_be_missing_or_foreign(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from moe_core.tuning import default_store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    bound()
    assert trtllm_double_autotuner.LOADED == []
    default_store(TRTLLM).parent.mkdir(parents=True)
    default_store(TRTLLM).write_text("{}")
    bound()
    assert "tune again" in caplog.text


def test_the_module_of_the_double_is_complete() -> None:
    assert all(isinstance(sys.modules[name], ModuleType) for name in ("flashinfer", "flashinfer.autotuner"))
