"""Real wheels in real, fresh environments without torch: what they contain, and what discovery says of each mixture.

Every wheel is built once a session. Every mixture gets an environment of its own (no system site packages, no pip:
ours installs into it), so that nothing of one test can be left over in another.
"""

from __future__ import annotations

import configparser
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from email.message import Message
from email.parser import Parser
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.wheels

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = Path(__file__).parent / "fixtures"
CORE = "core"
PLUGINS = ("aiter", "cutedsl", "deepep", "flashinfer_trtllm", "mori", "triton")
SEVEN = (CORE, *PLUGINS)
#: fixture -> (entry point, state, words of the detail)
BAD = {
    "broken_import": ("shaky", "broken", "libshaky_runtime.so.3"),
    "duplicate": ("triton", "duplicate", "none of them is loaded"),
    "incompatible": ("future", "incompatible", "moe-core>=99"),
    "misspelled_hook": ("typo", "broken", "moe_core_runner"),
    "name_thief": ("thief", "duplicate", "'reference', which core declares too"),
    "new_api": ("tomorrow", "incompatible", "API 99.0"),
}
PROJECTS = {
    CORE: ROOT,
    **{name: ROOT / "plugins" / name for name in PLUGINS},
    **{name: FIXTURES / name for name in (*BAD, "acme")},
}
#: What a wheel installed with --no-deps still needs, torch apart.
COMMON = ("click", "importlib-metadata", "packaging", "pluggy", "rich")
VENDORS = ("torch", "triton", "flashinfer", "cutlass", "aiter", "deep_ep", "mori")


