"""The shape of the repository: what keeps a plugin's folder from shadowing the vendor package of the same name."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("aiter", "cutedsl", "deepep", "flashinfer_trtllm", "mori", "triton")
PROJECTS = {"moe_core": ROOT} | {f"moe_core_{name}": ROOT / "plugins" / name for name in PLUGINS}
ALLOWED_FOLDERS = {"moe_core", "plugins", "tests", "docs", "benchmarks", "examples"}
BUILD_OUTPUTS = {"__pycache__", "build", "dist"}


def pyproject(project: Path) -> dict[str, Any]:
    return tomllib.loads((project / "pyproject.toml").read_text(encoding="utf-8"))


def folders() -> Iterator[Path]:
    """Every folder of the repository, relative to its root, but for hidden and build ones."""
    for place, names, _ in os.walk(ROOT):
        names[:] = [n for n in names if not n.startswith(".") and n not in BUILD_OUTPUTS]
        yield Path(place).relative_to(ROOT)


def test_plugins_are_the_six_of_the_design() -> None:
    found = {p.name for p in (ROOT / "plugins").iterdir() if p.is_dir() and p.name not in BUILD_OUTPUTS}
    assert found == set(PLUGINS)


def test_no_init_file_makes_a_folder_of_ours_importable() -> None:
    bare = [Path("plugins"), *(Path("plugins") / name for name in PLUGINS)]
    bare += [folder for folder in folders() if "tests" in folder.parts]
    assert [str(f) for f in bare if (ROOT / f / "__init__.py").exists()] == []


def test_only_the_packages_lie_under_src() -> None:
    for name in PLUGINS:
        found = {p.name for p in (ROOT / "plugins" / name / "src").iterdir() if not p.name.endswith(".egg-info")}
        assert found - BUILD_OUTPUTS == {f"moe_core_{name}"}


def test_import_triton_is_not_our_folder() -> None:
    spec = find_spec("triton")
    if spec is not None:
        assert spec.origin is not None, "only a folder called triton was found: something put plugins/ on sys.path"
        assert ROOT / "plugins" not in Path(spec.origin).resolve().parents


@pytest.mark.parametrize("name", PROJECTS)
def test_every_project_reads_the_one_version_file(name: str) -> None:
    project = PROJECTS[name]
    content = pyproject(project)
    assert "version" in content["project"]["dynamic"]
    assert "version" not in content["project"]
    assert (project / content["tool"]["hatch"]["version"]["path"]).resolve() == ROOT / "moe_core" / "_version.py"


@pytest.mark.parametrize("name", PROJECTS)
def test_every_project_ships_its_one_typed_package(name: str) -> None:
    project = PROJECTS[name]
    content = pyproject(project)
    (package,) = content["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert Path(package).name == name
    assert (project / package / "py.typed").is_file()
    assert content["project"]["name"] == name.replace("_", "-")
    assert content["project"]["requires-python"] == ">=3.11"
    assert content["project"]["license"] == "Apache-2.0"


def test_test_files_have_unique_names() -> None:
    names = [path.name for folder in folders() if "tests" in folder.parts for path in (ROOT / folder).glob("test_*.py")]
    assert sorted(n for n in set(names) if names.count(n) > 1) == []


def test_top_level_folders_are_those_of_the_design() -> None:
    found = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")} - BUILD_OUTPUTS
    assert found <= ALLOWED_FOLDERS
    assert {"moe_core", "plugins", "tests"} <= found
