"""The other half of honesty: what is not declared must be refused, with the right reason code."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from moe_core.capability import Support
from moe_core.config import Activation
from moe_core.testing.registration import CheckFailed, Refused
from moe_core.testing.stage import any_config, sentence
from moe_core.vocabulary import Phase

if TYPE_CHECKING:
    from moe_core.resolution import Resolution
    from moe_core.testing.case import Case

#: Features that are a property of the layer, and how the layer asks for them.
LAYER_FEATURES = ("bias", "router_weight_on_input", "no_combine")


@dataclass(frozen=True, slots=True)
class Demand:
    """A capability as a request makes it: changes of the layer and of the request, and the code that refuses it."""

    what: str
    code: str
    declared: Callable[[Support], bool]
    config: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)


def demand(token: str) -> Demand:
    """The demand behind a word of `needs`, such as "feature:bias"."""
    kind, _, value = token.partition(":")
    what = f"{kind} {value}"
    if kind == "scheme":
        return Demand(what, "quant.scheme", lambda s: value in s.schemes, {"scheme": value})
    if kind == "dtype":
        return Demand(what, "dtype", lambda s: value in s.dtypes, {"dtype": value})
    if kind == "activation":
        activation = Activation(name=value)
        return Demand(what, "activation", lambda s: value in s.activations, {"activation": activation})
    if kind == "form":
        gated = value == "gated"
        form = Activation(name="silu", gated=gated)
        return Demand(f"{value} layers", "activation.gated", lambda s: gated in s.gated, {"activation": form})
    if kind == "limit":
        clamp = Activation(limit=1.0)
        return Demand("activation limit", "activation.limit", lambda s: s.activation_limit, {"activation": clamp})
    if kind == "hook":
        return Demand(what, "feature", lambda s: value in s.hooks, request={"hooks": {value}})
    if kind == "feature":
        changes: dict[str, Any] = {value: True} if value in LAYER_FEATURES else {}
        request: dict[str, Any] = {} if changes else {"features": {value}}
        return Demand(what, "feature", lambda s: value in s.features, changes, request)
    if kind == "topk":
        return Demand(what, "topk.format", lambda s: value in s.topk_formats, request={"topk_format": value})
    if kind == "graph":
        phase = Phase(value)
        request = {"phases": (phase,), "graph_capture": {phase}}
        return Demand(f"graph capture in {value}", "feature", lambda s: phase in s.graph_capture, request=request)
    raise ValueError(f"a check needs {token!r}, which is no capability")


def unless_declared(case: Case, token: str) -> Refused | None:
    """None where the capability is declared; else the refusal by the selection. Raises CheckFailed without one."""
    wanted = demand(token)
    return None if wanted.declared(case.component.support) else refused(case, wanted)


def refused(case: Case, wanted: Demand, **request: Any) -> Refused:
    """Ask for it by name, and expect the reason code."""
    component, stage = case.component, case.stage
    config = any_config(component, **wanted.config)
    asked = {"hardware": stage.any_hardware(component), **case.by_name, **wanted.request, **request}
    resolution = stage.ask(config, asked.pop("hardware"), **asked)
    return _expect(case, resolution, wanted)


def _expect(case: Case, resolution: Resolution, wanted: Demand) -> Refused:
    reasons = [r for v in resolution.verdicts if v.spec.subject == case.component.subject for r in v.reasons]
    matching = [r for r in reasons if r.code == wanted.code]
    if resolution.chosen is not None or not matching:
        raise CheckFailed(
            f"{wanted.what} is not declared, so the selection must refuse it with the code {wanted.code!r}; "
            + (f"its reasons were {sentence(reasons)}" if reasons else "it did not refuse it")
        )
    return Refused(f"not declared, and refused: {matching[0]}")
