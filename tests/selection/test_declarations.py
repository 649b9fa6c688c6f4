"""What specs declare and selection holds them to: layouts a path, tokens, features of dispatchers, priority notes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_core
from moe_core._builtin import STANDARD_DISPATCHER
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import BindError, ContractViolation
from moe_core.formats import GroupedDispatchOutput
from moe_core.protocols import RunningState
from moe_core.quant import roundtrip_activation
from moe_core.registry import Registry
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.specs import Offers
from moe_core.testing.fakes import dispatcher_like, fake_hardware, fake_plugin, runner_like
from moe_core.vocabulary import GROUPED, STANDARD, DroppedSlot, IdSpace, Phase, Step

LAYER = MoeConfig(num_experts=4, top_k=2, hidden_size=32, intermediate_size=32, dtype="float32")


def registry(**parts: Any) -> Registry:
    made = Registry(plugins=[fake_plugin("acme", **parts)], autoload=False, settings=Settings())
    assert made.records[1].state.value == "loaded", made.records[1].detail
    return made


def ask(made: Registry, parallel: ParallelConfig | None = None, **changes: Any) -> Resolution:
    settings = Settings(**{k: changes.pop(k) for k in ("runner", "dispatcher", "path") if k in changes})
    config = changes.pop("config", LAYER)
    return moe_core.resolve(
        config, parallel, changes.pop("hardware", "cpu"), registry=made, settings=settings, **changes
    )


def codes(found: Resolution, name: str) -> list[str]:
    return [r.code for v in found.verdicts if v.spec.name == name for r in v.reasons]


def two_formats() -> dict[str, Any]:
    offer = Offers(id_spaces=frozenset(IdSpace), dropped=frozenset(DroppedSlot), can=frozenset(Step))
    formats = {Phase.PREFILL: STANDARD, Phase.DECODE: GROUPED}
    return dispatcher_like("standard", "two", formats=formats, offers={STANDARD: offer, GROUPED: offer})


def with_layouts(standard: frozenset[str] | None, grouped: frozenset[str] | None) -> Registry:
    parts = runner_like("reference", "acme", layouts=frozenset({"a", "b"}))
    wanted = {STANDARD: standard, GROUPED: grouped}
    parts["adapters"] = tuple(replace(s, layouts=wanted.get(s.format)) for s in parts["adapters"])
    return registry(**parts, **two_formats())


@pytest.mark.parametrize(
    ("standard", "grouped", "layouts"),
    [(None, None, {"a", "b"}), ({"a"}, None, {"a"}), ({"a"}, {"a", "b"}, {"a"}), ({"a"}, {"b"}, None)],
)
def test_one_layout_serves_all_phases(standard: Any, grouped: Any, layouts: set[str] | None) -> None:
    made = with_layouts(*(None if s is None else frozenset(s) for s in (standard, grouped)))
    found = ask(made, runner="acme", dispatcher="two")
    if layouts is None:
        assert found.chosen is None
        (reason,) = [r for r in found.reasons if r.code == "contract.layout"]
        assert "standard: a; grouped: b" in reason.message
        assert ask(made, runner="acme", dispatcher="two", phases="decode").require().layouts == {"b"}
    else:
        assert found.require().layouts == layouts


def test_prepare_is_told_the_layouts_and_held_to_them() -> None:
    seen: list[frozenset[str]] = []

    def prepare(weights: Any, binding: Any) -> Any:
        from moe_core.runners import reference

        seen.append(binding.layouts)
        return replace(reference.prepare(weights, binding), layout="b")

    parts = runner_like("reference", "acme", layouts=frozenset({"a", "b"}), prepare=prepare)
    parts["adapters"] = tuple(replace(s, layouts=frozenset({"a"})) for s in parts["adapters"])
    given = moe_core.CanonicalWeights(w13=torch.zeros(4, 64, 32), w2=torch.zeros(4, 32, 32))
    with pytest.raises(moe_core.LayoutMismatch, match=r"in layout a here, .* in layout 'b'"):
        moe_core.plan(LAYER, given, registry=registry(**parts), settings=Settings(runner="acme"))
    assert seen == [{"a"}]


@pytest.mark.parametrize("size", [1, 2])
def test_a_dispatcher_takes_the_tokens_that_it_declares(size: int) -> None:
    made = registry(**dispatcher_like("standard", "a2a", support={"tokens": frozenset({"sharded"})}))
    refused = ["parallel.tokens"] if size > 1 else []
    for tokens, takes, not_for in (("replicated", "standard", "a2a"), ("sharded", "a2a", "standard")):
        found = ask(made, ParallelConfig(ep_size=size, tokens=tokens))
        assert codes(found, takes) == []
        assert codes(found, not_for) == refused


@pytest.mark.parametrize(
    "changes", [{"features": "compile"}, {"features": "deterministic"}, {"config": LAYER.replace(no_combine=True)}]
)
def test_a_dispatcher_declares_what_it_carries(changes: dict[str, Any]) -> None:
    made = registry(**dispatcher_like("standard", "bare", support={"features": frozenset()}))
    assert codes(ask(made, **changes), "bare") == ["feature"]
    assert codes(ask(made, **changes), "standard") == codes(ask(made, features="lora"), "bare") == []


def test_who_adjusts_a_priority_with_something_else_is_noted() -> None:
    made = registry(hooks={"moe_core_adjust_priority": lambda request, candidate: 5})
    found = ask(made)
    assert found.require().notes == ()
    assert "plugin 'acme' adjusted a priority with 5, which is no PriorityNote" in found.notes


def test_a_profile_of_another_machine_cannot_be_bound() -> None:
    given = moe_core.CanonicalWeights(w13=torch.zeros(4, 64, 32), w2=torch.zeros(4, 32, 32))
    far = fake_hardware("cpu", arch="abacus")
    with pytest.raises(BindError, match=r"(?s)this machine is .*leave hardware= out"):
        moe_core.plan(LAYER, given, hardware=far, registry=Registry(autoload=False), settings=Settings())


def test_targets_layouts_and_versions_are_part_of_the_fingerprint() -> None:
    def fingerprint(version: str = "1", target: str = "moe_core:x", layouts: Any = None) -> str:
        parts = runner_like("reference", "acme", layouts=frozenset({"a", "b"}), adapter={"pre": target})
        parts["adapters"] = tuple(replace(s, layouts=layouts) for s in parts["adapters"])
        made = registry(**parts)
        made.records[1].version = version
        return ask(made, runner="acme").fingerprint

    found = [fingerprint(), fingerprint("2"), fingerprint(target="moe_core:y"), fingerprint(layouts=frozenset("a"))]
    assert len(set(found)) == 4
    assert fingerprint() == found[0]


def test_whoever_owns_an_adapter_or_the_scheme_is_among_the_versions() -> None:
    parts = runner_like("reference", "acme")
    joins = fake_plugin("joins", adapters=parts.pop("adapters"))
    plugins = [fake_plugin("acme", runners=parts["runners"]), joins]
    made = Registry(plugins=plugins, autoload=False, settings=Settings())
    assert set(ask(made, runner="acme").versions) == {"acme", "core", "joins"}


def test_the_reference_quantizes_all_live_rows_as_one_tensor() -> None:
    config = LAYER.replace(scheme="fp8_tensor", top_k=1)
    generator = torch.Generator().manual_seed(0)
    w13, w2 = torch.randn(4, 64, 32, generator=generator), torch.randn(4, 32, 32, generator=generator)
    given = moe_core.CanonicalWeights.quantize(w13, w2, config)
    hidden = torch.randn(3, 32, generator=generator)
    hidden[1] *= 100  # of another expert, and in the same tensor
    decision = moe_core.TopKOutput(torch.tensor([[0], [1], [-1]], dtype=torch.int32), torch.ones(3, 1))
    seen: list[torch.Tensor] = []
    hooks = moe_core.RunnerHooks(after_gate_up=lambda rows, info: seen.append(rows.clone()))
    plan = moe_core.plan(
        config, given, registry=Registry(autoload=False), settings=Settings(runner="reference"), hooks="after_gate_up"
    )
    hidden[2] = 1e6  # dropped: no part of the scale
    plan(hidden, decision, state=RunningState(hooks=hooks))
    x = roundtrip_activation(hidden[:2], "fp8_tensor")
    assert plan.quant_info.weights.w13_scale is not None
    matrices = given.w13.float() * given.w13_scale.reshape(4, -1, 1)[:, :1]  # type: ignore[union-attr]
    expected = torch.stack([matrices[e] @ x[e] for e in range(2)])
    torch.testing.assert_close(seen[0], expected, rtol=1e-3, atol=1e-2)


def test_the_reference_does_not_leave_out_router_weights_that_are_missing() -> None:
    parts = dispatcher_like("standard", "grouped", **_grouped())
    given = moe_core.CanonicalWeights(w13=torch.zeros(4, 64, 32), w2=torch.zeros(4, 32, 32))
    settings = Settings(runner="reference", dispatcher="grouped")
    plan = moe_core.plan(LAYER, given, registry=registry(**parts), settings=settings)
    assert plan.step_owner(Step.ROUTER_WEIGHT) is moe_core.Owner.RUNNER
    rows = GroupedDispatchOutput(torch.zeros(4, 32), torch.arange(5, dtype=torch.int32))
    with pytest.raises(ContractViolation, match="multiplies by the router's weight, but the grouped rows carry none"):
        plan.run(rows)


def _grouped() -> dict[str, Any]:
    offer = replace(STANDARD_DISPATCHER.offers[STANDARD], extras=frozenset())
    return {"formats": dict.fromkeys(Phase, GROUPED), "offers": {GROUPED: offer}}
