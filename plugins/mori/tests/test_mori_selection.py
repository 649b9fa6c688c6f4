"""Which of MoRI's dispatchers is chosen where, with which kernel and why, and every reason against one of them."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest
from moe_core_mori import launch, testing
from moe_core_mori.plugin import MoriPlugin
from moe_core_mori.testing import world

import moe_core
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import BindError
from moe_core.explanation import text
from moe_core.hardware import profile
from moe_core.registry import Registry
from moe_core.request import PlanRequest
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.testing import run_checks
from moe_core.vocabulary import STANDARD, Maturity, Step

SMALL_NODES = {n: Settings(options={"mori": {"gpus_per_node": n}}) for n in (2, 4)}
LAYER = MoeConfig(num_experts=256, top_k=8, hidden_size=7168, intermediate_size=2048)
NAMES = ("mori", "mori_ll", "mori_v2")


def ask(hardware: str = "mi300x", ranks: int = 8, tokens: str = "sharded", **changes: Any) -> Resolution:
    layer = {name: changes.pop(name) for name in list(changes) if name in MoeConfig.__dataclass_fields__}
    more: dict[str, Any] = {"max_tokens": 4096, "settings": Settings(), "assume": ("dependencies",), **changes}
    parallel = ParallelConfig(ep_size=ranks, tokens=tokens)
    return moe_core.resolve(
        LAYER.replace(**layer), parallel, hardware, registry=Registry([MoriPlugin()], autoload=False), **more
    )


def codes(name: str, *args: Any, **changes: Any) -> set[str]:
    verdict = next(v for v in ask(*args, **changes).verdicts if v.spec.name == name)
    return {reason.code for reason in verdict.reasons}


@pytest.mark.parametrize("hardware", ["mi300x", "mi355x"])
def test_chosen_on_amd_with_its_kernel_and_why(hardware: str) -> None:
    found = ask(hardware)
    assert found.require().id == "mori+reference/split"
    said = text(found)
    assert "MoRI's IntraNode, 80 blocks of 16 warps: 8 ranks of one node" in said
    assert f"dispatcher 'mori' is contract on {found.request.hardware.arch}" in said
    terms = found.require().paths[0][1].terms
    assert terms.owner(Step.EP_REDUCE) == "dispatcher"
    for name in NAMES:
        forced = ask(hardware, settings=Settings(dispatcher=name))
        assert forced.require().dispatcher == name
        spec = next(v for v in forced.verdicts if v.spec.name == name)
        assert (spec.usable, spec.maturity) == (True, Maturity.CONTRACT)


@pytest.mark.parametrize(
    ("name", "changes", "expected"),
    [
        ("mori", {"hardware": "h200"}, {"device.type"}),
        ("mori", {"tokens": "replicated"}, {"parallel.tokens"}),
        ("mori", {"max_tokens": None}, {"shape.max_tokens"}),
        ("mori", {"dtype": "float16"}, {"dtype"}),
        ("mori", {"dtype": "float32"}, set()),
        ("mori_v2", {"dtype": "float32"}, {"dtype"}),
        ("mori", {"hidden_size": 2880}, {"shape.hidden"}),
        ("mori_v2", {"hidden_size": 2880}, set()),
        ("mori_v2", {"hidden_size": 2000}, {"shape.hidden"}),
        ("mori", {"top_k": 64}, {"shape.top_k"}),
        ("mori", {"no_combine": True}, {"feature"}),
        ("mori", {"ranks": 6, "num_experts": 240}, {"parallel.ep"}),
        ("mori", {"ranks": 12, "num_experts": 240}, {"parallel.ep"}),
        ("mori", {"ranks": 16}, set()),
        ("mori_ll", {"ranks": 16}, set()),
        ("mori_v2", {"ranks": 16}, {"parallel.ep"}),
        ("mori", {"num_experts": 250}, {"parallel.ep"}),
        ("mori", {"ranks": 1}, {"parallel.ep"}),
        (
            "mori",
            {"ranks": 12, "num_experts": 240, "settings": SMALL_NODES[4]},
            set(),
        ),
        ("mori", {"ranks": 6, "num_experts": 240, "settings": SMALL_NODES[2]}, set()),
        ("mori", {"assume": ()}, {"dep.missing"}),
    ],
)
def test_every_reason_against_it(name: str, changes: dict[str, Any], expected: set[str]) -> None:
    assert codes(name, **changes) == expected


def test_the_hint_names_an_option_that_is_there() -> None:
    verdicts = ask(ranks=6, num_experts=240).verdicts
    hints = {v.spec.name: r.hint for v in verdicts for r in v.reasons if r.code == "parallel.ep"}
    assert hints["mori_v2"] is None
    assert "options={'mori_ll': {'gpus_per_node': 4}}" in hints["mori_ll"]


def request(ranks: int, tokens: int, hardware: str = "mi300x") -> PlanRequest:
    parallel = ParallelConfig(ep_size=ranks, tokens="sharded")
    return PlanRequest(config=LAYER, parallel=parallel, hardware=profile(hardware), max_tokens=tokens)


@pytest.mark.parametrize(
    ("ranks", "tokens", "hardware", "options", "expected"),
    [
        (8, 4096, "mi300x", {}, ("IntraNode", 16, 80, 0, 8)),
        (2, 8, "mi355x", {}, ("IntraNode", 16, 80, 0, 2)),
        (16, 4096, "mi300x", {}, ("InterNodeV1", 16, 32, 16, 8)),
        (16, 4096, "mi355x", {}, ("InterNodeV1", 8, 64, 32, 8)),
        (16, 256, "mi355x", {}, ("InterNodeV1LL", 8, 64, 32, 8)),
        (16, 257, "mi355x", {}, ("InterNodeV1", 8, 64, 32, 8)),
        (8, 64, "mi355x", {"gpus_per_node": 4}, ("InterNodeV1LL", 8, 64, 32, 4)),
        (8, 64, "mi355x", {"kernel": "IntraNodeLL"}, ("IntraNodeLL", 16, 80, 0, 8)),
        (8, 64, "mi300x", {"blocks": 400}, ("IntraNode", 16, 304, 0, 8)),
        (16, 64, "mi300x", {"blocks": 8, "warps": 4}, ("InterNodeV1LL", 4, 8, 4, 8)),
    ],
)
def test_kernels_and_sizes_by_rule(
    ranks: int, tokens: int, hardware: str, options: dict[str, Any], expected: tuple[str, int, int, int, int]
) -> None:
    found = launch.choose(request(ranks, tokens, hardware), options)
    sizes = (found.kernel, found.warps, found.blocks, found.rdma_blocks, found.gpus_per_node)
    assert sizes == expected
    assert found.why
    assert ("cut to the 304 compute units" in found.why) == (options.get("blocks") == 400)
    assert ("given by options" in found.why) == bool(options.keys() & {"blocks", "warps", "rdma_blocks"})
    assert found.compact == (expected[0] == "IntraNode")


def test_the_asynchronous_kernels_run_anywhere() -> None:
    for ranks in (2, 8, 16):
        found = launch.choose_asynchronous(request(ranks, 64), {})
        assert (found.kernel, found.warps, found.blocks, found.rdma_blocks) == ("AsyncLL", 8, 64, 32)
        assert found.compact


@pytest.mark.parametrize(
    "options",
    [{"kernel": "AsyncLL"}, {"kernel": "InterNodeV1"}, {"gpus_per_node": True}, {"blocks": "80"}, {"warps": 17}],
)
def test_options_that_make_no_sense_are_refused_and_explained(options: dict[str, Any]) -> None:
    with pytest.raises(BindError):
        launch.choose(request(8, 64), options)
    found = ask(settings=Settings(options={"mori": options}))
    assert "MoRI's IntraNode" not in text(found)  # nothing is claimed that will not be


def test_all_terms_are_offered_in_the_one_format() -> None:
    for spec in MoriPlugin().moe_core_dispatchers():
        assert set(spec.formats.values()) == set(spec.offers) == {STANDARD}
        assert spec.offers[STANDARD].payloads == {"bf16", "fp8_group128", "mxfp4"}
        assert spec.split_phases == (spec.name == "mori_ll")


@pytest.mark.parametrize("plugin", [MoriPlugin(), testing.OnCpu()], ids=["as it is", "over the double"])
def test_the_conformance_kit_has_nothing_against_it(plugin: MoriPlugin) -> None:
    results = run_checks("mori", registry=Registry([plugin]))
    assert [str(result) for result in results if result.outcome not in ("passed", "refused", "skipped")] == []
    assert sum(result.outcome == "passed" for result in results) > 20


def test_the_doctor_says_that_there_is_nothing_to_check() -> None:
    checks = MoriPlugin().moe_core_doctor()
    assert len(checks) == 2
    for check in checks:
        result = check.run()
        assert result.ok
        assert "nothing to check" in result.detail


def test_the_double_is_offered_in_the_cores_kit_and_goes_when_the_block_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    before = types.ModuleType("mori")
    monkeypatch.setitem(sys.modules, "mori", before)
    device = world.device()
    with moe_core.testing.double("mori", registry=Registry([MoriPlugin()]), arch="gfx942", version="1.1.1") as made:
        assert sys.modules["mori"].__version__ == "1.1.1"
        assert "mori.cco" not in sys.modules
        assert world.device().arch == "gfx942"
        assert {spec.support.devices["cpu"] for spec in made.plugin.moe_core_dispatchers()} == {("*",)}
    assert [name for name in sys.modules if name.partition(".")[0] == "mori"] == ["mori"]
    assert sys.modules["mori"] is before
    assert world.device() is device
