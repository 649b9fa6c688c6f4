"""What AITER does not run is refused with a reason, before anything of it is imported; a lacking build, at bind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import moe_core_aiter
import pytest
import torch
from moe_core_aiter import build, contract
from moe_core_aiter.adapters import pre_standard
from moe_core_aiter.plugin import RUNNER, AiterPlugin
from moe_core_aiter.plugin import plugin as aiter_plugin
from moe_core_aiter.rules import requirements
from moe_core_triton.plugin import plugin as triton_plugin

from moe_core import Activation, BindError, MoeConfig, ParallelConfig
from moe_core.api import resolve
from moe_core.hardware import PROFILES
from moe_core.registry import Registry
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.specs import AdapterSpec
from moe_core.testing import make_layer
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.vocabulary import BATCHED, DroppedSlot

OAI = Activation.swiglu_oai()
LAYER = MoeConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024)


def ask(hardware: str, *, assume: tuple[str, ...] = ("dependencies",), **changes: Any) -> Resolution:
    layer = {name: changes.pop(name) for name in list(changes) if name in MoeConfig.__dataclass_fields__}
    return resolve(
        replace(LAYER, **layer),
        changes.pop("parallel", None),
        hardware,
        registry=Registry(plugins=[aiter_plugin, triton_plugin], autoload=False),
        **{"max_tokens": 128, "settings": Settings(), "assume": assume, **changes},
    )


def reasons(found: Resolution) -> dict[str, str]:
    """Code -> message of everything that speaks against the runner."""
    verdicts = [v for v in found.verdicts if v.spec.subject == "runner:aiter"]
    return {r.code: r.message for v in verdicts for r in v.reasons}


@pytest.mark.parametrize("hardware", ["mi300x", "mi355x"])
@pytest.mark.parametrize("scheme", ["bf16", "fp8_tensor", "fp8_channel", "fp8_block128", "int8_channel"])
def test_instinct_prefers_aiter(hardware: str, scheme: str) -> None:
    found = ask(hardware, scheme=scheme)
    assert found.require().id == "standard+aiter/split"
    arch = PROFILES[hardware].arch
    assert f"runner 'aiter' is contract on {arch}" in "\n".join(found.notes)  # never without a note until it ran there


@pytest.mark.parametrize("hardware", ["mi300x", "mi355x"])
def test_without_aiter_it_falls_to_triton_and_says_why(hardware: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "aiter", raising=False)
    if RUNNER.support.requires[0].why_not("x") == []:
        pytest.skip("AITER is installed here")
    found = resolve(
        LAYER,
        None,
        hardware,
        registry=Registry(plugins=[aiter_plugin, triton_plugin], autoload=False),
        max_tokens=128,
        settings=Settings(),
    )
    assert found.require().id == "standard+triton/fused"
    assert "'aiter' is not installed" in reasons(found)["dep.missing"]
    (verdict,) = [v for v in found.verdicts if v.spec.subject == "runner:aiter"]
    assert "PyPI's 'aiter' is another project" in str(verdict.reasons[0].hint)


REFUSED: list[tuple[str, dict[str, Any], str, str]] = [
    ("mi300x", {"scheme": "mxfp4"}, "device.arch", "gfx950"),
    ("mi300x", {"scheme": "mxfp4_w4a16", "activation": OAI}, "device.arch", "gfx950"),
    ("mi355x", {"scheme": "mxfp4_w4a16"}, "activation", "swiglu_oai with mxfp4_w4a16 weights"),
    ("mi355x", {"scheme": "mxfp4", "activation": OAI}, "activation", "has silu with mxfp4 weights"),
    ("mi355x", {"scheme": "mxfp4", "activation": Activation(name="gelu")}, "activation", "has silu with mxfp4"),
    ("mi355x", {"activation": OAI}, "activation", "has silu or gelu with bf16 weights"),
    ("mi355x", {"scheme": "mxfp4_w4a16", "activation": replace(OAI, alpha=1.0)}, "activation", "fixed constants"),
    ("mi355x", {"scheme": "mxfp4_w4a16", "activation": replace(OAI, beta=0.0)}, "activation", "fixed constants"),
    ("mi355x", {"scheme": "mxfp4_w4a16", "activation": replace(OAI, limit=8.0)}, "activation", "fixed constants"),
    ("mi355x", {"scheme": "mxfp4_w4a16", "activation": OAI, "dtype": "float16"}, "dtype", "bfloat16 only"),
    ("mi300x", {"activation": Activation(limit=7.0)}, "activation.limit", "cannot clamp silu"),
    ("mi300x", {"activation": Activation(name="gelu_tanh")}, "activation", "has no gelu_tanh"),
    ("mi300x", {"activation": Activation(gated=False)}, "activation.gated", "does not run non-gated"),
    ("mi300x", {"intermediate_size": 1440}, "shape.intermediate", "1440 a rank is not a multiple of 128"),
    ("mi300x", {"hidden_size": 2080, "scheme": "fp8_block128"}, "shape.hidden", "not a multiple of 128"),
    ("mi300x", {"hidden_size": 2080}, "shape.hidden", "not a multiple of 64"),
    ("mi300x", {"bias": True}, "feature", "adds biases with mxfp4_w4a16"),
    ("mi300x", {"no_combine": True}, "feature", "fused_moe has no argument that leaves that out"),
    ("mi300x", {"router_weight_on_input": True}, "feature", "top_k 1 only"),
    ("mi300x", {"scheme": "int4_w4a16"}, "quant.group_size", "group size 32"),
    ("mi300x", {"scheme": "int8_channel", "dtype": "float16"}, "dtype", "bfloat16 only"),
    ("mi300x", {"dtype": "float32"}, "dtype", "does not run float32"),
    ("mi300x", {"scheme": "mxfp8"}, "device.arch", "gfx950"),
    ("mi355x", {"scheme": "mxfp8", "activation": Activation(name="gelu")}, "activation", "has silu with mxfp8"),
    ("mi300x", {"scheme": "nvfp4"}, "quant.scheme", "nvfp4"),
    ("mi300x", {"hooks": ("after_gate_up",)}, "feature", "after_gate_up"),
    ("h200", {}, "device.type", "cuda"),
]


@pytest.mark.parametrize(("hardware", "changes", "code", "message"), REFUSED)
def test_refused_with_a_reason(hardware: str, changes: dict[str, Any], code: str, message: str) -> None:
    found = ask(hardware, **changes)
    said = reasons(found)
    assert code in said, said
    verdicts = [v for v in found.verdicts if v.spec.subject == "runner:aiter"]
    assert any(r.code == code and message in r.message for v in verdicts for r in v.reasons), said


def test_all_reasons_are_given_at_once() -> None:
    odd = {"hidden_size": 2080, "intermediate_size": 1440, "activation": Activation(limit=7.0), "bias": True}
    assert set(reasons(ask("mi300x", **odd))) == {"shape.hidden", "shape.intermediate", "activation.limit", "feature"}


@pytest.mark.parametrize(
    ("scheme", "more", "sizes"),
    [
        ("mxfp4_w4a16", {"activation": OAI, "bias": True}, (3072, 3072)),
        ("mxfp4", {}, (3072, 3072)),
    ],
)
def test_sizes_of_four_bit_layers_are_padded(scheme: str, more: dict[str, Any], sizes: tuple[int, int]) -> None:
    found = ask("mi355x", scheme=scheme, hidden_size=2880, intermediate_size=2880, **more)
    assert found.require().runner == "aiter"
    required = requirements(found.request)
    assert (required.hidden_size, required.intermediate_size) == sizes


def test_rows_by_expert_are_refused() -> None:
    """`fused_moe` takes rows of tokens; a dispatcher of [E, M, H] finds no way into the runner."""
    assert all(isinstance(spec, AdapterSpec) and spec.format != BATCHED for spec in AiterPlugin().moe_core_adapters())
    found = resolve(
        LAYER,
        None,
        "mi300x",
        registry=Registry(plugins=[aiter_plugin, testing_plugin], autoload=False),
        settings=Settings(runner="aiter", dispatcher="testing_batched"),
        max_tokens=128,
        assume=("dependencies",),
    )
    assert found.chosen is None
    assert any(r.code == "path.missing" and "batched" in r.message for r in found.reasons), found.reasons


def test_negative_ids_never_reach_it(bench: Any) -> None:
    here = bench()
    plan = here.plan(here.config(), make_layer(here.config()).weights)
    binding = replace(plan._binding, terms=replace(plan.terms["standard"], dropped=DroppedSlot.NEGATIVE))
    with pytest.raises(BindError, match="ids of -1"):
        pre_standard(binding)


# Builds.

LACKING = [
    ("mxfp4_w4a16", {"version": "0.1.9"}, "fused_moe has no argument 'gate_mode'"),
    ("mxfp4_w4a16", {"version": "0.1.4"}, "ActivationType has no member Swiglu"),
    ("mxfp4_w4a16", {"version": "0.1.4"}, "fused_moe has no arguments 'bias1' and 'bias2'"),
    ("int4_w4a16", {"version": "0.1.7.post2.dev18"}, "it quantizes the tokens of int4_w4a16"),
    ("int4_w4a16", {"flydsl": False}, "its kernels for int4_w4a16 need FlyDSL"),
    ("mxfp8", {"version": "0.1.14"}, "its kernels for mxfp8 weights came with v0.1.17"),
    ("mxfp8", {"version": "0.1.16"}, "its kernels for mxfp8 weights came with v0.1.17"),
    ("mxfp8", {"flydsl": False}, "its kernels for mxfp8 need FlyDSL"),
]


@pytest.mark.parametrize(("scheme", "made", "message"), LACKING)
def test_a_build_that_lacks_something_is_refused_at_bind(scheme: str, made: Any, message: str, bench: Any) -> None:
    here = bench("gfx950", **made)
    config = here.config(scheme)
    with pytest.raises(BindError, match="the installed AITER cannot run") as refused:
        here.plan(config, make_layer(config).weights)
    assert message in str(refused.value)
    assert f"arguments as in {here.double.facts.version}" in str(refused.value)


@pytest.mark.parametrize("name", contract.SENT)
def test_every_argument_that_is_always_sent_is_probed(name: str, bench: Any) -> None:
    here = bench()
    plan = here.plan(here.config(), make_layer(here.config()).weights)
    kept = {argument: text for argument, text in plan.runner.build.parameters.items() if argument != name}
    cut = replace(plan.runner.build, parameters=kept)
    assert build.problems(cut, plan._binding) == [f"fused_moe has no argument {name!r}"]


def test_an_fp8_that_is_none_is_refused(bench: Any) -> None:
    here = bench()
    here.double.modules["aiter"].dtypes.fp8 = torch.uint8  # what AITER says on a device that it does not know
    config = here.config("fp8_block128")
    with pytest.raises(BindError, match=r"its fp8 is torch\.uint8"):
        here.plan(config, make_layer(config).weights)


@pytest.mark.parametrize("gone", ["QuantType", "ActivationType", "dtypes"])
def test_a_package_that_is_not_whole_is_refused(gone: str, bench: Any) -> None:
    here = bench()
    delattr(here.double.modules["aiter"], gone)
    with pytest.raises(BindError, match=f"has no aiter.{gone}"):
        here.plan(here.config(), make_layer(here.config()).weights)


def test_a_package_that_raises_is_named(bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    here = bench()
    monkeypatch.setitem(sys.modules, "aiter", None)
    with pytest.raises(BindError, match="aiter does not load"):
        here.plan(here.config(), make_layer(here.config()).weights)


def test_a_kernel_that_knows_no_mask_is_said(bench: Any) -> None:
    here = bench()
    layer = make_layer(here.config())
    plan = here.plan(here.config(), layer.weights)

    def unable(*args: Any, **more: Any) -> Any:
        raise NotImplementedError("no expert parallelism")

    plan.runner._fused_moe = unable
    with pytest.raises(BindError, match="no kernel for this call of 16 rows: no expert parallelism"):
        plan(layer.hidden, layer.topk)


@pytest.mark.parametrize(
    ("made", "ok", "message"),
    [
        ({}, True, "those of the recorded version e4048607"),
        ({"version": "0.1.4"}, True, "those of the recorded version 0.1.4"),
        ({"more": ("output", "quant_dtype_a")}, True, "of no recorded version: output is new, quant_dtype_a is new"),
    ],
)
def test_doctor_compares_the_build_with_the_records(made: Any, ok: bool, message: str, bench: Any) -> None:
    bench("gfx950", **made)
    result = build.examine()
    assert (result.ok, message in result.detail) == (ok, True), result


def test_doctor_tells_pypis_aiter_from_amds(tmp_path: Path) -> None:
    """Without importing it: the other package would raise here."""
    package = tmp_path / "aiter"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('PyPI\\'s aiter was imported')\n")
    (package / "map_aiter.py").touch()
    code = (
        "import json\n"
        "from moe_core_aiter.plugin import plugin, RUNNER\n"
        "(check,) = plugin.moe_core_doctor()\n"
        "result = check.run()\n"
        "(reason,) = RUNNER.support.requires[0].why_not('runner:aiter')\n"
        "print(json.dumps([result.ok, result.hint, reason.code, reason.message]))\n"
    )
    root = Path(moe_core_aiter.__file__).parents[4]
    paths = [str(tmp_path), str(Path(moe_core_aiter.__file__).parents[1]), str(root), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    ok, hint, reason, message = json.loads(done.stdout)
    assert (ok, reason) == (False, "dep.impostor")
    assert "another project" in hint
    assert "has no 'aiter.fused_moe'" in message


@pytest.mark.parametrize("hardware", ["mi300x", "mi355x"])
def test_ranks_that_bring_their_own_tokens(hardware: str) -> None:
    found = ask(hardware, parallel=ParallelConfig(ep_size=8, tokens="sharded"))
    assert found.require().id == "allgather+aiter/split"
