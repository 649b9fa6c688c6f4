"""How candidates are ordered, with runners and dispatchers made up for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from moe_core._builtin import STANDARD_DISPATCHER
from moe_core.api import make_request, resolve
from moe_core.capability import Support
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.hardware import profile
from moe_core.measurements import Measurements
from moe_core.registry import Registry
from moe_core.resolution import PriorityNote, Resolution
from moe_core.selection import resolve as select
from moe_core.settings import Settings
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedPathSpec, FusedSpec, Offers, RunnerSpec, Wants
from moe_core.testing.fakes import fake_plugin
from moe_core.vocabulary import BATCHED, STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

LAYER = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=64)
#: A device that none of the core's specs is made for, apart from those for any device.
GPU = replace(profile("h200"), device_type="acme", arch="acme_1")
CAN_ALL = Support(
    devices={"acme": ("*",)},
    schemes=frozenset({"bf16"}),
    dtypes=frozenset({"bfloat16"}),
    activations=frozenset({"silu"}),
    gated=frozenset({True}),
    features=frozenset({"lora", "no_combine"}),
    hooks=frozenset({"after_down"}),
)


def runner(name: str, priority: int = 100, **changes: Any) -> RunnerSpec:
    return RunnerSpec(
        **{
            "name": name,
            "summary": "",
            "factory": "moe_core:x",
            "prepare": "moe_core:x",
            "support": CAN_ALL,
            "layouts": frozenset({"rows"}),
            "priority": priority,
            **changes,
        }
    )


def split(name: str, format: str = STANDARD, **wants: Any) -> AdapterSpec:
    return AdapterSpec(runner=name, format=format, pre="moe_core:x", post="moe_core:x", wants=Wants(**wants))


def fused(name: str, format: str = STANDARD, gives_up: tuple[str, ...] = (), **wants: Any) -> FusedSpec:
    gives = frozenset(gives_up)
    return FusedSpec(runner=name, format=format, target="moe_core:x", wants=Wants(**wants), gives_up=gives)


def two_formats(name: str, priority: int) -> DispatcherSpec:
    """Token-major in prefill, expert-major in decode, as DeepEP does."""
    offer = Offers(id_spaces=frozenset(IdSpace), dropped=frozenset(DroppedSlot), can=frozenset(Step))
    return replace(
        STANDARD_DISPATCHER,
        name=name,
        priority=priority,
        formats={Phase.PREFILL: STANDARD, Phase.DECODE: BATCHED},
        offers={STANDARD: offer, BATCHED: offer},
    )


def registry(*specs: Any, hooks: dict[str, Any] | None = None) -> Registry:
    def of(*kinds: type) -> tuple[Any, ...]:
        return tuple(s for s in specs if isinstance(s, kinds))

    plugin = fake_plugin(
        "acme",
        runners=of(RunnerSpec),
        dispatchers=of(DispatcherSpec),
        adapters=of(AdapterSpec),
        fused=of(FusedSpec, FusedPathSpec),
        hooks=hooks,
    )
    made = Registry(plugins=[plugin], autoload=False, settings=Settings())
    assert made.records[1].state.value == "loaded", made.records[1].detail
    return made


def ask(made: Registry, measurements: Measurements | None = None, **changes: Any) -> Resolution:
    config, parallel = changes.pop("config", LAYER), changes.pop("parallel", None)
    request = make_request(config, parallel, GPU, registry=made, **{"settings": Settings(), **changes})
    return select(request, made, measurements)


def ids(made: Registry, measurements: Measurements | None = None, **changes: Any) -> list[str]:
    found = [c.id for c in ask(made, measurements, **changes).candidates]
    assert found.pop() == "standard+reference/split"  # the core's own is always there, and always last
    return found


def test_the_higher_priority_comes_first_and_names_break_ties() -> None:
    made = registry(
        *(runner(n, p) for n, p in (("low", 1), ("b", 50), ("high", 90), ("a", 50))),
        *(split(n) for n in ("low", "b", "high", "a")),
    )
    assert ids(made) == [f"standard+{n}/split" for n in ("high", "a", "b", "low")]


def test_a_fused_func_comes_before_the_split_path_of_equal_priority() -> None:
    made = registry(runner("a"), split("a"), fused("a"), runner("b", 101), split("b"))
    assert ids(made) == ["standard+b/split", "standard+a/fused", "standard+a/split"]


def test_a_slow_runner_stays_last_however_high_its_priority() -> None:
    made = registry(runner("slow", 9999, last_resort=True), split("slow"), runner("quick", -50), split("quick"))
    assert [c.id for c in ask(made).candidates] == [
        "standard+quick/split",
        "standard+slow/split",
        "standard+reference/split",
    ]


@pytest.mark.parametrize("settings", [Settings(allow_last_resort=False), Settings(min_maturity=Maturity.COMPILED)])
def test_the_settings_exclude_the_slow_and_the_unverified(settings: Settings) -> None:
    made = registry(
        runner("slow", last_resort=True, maturity={"*": Maturity.EXECUTED}),
        split("slow"),
        runner("unverified", 900),
        split("unverified"),
        runner("good", maturity={"acme_1": Maturity.COMPILED}),
        split("good"),
        replace(STANDARD_DISPATCHER, name="any", maturity={"*": Maturity.EXECUTED}),
    )
    found = ask(made, settings=settings)
    codes = {v.spec.name: [r.code for r in v.reasons] for v in found.verdicts}
    if settings.allow_last_resort:
        assert codes["unverified"] == codes["standard"] == codes["reference"] == ["maturity"]
        assert [c.id for c in found.candidates] == ["any+good/split", "any+slow/split"]
    else:
        assert codes["slow"] == codes["reference"] == ["last_resort"]
        assert codes["unverified"] == []


def test_a_candidate_is_as_mature_as_its_weaker_half() -> None:
    made = registry(runner("a", maturity={"acme_1": Maturity.EXECUTED}), split("a"))
    found = ask(made)
    assert found.require().maturity is Maturity.UNTESTED
    assert found.notes == ("dispatcher 'standard' is untested on acme_1: it has not been seen running there",)


def test_a_slow_choice_is_noted() -> None:
    assert any("'reference' is correct but slow; nothing faster" in note for note in ask(registry()).notes)


@pytest.mark.parametrize(
    "needs", [{"features": ("lora",)}, {"hooks": ("after_down",)}, {"config": LAYER.replace(no_combine=True)}]
)
def test_a_fused_func_is_passed_over_for_what_it_gives_up(needs: dict[str, Any]) -> None:
    made = registry(runner("a"), split("a"), fused("a", gives_up=("lora", "after_down", "no_combine")))
    assert ids(made) == ["standard+a/fused", "standard+a/split"]
    assert ids(made, **needs) == ["standard+a/split"]
    (refused,) = [r for r in ask(made, **needs).rejected if r.id == "standard+a/fused[standard]"]
    assert [r.code for r in refused.reasons] == ["feature"]


def test_the_first_alternative_for_which_terms_are_agreed_counts() -> None:
    wants = (Wants(extras=frozenset({"nobody_has_this"})), Wants(id_spaces=(IdSpace.GLOBAL,)), Wants())
    made = registry(runner("a"), replace(split("a"), wants=wants))
    (_, choice), _ = ask(made).require().paths
    assert choice.terms.id_space is IdSpace.GLOBAL
    hopeless = registry(runner("a"), replace(split("a"), wants=(wants[0], Wants(payloads=("nvfp4",)))))
    (refused,) = ask(hopeless).rejected
    assert [r.code for r in refused.reasons] == ["contract.extras", "contract.payload"]


@pytest.mark.parametrize(
    ("incoming", "ep", "expected"),
    [
        (DroppedSlot.NEVER, 1, DroppedSlot.NEVER),
        (DroppedSlot.NEVER, 2, DroppedSlot.NEGATIVE),  # experts of the other rank are dropped slots here
        (DroppedSlot.NEGATIVE, 1, DroppedSlot.NEGATIVE),
    ],
)
def test_a_runner_is_spared_dropped_slots_only_where_there_are_none(
    incoming: DroppedSlot, ep: int, expected: DroppedSlot
) -> None:
    made = registry(runner("a"), split("a", dropped=(DroppedSlot.NEVER, DroppedSlot.NEGATIVE)))
    found = ask(made, incoming=incoming, parallel=ParallelConfig(ep_size=ep)).require()
    assert {choice.terms.dropped for _, choice in found.paths} == {expected}


def test_a_payload_of_another_scheme_is_not_agreed_on() -> None:
    offers = {STANDARD: replace(STANDARD_DISPATCHER.offers[STANDARD], payloads=frozenset({"bf16", "fp8_group128"}))}
    sends = replace(STANDARD_DISPATCHER, name="sends", priority=500, offers=offers)
    schemes = frozenset({"bf16", "fp8_block128"})
    made = registry(
        sends,
        runner("a", support=replace(CAN_ALL, schemes=schemes)),
        split("a", payloads=("fp8_group128", "bf16")),
    )

    def payload(scheme: str) -> str:
        config = LAYER.replace(scheme=scheme, hidden_size=128, intermediate_size=128)
        return ask(made, config=config).require().paths[0][1].terms.payload

    assert (payload("bf16"), payload("fp8_block128")) == ("bf16", "fp8_group128")


def test_phases_with_formats_of_their_own_may_mix_kinds() -> None:
    made = registry(
        two_formats("two", 200), runner("a"), split("a"), fused("a"), split("a", BATCHED), runner("b"), split("b")
    )
    found = ask(made)
    assert [c.id for c in found.candidates][:4] == [
        "two+a/mixed",
        "two+a/split",
        "standard+a/fused",
        "standard+a/split",
    ]
    assert [(p, c.format, c.kind) for p, c in found.require().paths] == [
        (Phase.PREFILL, STANDARD, "fused"),
        (Phase.DECODE, BATCHED, "split"),
    ]
    assert found.require().formats == (STANDARD, BATCHED)
    (refused,) = [r for r in found.rejected if r.id.startswith("two+b")]
    assert [r.code for r in refused.reasons] == ["path.missing"]
    assert "'batched' with the runner 'b'" in refused.reasons[0].message
    assert ask(made, phases=(Phase.PREFILL,)).require().id == "two+a/fused"
    assert ask(made, phases=(Phase.DECODE,)).require().id == "two+a/split"


def test_a_dispatcher_that_serves_one_phase_is_not_joined_for_both() -> None:
    only = replace(STANDARD_DISPATCHER, name="only", priority=900, formats={Phase.DECODE: STANDARD})
    made = registry(only, runner("a"), split("a"))
    assert ids(made) == ["standard+a/split"]
    assert ask(made, phases=(Phase.DECODE,)).require().id == "only+a/split"
    assert {r.code for r in ask(made).reasons if r.subject == "path:only+a"} == {"phase"}


def whole(name: str = "mega", **changes: Any) -> FusedPathSpec:
    given = {"summary": "", "runner": "a", "target": "moe_core:x", "support": CAN_ALL, **changes}
    return FusedPathSpec(name=name, **given)


def test_a_whole_path_replaces_dispatcher_and_runner() -> None:
    made = registry(runner("a"), split("a"), fused("a"), whole())
    found = ask(made)
    assert [c.id for c in found.candidates][:3] == ["mega+a/whole", "standard+a/fused", "standard+a/split"]
    assert found.require().paths == ()
    assert ask(made, settings=Settings(path="fused")).require().id == "standard+a/fused"
    assert ask(made, settings=Settings(path="whole")).candidates == found.candidates[:1]
    assert ask(made, settings=Settings(dispatcher="mega")).candidates == found.candidates[:1]
    assert ask(made, settings=Settings(dispatcher="standard")).require().id == "standard+a/fused"


@pytest.mark.parametrize(
    ("spec", "changes", "code"),
    [
        (whole(gives_up=frozenset({"lora"})), {"features": ("lora",)}, "feature"),
        (whole(), {"caller_does": (Step.TOPK_SUM,)}, "step.twice"),
        (whole(), {"parallel": ParallelConfig(ep_size=2, reduce="caller")}, "step.twice"),
        (whole(support=replace(CAN_ALL, max_top_k=1)), {}, "shape.top_k"),
    ],
)
def test_a_whole_path_is_refused_like_anything_else(spec: FusedPathSpec, changes: dict[str, Any], code: str) -> None:
    found = ask(registry(runner("a"), split("a"), spec), **changes)
    assert found.require().id == "standard+a/split"
    assert code in {r.code for r in found.reasons if r.subject == "fused_path:mega"}


def test_a_whole_path_needs_its_runners_weights() -> None:
    found = ask(registry(runner("a", support=replace(CAN_ALL, max_top_k=1)), whole()))
    assert found.require().id == "standard+reference/split"


def test_the_priority_hook_moves_a_candidate_and_tells_why() -> None:
    def adjust(request: Any, candidate: Any) -> PriorityNote | None:
        return PriorityNote(60, "small batches") if candidate.runner == "b" and request.max_tokens == 1 else None

    specs = (runner("a", 100), split("a"), runner("b", 50), split("b"))
    made = registry(*specs, hooks={"moe_core_adjust_priority": adjust})
    assert ids(made) == ["standard+a/split", "standard+b/split"]
    found = ask(made, max_tokens=1)
    assert [c.runner for c in found.candidates] == ["b", "a", "reference"]
    assert found.require().priority == 50 + 60 + STANDARD_DISPATCHER.priority
    assert found.require().notes == (PriorityNote(60, "small batches"),)


MEASURED = tuple(spec for i, n in enumerate("abcd") for spec in (runner(n, 100 - i), split(n)))


def measured(made: Registry, **times: dict[int, float]) -> Measurements:
    result, request = Measurements(), ask(made).request
    for name, ms in times.items():
        result = result.with_result(request, f"standard+{name}/split", ms)
    return result


def order(made: Registry, measurements: Measurements | None) -> str:
    return "".join(c.runner for c in ask(made, measurements).candidates if c.runner != "reference")


def test_measured_candidates_share_out_their_places_by_time() -> None:
    made = registry(*MEASURED)
    assert order(made, None) == "abcd"
    assert order(made, measured(made, a={1: 9.0}, b={1: 5.0}, c={1: 1.0}, d={1: 7.0})) == "cbda"
    # What was not measured keeps its place: b is second whatever the others took.
    assert order(made, measured(made, a={1: 9.0}, c={1: 1.0})) == "cbad"
    assert order(made, measured(made, d={1: 0.001})) == "abcd"


def test_times_are_compared_over_the_sizes_that_all_have() -> None:
    made = registry(*MEASURED)
    assert order(made, measured(made, a={1: 1.0, 64: 100.0}, b={1: 2.0})) == "abcd"
    assert order(made, measured(made, a={1: 1.0, 64: 100.0}, b={1: 2.0, 64: 10.0})) == "bacd"


def test_a_measurement_of_another_problem_says_nothing() -> None:
    made = registry(*MEASURED)
    times = measured(made, a={1: 9.0}, b={1: 1.0})
    assert order(made, times) == "bacd"
    other = ask(made, times, config=LAYER.replace(hidden_size=128))
    assert [c.runner for c in other.candidates][:2] == ["a", "b"]
    assert other.require().measured_ms is None


def test_measurements_come_from_the_file_in_the_settings(tmp_path: Any) -> None:
    made = registry(*MEASURED)
    path = tmp_path / "times.json"
    measured(made, a={1: 9.0}, b={1: 1.0}).write(path)
    found = resolve(LAYER, None, GPU, registry=made, settings=Settings(measurements=str(path)))
    assert found.require().runner == "b"
    assert found.require().measured_ms == pytest.approx(1.0)
