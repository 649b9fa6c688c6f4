"""A forced choice is honored or refused with its reasons; and when nothing can run, the message lists everything."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from moe_core.api import make_request, resolve
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import ConfigError, NoUsableBackend, SelectionError, UnsupportedOverride
from moe_core.registry import Registry
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.testing.fakes import fake_plugin, runner_like

LAYER = MoeConfig(num_experts=8, top_k=2, hidden_size=64, intermediate_size=64)


@pytest.fixture(scope="module")
def ask() -> Callable[..., Resolution]:
    registry = Registry(autoload=False, settings=Settings())

    def ask_registry(config: MoeConfig = LAYER, hardware: str = "cpu", **settings: Any) -> Resolution:
        return resolve(config, None, hardware, registry=registry, settings=Settings(**settings))

    return ask_registry


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "standard+cpu/fused"),
        ({"runner": "cpu"}, "standard+cpu/fused"),
        ({"runner": "reference"}, "standard+reference/split"),
        ({"path": "split"}, "standard+cpu/split"),
        ({"dispatcher": "standard", "runner": "reference", "path": "split"}, "standard+reference/split"),
        ({"runner": "reference", "allow_last_resort": False}, "standard+reference/split"),  # it was named
    ],
)
def test_a_forced_choice_that_can_run_is_made(
    settings: dict[str, Any], expected: str, ask: Callable[..., Resolution]
) -> None:
    assert ask(**settings).require().id == expected


def test_a_forced_runner_is_the_only_candidate(ask: Callable[..., Resolution]) -> None:
    found = ask(runner="reference")
    assert {c.runner for c in found.candidates} == {"reference"}
    (verdict,) = [v for v in found.verdicts if v.spec.subject == "runner:cpu"]
    assert [r.code for r in verdict.reasons] == ["override.excluded"]


@pytest.mark.parametrize(
    ("config", "hardware", "settings", "codes", "words"),
    [
        (
            LAYER.replace(scheme="nvfp4"),
            "cpu",
            {"runner": "cpu"},
            {"quant.scheme"},
            ["runner 'cpu'", "does not run nvfp4"],
        ),
        (LAYER, "h200", {"runner": "cpu"}, {"device.type"}, ["runner 'cpu'", "made for cpu, this is cuda"]),
        (LAYER, "cpu", {"path": "whole"}, {"path.excluded"}, ["path 'whole'", "the path 'whole' was asked for"]),
        (
            LAYER,
            "cpu",
            {"runner": "reference", "path": "fused"},
            {"path.excluded"},
            ["runner 'reference' and path 'fused'", "standard+reference/split[standard]"],
        ),
    ],
)
def test_a_forced_choice_that_cannot_run_raises_its_reasons(
    config: MoeConfig,
    hardware: str,
    settings: dict[str, Any],
    codes: set[str],
    words: list[str],
    ask: Callable[..., Resolution],
) -> None:
    found = ask(config, hardware, **settings)
    assert found.chosen is None
    with pytest.raises(UnsupportedOverride) as caught:
        found.require()
    text = str(caught.value)
    assert text.startswith(f"{words[0]} was asked for by name and cannot serve this request\n")
    assert all(word in text for word in words), text
    assert "drop the override" in text
    assert caught.value.resolution is found
    assert codes <= {reason.code for reason in caught.value.reasons}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"runner": "refrence"}, r"(?s)no runner is called 'refrence'.*did you mean 'reference'\?"),
        ({"runner": "acme"}, r"(?s)no runner is called 'acme'.*known: cpu, reference"),
        ({"dispatcher": "standart"}, r"(?s)no dispatcher is called 'standart'.*did you mean 'standard'\?"),
    ],
)
def test_a_name_that_nothing_has_is_an_error_at_once(
    settings: dict[str, Any], message: str, ask: Callable[..., Resolution]
) -> None:
    with pytest.raises(ConfigError, match=message):
        ask(**settings)


def test_when_nothing_can_run_the_message_lists_every_component_with_every_reason(
    ask: Callable[..., Resolution],
) -> None:
    config = LAYER.replace(scheme="fp7", dtype="float64")
    found = ask(config, "h200")
    with pytest.raises(NoUsableBackend) as caught:
        found.require()
    text = str(caught.value)
    assert text.startswith("no installed backend can serve this request\n")
    assert "8 experts, top-2, hidden 64, intermediate 64, float64, fp7, silu" in text
    assert "NVIDIA H200 sm_90 141 GiB (profile, not this machine)" in text
    assert "yes dispatcher:standard" in text
    for subject, codes in {
        "runner:cpu": ["device.type", "quant.scheme", "dtype", "quant.unknown"],
        "runner:reference": ["quant.scheme", "quant.unknown"],
    }.items():
        (verdict,) = [v for v in found.verdicts if v.spec.subject == subject]
        assert [r.code for r in verdict.reasons] == codes
        assert all(r.message in text for r in verdict.reasons)
    assert "moe-core explain" in text


def test_pairs_that_cannot_agree_are_listed_too() -> None:
    deaf = runner_like("cpu", "deaf", adapter={"wants": {"payloads": ("nvfp4",)}})
    plugin = fake_plugin("acme", runners=deaf["runners"], adapters=deaf["adapters"])
    found = resolve(
        LAYER, None, "cpu", registry=Registry(plugins=[plugin], autoload=False), settings=Settings(runner="deaf")
    )
    with pytest.raises(UnsupportedOverride, match=r"(?s)no  standard\+deaf/split\[standard\].*\[contract.payload\]"):
        found.require()


def test_a_component_whose_code_is_not_installed_only_announces_itself() -> None:
    soon = runner_like("cpu", "soon", factory="moe_core_nowhere.runner:Runner")
    registry = Registry(plugins=[fake_plugin("acme", **soon)], autoload=False)
    found = resolve(LAYER, None, "cpu", registry=registry, settings=Settings())
    (reason,) = next(v for v in found.verdicts if v.spec.name == "soon").reasons
    assert reason.code == "target.missing"
    assert "'acme' declares it without its code (moe_core_nowhere.runner:Runner)" in reason.message
    taken = resolve(LAYER, None, "cpu", registry=registry, settings=Settings(), assume=("targets",))
    assert {c.runner for c in taken.candidates} == {"cpu", "reference", "soon"}


def test_a_rule_of_a_plugin_that_raises_speaks_against_that_plugin_only() -> None:
    def rule(request: Any, subject: str) -> list[Any]:
        raise RuntimeError("no license")

    plugin = fake_plugin("acme", **runner_like("cpu", "acme", why_not=rule, priority=999))
    found = resolve(LAYER, None, "cpu", registry=Registry(plugins=[plugin], autoload=False), settings=Settings())
    assert found.require().runner == "cpu"
    (reason,) = next(v for v in found.verdicts if v.spec.name == "acme").reasons
    assert (reason.code, "RuntimeError: no license" in reason.message) == ("probe.failed", True)


def test_the_errors_survive_a_trip_between_processes(ask: Callable[..., Resolution]) -> None:
    with pytest.raises(SelectionError) as caught:
        ask(LAYER, "h200", runner="cpu").require()
    back = pickle.loads(pickle.dumps(caught.value))
    assert type(back) is UnsupportedOverride
    assert (str(back), back.reasons, back.hint) == (str(caught.value), caught.value.reasons, caught.value.hint)
    assert back.resolution.fingerprint == copy.copy(caught.value).resolution.fingerprint


def test_a_typo_among_the_arguments_is_met_with_help() -> None:
    with pytest.raises(ConfigError, match=r"(?s)unknown setting 'runer'.*did you mean 'runner'"):
        make_request(LAYER, None, "cpu", runer="cpu")
    with pytest.raises(ConfigError, match=r"give settings= or single settings \(runner\), not both"):
        make_request(LAYER, None, "cpu", settings=Settings(), runner="cpu")
    with pytest.raises(ConfigError, match="ep_size 9 is larger than the number of experts 8"):
        make_request(LAYER, ParallelConfig(ep_size=9), "cpu")
