"""Reason codes are API: every one in use is documented, and every documented one is in use."""

from __future__ import annotations

import ast
from pathlib import Path

from moe_core.capability import REASON_CODES

ROOT = Path(__file__).resolve().parents[2]
SOURCES = [*(ROOT / "moe_core").rglob("*.py"), *(ROOT / "plugins").glob("*/src/**/*.py")]


def _codes_of(node: ast.AST) -> list[ast.expr]:
    """Expressions that stand where a code belongs."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", None)
        if name == "Reason":
            return node.args[1:2] + [k.value for k in node.keywords if k.arg == "code"]
        return node.args[:1] if name == "first" else []  # the negotiation's helper
    if isinstance(node, ast.Tuple):  # tables of rules, and what the probe returns
        return node.elts
    return []


def codes_in_use() -> set[str]:
    groups = {code.split(".")[0] for code in REASON_CODES if "." in code}
    found: set[str] = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            words = [e.value for e in _codes_of(node) if isinstance(e, ast.Constant) and isinstance(e.value, str)]
            if isinstance(node, ast.Tuple):
                parts = [word.split(".") for word in words]
                words = [".".join(p) for p in parts if len(p) == 2 and p[0] in groups and p[1].isidentifier()]
            found.update(words)
    return found


def test_every_code_in_use_is_documented() -> None:
    used = codes_in_use()
    assert {"dep.missing", "contract.payload", "step.twice", "device.arch", "shape.hidden"} <= used, "the scan is blind"
    assert used - set(REASON_CODES) == set()


def test_every_documented_code_is_in_use() -> None:
    """A code that nothing gives is a promise that nobody keeps."""
    for_the_rules_of_plugins: set[str] = set()
    assert set(REASON_CODES) - codes_in_use() <= for_the_rules_of_plugins


def test_codes_are_explained_in_a_line_each() -> None:
    assert all(text and "\n" not in text for text in REASON_CODES.values())
