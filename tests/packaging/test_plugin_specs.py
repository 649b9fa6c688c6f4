"""What the six plugins of this repository declare, checked without their vendors and without installing them."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from moe_core.capability import Reason, Requires
from moe_core.config import Activation, MoeConfig, ParallelConfig, RoutingConfig
from moe_core.formats import BUILTIN_FORMATS
from moe_core.hardware import profile
from moe_core.negotiation import negotiate
from moe_core.quant.payloads import ACTIVATION_PAYLOADS
from moe_core.quant.schemes import BUILTIN_SCHEMES
from moe_core.request import PlanRequest
from moe_core.settings import Settings
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedSpec, RunnerSpec, Terms, Wants
from moe_core.vocabulary import (
    PLUGIN_API,
    STANDARD,
    TOPK_BYPASSED,
    DroppedSlot,
    IdSpace,
    Maturity,
    Owner,
    Phase,
    Step,
)

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("aiter", "cutedsl", "deepep", "flashinfer_trtllm", "mori", "triton")
VENDORS = ("torch", "triton", "flashinfer", "cutlass", "aiter", "deep_ep", "mori", "transformers")
HOOKS = ("moe_core_runners", "moe_core_dispatchers", "moe_core_adapters", "moe_core_fused_funcs")
each_plugin = pytest.mark.parametrize("name", PLUGINS)


def source(name: str) -> Path:
    return ROOT / "plugins" / name / "src"


def pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module", autouse=True)
def _sources_on_the_path() -> Iterator[None]:
    """The plugins' packages are importable in this module only, installed or not."""

    def forget() -> dict[str, Any]:
        ours = [m for m in sys.modules if m.partition(".")[0] in {f"moe_core_{name}" for name in PLUGINS}]
        return {m: sys.modules.pop(m) for m in ours}

    path, before = list(sys.path), forget()
    sys.path[:0] = [str(source(name)) for name in PLUGINS]
    importlib.invalidate_caches()
    yield
    sys.path[:] = path
    forget()
    sys.modules.update(before)


def load(name: str) -> Any:
    return importlib.import_module(f"moe_core_{name}.plugin").plugin


def specs(name: str) -> list[Any]:
    plugin = load(name)
    return [spec for hook in HOOKS if hasattr(plugin, hook) for spec in getattr(plugin, hook)()]


def components(name: str) -> list[RunnerSpec | DispatcherSpec]:
    return [s for s in specs(name) if isinstance(s, (RunnerSpec, DispatcherSpec))]


def alternatives(spec: AdapterSpec | FusedSpec) -> tuple[Wants, ...]:
    return spec.wants if isinstance(spec.wants, tuple) else (spec.wants,)


def component(plugin: str, name: str) -> Any:
    return next(s for s in components(plugin) if s.name == name)


