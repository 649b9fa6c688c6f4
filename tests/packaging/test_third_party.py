"""A plugin written as a third party would write it, without a change in the core: it adds whatever a plugin can add."""

from __future__ import annotations

import ast
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import moe_core
from moe_core.explanation import text, to_json
from moe_core.specs import AdapterSpec
from moe_core.testing import run_checks
from moe_core.vocabulary import DroppedSlot, Owner, Phase, Step

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).parent / "fixtures" / "acme" / "src"
TOLERANCE = {"float32": 2e-5, "bfloat16": 1e-2, "float16": 2e-3}
CONFIG = moe_core.MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=96, dtype="float32")


@pytest.fixture(scope="module", autouse=True)
def _acme_on_the_path() -> Iterator[None]:
    sys.path.insert(0, str(SOURCE))
    importlib.invalidate_caches()
    # Layers this small gain nothing from threads, and on a busy machine waiting for them costs a minute.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    sys.path.remove(str(SOURCE))
    for name in [m for m in sys.modules if m.partition(".")[0] == "moe_core_acme"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def registry() -> moe_core.Registry:
    plugin = importlib.import_module("moe_core_acme.plugin").plugin
    return moe_core.Registry(plugins=[plugin], autoload=False)


def weights(config: moe_core.MoeConfig) -> moe_core.CanonicalWeights:
    random = torch.Generator().manual_seed(7)
    e, h, i = config.num_experts, config.hidden_size, config.intermediate_size
    rows, dtype = config.gate_up_factor * i, getattr(torch, config.dtype)

    def tensor(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=random) / shape[-1] ** 0.5).to(dtype)

    biases = {"w13_bias": tensor(e, rows), "w2_bias": tensor(e, h)} if config.bias else {}
    return moe_core.CanonicalWeights(w13=tensor(e, rows, h), w2=tensor(e, h, i), **biases)


def call(config: moe_core.MoeConfig, tokens: int = 33, drop: int = -1) -> tuple[torch.Tensor, moe_core.TopKOutput]:
    """Tokens and a routing with dropped slots, whose weights are NaN, and an expert without tokens."""
    random = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, config.hidden_size, generator=random).to(getattr(torch, config.dtype))
    ids = torch.rand(tokens, config.num_experts - 1, generator=random).topk(config.top_k).indices.int()
    scale = torch.rand(tokens, config.top_k, generator=random)
    dropped = torch.rand(tokens, config.top_k, generator=random) < 0.2
    return x, moe_core.TopKOutput(ids.masked_fill(dropped, drop), scale.masked_fill(dropped, float("nan")))


def bind(registry: moe_core.Registry, config: moe_core.MoeConfig, pair: str, **request: Any) -> moe_core.MoePlan:
    dispatcher, runner = pair.split("+")
    shard = weights(config)
    if "parallel" in request:
        shard = shard.shard(config, request["parallel"])
    return moe_core.plan(config, shard, registry=registry, dispatcher=dispatcher, runner=runner, **request)


def check(actual: torch.Tensor, expected: torch.Tensor, dtype: str = "float32") -> None:
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected.double()).norm() / max(float(expected.double().norm()), 1e-30)
    assert error < TOLERANCE[dtype], float(error)


PAIRS = ("acme_sorted+acme", "acme_sorted+reference", "standard+acme")
LAYERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "bias": {"bias": True},
    "not gated": {"activation": moe_core.Activation(name="relu2", gated=False)},
    "no combine": {"no_combine": True},
    "scaled": {"routed_scaling_factor": 2.5},
    "weight on input": {"router_weight_on_input": True},
    "all experts": {"top_k": 7},
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_computes_the_layer(registry: moe_core.Registry, pair: str, layer: str) -> None:
    config = CONFIG.replace(**LAYERS[layer])
    plan, oracle = bind(registry, config, pair), bind(registry, config, "standard+reference")
    assert plan.resolution.require().id == f"{pair}/split"
    for tokens in (33, 1, 0):
        x, topk = call(config, tokens)
        check(plan(x, topk), oracle(x, topk), config.dtype)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_sink_encoding_of_a_caller_is_understood(registry: moe_core.Registry, pair: str) -> None:
    x, topk = call(CONFIG)
    expected = bind(registry, CONFIG, "standard+reference")(x, topk)
    x, topk = call(CONFIG, drop=CONFIG.num_experts)
    check(bind(registry, CONFIG, pair, incoming=DroppedSlot.SINK)(x, topk), expected)


