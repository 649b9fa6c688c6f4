"""Requirements are probed without importing anything: missing, bare folder, impostor, too old."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from moe_core.capability import Requires
from moe_core.errors import SpecError

ROOT = Path(__file__).resolve().parents[2]


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
        f"torch = Requires(module='torch', submodule='nn.functional', min_version={version('torch')!r})\n"
        "assert torch.why_not('s') == []\n"
        "assert not any(m == 'torch' or m.startswith('torch.') for m in sys.modules), 'torch was imported'\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