@each_plugin
def test_discovery_imports_no_vendor(name: str, tmp_path: Path) -> None:
    rules = f"moe_core_{name}.rules"
    code = (
        "import importlib, importlib.util, sys\n"
        f"plugin = importlib.import_module('moe_core_{name}.plugin').plugin\n"
        f"for hook in {HOOKS!r}:\n"
        "    list(getattr(plugin, hook, tuple)())\n"
        f"if importlib.util.find_spec({rules!r}): importlib.import_module({rules!r})\n"
        f"print(sorted(set({VENDORS!r}) & set(sys.modules)))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(source(name)), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr


@each_plugin
def test_info_and_entry_point_carry_the_name_of_the_folder(name: str) -> None:
    info = load(name).moe_core_plugin_info()
    assert info.name == name
    assert info.api == PLUGIN_API
    entry_points = pyproject(ROOT / "plugins" / name)["project"]["entry-points"]
    assert entry_points == {"moe_core.plugins": {name: f"moe_core_{name}.plugin:plugin"}}


@each_plugin
def test_specs_are_hashable_and_refer_to_what_exists(name: str) -> None:
    declared = specs(name)
    assert len(set(declared)) == len(declared) > 0
    schemes = {scheme.id for scheme in BUILTIN_SCHEMES}
    payloads = {"bf16", *ACTIVATION_PAYLOADS}
    formats = {spec.id for spec in BUILTIN_FORMATS}
    runners = {s.name: s for s in declared if isinstance(s, RunnerSpec)}
    for spec in declared:
        assert all(target.startswith(f"moe_core_{name}.") for target in spec.targets)
        if isinstance(spec, (AdapterSpec, FusedSpec)):
            assert spec.runner in runners
            assert spec.format in formats
            assert all(set(wants.payloads) <= payloads for wants in alternatives(spec))
        if isinstance(spec, FusedSpec):
            support = runners[spec.runner].support
            assert spec.gives_up <= support.features | support.hooks
        if isinstance(spec, RunnerSpec):
            assert spec.support.schemes <= schemes
            assert set(spec.support.scheme_archs) <= spec.support.schemes
            assert any(isinstance(s, (AdapterSpec, FusedSpec)) and s.runner == spec.name for s in declared)
        if isinstance(spec, DispatcherSpec):
            assert set(spec.offers) == set(spec.formats.values()) <= formats
            assert all(offer.payloads <= payloads for offer in spec.offers.values())


def test_names_are_unique_over_all_plugins() -> None:
    declared = [s for name in PLUGINS for s in specs(name)]
    keys = [(type(s), s.name) for s in declared if isinstance(s, (RunnerSpec, DispatcherSpec))]
    keys += [(type(s), (s.format, s.runner)) for s in declared if isinstance(s, (AdapterSpec, FusedSpec))]
    assert sorted(str(k) for k in set(keys) if keys.count(k) > 1) == []


def written(name: str, spec: Any) -> bool:
    """Whether all modules that a spec names are there."""
    modules = [source(name) / target.partition(":")[0].replace(".", "/") for target in spec.targets]
    return all(m.with_suffix(".py").exists() or (m / "__init__.py").exists() for m in modules)


@each_plugin
def test_nothing_unwritten_claims_to_be_verified(name: str) -> None:
    for spec in components(name):
        assert written(name, spec) or set(spec.maturity.values()) <= {Maturity.UNTESTED}, spec.subject


@each_plugin
def test_what_is_written_can_be_imported(name: str) -> None:
    """Every target of every spec, where this machine has what the plugin requires."""
    missing = {s.name: [why for r in s.support.requires for why in r.why_not(s.subject)] for s in components(name)}
    for spec in specs(name):
        owner = spec.runner if isinstance(spec, (AdapterSpec, FusedSpec)) else spec.name
        if not written(name, spec) or missing[owner]:
            continue
        for target in spec.targets:
            module, _, attribute = target.partition(":")
            assert callable(getattr(importlib.import_module(module), attribute)), target


@each_plugin
def test_the_maturity_page_says_what_the_specs_say(name: str) -> None:
    lines = (ROOT / "docs" / "maturity.md").read_text(encoding="utf-8").splitlines()
    columns = ("x86_64", "sm_90", "sm_100", "gfx942", "gfx950")
    for spec in components(name):
        row = next((line for line in lines if line.startswith(f"| {spec.subject.replace(':', ' `')}` |")), None)
        assert (row is not None) == written(name, spec), f"{spec.subject}: written, and no row, or the other way round"
        if row is not None:
            cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
            for column, cell in zip(columns, cells, strict=True):
                assert cell == "-" or cell == spec.maturity.get(column, Maturity.UNTESTED).value, (spec.name, column)


@pytest.mark.parametrize("situation", ["absent", "bare folder", "impostor"])
@each_plugin
def test_a_missing_vendor_is_one_reason_with_a_hint(
    name: str, situation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requirements: set[Requires] = {r for spec in components(name) for r in spec.support.requires}
    assert requirements
    for requirement in requirements:
        monkeypatch.delitem(sys.modules, requirement.module, raising=False)
        if situation != "absent":
            (tmp_path / requirement.module).mkdir(exist_ok=True)
        if situation == "impostor":
            (tmp_path / requirement.module / "__init__.py").touch()
    with monkeypatch.context() as bare:
        bare.setattr(sys, "path", [str(tmp_path)])
        bare.setattr(sys, "meta_path", [PathFinder])
        found = {requirement: requirement.why_not("runner:x") for requirement in requirements}
    code = {"absent": "dep.missing", "bare folder": "dep.namespace", "impostor": "dep.impostor"}[situation]
    for requirement, reasons in found.items():
        if situation == "impostor" and requirement.submodule is None:
            continue  # nothing tells this one from another package of its name
        assert [reason.code for reason in reasons] == [code]
        assert reasons[0].hint


@pytest.mark.parametrize("project", [ROOT, *(ROOT / "plugins" / name for name in PLUGINS)], ids=lambda p: p.name)
def test_requirements_are_lower_bounds_of_the_right_packages(project: Path) -> None:
    content = pyproject(project)
    groups = [content["project"]["dependencies"], *content["project"].get("optional-dependencies", {}).values()]
    for line in (line for group in groups for line in group):
        requirement = Requirement(line)
        assert canonicalize_name(requirement.name) != "aiter", "PyPI's aiter is an unrelated project"
        own = canonicalize_name(requirement.name).startswith("moe-core")
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators <= ({">=", "<"} if own else {">="}), line
        assert own or operators == {">="}, f"{line} has no lower bound"
    if project != ROOT:
        names = {canonicalize_name(Requirement(line).name) for line in groups[0]}
        assert names <= {"moe-core", "flashinfer-python"}
        assert "moe-core>=0.1,<0.2" in groups[0]


@each_plugin
def test_readme_is_honest(name: str) -> None:
    text = (ROOT / "plugins" / name / "README.md").read_text(encoding="utf-8")
    assert f"pip install moe-core-{name.replace('_', '-')}" in text
    for spec in components(name):
        assert f"`{spec.name}`" in text
        missing = not (source(name) / (spec.factory.partition(":")[0].replace(".", "/") + ".py")).exists()
        assert not missing or "`target.missing`" in text


# The rules, which are code already.

LAYER = MoeConfig(num_experts=128, top_k=8, hidden_size=4096, intermediate_size=1536)
OAI = Activation.swiglu_oai()
NON_GATED = Activation(name="relu2", gated=False)
DEEPSEEK = RoutingConfig(
    method="sigmoid", renormalize=True, correction_bias=True, num_groups=8, topk_groups=4, group_score="top2_sum"
)


def codes(plugin: str, name: str, hardware: str = "b200", **request: Any) -> set[str]:
    """Codes of everything that speaks against a component, its dependencies apart."""
    spec = component(plugin, name)
    question = PlanRequest(
        hardware=profile(hardware), assume=frozenset({"dependencies"}), **{"config": LAYER, "max_tokens": 512} | request
    )
    reasons: list[Reason] = spec.support.why_not(question, spec.subject)
    if spec.why_not:
        module, _, attribute = spec.why_not.partition(":")
        reasons += getattr(importlib.import_module(module), attribute)(question, spec.subject)
    assert all(reason.subject == spec.subject for reason in reasons)
    return {reason.code for reason in reasons}


@pytest.mark.parametrize(
    ("hardware", "changes", "expected"),
    [
        ("b200", {}, set()),
        ("h200", {}, {"device.arch"}),
        ("b200", {"scheme": "mxfp4_w4a16", "activation": OAI, "bias": True, "hidden_size": 2880}, set()),
        ("b200", {"activation": OAI, "bias": True}, {"feature"}),
        ("b200", {"activation": OAI, "scheme": "fp8_tensor"}, {"activation"}),
        ("b200", {"activation": NON_GATED}, set()),
        ("b200", {"activation": replace(NON_GATED, gated=True)}, {"activation.gated"}),
        ("b200", {"intermediate_size": 1472}, {"shape.intermediate"}),
        ("b200", {"router_weight_on_input": True}, {"feature"}),
        ("b200", {"router_weight_on_input": True, "top_k": 1, "scheme": "fp8_tensor"}, set()),
        ("b200", {"activation": Activation(limit=10.0), "scheme": "fp8_tensor"}, {"activation.limit"}),
        ("b200", {"activation": Activation(limit=10.0), "scheme": "nvfp4"}, set()),
        ("b200", {"scheme": "int4_w4a16"}, {"quant.group_size"}),
        ("b200", {"scheme": "int4_w4a16", "group_size": 32}, set()),
        ("b200", {"scheme": "mxfp8", "num_experts": 126}, {"shape.num_experts"}),
    ],
)
def test_flashinfer_trtllm(hardware: str, changes: dict[str, Any], expected: set[str]) -> None:
    assert codes("flashinfer_trtllm", "flashinfer_trtllm", hardware, config=replace(LAYER, **changes)) == expected


@pytest.mark.parametrize(
    ("routing", "top_k", "method"),
    [
        (RoutingConfig(), 8, "Default"),
        (RoutingConfig(renormalize=True), 8, "RenormalizeNaive"),
        (RoutingConfig(method="topk_softmax"), 8, "Renormalize"),
        (RoutingConfig(method="topk_sigmoid"), 1, "Llama4"),
        (RoutingConfig(method="topk_sigmoid"), 2, "TopKSigmoid"),
        (DEEPSEEK, 8, "DeepSeekV3"),
        (replace(DEEPSEEK, group_score="max"), 8, None),
        (RoutingConfig(method="sigmoid"), 8, "Sigmoid"),
        (RoutingConfig(method="sigmoid", renormalize=True), 8, "SigmoidRenorm"),
        (RoutingConfig(method="sigmoid", renormalize=True, correction_bias=True), 8, "MiniMax2"),
        (RoutingConfig(method="sigmoid", correction_bias=True), 8, None),
    ],
)
def test_flashinfer_trtllm_routes_only_as_declared(routing: RoutingConfig, top_k: int, method: str | None) -> None:
    config = replace(LAYER, routing=routing, top_k=top_k)
    assert importlib.import_module("moe_core_flashinfer_trtllm.rules").routing_method(config) == method
    found = codes("flashinfer_trtllm", "flashinfer_trtllm", config=config, topk_format=TOPK_BYPASSED)
    assert found == (set() if method else {"topk.format"})


def test_flashinfer_cutlass() -> None:
    def ask(hardware: str, parallel: ParallelConfig | None = None, **changes: Any) -> set[str]:
        config = replace(LAYER, **changes)
        return codes(
            "flashinfer_trtllm", "flashinfer_cutlass", hardware, config=config, parallel=parallel or ParallelConfig()
        )

    assert ask("h200") == ask("b200") == ask("h200", scheme="fp8_block128") == set()
    assert ask("b200", scheme="fp8_block128") == ask("h200", scheme="nvfp4") == {"device.arch"}
    assert ask("h200", dtype="float16", scheme="fp8_block128") == {"dtype"}
    assert ask("h200", ParallelConfig(ep_size=3)) == {"parallel.ep"}
    assert codes("flashinfer_trtllm", "flashinfer_cutlass", "h200", config=replace(LAYER, scheme="fp8_tensor")) == set()
    uncalibrated = {"config": replace(LAYER, scheme="fp8_tensor"), "input_scales": False}
    assert codes("flashinfer_trtllm", "flashinfer_cutlass", "h200", **uncalibrated) == {"quant.input_scales"}
    settings = Settings(options={"flashinfer_cutlass": {"fused_finalize": True}})
    extra = {"settings": settings, "features": frozenset({"deterministic"})}
    assert codes("flashinfer_trtllm", "flashinfer_cutlass", "h200", **extra) == {"feature"}


def test_cutedsl() -> None:
    assert codes("cutedsl", "cutedsl", config=replace(LAYER, scheme="nvfp4")) == set()
    assert codes("cutedsl", "cutedsl_sm90", "h200", config=replace(LAYER, activation=OAI)) == set()
    bad = replace(LAYER, activation=Activation(name="gelu_tanh", gated=False, limit=7.0))
    assert codes("cutedsl", "cutedsl_sm90", "h200", config=bad) == {"activation.gated", "activation.limit"}
    ragged = replace(LAYER, scheme="fp8_block128", intermediate_size=1440)
    assert codes("cutedsl", "cutedsl_hopper", "h200", config=ragged) == {"shape.intermediate"}


GPT_OSS = {"scheme": "mxfp4_w4a16", "activation": OAI}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, set()),
        ({**GPT_OSS, "bias": True, "intermediate_size": 2880}, {"device.arch"}),
        ({**GPT_OSS, "activation": replace(OAI, alpha=1.0)}, {"activation", "device.arch"}),
        ({"activation": OAI}, {"activation"}),
        ({"activation": Activation(limit=10.0)}, {"activation.limit"}),
        ({"activation": NON_GATED}, {"activation", "activation.gated"}),
        ({"intermediate_size": 1440}, {"shape.intermediate"}),
        ({"bias": True}, {"feature"}),
        ({"no_combine": True}, {"feature"}),
        ({"router_weight_on_input": True}, {"feature"}),
        ({"scheme": "int4_w4a16"}, {"quant.group_size"}),
        ({"scheme": "int4_w4a16", "group_size": 32}, set()),
        ({"scheme": "mxfp4"}, {"device.arch"}),
    ],
)
def test_aiter(changes: dict[str, Any], expected: set[str]) -> None:
    config = replace(LAYER, **changes)
    assert codes("aiter", "aiter", "mi300x", config=config) == expected
    assert codes("aiter", "aiter", "mi355x", config=config) == expected - {"device.arch"}