@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("pair", PAIRS)
def test_parts_of_ranks_add_up(registry: moe_core.Registry, pair: str, placement: str) -> None:
    x, topk = call(CONFIG)
    total = torch.zeros_like(x)
    for rank in range(6):
        parallel = moe_core.ParallelConfig(
            ep_size=3, ep_rank=rank % 3, tp_size=2, tp_rank=rank // 3, placement=placement, reduce="caller"
        )
        total += bind(registry, CONFIG, pair, parallel=parallel)(x, topk)
    check(total, bind(registry, CONFIG, "standard+reference")(x, topk))


def test_terms_name_one_owner_for_each_step(registry: moe_core.Registry) -> None:
    config = CONFIG.replace(routed_scaling_factor=2.5)
    plan = bind(registry, config, "acme_sorted+acme")
    assert plan.step_owner(Step.TOPK_SUM) is Owner.DISPATCHER
    assert plan.step_owner(Step.ROUTER_WEIGHT) is Owner.RUNNER
    assert plan.step_owner(Step.ROUTED_SCALING) is Owner.RUNNER
    assert bind(registry, config, "standard+acme").step_owner(Step.TOPK_SUM) is Owner.RUNNER


@pytest.mark.parametrize("pair", ["acme_sorted+acme", "standard+acme"])
def test_hooks_see_the_rows_that_they_belong_to(registry: moe_core.Registry, pair: str) -> None:
    seen: list[tuple[int, int]] = []

    def add(tensor: torch.Tensor, rows: moe_core.HookRows) -> None:
        # A "LoRA" of the token itself: right only if every row is matched with its own token and expert.
        seen.extend(zip(rows.expert_ids.tolist(), rows.slot_ids.tolist(), strict=True))
        tensor += rows.hidden_states[rows.token_ids].sum(dim=1, keepdim=True) * (rows.expert_ids[:, None] + 1)

    hooks = moe_core.RunnerHooks(after_gate_up=add, after_down=add)
    names = ("after_gate_up", "after_down")
    x, topk = call(CONFIG)
    results = [
        bind(registry, CONFIG, p, hooks=names)(x, topk, state=moe_core.RunningState(Phase.PREFILL, hooks))
        for p in (pair, "standard+reference")
    ]
    check(*results)
    assert len(seen) == 4 * int((topk.topk_ids >= 0).sum())


@pytest.mark.parametrize("pair", PAIRS)
def test_new_weights_take_effect_in_place(registry: moe_core.Registry, pair: str) -> None:
    plan = bind(registry, CONFIG, pair)
    x, topk = call(CONFIG)
    before = plan(x, topk)
    doubled = weights(CONFIG)
    doubled.w2 *= 2
    plan.update_weights(doubled)
    check(plan(x, topk), 2 * before)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_result_goes_where_the_caller_wants_it(registry: moe_core.Registry, pair: str) -> None:
    plan = bind(registry, CONFIG, pair)
    x, topk = call(CONFIG)
    out = torch.empty_like(x)
    result = plan(x, topk, state=moe_core.RunningState(output=out))
    assert result.data_ptr() == out.data_ptr()
    check(out, plan(x, topk))


def test_its_options_are_options_like_any_other(registry: moe_core.Registry) -> None:
    x, topk = call(CONFIG)
    down = bind(registry, CONFIG, "standard+acme", options={"acme": {"order": "down"}})
    assert torch.equal(down(x, topk), bind(registry, CONFIG, "standard+acme")(x, topk))
    with pytest.raises(moe_core.ConfigError, match="order"):
        bind(registry, CONFIG, "standard+acme", options={"acme": {"ordr": "down"}})


