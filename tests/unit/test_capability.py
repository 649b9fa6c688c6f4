"""Capabilities: architecture windows, requirements probed without an import, and all reasons at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from moe_core.capability import REASON_CODES, Reason, Requires, Support, arch_matches, arch_number
from moe_core.config import Activation, MoeConfig, ParallelConfig
from moe_core.errors import SpecError
from moe_core.hardware import profile
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_BYPASSED, Phase

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("arch", "window", "expected"),
    [
        ("sm_90", "*", True),
        ("x86_64", "*", True),
        ("sm_90", "sm_90", True),
        ("sm_90", "sm_89", False),
        ("sm_90", ">=sm_80", True),
        ("sm_75", ">=sm_80", False),
        ("sm_100", ">=sm_90", True),  # a number, not a text: "sm_100" < "sm_90" as text
        ("sm_89", "sm_90..sm_103", False),
        ("sm_90", "sm_90..sm_103", True),
        ("sm_103", "sm_90..sm_103", True),
        ("sm_120", "sm_90..sm_103", False),
        ("sm_90a", ">=sm_90", True),
        ("sm_100f", "sm_100..sm_103", True),
        ("gfx90a", "gfx90a..gfx942", True),  # hexadecimal: 0x90a < 0x942
        ("gfx942", ">=gfx90a", True),
        ("gfx908", ">=gfx90a", False),
        ("gfx1100", ">=gfx942", True),
        ("gfx950", "gfx90a..gfx942", False),
        ("gfx942", ">=sm_80", False),
        ("sm_90", ">=gfx90a", False),
        ("x86_64", "x86_64", True),
        ("x86_64", ">=sm_80", False),
        ("x86_64", ">=x86_64", False),  # it has no order
        ("aarch64", "x86_64", False),
        ("sm_90", "sm_80..", False),
        ("sm_90", "nonsense", False),
    ],
)
def test_an_architecture_lies_in_a_window(arch: str, window: str, expected: bool) -> None:
    assert arch_matches(arch, window) is expected


@pytest.mark.parametrize(
    ("arch", "number"),
    [
        ("sm_90", ("sm", 90)),
        ("sm_103a", ("sm", 103)),
        ("gfx90a", ("gfx", 0x90A)),
        ("gfx942", ("gfx", 0x942)),
        ("x86_64", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_architectures_are_numbered_within_their_family(arch: str, number: tuple[str, int] | None) -> None:
    assert arch_number(arch) == number


def why_not(requirement: Requires) -> str | None:
    reasons = requirement.why_not("runner:acme")
    assert len(reasons) <= 1
    return reasons[0].code if reasons else None


def install(folder: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


EXPLODES = "raise SystemError('a probe must not import this')\n"


@pytest.fixture
def vendor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`vendor_x` 1.5, which cannot be imported, and a bare folder `vendor_bare`."""
    install(
        tmp_path,
        {
            "vendor_x/__init__.py": EXPLODES,
            "vendor_x/kernels/__init__.py": EXPLODES,
            "vendor_x/kernels/moe.py": EXPLODES,
            "vendor_x/data/deep.py": EXPLODES,  # the folder between has no __init__.py
            "vendor_x-1.5.dist-info/METADATA": "Metadata-Version: 2.1\nName: vendor-x\nVersion: 1.5\n",
            "vendor_bare/notes.txt": "no package\n",
            "vendor_single.py": EXPLODES,
        },
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("requirement", "code"),
    [
        (Requires(module="vendor_x"), None),
        (Requires(module="vendor_x", submodule="kernels"), None),
        (Requires(module="vendor_x", submodule="kernels.moe"), None),
        (Requires(module="vendor_x", submodule="data.deep"), None),
        (Requires(module="vendor_single"), None),
        (Requires(module="vendor_nowhere"), "dep.missing"),
        (Requires(module="vendor_bare"), "dep.namespace"),
        (Requires(module="vendor_bare", submodule="kernels"), "dep.namespace"),
        (Requires(module="vendor_x", submodule="fused"), "dep.impostor"),
        (Requires(module="vendor_x", submodule="kernels.fused"), "dep.impostor"),
        (Requires(module="vendor_x", submodule="kernels.moe.deeper"), "dep.impostor"),
        (Requires(module="vendor_single", submodule="kernels"), "dep.impostor"),
        (Requires(module="vendor_x", min_version="1.5"), None),
        (Requires(module="vendor_x", min_version="1.10"), "dep.version"),  # 1.10 > 1.5, though not as text
        (Requires(module="vendor_x", distribution="vendor-x", min_version="2"), "dep.version"),
        (Requires(module="vendor_single", min_version="9"), None),  # no distribution to ask: found is enough
    ],
)
def test_requirements_are_probed_without_importing_them(vendor: Path, requirement: Requires, code: str | None) -> None:
    before = set(sys.modules)
    assert why_not(requirement) == code
    assert not {m for m in set(sys.modules) - before if m.startswith("vendor")}