def test_all_of_triton_is_written() -> None:
    assert {spec.name for spec in components("triton")} == {"triton", "triton_interpreter", "symm_mem"}
    assert [spec for spec in specs("triton") if not written("triton", spec)] == []


def test_the_interpreter_of_triton_serves_only_where_it_is_switched_on(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = replace(LAYER, dtype="float32")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert codes("triton", "triton_interpreter", "cpu", config=layer) == {"device.type"}
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert codes("triton", "triton_interpreter", "cpu", config=layer) == set()
    assert codes("triton", "triton_interpreter", "cpu") == {"dtype"}  # numpy has no bfloat16
    assert codes("triton", "triton_interpreter", "h200", config=layer) == {"device.type"}


def test_triton_runs_fp8_only_where_the_hardware_has_it() -> None:
    fp8 = replace(LAYER, scheme="fp8_block128")
    assert codes("triton", "triton", "a100") == codes("triton", "triton", "h200", config=fp8) == set()
    assert codes("triton", "triton", "mi300x", config=fp8) == set()
    assert codes("triton", "triton", "a100", config=fp8) == {"device.arch"}


def test_deepep() -> None:
    def ask(name: str, ranks: int = 8, **request: Any) -> set[str]:
        return codes("deepep", name, "h200", parallel=ParallelConfig(ep_size=ranks, tokens="sharded"), **request)

    every = ("deepep", "deepep_normal", "deepep_normal_static", "deepep_ll", "deepep_v2", "deepep_v2_grouped")
    assert [name for name in every if ask(name)] == []
    assert all("dtype" in ask(name, config=replace(LAYER, dtype="float16")) for name in every)
    assert all("topk.format" in ask(name, topk_format=TOPK_BYPASSED) for name in every)
    assert all("parallel.ep" in ask(name, 1) for name in every)
    assert ask("deepep_normal", 6, config=replace(LAYER, num_experts=96)) == {"parallel.ep"}
    assert ask("deepep_normal_static", 16) == {"parallel.ep"}
    assert ask("deepep_ll", max_tokens=4096) == {"shape.max_tokens"}
    assert ask("deepep_ll", config=replace(LAYER, hidden_size=2880)) == {"shape.hidden"}
    assert ask("deepep_ll", config=replace(LAYER, router_weight_on_input=True)) == {"feature"}
    wide, many = replace(LAYER, hidden_size=8192), replace(LAYER, num_experts=258)
    assert ask("deepep_normal", config=wide) == ask("deepep", config=wide) == {"shape.hidden"}
    assert ask("deepep_normal", 2, config=many) == ask("deepep", 2, config=many) == {"shape.num_experts"}
    assert ask("deepep_ll", config=wide) == ask("deepep_ll", 2, config=many) == set()
    assert ask("deepep_ll", config=replace(LAYER, top_k=12)) == {"shape.top_k"}
    assert ask("deepep_normal", config=replace(LAYER, top_k=33)) == {"shape.top_k"}
    assert ask("deepep_normal", 8, config=replace(LAYER, num_experts=100)) == {"parallel.ep"}
    assert ask("deepep", max_tokens=4096) == {"shape.max_tokens"}
    assert ask("deepep", max_tokens=4096, phases=(Phase.PREFILL,)) == set()
    small = Settings(options={"deepep": {"decode_max_tokens": 128}})
    assert ask("deepep", max_tokens=4096, settings=small) == set()
    assert ask("deepep_normal", no_host_sync=frozenset({Phase.PREFILL})) == {"feature.host_sync"}


@pytest.mark.parametrize("name", ["deepep_v2", "deepep_v2_grouped"])
def test_deepep_v2(name: str) -> None:
    def ask(ranks: int = 8, options: dict[str, Any] | None = None, **request: Any) -> set[str]:
        settings = Settings(options={name: options or {}})
        parallel = ParallelConfig(ep_size=ranks, tokens="sharded")
        return codes("deepep", name, "h200", parallel=parallel, settings=settings, **request)

    assert ask(max_tokens=100000) == ask(12, config=replace(LAYER, num_experts=96)) == set()
    assert ask(config=replace(LAYER, hidden_size=2880)) == {"shape.hidden"}  # no multiple of 256
    assert ask(config=replace(LAYER, top_k=33)) == {"shape.top_k"}
    assert ask(2, config=replace(LAYER, num_experts=514)) == {"shape.num_experts"}
    assert ask(config=replace(LAYER, num_experts=4096)) >= {"shape.num_experts"}
    weighted = replace(LAYER, router_weight_on_input=True)
    assert ask(config=weighted) == {"feature"}
    assert ask(options={"distinct_experts": True}, config=weighted) == set()
    assert ask(config=replace(weighted, top_k=1)) == set()
    assert ask(options={"decode_max_tokens": 64}) == set()
    assert ask(options={"decode_max_tokens": 10**9}) == ask(options={"decode_max_tokens": 0}) == {"shape.max_tokens"}
    assert ask(no_host_sync=frozenset({Phase.PREFILL})) == {"feature.host_sync"}
    assert ask(no_host_sync=frozenset({Phase.DECODE})) == set()
    assert "target.missing" not in ask()


def test_mori() -> None:
    def ask(name: str, ranks: int = 8, **changes: Any) -> set[str]:
        parallel = ParallelConfig(ep_size=ranks, tokens="sharded")
        return codes("mori", name, "mi300x", config=replace(LAYER, **changes), parallel=parallel)

    assert ask("mori") == ask("mori_ll") == ask("mori_v2") == ask("mori", dtype="float32") == set()
    assert ask("mori", dtype="float16") == ask("mori_v2", dtype="float32") == {"dtype"}
    assert ask("mori", 12) == {"parallel.ep"}


STEPS = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.EP_REDUCE})


