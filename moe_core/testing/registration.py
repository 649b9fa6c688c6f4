"""`@check`: how a function becomes a conformance check, and what it may raise or return. Never imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from moe_core.errors import SpecError

if TYPE_CHECKING:
    from moe_core.testing.case import Case


@dataclass(frozen=True, slots=True)
class Refused:
    """Returned by a check: the component does not declare this, and the selection says so with the right reason."""

    detail: str


class CheckSkipped(Exception):
    """Raised by a check that cannot be made here. The message says why."""


class CheckFailed(AssertionError):
    """A component broke its contract. The message says which check, what it means and what happened."""


CheckFunction: TypeAlias = "Callable[[Case], Refused | None]"

#: Kinds of components (see `moe_core.testing.components`).
KINDS: Final = ("plugin", "runner", "dispatcher", "adapter", "fused", "fused_path", "format")
#: Those that compute experts.
COMPUTING: Final = ("runner", "adapter", "fused", "fused_path")
#: Those that declare a `Support`.
DECLARING: Final = ("runner", "dispatcher", "fused_path")
#: What a parametrized check may range over (see `moe_core.testing.components.parameters`).
EACH: Final = (
    "lane",
    "scheme",
    "dtype",
    "activation",
    "group_size",
    "placement",
    "hook",
    "profile",
    "category",
    "form",
    "pattern",
    "format",
    "phase",
)


@dataclass(frozen=True, slots=True)
class Definition:
    """A check before it meets a component. `needs`: see `check`."""

    id: str
    kinds: tuple[str, ...]
    needs: tuple[str, ...]
    each: str | None
    function: CheckFunction

    @property
    def doc(self) -> str:
        """What is checked, as its docstring says."""
        return " ".join((self.function.__doc__ or "").split())


DEFINITIONS: Final[dict[str, Definition]] = {}


def check(
    id: str, *, kind: str | tuple[str, ...] = "runner", needs: str | tuple[str, ...] = (), each: str | None = None
) -> Callable[[CheckFunction], CheckFunction]:
    """Register a function as the check `id` ("group.name", stable: people list it as an expected failure).

    kind: the kinds of components it is made on; "runner" means everything that computes experts. each: what it ranges
    over; every value is a check of its own, "group.name[value]". needs: "run" (the component must be able to run here,
    else the check is skipped with the reasons), "cuda", and capabilities: "feature:bias", "scheme:{}", "hook:{}", ...
    with {} for the value. A capability that is not declared turns the check around: the selection must refuse it with
    the right reason code.
    """

    def register(function: CheckFunction) -> CheckFunction:
        kinds = COMPUTING if kind == "runner" else (kind,) if isinstance(kind, str) else kind
        problems = [k for k in kinds if k not in KINDS] + ([each] if each is not None and each not in EACH else [])
        if id in DEFINITIONS or "." not in id or problems or not function.__doc__:
            raise SpecError(f"check {id!r} is declared twice, has no group or docstring, or names {problems}")
        required = (needs,) if isinstance(needs, str) else needs
        DEFINITIONS[id] = Definition(id, kinds, required, each, function)
        return function

    return register
