"""What `import moe_core` gives, what it costs, and that every error is what its documentation says."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

import moe_core
from moe_core import errors
from moe_core.capability import Reason

ROOT = Path(__file__).resolve().parents[2]

#: Adding a name is a decision, and removing one breaks somebody: change this list on purpose.
PUBLIC = [
    "PLUGIN_API",
    "Activation",
    "BindError",
    "Binding",
    "BypassedTopK",
    "CanonicalWeights",
    "CommunicationError",
    "ConfigError",
    "ContractViolation",
    "DependencyError",
    "DroppedSlot",
    "ExpertLoad",
    "ExpertReplicas",
    "HardwareInfo",
    "HookRows",
    "IdSpace",
    "LayoutMismatch",
    "Maturity",
    "MoeConfig",
    "MoeCoreError",
    "MoeLayer",
    "MoePlan",
    "NoUsableBackend",
    "Owner",
    "ParallelConfig",
    "Phase",
    "PluginError",
    "RankDisagreement",
    "Reason",
    "Registry",
    "Requires",
    "RoutingConfig",
    "RunnerHooks",
    "RunningState",
    "SelectionError",
    "Settings",
    "Step",
    "Support",
    "TopKOutput",
    "UnsupportedOverride",
    "WeightError",
    "__version__",
    "canonical_gate_up",
    "default_registry",
    "detect_hardware",
    "explain",
    "forget_plugins",
    "hookimpl",
    "make_request",
    "override",
    "plan",
    "preset",
    "resolve",
    "route",
    "weight_requirements",
]


def test_the_public_names_are_pinned_and_sorted() -> None:
    """Constants, classes, functions, each by name: the order that ruff keeps."""
    assert moe_core.__all__ == PUBLIC
    assert len(set(PUBLIC)) == len(PUBLIC)
    kinds = [0 if name.isupper() else 1 if name[:1].isupper() else 2 for name in PUBLIC]
    assert sorted(zip(kinds, PUBLIC, strict=True)) == list(zip(kinds, PUBLIC, strict=True))


@pytest.mark.parametrize("name", moe_core.__all__)
def test_every_public_name_is_there_and_documented(name: str) -> None:
    value = getattr(moe_core, name)
    assert name in dir(moe_core)
    if inspect.isclass(value) or inspect.isfunction(value):
        text = value.__doc__ or ""
        assert text.strip(), f"{name} has no docstring"
        assert not text.startswith(f"{name}("), f"{name} has only the docstring that dataclass writes"


def test_an_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'moe_core' has no attribute 'Plan'"):
        _ = moe_core.Plan
    assert not hasattr(moe_core, "torch")


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


HEAVY = "{'torch', 'rich', 'click', 'numpy', 'triton', 'transformers', 'flashinfer', 'aiter', 'deep_ep', 'mori'}"


@pytest.mark.parametrize(
    "code",
    [
        "import moe_core",
        "import moe_core; moe_core.explain(moe_core.preset('deepseek-v3'), moe_core.ParallelConfig(ep_size=8), 'h200')",
        "import moe_core.testing.fakes, moe_core.testing.dispatchers, moe_core.measurements, moe_core.formats",
    ],
    ids=["import", "explain", "fakes"],
)
def test_importing_and_explaining_load_nothing_heavy(code: str) -> None:
    assert run(f"{code}\nimport sys; print(sorted({{m.split('.')[0] for m in sys.modules}} & {HEAVY}))") == "[]"


def test_what_needs_torch_is_loaded_when_it_is_first_touched() -> None:
    lazy = sorted(moe_core._LAZY)
    assert {"MoeLayer", "MoePlan", "CanonicalWeights"} <= set(lazy)
    code = (
        f"import sys, moe_core\nlazy = {lazy}\n"
        "assert 'torch' not in sys.modules and not set(lazy) & set(vars(moe_core))\n"
        "found = [getattr(moe_core, name) for name in lazy]\n"
        "assert all(vars(moe_core)[name] is value for name, value in zip(lazy, found))\n"
        "print('torch' in sys.modules)"
    )
    assert run(code) == "True"


def test_the_settings_of_the_process_are_left_alone() -> None:
    code = (
        "import logging, os, warnings\n"
        "def state(): return dict(os.environ), list(warnings.filters), logging.root.handlers[:]\n"
        "before = state()\nimport moe_core\n"
        "moe_core.resolve(moe_core.preset('olmoe'), hardware='cpu')\nprint(before == state())"
    )
    assert run(code) == "True"


def classes() -> dict[str, type[Exception]]:
    found = {n: v for n, v in vars(errors).items() if inspect.isclass(v) and issubclass(v, errors.MoeCoreError)}
    assert len(found) > 10
    return found


def test_the_tree_in_the_documentation_is_the_tree_of_classes() -> None:
    parents: dict[str, str | None] = {}
    stack: list[tuple[int, str]] = []
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"^([ |`-]*)([A-Z]\w+)(?:  .*)?$", line)
        if match is None or match[2] not in classes():
            continue
        depth = len(match[1])
        while stack and stack[-1][0] >= depth:
            stack.pop()
        parents[match[2]] = stack[-1][1] if stack else None
        stack.append((depth, match[2]))
    assert parents == {
        name: None if cls is errors.MoeCoreError else cls.__bases__[0].__name__ for name, cls in classes().items()
    }


@pytest.mark.parametrize("name", classes())
def test_every_error_survives_a_trip_between_processes(name: str) -> None:
    error = classes()[name]("it failed", hint="do this")
    if isinstance(error, errors.SelectionError):
        error.reasons = (Reason("runner:acme", "dtype", "no"),)
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is type(error)
    assert (str(back), back.message, back.hint) == ("it failed\n  -> do this", "it failed", "do this")
    assert getattr(back, "reasons", None) == getattr(error, "reasons", None)


def test_a_hint_is_part_of_the_message_and_optional() -> None:
    assert str(errors.ConfigError("bad")) == "bad"
    assert errors.ConfigError("bad").hint is None


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("tritn", ["triton", "cpu"], "did you mean 'triton'?"),
        ("ep_ranks", ["ep_rank", "tp_rank", "x"], "did you mean 'ep_rank' or 'tp_rank'?"),
        ("zzz", ["b", "a", "b"], "known: a, b"),
        ("zzz", [], "nothing of that kind is known here"),
    ],
)
def test_a_typo_is_met_with_the_closest_names_or_all(name: str, known: list[str], expected: str) -> None:
    assert errors.did_you_mean(name, known) == expected
