"""The recorded facts: complete, fitted by every call of ours, and true of the published wheel and of a checkout."""

from __future__ import annotations

import ast
import itertools
import os
import subprocess
import sys
import zipfile
from dataclasses import replace
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import moe_core_aiter
import pytest
import torch
from moe_core_aiter import contract, layouts
from moe_core_aiter.schemes import ACTIVATIONS, SCHEMES

PACKAGE = Path(moe_core_aiter.__file__).parent
WHEEL = "0.1.7.post2.dev18"
#: A checkout of AITER, to compare the record of its commit with.
CHECKOUT = "MOE_CORE_AITER_CHECKOUT"


def test_the_oldest_record_is_the_floor() -> None:
    records = list(contract.recorded().values())
    assert tuple(records[0].fused_moe) == contract.FLOOR
    for older, newer in itertools.pairwise(records):
        assert set(older.fused_moe) <= set(newer.fused_moe), f"{newer.version} lost arguments of {older.version}"
        assert set(older.quant_type) <= set(newer.quant_type)
        assert set(older.activation_type) <= set(newer.activation_type)


def test_records_say_where_they_were_read() -> None:
    for facts in contract.recorded().values():
        assert facts.source
        assert len(facts.sha256) == 64
        assert facts.commit is None or len(facts.commit) == 40
        assert list(facts.fused_moe)[:5] == ["hidden_states", "w1", "w2", "topk_weight", "topk_ids"]
        assert all((default is None) is (i < 5) for i, default in enumerate(facts.fused_moe.values()))


def test_what_the_code_sends_is_listed() -> None:
    """Every keyword at our one call, read out of the source: a new one must be put into a list, and so be probed."""
    tree = ast.parse((PACKAGE / "runner.py").read_text(encoding="utf-8"))
    sent: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("dict", "update", "_fused_moe"):
                sent |= {k.arg for k in node.keywords if k.arg}
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript):
            key = node.targets[0].slice
            sent |= {key.value} if isinstance(key, ast.Constant) else set()
        if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict):
            sent |= {k.value for k in node.value.keys if isinstance(k, ast.Constant)}
    assert sent == {*contract.SENT[5:], *contract.PROBED}
    assert set(contract.SENT) <= set(contract.FLOOR)


@pytest.mark.parametrize("version", contract.recorded())
def test_calls_fit_every_version(version: str, bench: Any) -> None:
    """By the double, which has exactly that version's arguments: an unknown one is a TypeError there."""
    here = bench("gfx942", version)
    for scheme in ("bf16", "fp8_channel", "int8_channel"):
        plan = here.check(here.config(scheme), pattern="dropped", dispatcher="testing_standard")
        assert set(here.double.calls[-1]) <= {*contract.SENT, *contract.PROBED}
        found = contract.like(plan.runner.build.parameters)
        assert found is not None
        # Releases without a change of the interface look alike.
        assert contract.recorded()[found].fused_moe == contract.recorded()[version].fused_moe


def test_enum_members_are_there_by_name() -> None:
    for facts in contract.recorded().values():
        assert {s.quant_type for s in SCHEMES.values()} <= set(contract.QUANT_TYPES) <= set(facts.quant_type)
    # The oldest version has no swiglu: a layer with it is refused at bind there.
    assert set(ACTIVATIONS.values()) == set(contract.ACTIVATIONS)
    assert [v for v, f in contract.recorded().items() if not set(contract.ACTIVATIONS) <= set(f.activation_type)] == [
        "0.1.4"
    ]


def test_reading_a_place(tmp_path: Path) -> None:
    (tmp_path / "aiter").mkdir()
    (tmp_path / "csrc" / "include").mkdir(parents=True)
    module = "def other(x): pass\n\ndef fused_moe(a, b, c=Kind.One, *, d=None):\n    pass\n"
    (tmp_path / "aiter" / "fused_moe.py").write_text(module)
    header = "enum class ActivationType : int\n{\n  No = -1, // none\n  Silu,\n};\nenum class QuantType { No, Two, };\n"
    (tmp_path / "csrc" / "include" / "aiter_enum.h").write_text(header)
    facts = contract.read(tmp_path, version="1", commit=None, source="here")
    assert dict(facts.fused_moe) == {"a": None, "b": None, "c": "Kind.One", "d": "None"}
    assert (facts.activation_type, facts.quant_type) == (("No", "Silu"), ("No", "Two"))
    with pytest.raises(ValueError, match="no function 'fused'"):
        contract.signature_of(module, "fused")
    command = [sys.executable, "-m", "moe_core_aiter.contract", str(tmp_path), "--version", "1"]
    path = os.pathsep.join([str(PACKAGE.parent), *sys.path])
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=True)
    assert '"version": "1"' in done.stdout


def test_differences() -> None:
    newest = list(contract.recorded().values())[-1]
    assert contract.differences(newest.fused_moe) == []
    assert contract.differences([*newest.fused_moe, "output"]) == ["output is new"]
    assert contract.differences(contract.FLOOR[:-1]) == ["dtype is missing"]
    assert contract.like(newest.fused_moe) == newest.version
    assert contract.like(dict(reversed(newest.fused_moe.items()))) is None