def test_the_explanation_lists_it(registry: moe_core.Registry) -> None:
    resolution = moe_core.resolve(CONFIG, None, "cpu", registry=registry)
    found = {c.id for c in resolution.candidates}
    assert {"acme_sorted+acme/split", "acme_sorted+reference/split", "standard+acme/split"} <= found
    # A pair for which nobody wrote an adapter is refused with a reason, not forgotten.
    missing = {r.id: [x.code for x in r.reasons] for r in resolution.rejected}
    assert missing["acme_sorted+cpu[acme_sorted]"] == ["path.missing"]
    report = to_json(resolution)
    assert {"runner:acme", "dispatcher:acme_sorted"} <= {c["component"] for c in report["components"] if c["usable"]}
    lines = text(resolution).splitlines()
    for name in ("yes runner:acme ", "yes dispatcher:acme_sorted ", "acme_sorted+acme/split "):
        assert any(name in line for line in lines), name


def test_what_it_does_not_declare_is_refused(registry: moe_core.Registry) -> None:
    def codes(config: moe_core.MoeConfig, hardware: str = "cpu") -> dict[str, set[str]]:
        verdicts = moe_core.resolve(config, None, hardware, registry=registry).verdicts
        return {v.spec.subject: {r.code for r in v.reasons} for v in verdicts}

    assert codes(CONFIG.replace(scheme="int8_w8a16"))["runner:acme"] == {"quant.scheme"}
    assert codes(CONFIG.replace(activation=moe_core.Activation(limit=7.0)))["runner:acme"] == {"activation.limit"}
    double = codes(CONFIG.replace(dtype="float64"))
    assert double["runner:acme"] == double["dispatcher:acme_sorted"] == {"dtype"}
    assert codes(CONFIG, "h200")["dispatcher:acme_sorted"] == {"device.type"}
    with pytest.raises(moe_core.UnsupportedOverride, match=r"quant\.scheme"):
        bind(registry, CONFIG.replace(scheme="int8_w8a16"), "standard+acme", hardware="cpu")


def test_its_adapters_may_serve_runners_of_others(registry: moe_core.Registry) -> None:
    spec = registry.adapters[("acme_sorted", "reference")]
    assert isinstance(spec, AdapterSpec)
    owners = {registry.owner("adapter", key) for key in registry.adapters if key[0] == "acme_sorted"}
    assert owners == {registry.owner("runner", "acme")} != {registry.owner("runner", "reference")}
    assert registry.notes == []


def test_it_is_discovered_without_torch(tmp_path: Path) -> None:
    code = (
        "import json, sys, moe_core\n"
        "from moe_core_acme.plugin import plugin\n"
        "registry = moe_core.Registry(plugins=[plugin], autoload=False)\n"
        "config = moe_core.preset('qwen3-30b-a3b')\n"
        "chosen = [c.id for c in moe_core.resolve(config, None, 'cpu', registry=registry).candidates]\n"
        "print(json.dumps([chosen, 'torch' in sys.modules]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chosen, torch_imported = json.loads(done.stdout)
    assert "acme_sorted+acme/split" in chosen
    assert not torch_imported


def test_the_core_knows_nothing_about_it() -> None:
    """No name and no string of the core's code says "acme": only docstrings use it, as an example."""
    found = []
    for path in sorted((ROOT / "moe_core").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        bodies = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        docs = {
            node.body[0].value
            for node in ast.walk(tree)
            if isinstance(node, bodies) and node.body and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            words = [value for _, value in ast.iter_fields(node) if isinstance(value, str)]
            if node not in docs and any("acme" in word.lower() for word in words):
                found.append(f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}")
    assert found == []


def test_the_conformance_kit_agrees(registry: moe_core.Registry) -> None:
    """The kit decides what a plugin must do; this one gets no allowance."""
    results = run_checks(next(r.name for r in registry.records if r.name != "core"), registry=registry)
    assert [f"{r.component}/{r.id}: {r.detail}" for r in results if r.outcome in ("failed", "xpassed")] == []
    passed = {r.component for r in results if r.outcome == "passed"}
    assert passed >= {"runner:acme", "dispatcher:acme_sorted"}
