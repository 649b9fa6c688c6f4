"""Recorded facts of MoRI's Python interface: a JSON file a version, and the reader that makes one from a source tree.

A fact file says, for each callable that this plugin uses, the names, order, kinds and defaults of its parameters, and
the names of the enums' members (never their numbers). `OLDEST` is the oldest version that the V1 dispatchers run on.
"""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

OLDEST: Final = "1.1.1"
#: The first version with the second interface.
OLDEST_V2: Final = "1.2.2"
NEWEST: Final = "1.2.4"

_V1, _V2 = "mori/ops/dispatch_combine.py", "mori/ops/dispatch_combine_v2/dispatch_combine_op.py"
_SHMEM, _CCO = "mori/shmem/api.py", "mori/cco/communicator.py"
_STEPS = ("__init__", "dispatch", "dispatch_send", "dispatch_recv", "combine", "combine_send", "combine_recv", "reset")
#: File -> (import name of its contents, what of it is recorded).
_RECORDED: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    _V1: ("mori.ops", ("EpDispatchCombineConfig", *(f"EpDispatchCombineOp.{step}" for step in _STEPS))),
    _V2: (
        "mori.ops.dispatch_combine_v2",
        (
            "EpDispatchCombineConfig",
            *(f"EpDispatchCombineOp.{step}" for step in ("dispatch", "combine", "reset", "close")),
        ),
    ),
    _SHMEM: ("mori.shmem", ("shmem_get_unique_id", "shmem_init_attr", "shmem_mype", "shmem_npes")),
    _CCO: ("mori.cco", tuple(f"Communicator.{name}" for name in ("get_unique_id", "init", "destroy"))),
}


@dataclass(frozen=True, slots=True)
class Parameter:
    """keyword_only: cannot be given by place. default: its source text, or None where it must be given."""

    name: str
    keyword_only: bool = False
    default: str | None = None


@dataclass(frozen=True, slots=True)
class Facts:
    """version: of the distribution. source: what was read. commit: of it in github.com/ROCm/mori, where it is known.

    callables: dotted name -> parameters in order, without self. enums: name -> names of its members. files: path inside
    the distribution -> sha256 of what was read.
    """

    version: str
    source: str
    commit: str | None
    callables: dict[str, tuple[Parameter, ...]]
    enums: dict[str, tuple[str, ...]]
    files: dict[str, str]

    def parameters(self, name: str) -> frozenset[str]:
        """Names of the parameters of a callable; empty where this version has none of that name."""
        return frozenset(parameter.name for parameter in self.callables.get(name, ()))

    def to_json(self) -> dict[str, Any]:
        """What a fact file holds."""
        return {
            "version": self.version,
            "source": self.source,
            "commit": self.commit,
            "files": self.files,
            "callables": {
                name: [[p.name, "keyword" if p.keyword_only else "any", p.default] for p in parameters]
                for name, parameters in self.callables.items()
            },
            "enums": {name: list(members) for name, members in self.enums.items()},
        }


def versions() -> tuple[str, ...]:
    """Those that facts are recorded of, oldest first."""
    names = (entry.name for entry in files(__package__).iterdir())
    found = [name.removeprefix("mori-").removesuffix(".json") for name in names if name.endswith(".json")]
    return tuple(sorted(found, key=lambda version: [int(part) for part in version.split(".")]))


def load(version: str) -> Facts:
    """The recorded facts of a version. Raises FileNotFoundError for one that is not recorded."""
    raw = json.loads((files(__package__) / f"mori-{version}.json").read_text(encoding="utf-8"))
    callables = {
        name: tuple(Parameter(p, kind == "keyword", default) for p, kind, default in parameters)
        for name, parameters in raw["callables"].items()
    }
    enums = {name: tuple(members) for name, members in raw["enums"].items()}
    return Facts(raw["version"], raw["source"], raw["commit"], callables, enums, raw["files"])


def read_sources(root: Path, version: str, source: str, commit: str | None, enums: dict[str, tuple[str, ...]]) -> Facts:
    """Facts from an unpacked wheel or the `python` folder of a checkout, by parsing: nothing is imported or run.

    root: holds the folder `mori`. enums: from the C++ bindings, which Python's sources do not hold. A callable that the
    version lacks is left out.
    """
    callables: dict[str, tuple[Parameter, ...]] = {}
    hashes: dict[str, str] = {}
    for path, (module, names) in _RECORDED.items():
        if not (root / path).is_file():
            continue
        text = (root / path).read_bytes()
        hashes[path] = hashlib.sha256(text).hexdigest()
        found = dict(_callables(ast.parse(text)))
        callables |= {f"{module}.{name}": found[name] for name in names if name in found}
    return Facts(version, source, commit, callables, enums, hashes)


def _callables(tree: ast.Module) -> Iterator[tuple[str, tuple[Parameter, ...]]]:
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name, tuple(_parameters(node.args, method=False))
        elif isinstance(node, ast.ClassDef):
            members = [m for m in node.body if isinstance(m, ast.AnnAssign) and isinstance(m.target, ast.Name)]
            if members:
                yield node.name, tuple(_fields(members))
            for method in node.body:
                if isinstance(method, ast.FunctionDef):
                    static = any(isinstance(d, ast.Name) and d.id == "staticmethod" for d in method.decorator_list)
                    yield f"{node.name}.{method.name}", tuple(_parameters(method.args, method=not static))


def _fields(members: Iterable[ast.AnnAssign]) -> Iterator[Parameter]:
    """The fields of a dataclass, which are its constructor's parameters."""
    for member in members:
        name = ast.unparse(member.target)
        yield Parameter(name, default=None if member.value is None else ast.unparse(member.value))


def _parameters(arguments: ast.arguments, *, method: bool) -> Iterator[Parameter]:
    placed = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(placed) - len(arguments.defaults)) + [ast.unparse(d) for d in arguments.defaults]
    yield from [Parameter(a.arg, False, d) for a, d in zip(placed, defaults, strict=True)][1 if method else 0 :]
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield Parameter(argument.arg, True, None if default is None else ast.unparse(default))