def test_a_requirement_says_what_is_needed_what_was_found_and_what_to_do(vendor: Path) -> None:
    (reason,) = Requires(module="vendor_x", min_version="2.0", hint="pip install vendor-x").why_not("runner:acme")
    assert reason.subject == "runner:acme"
    assert (reason.needed, reason.found, reason.hint) == ("vendor_x>=2.0", "1.5", "pip install vendor-x")
    assert str(reason) == "[dep.version] 'vendor_x' is 1.5, older than 2.0  -> pip install vendor-x"
    (bare,) = Requires(module="vendor_bare").why_not("runner:acme")
    assert str(vendor / "vendor_bare") in bare.message
    (impostor,) = Requires(module="vendor_x", submodule="kernels.fused").why_not("runner:acme")
    assert "has no 'vendor_x.kernels.fused'" in impostor.message


def test_an_unreadable_version_is_too_old(vendor: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moe_core._metadata.version", lambda name: "git-abcdef")
    (reason,) = Requires(module="vendor_x", min_version="1").why_not("s")
    assert (reason.code, reason.found) == ("dep.version", "git-abcdef")


def test_a_module_without_a_spec_is_missing_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = type(sys)("vendor_ghost")
    stand_in.__spec__ = None
    monkeypatch.setitem(sys.modules, "vendor_ghost", stand_in)
    assert why_not(Requires(module="vendor_ghost")) == "dep.missing"


def test_a_dotted_module_is_refused_since_finding_it_would_import_its_parent() -> None:
    with pytest.raises(SpecError, match=r"(?s)Requires.module is 'a.b'.*submodule="):
        Requires(module="a.b")


def test_asking_for_torch_does_not_import_it() -> None:
    code = (
        "import sys\nfrom moe_core.capability import Requires\n"
        f"assert not Requires(module='torch', submodule='nn.functional', min_version={version('torch')!r}).why_not('s')\n"
        "assert not any(m == 'torch' or m.startswith('torch.') for m in sys.modules), 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_support_without_a_device_is_refused() -> None:
    with pytest.raises(SpecError, match="devices is empty"):
        Support(devices={})


def test_a_device_may_be_any() -> None:
    anywhere = Support(devices={"*": ("*",)})
    assert anywhere.arch_supported("cuda", "sm_90")
    assert anywhere.arch_supported("acme", "x1")
    some = Support(devices={"cuda": (">=sm_90",), "*": ("x86_64",)})
    assert some.arch_supported("cpu", "x86_64")
    assert some.arch_supported("cuda", "sm_100")
    assert not some.arch_supported("cuda", "sm_80")


GOOD = Support(
    devices={"cuda": ("sm_90",)},
    schemes=frozenset({"bf16", "int4_w4a16"}),
    dtypes=frozenset({"bfloat16"}),
    activations=frozenset({"silu"}),
    gated=frozenset({True}),
)


def ask(**changes: Any) -> PlanRequest:
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 64}
    config = changes.pop("config", MoeConfig(**sizes))
    return PlanRequest(**{"config": config, "hardware": profile("h200"), **changes})


def codes(support: Support, request: PlanRequest, subject: str = "runner:acme") -> list[str]:
    return [reason.code for reason in support.why_not(request, subject)]


def config(**changes: Any) -> MoeConfig:
    return replace(ask().config, **changes)


def test_what_is_declared_is_supported() -> None:
    assert codes(GOOD, ask()) == []


@pytest.mark.parametrize(
    ("code", "changes", "support"),
    [
        ("device.type", {"hardware": profile("cpu")}, {}),
        ("device.arch", {"hardware": profile("b200")}, {}),
        ("device.arch", {}, {"scheme_archs": {"bf16": ("sm_100",)}}),
        ("dep.missing", {}, {"requires": (Requires(module="vendor_nowhere"),)}),
        ("quant.scheme", {"config": config(scheme="nvfp4")}, {}),
        ("quant.group_size", {"config": config(scheme="int4_w4a16", group_size=32)}, {}),
        ("dtype", {"config": config(dtype="float16")}, {}),
        ("activation", {"config": config(activation=Activation(name="gelu"))}, {}),
        ("activation.gated", {"config": config(activation=Activation(gated=False))}, {}),
        ("activation.limit", {"config": config(activation=Activation(limit=7.0))}, {}),
        ("shape.hidden", {}, {"hidden_multiple": 128}),
        ("shape.hidden", {}, {"hidden_sizes": frozenset({2048, 4096})}),
        ("shape.intermediate", {"parallel": ParallelConfig(tp_size=2)}, {"intermediate_multiple": 64}),
        ("shape.top_k", {}, {"max_top_k": 1}),
        ("shape.num_experts", {}, {"max_experts": 7}),
        ("shape.max_tokens", {"max_tokens": 65}, {"max_tokens": 64}),
        ("shape.max_tokens", {}, {"needs_max_tokens": True}),
        ("topk.format", {"topk_format": TOPK_BYPASSED}, {}),
        ("parallel.ep", {}, {"ep_sizes": (2, None)}),
        ("parallel.ep", {"parallel": ParallelConfig(ep_size=4)}, {"ep_sizes": (1, 2)}),
        ("parallel.ep", {"parallel": ParallelConfig(ep_size=3)}, {"even_experts": True}),
        (
            "parallel.placement",
            {"parallel": ParallelConfig(ep_size=2, placement=(0, 1) * 4)},
            {"placements": frozenset({"linear", "round_robin"})},
        ),
        ("feature", {"config": config(bias=True)}, {}),
        ("feature", {"features": frozenset({"acme.magic"})}, {}),
        ("feature", {"hooks": frozenset({"after_down"})}, {}),
        ("feature", {"graph_capture": frozenset({Phase.DECODE})}, {"graph_capture": frozenset({Phase.PREFILL})}),
        ("feature.host_sync", {"no_host_sync": frozenset(Phase)}, {"host_sync": frozenset({Phase.DECODE})}),
        ("phase", {}, {"phases": frozenset({Phase.DECODE})}),
    ],
)
def test_what_is_not_declared_is_refused_with_its_code(
    code: str, changes: dict[str, Any], support: dict[str, Any]
) -> None:
    request = ask(**changes)
    reasons = replace(GOOD, **support).why_not(request, "runner:acme")
    assert [r.code for r in reasons] == [code]
    assert reasons[0].subject == "runner:acme"
    assert reasons[0].message


@pytest.mark.parametrize(
    ("changes", "support"),
    [
        ({"parallel": ParallelConfig(placement="round_robin")}, {"placements": frozenset({"linear"})}),  # one rank
        ({"parallel": ParallelConfig(ep_size=4)}, {"even_experts": True}),
        ({"max_tokens": 64}, {"max_tokens": 64, "needs_max_tokens": True}),
        ({"phases": (Phase.DECODE,)}, {"phases": frozenset({Phase.DECODE})}),
        (
            {"phases": (Phase.DECODE,), "no_host_sync": frozenset(Phase), "graph_capture": frozenset(Phase)},
            {"host_sync": frozenset({Phase.PREFILL}), "graph_capture": frozenset({Phase.DECODE})},
        ),
        ({"assume": frozenset({"dependencies"})}, {"requires": (Requires(module="vendor_nowhere"),)}),
        ({}, {"scheme_archs": {"int4_w4a16": ("sm_100",)}}),
    ],
)
def test_a_limit_that_does_not_apply_refuses_nothing(changes: dict[str, Any], support: dict[str, Any]) -> None:
    assert codes(replace(GOOD, **support), ask(**changes)) == []


def test_a_dispatcher_is_not_asked_what_the_experts_compute() -> None:
    carrier = Support(devices={"cuda": ("sm_90",)})
    assert codes(carrier, ask(config=config(scheme="nvfp4", bias=True)), "dispatcher:acme") == []
    narrow = replace(carrier, dtypes=frozenset({"bfloat16"}))
    assert codes(narrow, ask(config=config(dtype="float16")), "dispatcher:acme") == ["dtype"]


def test_why_not_gives_all_reasons_at_once() -> None:
    support = Support(
        devices={"cuda": ("sm_100",)},
        schemes=frozenset({"nvfp4"}),
        dtypes=frozenset({"float16"}),
        activations=frozenset({"gelu"}),
        gated=frozenset({False}),
        host_sync=frozenset(Phase),
        hidden_multiple=128,
        hidden_sizes=frozenset({2048}),
        intermediate_multiple=128,
        max_top_k=1,
        max_experts=4,
        needs_max_tokens=True,
        ep_sizes=(4, 8),
        placements=frozenset(),
        even_experts=True,
        topk_formats=frozenset({TOPK_BYPASSED}),
        phases=frozenset({Phase.DECODE}),
        requires=(Requires(module="vendor_nowhere"), Requires(module="vendor_nowhere_either")),
    )
    request = ask(
        config=config(num_experts=9, bias=True, activation=Activation(limit=1.0)),
        parallel=ParallelConfig(ep_size=2),
        hooks=frozenset({"after_down"}),
        features=frozenset({"compile"}),
        graph_capture=frozenset(Phase),
        no_host_sync=frozenset(Phase),
    )
    found = codes(support, request)
    assert found[0] == "device.arch"  # what cannot be changed comes first
    assert sorted(found) == sorted(
        [
            "device.arch",
            *["dep.missing"] * 2,
            "quant.scheme",
            "dtype",
            "activation",
            "activation.gated",
            "activation.limit",
            *["feature"] * 5,  # bias, compile, the hook, and a graph in either phase
            "topk.format",
            *["parallel.ep"] * 2,
            "parallel.placement",
            *["shape.hidden"] * 2,
            "shape.intermediate",
            "shape.top_k",
            "shape.num_experts",
            "shape.max_tokens",
            "phase",
            *["feature.host_sync"] * 2,
        ]
    )


def literals_that_look_like_codes() -> set[str]:
    """The code of every `Reason(...)` in the core and the plugins, and of `return "code", ...` in the probe."""
    found: set[str] = set()
    sources = [*(ROOT / "moe_core").rglob("*.py"), *(ROOT / "plugins").glob("*/src/**/*.py")]
    prefixes = {code.split(".")[0] for code in REASON_CODES if "." in code}
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "Reason" and len(node.args) > 1:
                code = node.args[1]
                if isinstance(code, ast.Constant) and isinstance(code.value, str):
                    found.add(code.value)
            elif isinstance(node, ast.Tuple):
                words = [e.value for e in node.elts if isinstance(e, ast.Constant) and isinstance(e.value, str)]
                found |= {w for w in words if w.split(".")[0] in prefixes and "." in w and w.replace(".", "").isalpha()}
    return found | {
        node.args[0].value
        for path in sources
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call)
        and getattr(node.func, "id", None) == "first"
        and node.args
        and isinstance(node.args[0], ast.Constant)
    }


def test_every_code_in_use_is_documented() -> None:
    used = literals_that_look_like_codes()
    assert {"dep.missing", "contract.payload", "step.twice", "device.arch", "shape.hidden"} <= used
    assert used - set(REASON_CODES) == set()


def test_every_documented_code_is_in_use() -> None:
    """A code that nothing gives is a promise that nobody keeps."""
    text = "".join(
        path.read_text(encoding="utf-8")
        for path in [*(ROOT / "moe_core").rglob("*.py"), *(ROOT / "plugins").glob("*/src/**/*.py")]
        if path.name != "capability.py"
    )
    probe = (ROOT / "moe_core" / "capability.py").read_text(encoding="utf-8").split("class Requires")[1]
    assert {code for code in REASON_CODES if f'"{code}"' not in text + probe} == set()


def test_codes_are_explained_in_a_line_each() -> None:
    assert all(text and "\n" not in text for text in REASON_CODES.values())


def test_a_reason_is_json() -> None:
    reason = Reason("runner:acme", "dtype", "no", "a", "b", "c")
    assert reason.to_json() == {
        "subject": "runner:acme",
        "code": "dtype",
        "message": "no",
        "needed": "a",
        "found": "b",
        "hint": "c",
    }
