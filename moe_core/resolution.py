"""The answer of a selection: every verdict, the ranked candidates, the choice and its fingerprint, as frozen data."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from moe_core.capability import Reason
from moe_core.errors import NoUsableBackend, UnsupportedOverride
from moe_core.request import PlanRequest, plain
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedPathSpec, FusedSpec, RunnerSpec, Terms
from moe_core.vocabulary import FormatId, Maturity, Phase

Component: TypeAlias = DispatcherSpec | RunnerSpec | FusedPathSpec


@dataclass(frozen=True, slots=True)
class PriorityNote:
    """A change of priority and why, from the hook `moe_core_adjust_priority`."""

    delta: int
    why: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """A component and every reason against it (none: usable)."""

    spec: Component
    plugin: str
    reasons: tuple[Reason, ...]
    maturity: Maturity

    @property
    def usable(self) -> bool:
        """Whether nothing speaks against it."""
        return not self.reasons


@dataclass(frozen=True, slots=True)
class PathChoice:
    """How one format is served: by an adapter pair ("split") or a fused func ("fused"), under these terms."""

    format: FormatId
    kind: str
    terms: Terms
    spec: AdapterSpec | FusedSpec


@dataclass(frozen=True, slots=True)
class Candidate:
    """A combination that can serve the request. `paths` is empty for a fused path, which replaces everything."""

    dispatcher: str
    runner: str
    paths: tuple[tuple[Phase, PathChoice], ...]
    priority: int
    maturity: Maturity
    fused_path: str | None = None
    notes: tuple[PriorityNote, ...] = ()
    measured_ms: float | None = None
    layouts: frozenset[str] = frozenset()

    @property
    def kind(self) -> str:
        """ "whole", "fused", "split", or "mixed" where the phases differ."""
        if self.fused_path is not None:
            return "whole"
        kinds = {choice.kind for _, choice in self.paths}
        return kinds.pop() if len(kinds) == 1 else "mixed"

    @property
    def id(self) -> str:
        """A stable name: "standard+cpu/fused"."""
        return f"{self.dispatcher}+{self.runner}/{self.kind}"

    @property
    def formats(self) -> tuple[FormatId, ...]:
        """The formats that its dispatcher gives, in the order of the phases."""
        return tuple(dict.fromkeys(choice.format for _, choice in self.paths))


@dataclass(frozen=True, slots=True)
class Rejected:
    """A pair of usable components, or one of its paths, that cannot serve."""

    id: str
    reasons: tuple[Reason, ...]


@dataclass(frozen=True, slots=True)
class Resolution:
    """The ranked, explained decision. `candidates[0]` is chosen; none usable leaves it empty."""

    request: PlanRequest
    verdicts: tuple[Verdict, ...]
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    notes: tuple[str, ...]
    versions: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def chosen(self) -> Candidate | None:
        """The best candidate, or None."""
        return self.candidates[0] if self.candidates else None

    @property
    def reasons(self) -> tuple[Reason, ...]:
        """Everything that speaks against anything."""
        return (
            *(r for v in self.verdicts for r in v.reasons),
            *(r for p in self.rejected for r in p.reasons),
        )

    def require(self) -> Candidate:
        """The best candidate; raises UnsupportedOverride or NoUsableBackend with the whole report."""
        if self.chosen is not None:
            return self.chosen
        from moe_core.explanation import refusal

        settings = self.request.settings
        forced = {"runner": settings.runner, "dispatcher": settings.dispatcher, "path": settings.path}
        named = [f"{kind} {name!r}" for kind, name in forced.items() if name is not None]
        message = refusal(self)
        if named:
            raise UnsupportedOverride(
                f"{' and '.join(named)} was asked for by name and cannot serve this request\n{message}",
                hint="drop the override to let the selection choose, or change what the reasons name",
                resolution=self,
                reasons=self.reasons,
            )
        raise NoUsableBackend(
            f"no installed backend can serve this request\n{message}",
            hint="`moe-core plugins` shows what is installed, `moe-core explain` asks the same question again",
            resolution=self,
            reasons=self.reasons,
        )

    @property
    def fingerprint(self) -> str:
        """16 hex digits over the problem, the choice, its terms and the versions involved; equal on all ranks."""
        chosen = self.chosen
        request = self.request.to_json()
        # Known only when weights are there; what follows from it is in the choice.
        request.pop("input_scales")
        for rank in ("ep_rank", "tp_rank"):
            request["parallel"].pop(rank)
        # The product's name may differ between ranks that run the same code.
        request["hardware"] = {k: request["hardware"][k] for k in ("device_type", "arch")}
        # How the choice came about may differ between ranks; what it is may not. Its options change what runs.
        names = (chosen.runner, chosen.dispatcher) if chosen else ()
        options = request["settings"]["options"]
        request["settings"] = {"options": {name: options[name] for name in names if name in options}}
        content = {
            "request": request,
            "choice": None
            if chosen is None
            else [
                chosen.id,
                sorted(chosen.layouts),
                [[p, c.format, plain(c.terms), c.spec.targets] for p, c in chosen.paths],
            ],
            "versions": dict(sorted(self.versions.items())),
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=repr).encode()).hexdigest()[:16]