def run(*command: str | Path, cwd: Path, ok: Sequence[int] = (0,), **variables: str) -> str:
    """stdout of a command that must end with a code of `ok`; nothing in its environment points to this checkout."""
    hidden = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in hidden and not k.startswith(("MOE_CORE_", "PYTEST"))}
    words = [str(word) for word in command]
    done = subprocess.run(words, cwd=cwd, env=environment | variables, capture_output=True, text=True, check=False)
    assert done.returncode in ok, (
        f"{' '.join(words)} ended with {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


def package_of(name: str) -> Path:
    """The folder that a wheel of ours ships."""
    return ROOT / "moe_core" if name == CORE else ROOT / "plugins" / name / "src" / f"moe_core_{name}"


def sources(name: str) -> set[str]:
    """Files of a package as they must stand in the wheel."""
    package = package_of(name)
    files = (p for p in package.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return {p.relative_to(package.parent).as_posix() for p in files}


@dataclass(frozen=True)
class Wheel:
    """A wheel that was built."""

    path: Path

    @property
    def names(self) -> set[str]:
        """Files in it."""
        with zipfile.ZipFile(self.path) as archive:
            return set(archive.namelist())

    def read(self, file: str) -> str:
        """A file of its .dist-info, empty where there is none."""
        with zipfile.ZipFile(self.path) as archive:
            found = [n for n in archive.namelist() if n.endswith(f".dist-info/{file}")]
            return archive.read(found[0]).decode() if found else ""

    @property
    def metadata(self) -> Message:
        """METADATA."""
        return Parser().parsestr(self.read("METADATA"))

    @property
    def requirements(self) -> list[Requirement]:
        """Requires-Dist, extras included."""
        return [Requirement(line) for line in self.metadata.get_all("Requires-Dist") or []]

    @property
    def entry_points(self) -> dict[str, dict[str, str]]:
        """Group -> name -> target."""
        parser = configparser.ConfigParser(delimiters=("=",))
        parser.optionxform = str  # type: ignore[assignment,method-assign]
        parser.read_string(self.read("entry_points.txt"))
        return {group: dict(parser[group]) for group in parser.sections()}


@dataclass(frozen=True)
class Environment:
    """A virtual environment with some of the wheels, and an empty folder to work in."""

    folder: Path
    empty: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def pip(self, *words: str | Path, ok: Sequence[int] = (0,)) -> str:
        """Our pip on its packages; never the index."""
        pip = (sys.executable, "-m", "pip", "--python", self.python, "--disable-pip-version-check", "--no-input")
        return run(*pip, *words, cwd=self.empty, ok=ok)

    def moe_core(self, *words: str, ok: Sequence[int] = (0,), **variables: str) -> Any:
        """JSON of the installed command."""
        return json.loads(run(self.folder / "bin" / "moe-core", *words, "--json", cwd=self.empty, ok=ok, **variables))

    def records(self, **variables: str) -> list[dict[str, Any]]:
        """`moe-core plugins`; its exit code must say whether any plugin is in trouble."""
        rows: list[dict[str, Any]] = self.moe_core("plugins", ok=(0, 1), **variables)["plugins"]
        trouble = any(r["state"] in ("broken", "duplicate", "incompatible") for r in rows)
        self.moe_core("plugins", ok=(int(trouble),), **variables)
        return rows

    def states(self, **variables: str) -> list[tuple[str, str]]:
        """(name, state) of every plugin, sorted."""
        return sorted((r["name"], r["state"]) for r in self.records(**variables))


def _build(name: str, out: Path, *flags: str) -> Path:
    before = set(out.glob("*.whl"))
    project = PROJECTS[name]
    run(sys.executable, "-m", "build", "--no-isolation", *flags, "--outdir", out, project, cwd=out)
    (wheel,) = set(out.glob("*.whl")) - before
    return wheel


@pytest.fixture(scope="session")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Wheel]:
    """All wheels by project, built two at a time."""
    folders = {name: tmp_path_factory.mktemp(f"wheel-{name}-") for name in PROJECTS}
    with ThreadPoolExecutor(2) as pool:
        built = pool.map(lambda name: _build(name, folders[name], "--wheel"), PROJECTS)
        return {name: Wheel(path) for name, path in zip(PROJECTS, built, strict=True)}


@pytest.fixture(scope="session")
def download(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[Path]]:
    """Wheels of packages of others and of what those need, fetched from the index once."""

    def fetch(*names: str) -> list[Path]:
        folder = tmp_path_factory.mktemp("index-")
        run(sys.executable, "-m", "pip", "download", "-q", "--only-binary", ":all:", "-d", folder, *names, cwd=folder)
        return sorted(folder.glob("*.whl"))

    return fetch


@pytest.fixture(scope="session")
def common(download: Callable[..., list[Path]]) -> list[Path]:
    """What every environment gets."""
    return download(*COMMON)


@pytest.fixture(scope="session")
def create(
    wheels: dict[str, Wheel], common: list[Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Environment]:
    """A new environment with the wheels of some projects."""

    def make(*names: str, extra: Sequence[Path] = ()) -> Environment:
        folder = tmp_path_factory.mktemp("environment-")
        made = Environment(folder / "venv", folder / "empty")
        made.empty.mkdir()
        run(sys.executable, "-m", "venv", "--without-pip", made.folder, cwd=made.empty)
        files = {path.name: path for path in (*common, *extra, *(wheels[name].path for name in names))}
        made.pip("install", "-q", "--no-deps", "--no-index", "--no-compile", *files.values())
        return made

    return make


@pytest.fixture(scope="session")
def all_seven(create: Callable[..., Environment]) -> Environment:
    """Shared by tests that change nothing in it."""
    return create(*SEVEN)


def loaded(*names: str) -> list[tuple[str, str]]:
    return sorted((name, "loaded") for name in names)


# What the wheels contain.


@pytest.mark.parametrize("name", SEVEN)
def test_a_wheel_ships_its_package_and_nothing_else(wheels: dict[str, Wheel], name: str) -> None:
    wheel, package = wheels[name], package_of(name).name
    assert {n.split("/")[0] for n in wheel.names if ".dist-info/" not in n} == {package}
    assert len({n.split("/")[0] for n in wheel.names}) == 2
    assert f"{package}/py.typed" in wheel.names
    assert sources(name) - wheel.names == set()
    tests = [n for n in wheel.names if "tests" in n.split("/") or n.endswith(".pyc")]
    tests += [n for n in wheel.names if n.endswith(".py") and n.split("/")[-1].startswith(("test_", "conftest"))]
    assert tests == []


def test_the_core_ships_its_templates(wheels: dict[str, Wheel]) -> None:
    templates = {n for n in sources(CORE) if n.startswith("moe_core/_templates/")}
    assert templates
    assert templates <= wheels[CORE].names


@pytest.mark.parametrize("name", SEVEN)
def test_a_wheel_has_one_entry_point(wheels: dict[str, Wheel], name: str) -> None:
    expected = {"moe_core.plugins": {name: f"moe_core_{name}.plugin:plugin"}}
    if name == CORE:
        expected = {
            "console_scripts": {"moe-core": "moe_core.cli:main"},
            "pytest11": {"moe_core": "moe_core.testing.pytest_plugin"},
        }
    assert wheels[name].entry_points == expected


def test_all_seven_have_one_version(wheels: dict[str, Wheel]) -> None:
    assert len({wheels[name].metadata["Version"] for name in SEVEN}) == 1
    for name in SEVEN:
        distribution = "moe-core" if name == CORE else f"moe-core-{name.replace('_', '-')}"
        assert canonicalize_name(wheels[name].metadata["Name"]) == distribution
        assert wheels[name].metadata["License-Expression"] == "Apache-2.0"


@pytest.mark.parametrize("name", SEVEN)
def test_no_wheel_pins_a_vendor(wheels: dict[str, Wheel], name: str) -> None:
    for requirement in wheels[name].requirements:
        other = canonicalize_name(requirement.name)
        assert other != "aiter", "PyPI's aiter is an unrelated project"
        if not other.startswith("moe-core"):
            assert {s.operator for s in requirement.specifier} == {">="}, str(requirement)
        elif name != CORE:
            assert requirement.specifier.contains(wheels[CORE].metadata["Version"], prereleases=True)
    needed = {canonicalize_name(r.name) for r in wheels[name].requirements if r.marker is None}
    vendor = {"flashinfer-python"} if name in ("cutedsl", "flashinfer_trtllm") else set()
    assert needed == ({*COMMON, "torch"} - {"importlib-metadata"} if name == CORE else {"moe-core", *vendor})


@pytest.mark.parametrize("name", [CORE, "triton"])
def test_a_wheel_from_the_source_distribution_is_the_same(wheels: dict[str, Wheel], name: str, tmp_path: Path) -> None:
    again = Wheel(_build(name, tmp_path))
    (archive,) = tmp_path.glob("*.tar.gz")
    assert archive.name.removesuffix(".tar.gz") == "-".join(again.path.name.split("-")[:2])
    assert again.path.name == wheels[name].path.name
    assert again.names == wheels[name].names
    assert again.read("METADATA") == wheels[name].read("METADATA")


# What discovery says where they are installed.

MIXTURES = {
    "core": (CORE,),
    "core, triton": (CORE, "triton"),
    "core, deepep, aiter": (CORE, "deepep", "aiter"),
    "all": SEVEN,
    "all, acme": (*SEVEN, "acme"),
}


@pytest.mark.parametrize("mixture", MIXTURES)
def test_what_is_installed_is_loaded(create: Callable[..., Environment], mixture: str) -> None:
    names = MIXTURES[mixture]
    environment = create(*names)
    assert environment.states() == loaded(*names)
    absent = [f"importlib.util.find_spec({vendor!r}) is None" for vendor in VENDORS]
    code = f"import importlib.util; assert {' and '.join(absent)}"
    run(environment.python, "-I", "-c", code, cwd=environment.empty)
    report = environment.moe_core("explain", "--model", "qwen3-30b-a3b", "--hardware", "h200")
    assert report["chosen"]
    assert {c["plugin"] for c in report["components"]} == set(names)


@pytest.mark.parametrize("fixture", BAD)
def test_a_bad_plugin_takes_nothing_else_down(create: Callable[..., Environment], fixture: str) -> None:
    name, state, words = BAD[fixture]
    environment = create(*SEVEN, fixture)
    expected = [row for row in loaded(*SEVEN) if row[0] != name]
    twice = 2 if fixture == "duplicate" else 1
    assert environment.states() == sorted([*expected, *[(name, state)] * twice])
    bad = [r for r in environment.records() if r["name"] == name]
    assert all(words in r["detail"] for r in bad), bad
    assert all((r["traceback"] is not None) == (state == "broken") for r in bad)
    report = environment.moe_core("explain", "--model", "qwen3-30b-a3b", "--hardware", "h200")
    assert report["chosen"]
    assert name not in {c["plugin"] for c in report["components"]}
    owners = {c["component"]: c["plugin"] for c in report["components"]}
    assert owners["runner:reference"] == CORE
    # One switch makes peace, another one makes it an error wherever plugins are not just listed.
    assert (name, "blocked") in environment.states(MOE_CORE_DISABLE=name)
    code = "import moe_core\ntry: moe_core.default_registry()\nexcept moe_core.PluginError as error: print(error)"
    assert f"plugin '{name}'" in run(environment.python, "-c", code, cwd=environment.empty, MOE_CORE_STRICT="1")


def test_an_allow_list_blocks_the_rest(all_seven: Environment) -> None:
    allowed = ("deepep", "triton")
    expected = [*loaded(CORE, *allowed), *((name, "blocked") for name in PLUGINS if name not in allowed)]
    assert all_seven.states(MOE_CORE_PLUGINS=",".join(allowed)) == sorted(expected)


def test_uninstalling_a_plugin_removes_it_and_nothing_else(create: Callable[..., Environment]) -> None:
    environment = create(*SEVEN)
    environment.pip("uninstall", "-q", "-y", "moe-core-triton")
    assert environment.states() == loaded(*(name for name in SEVEN if name != "triton"))
    report = environment.moe_core("explain", "--model", "qwen3-30b-a3b", "--hardware", "h200")
    assert not any(c["plugin"] == "triton" for c in report["components"])


def test_nothing_but_torch_and_vendors_is_missing(all_seven: Environment) -> None:
    """What was left out by --no-deps is what we meant to leave out."""
    lines = all_seven.pip("check", ok=(1,)).splitlines()
    missing = {line.split(" requires ")[1].split(",")[0] for line in lines if "which is not installed" in line}
    assert missing == {"torch", "flashinfer-python"}
    assert all("which is not installed" in line for line in lines), lines


def test_people_get_tables_and_advice_without_torch(all_seven: Environment) -> None:
    command = all_seven.folder / "bin" / "moe-core"
    tables = run(command, "plugins", cwd=all_seven.empty)
    assert all(name in tables for name in SEVEN)
    assert "triton" in run(command, "explain", "--model", "mixtral-8x7b", "--hardware", "b200", cwd=all_seven.empty)
    assert run(all_seven.python, "-m", "moe_core", "--version", cwd=all_seven.empty).startswith("moe-core ")


def test_a_plain_pytest_run_is_not_disturbed(
    create: Callable[..., Environment], download: Callable[..., list[Path]]
) -> None:
    environment = create(CORE, "triton", "broken_import", extra=download("pytest"))
    test = environment.empty / "test_plain.py"
    test.write_text("import sys\n\n\ndef test_plain():\n    assert 'torch' not in sys.modules\n", encoding="utf-8")
    pytest_ = (environment.folder / "bin" / "pytest", "-p", "no:cacheprovider", "--strict-markers", "-W", "error")
    assert "1 passed" in run(*pytest_, cwd=environment.empty)
    assert "1 passed" in run(*pytest_, "-p", "no:moe_core", cwd=environment.empty)
