"""Capabilities: architecture windows, what is not declared is refused, and all reasons at once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_core.capability import Reason, Requires, Support, arch_matches, arch_number
from moe_core.config import Activation, MoeConfig, ParallelConfig
from moe_core.errors import SpecError
from moe_core.hardware import profile
from moe_core.request import PlanRequest
from moe_core.vocabulary import TOPK_BYPASSED, Phase


@pytest.mark.parametrize(
    ("arch", "window", "expected"),
    [
        ("sm_90", "*", True),
        ("x86_64", "*", True),
        ("sm_90", "sm_90", True),
        ("sm_90", "sm_89", False),
        ("sm_90", ">=sm_80", True),
        ("sm_75", ">=sm_80", False),
        ("sm_100", ">=sm_90", True),  # a number, not a text: "sm_100" < "sm_90" as text
        ("sm_89", "sm_90..sm_103", False),
        ("sm_90", "sm_90..sm_103", True),
        ("sm_103", "sm_90..sm_103", True),
        ("sm_120", "sm_90..sm_103", False),
        ("sm_90a", ">=sm_90", True),
        ("sm_100f", "sm_100..sm_103", True),
        ("gfx90a", "gfx90a..gfx942", True),  # hexadecimal: 0x90a < 0x942
        ("gfx942", ">=gfx90a", True),
        ("gfx908", ">=gfx90a", False),
        ("gfx1100", ">=gfx942", True),
        ("gfx950", "gfx90a..gfx942", False),
        ("gfx942", ">=sm_80", False),
        ("sm_90", ">=gfx90a", False),
        ("x86_64", "x86_64", True),
        ("x86_64", ">=sm_80", False),
        ("x86_64", ">=x86_64", False),  # it has no order
        ("aarch64", "x86_64", False),
        ("sm_90", "sm_80..", False),
        ("sm_90", "nonsense", False),
    ],
)
def test_an_architecture_lies_in_a_window(arch: str, window: str, expected: bool) -> None:
    assert arch_matches(arch, window) is expected


@pytest.mark.parametrize(
    ("arch", "number"),
    [
        ("sm_90", ("sm", 90)),
        ("sm_103a", ("sm", 103)),
        ("gfx90a", ("gfx", 0x90A)),
        ("gfx942", ("gfx", 0x942)),
        ("x86_64", None),
        ("cpu", None),
        ("", None),
    ],
)
def test_architectures_are_numbered_within_their_family(arch: str, number: tuple[str, int] | None) -> None:
    assert arch_number(arch) == number


def test_support_without_a_device_is_refused() -> None:
    with pytest.raises(SpecError, match="devices is empty"):
        Support(devices={})


def test_a_device_may_be_any() -> None:
    anywhere = Support(devices={"*": ("*",)})
    assert anywhere.arch_supported("cuda", "sm_90")
    assert anywhere.arch_supported("acme", "x1")
    some = Support(devices={"cuda": (">=sm_90",), "*": ("x86_64",)})
    assert some.arch_supported("cpu", "x86_64")
    assert some.arch_supported("cuda", "sm_100")
    assert not some.arch_supported("cuda", "sm_80")


GOOD = Support(
    devices={"cuda": ("sm_90",)},
    schemes=frozenset({"bf16", "int4_w4a16"}),
    dtypes=frozenset({"bfloat16"}),
    activations=frozenset({"silu"}),
    gated=frozenset({True}),
)


def ask(**changes: Any) -> PlanRequest:
    sizes = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 64}
    config = changes.pop("config", MoeConfig(**sizes))
    return PlanRequest(**{"config": config, "hardware": profile("h200"), **changes})


def codes(support: Support, request: PlanRequest, subject: str = "runner:acme") -> list[str]:
    return [reason.code for reason in support.why_not(request, subject)]


def config(**changes: Any) -> MoeConfig:
    return replace(ask().config, **changes)


def test_what_is_declared_is_supported() -> None:
    assert codes(GOOD, ask()) == []


@pytest.mark.parametrize(
    ("code", "changes", "support"),
    [
        ("device.type", {"hardware": profile("cpu")}, {}),
        ("device.arch", {"hardware": profile("b200")}, {}),
        ("device.arch", {}, {"scheme_archs": {"bf16": ("sm_100",)}}),
        ("dep.missing", {}, {"requires": (Requires(module="vendor_nowhere"),)}),
        ("quant.scheme", {"config": config(scheme="nvfp4")}, {}),
        ("quant.group_size", {"config": config(scheme="int4_w4a16", group_size=32)}, {}),
        ("dtype", {"config": config(dtype="float16")}, {}),
        ("activation", {"config": config(activation=Activation(name="gelu"))}, {}),
        ("activation.gated", {"config": config(activation=Activation(gated=False))}, {}),
        ("activation.limit", {"config": config(activation=Activation(limit=7.0))}, {}),
        ("shape.hidden", {}, {"hidden_multiple": 128}),
        ("shape.hidden", {}, {"hidden_sizes": frozenset({2048, 4096})}),
        ("shape.intermediate", {"parallel": ParallelConfig(tp_size=2)}, {"intermediate_multiple": 64}),
        ("shape.top_k", {}, {"max_top_k": 1}),
        ("shape.num_experts", {}, {"max_experts": 7}),
        ("shape.max_tokens", {"max_tokens": 65}, {"max_tokens": 64}),
        ("shape.max_tokens", {}, {"needs_max_tokens": True}),
        ("topk.format", {"topk_format": TOPK_BYPASSED}, {}),
        ("parallel.ep", {}, {"ep_sizes": (2, None)}),
        ("parallel.ep", {"parallel": ParallelConfig(ep_size=4)}, {"ep_sizes": (1, 2)}),
        ("parallel.ep", {"parallel": ParallelConfig(ep_size=3)}, {"even_experts": True}),
        (
            "parallel.placement",
            {"parallel": ParallelConfig(ep_size=2, placement=(0, 1) * 4)},
            {"placements": frozenset({"linear", "round_robin"})},
        ),
        ("feature", {"config": config(bias=True)}, {}),
        ("feature", {"features": frozenset({"acme.magic"})}, {}),
        ("feature", {"hooks": frozenset({"after_down"})}, {}),
        ("feature", {"graph_capture": frozenset({Phase.DECODE})}, {"graph_capture": frozenset({Phase.PREFILL})}),
        ("feature.host_sync", {"no_host_sync": frozenset(Phase)}, {"host_sync": frozenset({Phase.DECODE})}),
        ("phase", {}, {"phases": frozenset({Phase.DECODE})}),
    ],
)
def test_what_is_not_declared_is_refused_with_its_code(
    code: str, changes: dict[str, Any], support: dict[str, Any]
) -> None:
    request = ask(**changes)
    reasons = replace(GOOD, **support).why_not(request, "runner:acme")
    assert [r.code for r in reasons] == [code]
    assert reasons[0].subject == "runner:acme"
    assert reasons[0].message


@pytest.mark.parametrize(
    ("changes", "support"),
    [
        ({"parallel": ParallelConfig(placement="round_robin")}, {"placements": frozenset({"linear"})}),  # one rank
        ({"parallel": ParallelConfig(ep_size=4)}, {"even_experts": True}),
        ({"max_tokens": 64}, {"max_tokens": 64, "needs_max_tokens": True}),
        ({"phases": (Phase.DECODE,)}, {"phases": frozenset({Phase.DECODE})}),
        (
            {"phases": (Phase.DECODE,), "no_host_sync": frozenset(Phase), "graph_capture": frozenset(Phase)},
            {"host_sync": frozenset({Phase.PREFILL}), "graph_capture": frozenset({Phase.DECODE})},
        ),
        ({"assume": frozenset({"dependencies"})}, {"requires": (Requires(module="vendor_nowhere"),)}),
        ({}, {"scheme_archs": {"int4_w4a16": ("sm_100",)}}),
    ],
)
def test_a_limit_that_does_not_apply_refuses_nothing(changes: dict[str, Any], support: dict[str, Any]) -> None:
    assert codes(replace(GOOD, **support), ask(**changes)) == []


def test_a_dispatcher_is_not_asked_what_the_experts_compute() -> None:
    carrier = Support(devices={"cuda": ("sm_90",)})
    assert codes(carrier, ask(config=config(scheme="nvfp4", bias=True)), "dispatcher:acme") == []
    narrow = replace(carrier, dtypes=frozenset({"bfloat16"}))
    assert codes(narrow, ask(config=config(dtype="float16")), "dispatcher:acme") == ["dtype"]


def test_why_not_gives_all_reasons_at_once() -> None:
    support = Support(
        devices={"cuda": ("sm_100",)},
        schemes=frozenset({"nvfp4"}),
        dtypes=frozenset({"float16"}),
        activations=frozenset({"gelu"}),
        gated=frozenset({False}),
        host_sync=frozenset(Phase),
        hidden_multiple=128,
        hidden_sizes=frozenset({2048}),
        intermediate_multiple=128,
        max_top_k=1,
        max_experts=4,
        needs_max_tokens=True,
        ep_sizes=(4, 8),
        placements=frozenset(),
        even_experts=True,
        topk_formats=frozenset({TOPK_BYPASSED}),
        phases=frozenset({Phase.DECODE}),
        requires=(Requires(module="vendor_nowhere"), Requires(module="vendor_nowhere_either")),
    )
    request = ask(
        config=config(num_experts=9, bias=True, activation=Activation(limit=1.0)),
        parallel=ParallelConfig(ep_size=2),
        hooks=frozenset({"after_down"}),
        features=frozenset({"compile"}),
        graph_capture=frozenset(Phase),
        no_host_sync=frozenset(Phase),
    )
    found = codes(support, request)
    assert found[0] == "device.arch"  # what cannot be changed comes first
    assert sorted(found) == sorted(
        [
            "device.arch",
            *["dep.missing"] * 2,
            "quant.scheme",
            "dtype",
            "activation",
            "activation.gated",
            "activation.limit",
            *["feature"] * 5,  # bias, compile, the hook, and a graph in either phase
            "topk.format",
            *["parallel.ep"] * 2,
            "parallel.placement",
            *["shape.hidden"] * 2,
            "shape.intermediate",
            "shape.top_k",
            "shape.num_experts",
            "shape.max_tokens",
            "phase",
            *["feature.host_sync"] * 2,
        ]
    )


def test_a_reason_is_json() -> None:
    reason = Reason("runner:acme", "dtype", "no", "a", "b", "c")
    assert reason.to_json() == {
        "subject": "runner:acme",
        "code": "dtype",
        "message": "no",
        "needed": "a",
        "found": "b",
        "hint": "c",
    }
