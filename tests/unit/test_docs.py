"""What the README, the docs and the examples say is what the code does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from moe_core import errors
from moe_core._builtin import CPU_RUNNER, REFERENCE_RUNNER, STANDARD_DISPATCHER
from moe_core.capability import REASON_CODES
from moe_core.hookspecs import all_hooks
from moe_core.settings import ENVIRONMENT, Settings
from moe_core.vocabulary import Maturity, Step

ROOT = Path(__file__).parents[2]
REFERENCE = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_every_setting_reason_and_hook_is_in_the_reference() -> None:
    for name in Settings.__dataclass_fields__:
        assert f"| `{name}` |" in REFERENCE
    for variable in ENVIRONMENT.values():
        assert variable in REFERENCE
    for code, meaning in REASON_CODES.items():
        assert f"| `{code}` | {meaning} |" in REFERENCE
    for name in all_hooks():
        assert f"| `{name}(" in REFERENCE


def test_the_reference_knows_no_more_than_the_code() -> None:
    section = REFERENCE.split("## Reason codes")[1].split("## Hooks")[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)) == set(REASON_CODES)


def test_every_error_is_in_the_reference() -> None:
    for value in vars(errors).values():
        if isinstance(value, type) and issubclass(value, errors.MoeCoreError):
            assert value.__name__ in REFERENCE


def test_every_command_is_in_the_reference() -> None:
    from moe_core.cli._app import app

    commands = set(re.findall(r"^\| `moe-core ([\w-]+)", REFERENCE, re.MULTILINE))
    assert commands == set(app.list_commands(None))  # type: ignore[arg-type]


def test_every_step_is_in_the_concepts() -> None:
    text = (ROOT / "docs/concepts.md").read_text(encoding="utf-8")
    for step in Step:
        assert f"`{step.value}`" in text


def test_the_maturity_table_says_what_the_specs_say() -> None:
    text = (ROOT / "docs/maturity.md").read_text(encoding="utf-8")
    columns = ["x86_64", "sm_90", "sm_100", "gfx942", "gfx950"]
    for spec in (STANDARD_DISPATCHER, REFERENCE_RUNNER, CPU_RUNNER):
        kind = spec.subject.split(":")[0]
        row = next(line for line in text.splitlines() if line.startswith(f"| {kind} `{spec.name}` |"))
        cells = [cell.strip() for cell in row.strip("|").split("|")[1:]]
        for column, cell in zip(columns, cells, strict=True):
            assert cell == "-" or cell == spec.maturity.get(column, Maturity.UNTESTED).value


def test_the_readme_program_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = next(block for block in blocks if "moe_core.plan(" in block)
    # Smaller sizes: the same program in a tenth of a second.
    program = program.replace("2048", "128").replace("1024", "64")
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert run.returncode == 0, run.stderr
    assert "chosen    standard+cpu" in run.stdout


@pytest.mark.parametrize("example", sorted(p.name for p in (ROOT / "examples").glob("*.py")))
def test_examples_run(example: str) -> None:
    run = subprocess.run(
        [sys.executable, str(ROOT / "examples" / example)], capture_output=True, text=True, cwd=ROOT, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


@pytest.mark.parametrize(
    "page",
    sorted(p for p in ROOT.rglob("*.md") if not {".venv", ".devpkg", "node_modules"} & set(p.relative_to(ROOT).parts)),
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_every_link_to_a_file_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_every_result_file_that_is_named_exists() -> None:
    text = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "docs").glob("*.md")) + README
    for name in re.findall(r"benchmarks/results/[\w./-]+\.json", text):
        assert (ROOT / name).is_file(), name
