"""The same question gets the same answer, in every process and on every rank, and says so in one fingerprint."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_core import explanation
from moe_core.api import explain, resolve
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.registry import Registry
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.testing.fakes import dispatcher_like, fake_hardware, fake_plugin, runner_like
from moe_core.vocabulary import DroppedSlot, Phase, Step

ROOT = Path(__file__).resolve().parents[2]
LAYER = MoeConfig(
    num_experts=8, top_k=2, hidden_size=64, intermediate_size=64, routed_scaling_factor=2.5, scheme="fp8_tensor"
)

SCRIPT = """
import json, sys
from moe_core.api import resolve
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.explanation import text, to_json
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.vocabulary import Step

found = resolve(
    MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=64, routed_scaling_factor=2.5,
              scheme="fp8_tensor"),
    ParallelConfig(ep_size=2, ep_rank=1), "h200", registry=Registry(autoload=False, settings=Settings()),
    settings=Settings(options={"reference": {"emulate_activations": False}, "cpu": {"pack_weights": True}}),
    features={"deterministic", "lora"}, caller_can=set(Step),
)
assert "torch" not in sys.modules, "selection imported torch"
print(json.dumps({"fingerprint": found.fingerprint, "text": text(found), "json": to_json(found)}))
"""


def ask(config: MoeConfig = LAYER, parallel: ParallelConfig | None = None, **changes: Any) -> Resolution:
    given = {
        "hardware": "h200",
        "registry": Registry(autoload=False, settings=Settings()),
        "settings": Settings(),
        **changes,
    }
    return resolve(config, parallel, given.pop("hardware"), **given)


def test_another_process_with_another_hash_seed_gives_the_same_answer_and_no_torch() -> None:
    answers = [
        subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1", "4242")
    ]
    assert answers[0] == answers[1] == answers[2]
    here = ask(
        parallel=ParallelConfig(ep_size=2, ep_rank=0),
        settings=Settings(options={"cpu": {"pack_weights": True}, "reference": {"emulate_activations": False}}),
        features={"lora", "deterministic"},
        caller_can=frozenset(Step),
    )
    assert json.loads(answers[0])["fingerprint"] == here.fingerprint  # of the other rank


def test_the_same_question_twice_is_the_same_resolution() -> None:
    one, two = ask(), ask()
    assert one == two
    assert one.fingerprint == two.fingerprint
    assert re.fullmatch(r"[0-9a-f]{16}", one.fingerprint)


def test_all_ranks_share_a_fingerprint_though_their_parts_differ() -> None:
    ranks = [ParallelConfig(ep_size=3, ep_rank=e, tp_size=2, tp_rank=t) for e in range(3) for t in range(2)]
    assert len({ask(parallel=rank).fingerprint for rank in ranks}) == 1


def fingerprint(**changes: Any) -> str:
    return ask(**changes).fingerprint


@pytest.mark.parametrize(
    "changes",
    [
        {"config": LAYER.replace(top_k=3)},
        {"config": LAYER.replace(routed_scaling_factor=2.6)},
        {"parallel": ParallelConfig(ep_size=2)},
        {"hardware": "b200"},
        {"parallel": ParallelConfig(ep_size=2, reduce="caller")},
        {"max_tokens": 8},
        {"phases": (Phase.DECODE,)},
        {"features": {"lora"}},
        {"incoming": DroppedSlot.NEVER},
        {"caller_does": {Step.ROUTED_SCALING}},
        {"settings": Settings(options={"reference": {"emulate_activations": False}})},
    ],
)
def test_what_changes_the_plan_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert fingerprint(**changes) != fingerprint()


@pytest.mark.parametrize(
    "settings",
    [Settings(runner="reference"), Settings(path="split"), Settings(check=True), Settings(disable=("nobody",))],
)
def test_how_a_choice_came_about_does_not(settings: Settings) -> None:
    assert fingerprint(settings=settings) == fingerprint()


def test_the_device_counts_and_not_the_machine_around_it() -> None:
    one = fake_hardware("h200", present=True, device_count=1, runtime="CUDA 13.0")
    assert fingerprint(hardware=one) == fingerprint()
    # Ranks with another product of the same architecture run the same code.
    assert fingerprint(hardware="h100") == fingerprint(hardware="h200")


def test_the_placement_of_experts_is_part_of_the_fingerprint() -> None:
    linear, other = (ParallelConfig(ep_size=2, placement=p) for p in ("linear", "round_robin"))
    assert fingerprint(parallel=linear) != fingerprint(parallel=other)


def test_another_version_or_other_terms_alter_the_fingerprint() -> None:
    def with_plugin(version: str, **adapter: Any) -> str:
        plugin = fake_plugin("acme", **runner_like("reference", "acme", last_resort=False, adapter=adapter))
        registry = Registry(plugins=[plugin], autoload=False, settings=Settings())
        registry.records[1].version = version
        found = ask(registry=registry)
        assert found.require().runner == "acme"
        return found.fingerprint

    assert with_plugin("1.0") == with_plugin("1.0")
    assert with_plugin("1.0") != with_plugin("1.1")
    assert with_plugin("1.0") != with_plugin("1.0", wants={"ids_dtypes": ("int64",)})


def test_what_was_not_chosen_is_no_part_of_the_fingerprint() -> None:
    plugin = fake_plugin("acme", **runner_like("reference", "slower", priority=-10), **dispatcher_like("standard", "z"))
    registry = Registry(plugins=[plugin], autoload=False, settings=Settings())
    assert fingerprint(registry=registry) == fingerprint()


EXPECTED = (Path(__file__).parent / "explanation.txt").read_text().rstrip()


def test_the_explanation_reads_like_this() -> None:
    registry = Registry(autoload=False, settings=Settings())
    config = LAYER.replace(scheme="bf16", bias=True, routed_scaling_factor=1.0)
    text = explain(config, ParallelConfig(ep_size=2), "cpu", registry=registry, settings=Settings(), features={"lora"})
    assert re.sub(r"fingerprint [0-9a-f]{16}", "fingerprint FINGERPRINT", text) == EXPECTED


def test_the_explanation_of_nothing_reads_like_this() -> None:
    far = dispatcher_like("standard", "far", priority=7, support={"ep_sizes": (2, None)})
    registry = Registry(plugins=[fake_plugin("acme", **far)], autoload=False, settings=Settings())
    found = ask(registry=registry, settings=Settings(dispatcher="far"))
    text = explanation.text(found)
    assert "no  dispatcher:far  priority 7, executed on sm_90" in text
    assert "[override.excluded] 'far' was asked for by name" in text
    assert "[parallel.ep] runs with ep_size >=2, this is 1" in text
    assert text.splitlines()[-1] == "chosen    nothing: no plan"
    assert explanation.to_json(found)["chosen"] is None


def test_the_json_form_survives_a_round_trip() -> None:
    found = ask(parallel=ParallelConfig(ep_size=2), features={"lora", "deterministic"})
    document = explanation.to_json(found)
    back = json.loads(json.dumps(document))
    assert back == document
    assert (back["chosen"], back["fingerprint"]) == (found.require().id, found.fingerprint)
    usable = {c["component"]: c["usable"] for c in back["components"]}
    assert usable == {"runner:cpu": False, "runner:reference": True, "dispatcher:standard": True} | dict.fromkeys(
        ("dispatcher:allgather", "dispatcher:alltoall", "dispatcher:alltoall_grouped"), False
    )
    (cpu,) = (c for c in back["components"] if c["component"] == "runner:cpu")
    assert {r["code"] for r in cpu["reasons"]} >= {"device.type", "quant.scheme"}
    path = back["candidates"][0]["paths"][0]
    assert (path["phase"], path["format"], path["kind"]) == ("prefill", "standard", "split")
    assert path["terms"]["steps"]["ep_reduce"] == "dispatcher"
