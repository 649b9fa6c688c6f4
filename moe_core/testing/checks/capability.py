"""Capabilities: on every known machine a component is usable or says why not, and what nobody declared is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from moe_core.capability import REASON_CODES, Support
from moe_core.config import DTYPES, ParallelConfig
from moe_core.hardware import PROFILES, HardwareInfo
from moe_core.testing.case import Case
from moe_core.testing.refusals import Demand, demand, refused
from moe_core.testing.registration import DECLARING, CheckFailed, Refused, check
from moe_core.testing.stage import any_config
from moe_core.vocabulary import Phase

_NOBODY = "no_such_name"


@check("capability.hardware", kind=DECLARING, each="profile")
def hardware(case: Case) -> None:
    """On this hardware the component is usable, or gives at least one reason, and every reason has a known code."""
    resolution = case.stage.ask(any_config(case.component), PROFILES[case.param], **case.by_name)
    verdict = case.stage.verdicts(case.component, resolution)[0]
    plugin = case.stage.record.info
    for reason in verdict.reasons:
        own = plugin is not None and reason.code.startswith(f"{plugin.name}.")
        if reason.code not in REASON_CODES and not own:
            raise CheckFailed(
                f"the reason code {reason.code!r} is neither the core's nor prefixed with the plugin's name"
            )
        if not reason.message.strip() or reason.code == "probe.failed":
            raise CheckFailed(f"the reason {reason.code} says: {reason.message!r}")


@check("capability.pure", kind=DECLARING)
def pure(case: Case) -> None:
    """Asking twice gives the same reasons, and asking again imports nothing."""
    config = any_config(case.component)

    def reasons() -> list[Any]:
        found = []
        for machine in PROFILES.values():
            resolution = case.stage.ask(config, machine, **case.by_name)
            found.append([v.reasons for v in case.stage.verdicts(case.component, resolution)])
        return found

    first, before = reasons(), set(sys.modules)
    second, after = reasons(), set(sys.modules)
    if first != second:
        raise CheckFailed("it gave other reasons the second time")
    if after - before:
        raise CheckFailed(f"asking imported {', '.join(sorted(after - before))}")


@check("capability.refuses", kind=DECLARING, each="category")
def refuses(case: Case) -> Refused:
    """A request beyond what is declared (an unknown name, a size out of range) is refused with the right code."""
    support, kind = case.component.support, case.param
    layer = any_config(case.component)
    if kind in ("ep_size", "placement"):
        return _refuses_ranks(case, kind)
    if kind == "sizes":
        return _refuses_sizes(case)
    if kind == "device":
        nowhere = HardwareInfo(device_type=_NOBODY, arch=_NOBODY, product="nothing")
        return refused(case, Demand("an unknown device", "device.type", _never), hardware=nowhere)
    if kind == "dtype":
        return refused(case, demand(f"dtype:{min(set(DTYPES) - support.dtypes)}"))
    if kind == "gated":
        form = replace(layer.activation, gated=not layer.activation.gated)
        wanted = demand("form:gated" if form.gated else "form:plain")
        return refused(case, replace(wanted, config={"activation": form}))
    if kind == "limit":
        clamped = replace(layer.activation, limit=1.0)
        return refused(case, replace(demand("limit:"), config={"activation": clamped}))
    if kind == "graph_capture":
        return refused(case, demand(f"graph:{min(frozenset(Phase) - support.graph_capture)}"))
    return refused(case, demand(f"{'topk' if kind == 'topk_format' else kind}:{_NOBODY}"))


def _never(support: Support) -> bool:
    return False


def _refuses_ranks(case: Case, kind: str) -> Refused:
    support, config = case.component.support, any_config(case.component)
    if kind == "ep_size":
        low, high = support.ep_sizes
        size = low - 1 if low > 1 else (high or 0) + 1
        wanted = Demand(f"ep_size {size}", "parallel.ep", _never, {"num_experts": max(size, config.num_experts)})
        return refused(case, wanted, parallel=ParallelConfig(ep_size=size))
    undeclared = min({"linear", "round_robin", "map"} - support.placements)
    size = max(2, support.ep_sizes[0])
    experts = max(size, config.num_experts)
    owners = tuple(e * size // experts for e in range(experts))
    placement = owners if undeclared == "map" else undeclared
    wanted = Demand(f"placement {undeclared}", "parallel.placement", _never, {"num_experts": experts})
    return refused(case, wanted, parallel=ParallelConfig(ep_size=size, placement=placement))


def _refuses_sizes(case: Case) -> Refused:
    support, config = case.component.support, any_config(case.component)
    limits: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    if support.hidden_multiple > 1 or support.hidden_sizes:
        limits.append(("shape.hidden", {"hidden_size": config.hidden_size + 1}, {}))
    if support.intermediate_multiple > 1:
        limits.append(("shape.intermediate", {"intermediate_size": config.intermediate_size + 1}, {}))
    if support.max_top_k is not None:
        many = support.max_top_k + 1
        limits.append(("shape.top_k", {"top_k": many, "num_experts": max(many, config.num_experts)}, {}))
    if support.max_experts is not None:
        limits.append(("shape.num_experts", {"num_experts": support.max_experts + 1}, {}))
    if support.max_tokens is not None:
        limits.append(("shape.max_tokens", {}, {"max_tokens": support.max_tokens + 1}))
    if support.needs_max_tokens:
        limits.append(("shape.max_tokens", {}, {"max_tokens": None}))
    for code, changes, request in limits:
        refused(case, Demand(f"{changes or request}", code, _never, changes), **request)
    return Refused(f"sizes beyond the declared ones are refused with {', '.join(code for code, _, _ in limits)}")
