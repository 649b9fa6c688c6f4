"""Our calls of MoRI against recorded facts of its interface, and the facts against the wheels that were published."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from moe_core_mori import facts
from packaging.version import Version

SOURCE = Path(importlib.util.find_spec("moe_core_mori").origin).parent  # type: ignore[arg-type, union-attr]
#: Function of calls.py -> what it calls, and of which interface.
CALLS = {
    "make_v1": ("mori.ops.EpDispatchCombineConfig", "mori.ops.EpDispatchCombineOp.__init__"),
    "dispatch_v1": ("mori.ops.EpDispatchCombineOp.dispatch",),
    "combine_v1": ("mori.ops.EpDispatchCombineOp.combine",),
    "dispatch_send": ("mori.ops.EpDispatchCombineOp.dispatch_send",),
    "dispatch_receive": ("mori.ops.EpDispatchCombineOp.dispatch_recv",),
    "combine_send": ("mori.ops.EpDispatchCombineOp.combine_send",),
    "combine_receive": ("mori.ops.EpDispatchCombineOp.combine_recv",),
    "join_symmetric_memory": (
        "mori.shmem.shmem_get_unique_id",
        "mori.shmem.shmem_init_attr",
        "mori.shmem.shmem_mype",
        "mori.shmem.shmem_npes",
    ),
    "make_communicator": ("mori.cco.Communicator.get_unique_id", "mori.cco.Communicator.init"),
    "make_v2": ("mori.ops.dispatch_combine_v2.EpDispatchCombineConfig",),
    "dispatch_v2": ("mori.ops.dispatch_combine_v2.EpDispatchCombineOp.dispatch",),
    "combine_v2": ("mori.ops.dispatch_combine_v2.EpDispatchCombineOp.combine",),
}


def tables() -> dict[str, dict[str, tuple[str, ...]]]:
    """The tables of calls.py, without importing it."""
    tree = ast.parse((SOURCE / "calls.py").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.AnnAssign) and isinstance(node.value, ast.Dict)]
    return {ast.unparse(node.target): ast.literal_eval(node.value) for node in found if node.value is not None}


def keywords(function: str) -> dict[str, set[str]]:
    """Last name of everything that a function of calls.py calls by keywords -> those keywords ("**" for more)."""
    tree = ast.parse((SOURCE / "calls.py").read_text(encoding="utf-8"))
    body = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == function)
    made = [node for node in ast.walk(body) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)]
    return {node.func.attr: {k.arg or "**" for k in node.keywords} for node in made}  # type: ignore[attr-defined]


def test_facts_are_recorded_of_the_oldest_the_first_with_v2_and_the_newest() -> None:
    assert facts.versions() == (facts.OLDEST, facts.OLDEST_V2, facts.NEWEST)
    for version in facts.versions():
        recorded = facts.load(version)
        assert recorded.version == version
        assert recorded.source
        assert recorded.files
        second = "mori.ops.dispatch_combine_v2.EpDispatchCombineOp.dispatch" in recorded.callables
        assert second == (Version(version) >= Version(facts.OLDEST_V2))


def test_requirements_name_the_versions_of_the_facts() -> None:
    text = (SOURCE / "plugin.py").read_text(encoding="utf-8")
    assert re.findall(r'min_version="([\d.]+)"', text) == [facts.OLDEST, facts.OLDEST_V2]
    assert f"amd-mori>={facts.OLDEST}" in (SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("function", CALLS)
def test_the_tables_say_what_the_code_calls(function: str) -> None:
    declared, used = tables(), keywords(function)
    probed = declared.pop("PROBED")
    parameters = {name: set(of) for table in declared.values() for name, of in table.items()}
    for name in CALLS[function]:
        last = name.rpartition(".")[2] if not name.endswith("__init__") else name.split(".")[-2]
        extra = {"**"} if name in probed else set()
        assert used[last] == parameters[name] | extra, name


def test_every_call_of_mori_is_in_that_file() -> None:
    for path in SOURCE.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert path.name == "calls.py" or not re.search(r"import_module|^\s*(import|from) mori\b", text, re.M), path


@pytest.mark.parametrize(
    ("table", "oldest"), [("V1", facts.OLDEST), ("ASYNCHRONOUS", facts.OLDEST), ("V2", facts.OLDEST_V2)]
)
def test_every_call_fits_every_supported_version(table: str, oldest: str) -> None:
    for version in facts.versions():
        if Version(version) < Version(oldest):
            continue
        recorded = facts.load(version)
        for name, ours in tables()[table].items():
            theirs = recorded.callables[name]
            assert set(ours) <= {p.name for p in theirs}, (version, name)
            assert {p.name for p in theirs if p.default is None} <= {*ours, "weights", "indices"}, (version, name)


def test_what_is_probed_is_not_in_every_version() -> None:
    for name, parameters in tables()["PROBED"].items():
        assert set(parameters) <= facts.load(facts.NEWEST).parameters(name)
        assert not set(parameters) <= facts.load(facts.OLDEST_V2).parameters(name)


def test_kernels_by_name_are_those_of_the_facts() -> None:
    from moe_core_mori import launch

    named = {*launch.WITHIN, *launch.ACROSS, launch.ASYNCHRONOUS}
    assert named == set(facts.load(facts.NEWEST).enums["EpDispatchCombineKernelType"])
    chosen = {"IntraNode", "InterNodeV1", "InterNodeV1LL", "AsyncLL"}  # by rules, so the oldest has them
    assert chosen <= set(facts.load(facts.OLDEST).enums["EpDispatchCombineKernelType"])


#: The real Python of a wheel, without its libraries: what the facts and the double stand for.
REAL = """
import sys, torch, types
from moe_core_mori import calls
bindings = types.ModuleType("mori.cpp")
for name, members in {enums!r}.items():
    setattr(bindings, name, type(name, (), {{}}))
    for member in members:
        setattr(getattr(bindings, name), member, member)
