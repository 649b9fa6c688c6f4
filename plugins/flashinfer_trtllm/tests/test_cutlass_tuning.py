"""`moe-core tune` for `flashinfer_cutlass` over the double: what is tried, kept, read again and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import trtllm_double_cutlass
from moe_core_flashinfer_trtllm import cutlass_tune
from moe_core_flashinfer_trtllm.cutlass_store import Tactics, merge, read
from trtllm_double import config, layer_of, plan

import moe_core
from moe_core.errors import BindError, MoeCoreError
from moe_core.protocols import TuningJob

RUNNER = "flashinfer_cutlass"
pytestmark = pytest.mark.usefixtures("double")


def job(store: Path, tokens: tuple[int, ...] = (4, 9), scheme: str = "bf16", budget_s: float = 60.0) -> TuningJob:
    layer = config(scheme)
    bound = plan(RUNNER, layer, layer_of(layer).weights)

    def inputs(count: int, seed: int) -> Any:
        one = layer_of(layer, seed, tokens=count)
        return one.hidden, one.topk

    return TuningJob(
        plan=bound, binding=bound._binding, quant_info=bound.quant_info, tokens=tokens, budget_s=budget_s,
        inputs=inputs, store=store, progress=lambda text: None,
    )  # fmt: skip


def pretend(monkeypatch: pytest.MonkeyPatch, best: tuple[int, int]) -> None:
    """Calls take as long as their kernels are far from `best`."""

    def microseconds(call: Any, device: torch.device) -> float:
        call()
        ids = trtllm_double_cutlass.CALLS[-1]["profile_ids"]
        return 100.0 + sum(10.0 if a == -1 else abs(a - b) for a, b in zip(ids, best, strict=True))

    monkeypatch.setattr(cutlass_tune, "microseconds", microseconds)


def test_every_kernel_is_tried_and_the_best_pair_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (1, 5))
    store = tmp_path / "store.json"
    rows = cutlass_tune.tune(job(store))
    assert [(row.tokens, row.tuned, row.tried) for row in rows] == [
        (4, "kernels 1 and 5", 8),
        (9, "kernels 1 and 5", 8),
    ]
    assert all(row.tuned_us == 100.0 < row.default_us == 120.0 for row in rows)
    (layer,) = read(store).values()
    assert layer == {"4": [1, 5], "9": [1, 5]}


def test_plans_use_what_was_found_and_nothing_else_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (2, 4))
    store = tmp_path / f"{RUNNER}.json"
    cutlass_tune.tune(job(store))
    layer = config()
    one = layer_of(layer, tokens=5)

    def bound(**settings: Any) -> moe_core.MoePlan:
        from trtllm_double import registry

        chosen = moe_core.Settings(runner=RUNNER, **settings)
        return moe_core.plan(layer, one.weights, registry=registry(), settings=chosen, max_tokens=64)

    bound(tuning=str(tmp_path))(one.hidden, one.topk)
    assert trtllm_double_cutlass.CALLS[-1]["profile_ids"] == [2, 4]
    bound()(one.hidden, one.topk)
    assert trtllm_double_cutlass.CALLS[-1]["profile_ids"] is None
    bound(tuning=str(store), options={RUNNER: {"fused_finalize": True}})(one.hidden, one.topk)
    assert trtllm_double_cutlass.CALLS[-1]["profile_ids"] is None, "other kernels, other numbers"


def test_a_kernel_that_computes_something_else_does_not_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretend(monkeypatch, (1, 5))
    right = trtllm_double_cutlass._Schemes.run

    def broken(self: Any, *arguments: Any) -> Any:
        result = right(self, *arguments)
        return result * float("nan") if (trtllm_double_cutlass.CALLS[-1]["profile_ids"] or [0])[0] == 1 else result

    monkeypatch.setattr(trtllm_double_cutlass._Schemes, "run", broken)
    (row,) = cutlass_tune.tune(job(tmp_path / "s.json", tokens=(4,)))
    assert row.tuned != "kernels 1 and 5"


def test_no_time_no_row_and_no_file(tmp_path: Path) -> None:
    store = tmp_path / "store.json"
    assert cutlass_tune.tune(job(store, budget_s=0.0)) == []
    assert not store.exists()


def test_fp8_blocks_have_nothing_to_choose(tmp_path: Path) -> None:
    with pytest.raises(MoeCoreError, match="one kernel for fp8_block128"):
        cutlass_tune.tune(job(tmp_path / "s.json", scheme="fp8_block128"))


def test_the_nearest_smaller_token_count_counts() -> None:
    table = Tactics((8, 64), ([1, 5], [2, 6]))
    assert [table.at(tokens) for tokens in (1, 8, 63, 64, 5000)] == [[1, 5], [1, 5], [1, 5], [2, 6], [2, 6]]
    assert Tactics().at(3) is None


def test_merging_keeps_what_a_file_holds(tmp_path: Path) -> None:
    store = tmp_path / "deep" / "store.json"
    merge(store, "a", {8: [0, 3]})
    merge(store, "b", {1: [1, 4]})
    merge(store, "a", {16: [2, 5]})
    assert read(store) == {"a": {"8": [0, 3], "16": [2, 5]}, "b": {"1": [1, 4]}}
    assert [p.name for p in store.parent.iterdir()] == ["store.json"]


@pytest.mark.parametrize("content", ["{", json.dumps({"runner": "triton", "format": 1}), "[]"])
def test_a_named_file_that_is_none_is_an_error(content: str, tmp_path: Path) -> None:
    from trtllm_double import registry

    store = tmp_path / "other.json"
    store.write_text(content)
    layer = config()
    settings = moe_core.Settings(runner=RUNNER, tuning=str(store))
    with pytest.raises(BindError, match=r"other\.json"):
        moe_core.plan(layer, layer_of(layer).weights, registry=registry(), settings=settings, max_tokens=64)


def test_an_unreadable_file_of_this_user_is_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from moe_core.tuning import default_store

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    default_store(RUNNER).parent.mkdir(parents=True)
    default_store(RUNNER).write_text("{")
    plan(RUNNER, config(), layer_of(config()).weights)
    assert "cannot be read" in caplog.text
