"""The GPU benchmark without a GPU: shapes, floors, checks, tables, figures, and a dry run of the whole script."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu_routing  # noqa: E402
import plot_gpu  # noqa: E402
import shapes  # noqa: E402
from _gpu import checking, contestants, floors, making, points, report, timing, warmup  # noqa: E402

import moe_core  # noqa: E402
from moe_core.config import ParallelConfig, RoutingConfig  # noqa: E402
from moe_core.errors import ConfigError  # noqa: E402
from moe_core.presets import preset  # noqa: E402
from moe_core.quant import BUILTIN_SCHEMES, builtin_scheme  # noqa: E402

CPU = torch.device("cpu")
TINY, BIASED = shapes.TINY["tiny"], shapes.TINY["tiny-biased"]


def row(shape: str, tokens: int, contestant: str, percent: float, **more: Any) -> dict[str, Any]:
    floor = floors.work(shapes.find(shape), "bf16", tokens, 8).floor_us
    common = {"scheme": "bf16", "routing": "uniform", "ok": True, "error": 1e-3, "floor_us": floor}
    return {"shape": shape, "tokens": tokens, "contestant": contestant, "us": 100 * floor / percent} | common | more


@pytest.mark.parametrize("name", ["mixtral-8x7b", "qwen3-30b-a3b", "qwen3-235b-a22b", "gpt-oss-120b", "olmoe"])
def test_shapes_are_those_of_the_presets(name: str) -> None:
    ours, theirs = shapes.find(name).config(), preset(name)
    for field in ("num_experts", "top_k", "hidden_size", "intermediate_size", "activation", "bias"):
        assert getattr(ours, field) == getattr(theirs, field), field


def test_groups_of_shapes() -> None:
    assert len(shapes.select(("tuned",))) == 7
    assert [s.name for s in shapes.select(("olmoe", "never-tuned", "olmoe"))] == ["olmoe", *shapes.NEVER_TUNED]
    with pytest.raises(ConfigError, match="unknown shape 'olmo'"):
        shapes.select(("olmo",))


@pytest.mark.parametrize("shape", shapes.SHAPES.values(), ids=shapes.SHAPES)
def test_every_shape_fits_its_schemes(shape: shapes.Shape) -> None:
    for scheme in shape.schemes:
        assert shape.problems(scheme) == []


def test_recorded_floors_are_ours() -> None:
    """The recorded table was made with the same formula: where every expert has tokens the floors are equal."""
    for recorded in floors.recorded():
        if recorded["tokens"] >= 1024:
            shape = shapes.find(recorded["shape"])
            floor = floors.work(shape, recorded["scheme"], recorded["tokens"], shape.experts).floor_us
            assert floor == pytest.approx(recorded["floor_us"], rel=2e-3), recorded


def test_recorded_peers_are_the_brackets_of_the_goals() -> None:
    others = floors.recorded()
    cells = {(c.scheme, c.bucket): c.peers for c in floors.summary(others, others, set(shapes.SHAPES))}
    expected = {
        "bf16": (77, 97, 84, 74),
        "fp8_block128": (57, 87, 69, 57),
        "mxfp4_w4a16": (21, 60, 47, 34),
    }
    for scheme, values in expected.items():
        found = [cells[scheme, name] for name in floors.BUCKETS]
        assert found == pytest.approx(values, abs=1.0)


def test_bytes_floor_and_operations_floor() -> None:
    shape = shapes.find("qwen3-30b-a3b")
    one = floors.work(shape, "bf16", 1, 8)
    assert one.floor_us == pytest.approx((8 * 3 * 2048 * 768 * 2 + 2 * 2048 * 2) / 4.3e12 * 1e6)
    many = floors.work(shape, "fp8_block128", 16384, 128)
    assert many.floor_us == pytest.approx(6 * 16384 * 8 * 2048 * 768 / 1400e12 * 1e6)
    assert floors.gemm_rate("mxfp4_w4a16") == 790e12


def test_buckets() -> None:
    assert [floors.bucket(t) for t in shapes.TOKENS] == [
        "T=1",
        *["8-64"] * 2,
        *["256-1024"] * 2,
        *[">=4096"] * 2,
    ]


@pytest.mark.parametrize("scheme", [s.id for s in BUILTIN_SCHEMES])
def test_random_weights_are_valid_and_of_unit_gain(scheme: str) -> None:
    config = TINY.config(scheme)
    weights = making.random_weights(config, CPU, 3)
    weights.validate(config, ParallelConfig(), builtin_scheme(scheme))
    batch = making.random_inputs(TINY, 64, "uniform", CPU, 4)
    size = checking.sample(config, weights, batch, 5).wanted.square().mean().sqrt()
    assert 0.05 < float(size) < 2.0


def test_random_inputs() -> None:
    even = making.random_inputs(TINY, 400, "uniform", CPU, 1)
    skewed = making.random_inputs(TINY, 400, "skewed", CPU, 1)
    counts = [torch.bincount(b.ids64.flatten(), minlength=TINY.experts).sort().values for b in (even, skewed)]
    assert int(counts[1][-2:].sum()) > 1.3 * int(counts[0][-2:].sum())
    assert even.topk.topk_ids.dtype is torch.int32
    assert even.topk.topk_weights.sum(-1) == pytest.approx(torch.ones(400).numpy(), abs=1e-5)
    assert even.activated == len(even.ids64.unique())


def test_copies_keep_experts_out_of_the_cache() -> None:
    batch = making.random_inputs(TINY, 1, "uniform", CPU, 1)
    each = int(making.REUSE_DISTANCE / 2 / batch.activated / 1.5)
    assert making.reuse_distance([batch], each, 1) == each * batch.activated
    assert making.copies_needed([batch], each) == 3
    assert making.copies_needed([batch], int(making.REUSE_DISTANCE)) == 1
    assert making.copies_needed([batch], 1) == making.MOST_COPIES


@pytest.mark.parametrize(("shape", "scheme"), [(TINY, "bf16"), (TINY, "fp8_block128"), (BIASED, "mxfp4_w4a16")])
def test_right_outputs_pass_and_wrong_ones_do_not(shape: shapes.Shape, scheme: str) -> None:
    config = shape.config(scheme)
    weights = making.random_weights(config, CPU, 1)
    batch = making.random_inputs(shape, 40, "uniform", CPU, 2)
    sample, most = checking.sample(config, weights, batch, 3), checking.limit(scheme)
    right = contestants.ours("reference").bind(config, weights, 40)(batch)
    assert sample.error(right) <= most / 3

    def wrong(change: Any) -> float:
        out = right.clone()
        change(out)
        return sample.error(out)

    last = int(sample.rows[-1])
    assert last == 39
    assert wrong(lambda out: out.mul_(1.05)) > most
    assert wrong(lambda out: out[last].zero_()) > most
    assert wrong(lambda out: out.copy_(out.roll(1, dims=0))) > most
    assert wrong(lambda out: out[:, :16].mul_(-1)) > most
    # NaN never passes, also outside the sample.
    outside = next(t for t in range(40) if t not in sample.rows.tolist())
    assert not wrong(lambda out: out[outside, 0].fill_(float("nan"))) <= most
    swapped = making.random_inputs(shape, 40, "uniform", CPU, 9)
    swapped.hidden = batch.hidden
    assert sample.error(contestants.ours("reference").bind(config, weights, 40)(swapped)) > most


def test_the_check_sees_a_missing_quantization_and_a_missing_bias() -> None:
    config = BIASED.config("bf16")
    weights = making.random_weights(config, CPU, 1)
    batch = making.random_inputs(BIASED, 8, "uniform", CPU, 2)
    sample = checking.sample(config, weights, batch, 3)
    weights.w2_bias = torch.zeros_like(weights.w2_bias)
    assert sample.error(contestants.ours("reference").bind(config, weights, 8)(batch)) > checking.limit("bf16")


def test_a_row_for_everyone_that_runs_fails_or_is_wrong() -> None:
    def off(config: Any, weights: Any, most: int) -> contestants.Bound:
        right = contestants.ours("reference").bind(config, weights, most)
        return lambda batch: right(batch) * 1.1

    def broken(config: Any, weights: Any, most: int) -> contestants.Bound:
        raise RuntimeError("no\nkernel")

    who = [
        contestants.ours("reference"),
        contestants.Contestant("off", off, lambda config: None),
        contestants.Contestant("broken", broken, lambda config: None),
        contestants.Contestant("absent", broken, lambda config: "not this one"),
    ]
    layer = points.Layer(TINY, "bf16", CPU, 8, 1)
    with torch.no_grad():
        rows = {r["contestant"]: r for r in points.measure(layer, who, 8, "uniform", 5, 0.01)}
    assert set(rows) == {"moe_core reference", "off", "broken"}
    assert rows["moe_core reference"]["ok"]
    assert rows["moe_core reference"]["us"] > 0
    assert not rows["off"]["ok"]
    assert "relative error 0.1" in rows["off"]["problem"]
    assert rows["broken"]["us"] is None
    assert rows["broken"]["problem"] == "RuntimeError: no kernel"
    found = floors.percents(rows.values())
    assert list(found["tiny", "bf16", 8]) == ["moe_core reference"]
    json.dumps(rows)


def test_one_wrong_call_of_a_replay_is_seen() -> None:
    good, bad = torch.ones(2, 2), torch.full((2, 2), float("nan"))

    def error(out: torch.Tensor) -> float:
        return float((out - 1).abs().max())

    assert points.worst([good, good * 5, good, good], 2, 0, error) == 0
    assert points.worst([good, good, good * 5, good], 2, 0, error) == 4
    assert not points.worst([good, bad, good, good], 2, 0, error) <= 1


def test_poison_and_turns() -> None:
    replay = timing.Replay([lambda: torch.zeros(3)] * 2, CPU)
    replay.poison()
    assert all(out.isnan().all() for out in replay.outs)
    times = timing.take_turns({"a": replay, "b": timing.Replay([lambda: torch.zeros(3)], CPU)}, CPU, 1e-4)
    assert set(times) == {"a", "b"}
    assert all(3 <= len(values) <= timing.ROUNDS for values in times.values())
    assert timing.calls_per_replay(20.0, 16) == 64
    assert timing.calls_per_replay(15000.0, 2) == 2


def test_the_gpu_rests_where_operations_are_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr(timing.time, "sleep", slept.append)
    monkeypatch.setattr(timing, "_microseconds", lambda replay, device: 1000.0)
    replay = timing.Replay([lambda: torch.zeros(3)] * 2, CPU)
    timing.take_turns({"a": replay}, CPU, 0.01)
    assert slept == []
    rounds = len(timing.take_turns({"a": replay}, CPU, 0.01, rest=True)["a"])
    assert slept == [pytest.approx(0.006)] * rounds  # three times two calls of a millisecond
    replay.count = 1000
    timing.take_turns({"a": replay}, CPU, 0.01, rest=True)
    assert slept[-1] == timing.MOST_REST
    assert floors.work(shapes.find("mixtral-8x7b"), "bf16", 16384, 8.0).by_operations
    assert not floors.work(shapes.find("mixtral-8x7b"), "bf16", 8, 8.0).by_operations


def test_summary_and_points_behind() -> None:
    rows = [
        row("tiny", 1, "moe_core triton", 80),
        row("tiny", 1, "peer", 40),
        row("tiny", 8, "moe_core triton", 50),
        row("tiny", 64, "moe_core triton", 98),
        row("tiny", 64, "moe_core cutedsl", 99, ok=False),
    ]
    others = [row("tiny", 8, "other", 60), row("tiny", 64, "other", 100), row("tiny", 256, "other", 1)]
    first, second = floors.summary(rows, others, {"tiny"})
    assert (first.bucket, first.points, first.goal) == ("T=1", 1, 85)
    assert (first.ours, first.peers, first.recorded) == (pytest.approx(80), pytest.approx(40), None)
    assert second.ours == pytest.approx(70)
    assert second.recorded == pytest.approx(6000**0.5)
    assert second.ours_there == pytest.approx(70)
    (late,) = floors.behind(rows, others)
    assert (late.tokens, late.peer, late.times) == (8, "other (recorded)", pytest.approx(1.2))


def test_tables_are_short_and_say_what_failed(tmp_path: Path) -> None:
    rows = []
    for shape in shapes.SHAPES:
        for tokens in shapes.TOKENS:
            for scheme in ("bf16", "fp8_block128"):
                rows.append(row(shape, tokens, "moe_core triton", 70, scheme=scheme))
    rows.append(row("olmoe", 8, "moe_core cpu", 1, ok=False, problem="wrong: [bold]"))
    with (tmp_path / "out").open("w") as file:
        report.show(rows, floors.recorded(), Console(width=132, file=file))
    text = (tmp_path / "out").read_text()
    assert len(text) < 10_000
    assert "FAILED moe_core cpu olmoe bf16 T=8 uniform: wrong: [bold]" in text
    assert "never-tuned shapes" in text


def test_rows_survive_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    report.Rows(path).add(row("tiny", 8, "moe_core triton", 50))
    again = report.Rows(path, resume=True)
    assert again.has("tiny", "bf16", 8, "uniform", "moe_core triton")
    assert not again.has("tiny", "bf16", 8, "skewed", "moe_core triton")
    assert report.Rows(path).rows == []


def test_interleaving() -> None:
    w13 = torch.arange(8).view(1, 8, 1).expand(2, 8, 3)
    assert contestants.interleave(w13)[0, :, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert contestants.interleave(w13, rows=2)[1, :, 2].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


@pytest.mark.parametrize(
    ("runner", "options"), [("triton", {}), ("triton-plain", {"triton": {"specialized": False}}), ("reference", {})]
)
def test_what_a_contestant_asks_for(monkeypatch: pytest.MonkeyPatch, runner: str, options: dict[str, Any]) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(contestants, "registry", lambda name: name)
    monkeypatch.setattr(moe_core, "plan", lambda config, weights, **given: asked.append(given))
    contestant = contestants.ours(runner)
    contestant.bind(TINY.config(), making.random_weights(TINY.config(), CPU, 0), 8)
    assert contestant.name == f"moe_core {runner}"
    name = runner.removesuffix("-plain")
    assert (asked[0]["registry"], asked[0]["settings"].runner) == (name, name)
    assert asked[0]["settings"].options == options


def test_peers_that_are_missing_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "quack", None)
    found, missing = contestants.load(["reference"], ["quack"])
    assert [c.name for c in found] == ["moe_core reference"]
    assert "quack" in missing


@pytest.mark.parametrize("shape", [TINY, BIASED], ids=lambda s: s.name)
def test_torch_gmm_is_right(shape: shapes.Shape) -> None:
    pytest.importorskip("transformers")
    config = shape.config()
    weights = making.random_weights(config, CPU, 1)
    batch = making.random_inputs(shape, 16, "uniform", CPU, 2)
    with torch.no_grad():
        out = contestants.torch_gmm().bind(config, weights, 16)(batch)
    assert checking.sample(config, weights, batch, 3).error(out) <= checking.limit("bf16")


def test_work_of_the_compiling_processes() -> None:
    pairs = [("olmoe", "bf16"), ("olmoe", "fp8_block128")]
    split = warmup.units(pairs, (1, 8, 64), ("triton",), 5)
    assert len(split) == 4
    assert sorted(t for unit in split if unit.scheme == "bf16" for t in unit.tokens) == [1, 8, 64]
    assert {unit.max_tokens for unit in split} == {64}
    assert len(warmup.units(pairs * 20, (1, 8), ("triton",), 15)) == 40


def test_checks_of_routing_and_alignment() -> None:
    class Table:
        starts, ends = torch.tensor([0, 2, 2]), torch.tensor([2, 2, 4])
        slots = torch.tensor([0, 3, 1, 2])

    ids = torch.tensor([[0, 2], [2, 0]])
    assert gpu_routing.wrong_table(Table, ids, 3) is None
    assert gpu_routing.wrong_table(Table, torch.tensor([[0, 2], [2, 1]]), 3) is not None
    assert gpu_routing.wrong_table(Table, torch.tensor([[2, 0], [0, 2]]), 3) is not None
    logits, routing = torch.randn(200, 8), RoutingConfig(renormalize=True)
    found = gpu_routing.oracle.route(logits, 2, routing)
    assert gpu_routing.wrong_choice(found, logits, 2, routing, None) is None
    found.topk_weights = found.topk_weights * 1.01
    assert "weights differ" in (gpu_routing.wrong_choice(found, logits, 2, routing, None) or "")
    assert "other experts" in (gpu_routing.wrong_choice(found, -logits, 2, routing, None) or "")


def test_figures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row("olmoe", t, c, p) for t in (1, 8) for c, p in (("moe_core triton", 80), ("torch_gmm", 30))]
    result = tmp_path / "result.json"
    result.write_text(json.dumps({"rows": [*rows, row("olmoe", 8, "broken", 1, us=None, ok=False)]}))
    drawn = plot_gpu.draw(plot_gpu.load([result, result]), floors.recorded(), tmp_path)
    assert [path.name for path in drawn] == ["gpu_bf16.png", "gpu_floor.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in drawn)


def test_dry_run(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu_experts.py", "--dry", "--tokens", "1,8", "--peers", "", "--seed", "7"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--out", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "gpu_experts.json").read_text())
    assert result["not_reached"] == []
    assert len(result["rows"]) == len((tmp_path / "gpu_experts.jsonl").read_text().splitlines()) == 2 * 4
    assert {(r["shape"], r["scheme"]) for r in result["rows"]} == {
        ("tiny", "bf16"),
        ("tiny", "fp8_block128"),
        ("tiny-biased", "bf16"),
        ("tiny-biased", "mxfp4_w4a16"),
    }
    assert all(r["ok"] and r["error"] <= r["error_limit"] for r in result["rows"])
    assert "geometric mean" in done.stdout