@pytest.mark.parametrize("runner", [("triton", "triton"), ("aiter", "aiter"), ("cutedsl", "cutedsl")])
@pytest.mark.parametrize("dispatcher", ["deepep_normal", "deepep_ll", "deepep_v2_grouped", "mori"])
def test_dispatchers_and_runners_agree_wherever_they_share_a_format(runner: tuple[str, str], dispatcher: str) -> None:
    offers = component("mori" if dispatcher == "mori" else "deepep", dispatcher).offers
    for spec in specs(runner[0]):
        if not isinstance(spec, (AdapterSpec, FusedSpec)) or spec.runner != runner[1] or spec.format not in offers:
            continue
        outcomes = [negotiate(offers[spec.format], w, subject="path:x", steps=STEPS) for w in alternatives(spec)]
        terms = next((found for found in outcomes if isinstance(found, Terms)), outcomes[0])
        if runner[1] == "cutedsl" and (spec.format == STANDARD and dispatcher == "deepep_normal"):
            assert isinstance(terms, list)  # it finds its experts by global ids, and DeepEP gives local ones
            assert [reason.code for reason in terms] == ["contract.id_space"]
            continue
        assert isinstance(terms, Terms), terms
        assert terms.owner(Step.EP_REDUCE) is Owner.DISPATCHER
        if runner[1] == "aiter":
            assert terms.dropped is DroppedSlot.SINK
            assert "expert_mask" in terms.extras
            assert terms.id_space is (IdSpace.GLOBAL if dispatcher == "mori" else IdSpace.LOCAL)
        if dispatcher == "deepep_ll":
            assert terms.owner(Step.ROUTER_WEIGHT) is Owner.DISPATCHER


def test_fused_vendor_kernels_keep_negative_global_ids() -> None:
    wants = [w for s in specs("flashinfer_trtllm") if isinstance(s, FusedSpec) for w in alternatives(s)]
    assert {(w.id_spaces[0], w.dropped[0]) for w in wants} == {(IdSpace.GLOBAL, DroppedSlot.NEGATIVE)}
