"""Capabilities: on every known machine a component is usable or says why not, and what nobody declared is refused."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from moe_core.capability import REASON_CODES
from moe_core.config import DTYPES, Activation, ParallelConfig
from moe_core.hardware import PROFILES, HardwareInfo
from moe_core.testing.case import Case
from moe_core.testing.refusals import Demand, demand, refused
from moe_core.testing.registration import DECLARING, CheckFailed, CheckSkipped, Refused, check
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
            raise CheckFailed(f"the reason code {reason.code!r} is neither the core's nor prefixed with the plugin's name")
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
def refuses(case: Case) -> Refused | None:
    """A request beyond what is declared (an unknown name, a size or count out of range) is refused with the right code."""
    support, kind = case.component.support, case.param
    if kind in ("ep_size", "placement", "sizes"):
        return _refuses_layout(case, kind)
    if kind == "device":
        if "*" in support.devices:
            raise CheckSkipped("it declares every device")
        wanted = Demand("an unknown device", "device.type", lambda s: False)
        return refused(case, wanted, hardware=HardwareInfo(device_type=_NOBODY, arch=_NOBODY, product="nothing"))
    if kind == "dtype":
        undeclared = [name for name in DTYPES if name not in support.dtypes]
        if not undeclared:
            raise CheckSkipped("it declares every dtype")
        return refused(case, demand(f"dtype:{undeclared[0]}"))
    if kind in ("gated", "limit", "graph_capture"):
        declared = {
            "gated": len(support.gated) == 2,
            "limit": support.activation_limit,
            "graph_capture": support.graph_capture == frozenset(Phase),
        }
        if declared[kind]:
            raise CheckSkipped("it declares all of it")
        token = {
            "gated": f"form:{'plain' if True in support.gated else 'gated'}",
            "limit": "limit:",
            "graph_capture": f"graph:{min(frozenset(Phase) - support.graph_capture, default=Phase.DECODE)}",
        }
        wanted = demand(token[kind])
        if kind == "limit":
            layer = any_config(case.component)
            wanted = replace(wanted, config={"activation": replace(layer.activation, limit=1.0)})
        elif kind == "gated":
            layer = any_config(case.component)
            wanted = replace(wanted, config={"activation": Activation(name=layer.activation.name, gated=False)})
            if True not in support.gated:
                wanted = replace(wanted, config={"activation": Activation(name=layer.activation.name)})
        return refused(case, wanted)
    return refused(case, demand(f"{'topk' if kind == 'topk_format' else kind}:{_NOBODY}"))


def _refuses_layout(case: Case, kind: str) -> Refused:
    support = case.component.support
    config = any_config(case.component)
    if kind == "ep_size":
        low, high = support.ep_sizes
        size = high + 1 if high is not None else low - 1
        if not 1 <= size <= 64:
            raise CheckSkipped("it declares every EP size")
        wanted = Demand(f"ep_size {size}", "parallel.ep", lambda s: False, {"num_experts": max(size, config.num_experts)})
        return refused(case, wanted, parallel=ParallelConfig(ep_size=size))
    if kind == "placement":
        undeclared = sorted({"linear", "round_robin", "map"} - support.placements)
        if not undeclared:
            raise CheckSkipped("it declares every placement")
        size = max(2, support.ep_sizes[0])
        experts = max(size, config.num_experts)
        owners = tuple(e * size // experts for e in range(experts))
        placement = owners if undeclared[0] == "map" else undeclared[0]
        wanted = Demand(f"placement {undeclared[0]}", "parallel.placement", lambda s: False, {"num_experts": experts})
        return refused(case, wanted, parallel=ParallelConfig(ep_size=size, placement=placement))
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
    if not limits:
        raise CheckSkipped("it declares no limit of sizes")
    for code, changes, request in limits:
        refused(case, Demand(f"{changes or request}", code, lambda s: False, changes), **request)
    return Refused(f"sizes beyond the declared ones are refused with {', '.join(code for code, _, _ in limits)}")
