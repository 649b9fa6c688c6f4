"""What a plugin tells the conformance kit about itself. Never imports torch: the hook is called while discovering."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from moe_core._frozen import FrozenDict
from moe_core.errors import ConfigError

#: How a reason for an expected failure starts: we could do it, somebody else must move first, it cannot be done.
REASON_PREFIXES: Final = ("notimpl:", "notyet:", "never:")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceProfile:
    """The answer of the hook `moe_core_conformance`.

    expected_failures: check id, or "component/check id" for one component only ("runner:acme/numerics.bias") -> reason,
    which starts with "notimpl:", "notyet:" or "never:". A check that is listed and passes fails the run.
    tolerances: (dtype, scheme) -> largest relative RMS error. It may only be smaller than the kit's own ceiling.
    """

    expected_failures: Mapping[str, str] = field(default_factory=FrozenDict)
    tolerances: Mapping[tuple[str, str], float] = field(default_factory=FrozenDict)

    def __post_init__(self) -> None:
        check_reasons(self.expected_failures)
        for name in ("expected_failures", "tolerances"):
            object.__setattr__(self, name, FrozenDict(getattr(self, name)))


def check_reasons(expected_failures: Mapping[str, str]) -> None:
    """Raise ConfigError unless every reason starts with one of `REASON_PREFIXES` and says something after it."""
    for name, reason in expected_failures.items():
        prefix = next((p for p in REASON_PREFIXES if reason.startswith(p)), None)
        if prefix is None or not reason.removeprefix(prefix).strip():
            raise ConfigError(
                f"the expected failure of {name!r} has the reason {reason!r}",
                hint=f"start it with {', '.join(REASON_PREFIXES)} and say why (we could, others must, nobody can)",
            )