# The vendor's own text.


def functions(source: str, *names: str) -> dict[str, Any]:
    """Functions of a module of the vendor, defined from its text alone: nothing else of it runs."""
    kept = [n for n in ast.parse(source).body if isinstance(n, ast.FunctionDef) and n.name in names]
    space: dict[str, Any] = {"torch": torch, "F": torch.nn.functional}
    exec(compile(ast.Module(kept, []), "vendor", "exec"), space)
    return {name: space[name] for name in names if name in space}


def compare_layouts(place: Path) -> set[str]:
    """Our shuffles beside those of the vendor's text; the names of those that were there."""
    shuffle = (place / "aiter" / "ops" / "shuffle.py").read_text(encoding="utf-8")
    names = ("shuffle_weight", "shuffle_weight_a16w4", "shuffle_scale", "shuffle_scale_a16w4")
    theirs = functions(shuffle, *names, "pack_int8_to_packed_int4", "shuffle_scale_for_int4")
    helper = place / "aiter" / "utility" / "fp4_utils.py"
    if "shuffle_scale" not in theirs and helper.is_file():
        theirs |= functions(helper.read_text(encoding="utf-8"), "e8m0_shuffle")
    random = torch.Generator().manual_seed(0)

    def bytes_(*shape: int) -> torch.Tensor:
        return torch.randint(0, 255, shape, generator=random, dtype=torch.uint8)

    for data in (bytes_(2, 32, 64), torch.randn(2, 32, 64, generator=random).bfloat16()):
        assert torch.equal(layouts.shuffled(data), theirs["shuffle_weight"](data, (16, 16)))
    data, scale = bytes_(2, 64, 128), bytes_(2, 64, 16)
    for parts in (1, 2):
        if "shuffle_weight_a16w4" in theirs:
            assert torch.equal(
                layouts.interleaved(data, parts=parts), theirs["shuffle_weight_a16w4"](data, 16, parts == 2)
            )
            assert torch.equal(
                layouts.interleaved_scales(scale, parts=parts),
                theirs["shuffle_scale_a16w4"](scale.flatten(0, 1), 2, parts == 2),
            )
    found = theirs.get("shuffle_scale", theirs.get("e8m0_shuffle"))
    if found is not None:
        whole = bytes_(512, 24)
        assert torch.equal(layouts.shuffled_scales(whole), found(whole))
    if "pack_int8_to_packed_int4" in theirs:
        values = torch.randint(-8, 8, (2, 32, 64), generator=random, dtype=torch.int8)
        assert torch.equal(layouts.packed_int4(values).flatten(), theirs["pack_int8_to_packed_int4"](values))
        groups = torch.randn(2, 4, 32, generator=random).bfloat16()  # [E, G, N] there
        mine = layouts.int4_scales(groups.transpose(1, 2).contiguous())
        assert torch.equal(mine, theirs["shuffle_scale_for_int4"](groups))
    return set(theirs)


@pytest.mark.wheels
def test_the_published_wheel_is_as_recorded(tmp_path: Path) -> None:
    """Downloaded, unpacked and parsed; nothing of it is installed or imported."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--pre", f"amd-aiter=={WHEEL}", "-d"]
    try:
        done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=300, check=False)
    except (OSError, subprocess.TimeoutExpired, PackageNotFoundError) as error:
        pytest.skip(f"the wheel cannot be had: {error}")
    if done.returncode:
        pytest.skip(f"the wheel cannot be had: {done.stderr.strip().splitlines()[-1:]}")
    (wheel,) = tmp_path.glob("amd_aiter-*.whl")
    place = tmp_path / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        wanted = ("aiter/fused_moe.py", "aiter/ops/shuffle.py", "aiter/utility/fp4_utils.py")
        for name in (*wanted, "aiter_meta/csrc/include/aiter_enum.h"):
            archive.extract(name, place)
        # What tells it from PyPI's aiter, which has neither.
        assert "aiter/jit/optCompilerConfig.json" in archive.namelist()
    known = contract.recorded()[WHEEL]
    assert contract.read(place, version=WHEEL, commit=None, source=known.source) == known
    assert {"shuffle_weight", "shuffle_weight_a16w4", "shuffle_scale_a16w4", "e8m0_shuffle"} <= compare_layouts(place)


@pytest.mark.skipif(CHECKOUT not in os.environ, reason=f"{CHECKOUT} names no checkout of github.com/ROCm/aiter")
def test_a_checkout_is_as_recorded() -> None:
    place = Path(os.environ[CHECKOUT])
    found = contract.read(place, version="", commit=None, source="")
    same = [facts for facts in contract.recorded().values() if facts.sha256 == found.sha256]
    for facts in same:
        assert replace(found, version=facts.version, commit=facts.commit, source=facts.source) == facts
    assert same or contract.differences(found.fused_moe) == [], "no record is of this file, and it has other arguments"
    assert "shuffle_weight" in compare_layouts(place)
