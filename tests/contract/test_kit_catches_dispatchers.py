"""The kit catches dispatchers that break the contract, and plugins that are heavy to discover."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from moe_core.dispatchers.standard import StandardDispatcher
from moe_core.formats import StandardCombineInput
from moe_core.registry import Registry
from moe_core.testing import dispatcher_like, fake_plugin, run_checks
from moe_core.testing.dispatchers import TESTING_BATCHED
from moe_core.testing.dispatching import BatchedDispatcher


def failed(check: str, base: Any = "standard", **changes: Any) -> str:
    """Why `check` fails for a dispatcher that is `base` but for `changes`."""
    plugin = fake_plugin("acme", **dispatcher_like(base, "acme", **changes))
    results = run_checks("acme", registry=Registry(plugins=[plugin], autoload=False), select=check)
    bad = [result for result in results if result.outcome == "failed"]
    assert bad, results
    return bad[0].detail


class Forgetful(StandardDispatcher):
    """Keeps the handle to itself instead of sending it along."""

    def dispatch(self, *arguments: Any) -> Any:
        made = super().dispatch(*arguments)
        self.handle = made.handle
        return replace(made, handle=None)

    def combine(self, combine_input: Any, state: Any) -> Any:
        return super().combine(StandardCombineInput(combine_input.hidden_states, self.handle), state)


def test_handle_kept_on_the_dispatcher() -> None:
    assert "handle" in failed("dispatcher.keeps_nothing[standard]", factory=Forgetful)
    assert "in flight" in failed("dispatcher.calls_in_flight[standard]", factory=Forgetful)


class Shifted(StandardDispatcher):
    """Sends every token to the expert after its own."""

    def dispatch(self, *arguments: Any) -> Any:
        made = super().dispatch(*arguments)
        assert made.topk_ids is not None
        return replace(made, topk_ids=torch.where(made.topk_ids >= 0, (made.topk_ids + 1) % 8, made.topk_ids))


def test_wrong_expert() -> None:
    assert "is off by" in failed("dispatcher.round_trip[standard]", factory=Shifted)


class Untranslated(StandardDispatcher):
    """Hands out -1 whatever was agreed."""

    def dispatch(self, *arguments: Any) -> Any:
        made = super().dispatch(*arguments)
        assert made.topk_ids is not None
        return replace(made, topk_ids=torch.where(made.topk_ids >= 8, -1, made.topk_ids))


def test_dropped_slots_in_another_encoding_than_agreed() -> None:
    assert "dropped slots are 8" in failed("dispatcher.round_trip[standard]", factory=Untranslated)


class NoSink(StandardDispatcher):
    """Its mask has no entry for the sink."""

    def __init__(self, binding: Any) -> None:
        super().__init__(binding)
        if self.expert_mask is not None:
            self.expert_mask = self.expert_mask[: binding.config.num_experts]


def test_mask_without_its_sink_entry() -> None:
    assert "expert_mask is" in failed("dispatcher.expert_map_and_mask[standard]", factory=NoSink)


class Twice(StandardDispatcher):
    """Applies the router weight whoever owns it."""

    def __init__(self, binding: Any) -> None:
        super().__init__(binding)
        self._scale = binding.config.routed_scaling_factor
        self._touches = True


def test_step_that_belongs_to_the_runner() -> None:
    assert "is off by" in failed("dispatcher.steps[standard]", factory=Twice)


class ReadsNaN(BatchedDispatcher):
    """Multiplies by the weight of a dropped slot."""

    def _gather(self, rows: Any, handle: Any) -> Any:
        handle.live = torch.ones_like(handle.live)
        return super()._gather(rows, handle)


def test_weight_of_a_dropped_slot_read() -> None:
    failed("dispatcher.steps[batched]", TESTING_BATCHED, factory=ReadsNaN)


class NoBuffer(BatchedDispatcher):
    """Returns a tensor of its own."""

    def _gather(self, rows: Any, handle: Any) -> Any:
        handle.output = None
        return super()._gather(rows, handle)


def test_output_buffer_ignored() -> None:
    assert "another tensor" in failed("dispatcher.output_buffer[batched]", TESTING_BATCHED, factory=NoBuffer)


def test_format_that_nobody_registered() -> None:
    offers = next(iter(TESTING_BATCHED.offers.values()))
    changes = {"formats": dict.fromkeys(TESTING_BATCHED.formats, "spiral"), "offers": {"spiral": offers}}
    assert "spiral" in failed("hygiene.support", TESTING_BATCHED, **changes)


_PLUGIN = """
import {heavy}
from moe_core import hookimpl
from moe_core.specs import PluginInfo

class Heavy:
    @hookimpl
    def moe_core_plugin_info(self):
        return PluginInfo(name="Heavy", summary="imports too much")

    @hookimpl
    def moe_core_runners(self):
        {later}
        return ()

plugin = Heavy()
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Writes a plugin module and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names: list[str] = []

    def make(name: str, heavy: str, later: str) -> Registry:
        names.append(name)
        (tmp_path / f"{name}.py").write_text(_PLUGIN.format(heavy=heavy, later=later))
        importlib.invalidate_caches()
        return Registry(plugins=[importlib.import_module(name).plugin], autoload=False)

    yield make
    for name in names:
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("heavy", "later", "check"),
    [("torch", "pass", "hygiene.light_import"), ("json", "import torch", "hygiene.light_explain")],
)
def test_torch_at_discovery(write: Any, heavy: str, later: str, check: str) -> None:
    registry = write(f"plugin_of_{heavy}", heavy, later)
    results = {r.id: r for r in run_checks("Heavy", registry=registry, select="hygiene")}
    assert results[check].outcome == "failed"
    assert "torch" in results[check].detail


def test_light_plugin_passes(write: Any) -> None:
    registry = write("plugin_of_nothing", "json", "pass")
    outcomes = {r.id: r.outcome for r in run_checks("Heavy", registry=registry, select="hygiene")}
    assert outcomes["hygiene.light_import"] == outcomes["hygiene.light_explain"] == "passed"


FORGETS = """
from dataclasses import replace
from moe_core import hookimpl
from moe_core._builtin import ALLGATHER_DISPATCHER
from moe_core.dispatchers.torch_distributed.allgather import AllGatherDispatcher
from moe_core.specs import PluginInfo


class Deaf(AllGatherDispatcher):
    "Gives back what this rank's experts say, and hears no other."

    def combine(self, combine_input, state):
        own = combine_input.handle
        rows = combine_input.hidden_states.unflatten(0, (-1, max(own.rows, 1)))
        return rows[self._groups.members[0]][: own.tokens].clone()


class Plugin:
    @hookimpl
    def moe_core_plugin_info(self):
        return PluginInfo(name="deaf", summary="hears nobody")

    @hookimpl
    def moe_core_dispatchers(self):
        return (replace(ALLGATHER_DISPATCHER, name="deaf", factory="kit_deaf:Deaf", split_phases=False),)


plugin = Plugin()
"""


def test_a_dispatcher_that_hears_no_other_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In processes of its own, which import the plugin from where it is."""
    (tmp_path / "kit_deaf.py").write_text(FORGETS)
    monkeypatch.syspath_prepend(tmp_path)
    plugin = importlib.import_module("kit_deaf").plugin
    (result,) = run_checks(
        "deaf", registry=Registry(plugins=[plugin], autoload=False), select="dispatcher.ranks[prefill]"
    )
    assert result.outcome == "failed"
    assert "of the largest value off" in result.detail
