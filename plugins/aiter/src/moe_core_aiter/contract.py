"""What AITER's interface is known to be: recorded by parsing its releases, never by importing them. Imports no torch.

`facts.json` holds one record a version: the arguments of `aiter.fused_moe.fused_moe` in order with their defaults as
source text, the names of those of `get_2stage_cfgs`, which chooses kernels, and the members of two enums. Enums count
by *name*: their integers moved twice. To record another one:

    python -m moe_core_aiter.contract AITER --version V --commit C     # AITER: a checkout or an unpacked wheel
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

#: Arguments that every supported build has: those of v0.1.4, the oldest. Any other one is sent only where the
#: installed build has it.
FLOOR: Final = (
    "hidden_states",
    "w1",
    "w2",
    "topk_weight",
    "topk_ids",
    "expert_mask",
    "activation",
    "quant_type",
    "doweight_stage1",
    "w1_scale",
    "w2_scale",
    "a1_scale",
    "a2_scale",
    "block_size_M",
    "num_local_tokens",
    "dtype",
)
#: Those of them that this plugin sends, the first five by position.
SENT: Final = tuple(name for name in FLOOR if name != "doweight_stage1")
#: Sent where the installed build has them, and the layer needs them.
PROBED: Final = ("bias1", "bias2", "swiglu_limit", "gate_mode", "output")
#: Members that the plugin uses.
ACTIVATIONS: Final = ("Silu", "Gelu", "Swiglu")
QUANT_TYPES: Final = ("No", "per_Tensor", "per_Token", "per_1x32", "per_128x128")


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """One recorded version. fused_moe: argument -> its default as source text, None without one.

    get_2stage_cfgs: its arguments, none where this version has no such function.

    source: where it was read, and sha256: of the file `aiter/fused_moe.py` there.
    """

    version: str
    commit: str | None
    source: str
    sha256: str
    fused_moe: Mapping[str, str | None]
    get_2stage_cfgs: tuple[str, ...]
    activation_type: tuple[str, ...]
    quant_type: tuple[str, ...]


@cache
def recorded() -> Mapping[str, Facts]:
    """Every recorded version, the oldest first."""
    rows = json.loads((files("moe_core_aiter") / "facts.json").read_text(encoding="utf-8"))
    return {row["version"]: _facts(row) for row in rows}


def _facts(row: Mapping[str, Any]) -> Facts:
    names = {name: tuple(row[name]) for name in ("get_2stage_cfgs", "activation_type", "quant_type")}
    return Facts(**{**row, **names})


def signature_of(source: str, function: str = "fused_moe") -> dict[str, str | None]:
    """The arguments of a top-level function in the source text of a module, with their defaults as text.

    Raises ValueError where there is no such function.
    """
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef) and node.name == function:
            given = [*node.args.posonlyargs, *node.args.args]
            defaults = [None] * (len(given) - len(node.args.defaults)) + [ast.unparse(d) for d in node.args.defaults]
            found = dict(zip((argument.arg for argument in given), defaults, strict=True))
            keyword = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
            return found | {argument.arg: None if d is None else ast.unparse(d) for argument, d in keyword}
    raise ValueError(f"the module has no function {function!r}")


def enum_of(header: str, name: str) -> tuple[str, ...]:
    """The members of `enum class NAME` in a C++ header, in order. Raises ValueError where it is not there."""
    found = re.search(rf"enum class {name}\b[^{{]*{{([^}}]*)}}", header)
    if found is None:
        raise ValueError(f"the header has no enum class {name!r}")
    body = re.sub(r"//.*|/\*.*?\*/", "", found[1])
    return tuple(member.split("=")[0].strip() for member in body.split(",") if member.strip())


def read(place: Path, *, version: str, commit: str | None, source: str) -> Facts:
    """The facts of a checkout of AITER, or of an unpacked wheel. Raises OSError or ValueError where it is neither."""
    module = (place / "aiter" / "fused_moe.py").read_bytes()
    text = module.decode()
    headers = [root / "include" / "aiter_enum.h" for root in (place / "csrc", place / "aiter_meta" / "csrc")]
    header = next((h for h in headers if h.is_file()), headers[0]).read_text(encoding="utf-8")
    return Facts(
        version=version,
        commit=commit,
        source=source,
        sha256=hashlib.sha256(module).hexdigest(),
        fused_moe=signature_of(text),
        get_2stage_cfgs=tuple(signature_of(text, "get_2stage_cfgs") if "def get_2stage_cfgs(" in text else ()),
        activation_type=enum_of(header, "ActivationType"),
        quant_type=enum_of(header, "QuantType"),
    )


def differences(parameters: Iterable[str]) -> list[str]:
    """What an installed build's arguments have that no record has, or lack that every record has."""
    have, known = set(parameters), {name for facts in recorded().values() for name in facts.fused_moe}
    found = [f"{name} is new" for name in sorted(have - known)]
    return found + [f"{name} is missing" for name in FLOOR if name not in have]


def like(parameters: Mapping[str, str | None], stages: Sequence[str] | None = None) -> str | None:
    """The newest recorded version with exactly these arguments of `fused_moe`, in this order.

    parameters: argument -> its default as source text; None or "" where it has none, or none that is a literal.
    stages: the arguments of `get_2stage_cfgs`, where those shall be the same too.
    """

    def same(facts: Facts) -> bool:
        known = facts.fused_moe
        defaults = all(not text or text == known[name] for name, text in parameters.items() if name in known)
        chosen = stages is None or tuple(stages) == facts.get_2stage_cfgs
        return tuple(known) == tuple(parameters) and defaults and chosen

    return next((v for v, facts in reversed([*recorded().items()]) if same(facts)), None)


def main() -> None:
    """Print the facts of a checkout or unpacked wheel as JSON."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("place", type=Path)
    parser.add_argument("--version", required=True)
    parser.add_argument("--commit")
    parser.add_argument("--source", default="a checkout")
    given = parser.parse_args()
    print(json.dumps(asdict(read(**{**vars(given)})), indent=1))


if __name__ == "__main__":
    main()