bindings.MORI_SHMEM_INIT_WITH_MPI_COMM, bindings.MORI_SHMEM_INIT_WITH_UNIQUEID = 0, 2
sys.modules["mori.cpp"] = bindings
native = types.ModuleType("mori.cco.cco")
vars(native).update(dict.fromkeys({native!r}, object))
sys.modules["mori.cco.cco"] = native
calls.check(calls.V1, calls.ASYNCHRONOUS)
if {second}:
    calls.check(calls.V2)
    if {probed}:
        calls.check(calls.PROBED)
        from mori.ops.dispatch_combine_v2 import EpDispatchCombineConfig, EpDispatchCombineOp
        calls.module("mori.ops.dispatch_combine_v2").EpDispatchCombineOp = lambda config, communicator: config
        for sent, words in ((torch.bfloat16, 0), (torch.float8_e4m3fn, 56), (torch.float4_e2m1fn_x2, 56)):
            made = calls.make_v2(None, dtype=torch.bfloat16, sent_dtype=sent, rank=0, ranks=8, hidden=7168,
                                 scale_words=words, most=4096, experts_a_rank=33, top_k=8, backend="hip")
            assert made.dispatch_dtype == sent and made.combine_dtype == torch.bfloat16, made
print("fits")
"""


@pytest.fixture(scope="module", params=facts.versions())
def wheel(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A published wheel, unpacked; skipped where it cannot be had."""
    folder, version = tmp_path_factory.mktemp("wheel"), request.param
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", "312", "--platform", "manylinux_2_39_x86_64", "--retries", "0", "--timeout", "5"]
    done = subprocess.run([*command, f"amd-mori=={version}"], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        pytest.skip(f"the wheel amd-mori {version} cannot be had here: {(done.stderr.splitlines() or ['?'])[-1]}")
    zipfile.ZipFile(wheels[0]).extractall(folder / "unpacked")
    return version, folder / "unpacked"


@pytest.mark.wheels
def test_facts_are_those_of_the_published_wheel(wheel: tuple[str, Path]) -> None:
    version, root = wheel
    recorded = facts.load(version)
    read = facts.read_sources(root, version, recorded.source, recorded.commit, recorded.enums)
    assert read.callables == recorded.callables
    assert read.files == recorded.files
    library = (root / "mori" / "libmori_pybinds.so").read_bytes()
    names = {text.decode() for text in re.findall(rb"[A-Za-z0-9_]{4,}", library)}
    for members in recorded.enums.values():
        assert set(members) <= names
    newer = set(facts.load(facts.NEWEST).enums["EpDispatchCombineQuantType"])
    assert not (newer - set(recorded.enums["EpDispatchCombineQuantType"])) & names


def _imported_from(path: Path) -> set[str]:
    """What the package takes out of its compiled module, which is not for this machine."""
    tree = ast.parse(path.read_text(encoding="utf-8")) if path.exists() else ast.Module([], [])
    lists = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "cco"]
    return {alias.name for node in lists for alias in node.names} | {"DevCommRequirements", "UniqueId", "Comm"}


@pytest.mark.wheels
def test_the_published_python_takes_our_calls(wheel: tuple[str, Path], tmp_path: Path) -> None:
    version, root = wheel
    # The first version with V2 imports flydsl at its top; from the next on it is asked for where it is needed.
    second = version == facts.NEWEST
    native = sorted(_imported_from(root / "mori" / "cco" / "__init__.py"))
    source = REAL.format(enums=facts.load(version).enums, second=second, probed=second, native=native)
    paths = [str(root), str(SOURCE.parent), *(p for p in sys.path if p)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "MORI_WAVE_SIZE": "64",
    }
    done = subprocess.run(
        [sys.executable, "-P", "-c", source], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout.strip()) == (0, "fits"), done.stderr[-3000:]
