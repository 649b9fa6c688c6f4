"""The hot path, counted and not timed: Python frames of a forward, and where they come from."""

from __future__ import annotations

import sys
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

import moe_core
from moe_core import CanonicalWeights, MoeConfig, MoeLayer, MoePlan, ParallelConfig, Registry, Settings, TopKOutput
from moe_core.formats import StandardCombineInput
from moe_core.testing.fakes import fake_plugin, runner_like
from moe_core.vocabulary import DroppedSlot

LIMIT = 12
CORE = Path(moe_core.__file__).parent
#: What a forward never enters: planning, and everything that costs or waits.
PLANNING = {"registry.py", "plugins.py", "selection.py", "resolution.py", "settings.py", "explanation.py", "_lazy.py"}
STRANGERS = ("pluggy", "logging", "os.py", "posixpath", "importlib", "inspect", "re", "warnings", "contextlib.py")
LAYER = MoeConfig(
    num_experts=8, top_k=2, hidden_size=32, intermediate_size=32, dtype="float32", routed_scaling_factor=2.0
)


def weights() -> CanonicalWeights:
    generator = torch.Generator().manual_seed(0)
    return CanonicalWeights(
        w13=torch.randn(8, 64, 32, generator=generator), w2=torch.randn(8, 32, 32, generator=generator)
    )


def call(count: int = 4) -> tuple[Tensor, TopKOutput]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 8, (count, 2), dtype=torch.int32, generator=generator)
    return torch.randn(count, 32, generator=generator), TopKOutput(ids, torch.rand(count, 2, generator=generator))


class Trivial:
    """A runner that costs no frame but its own."""

    def __init__(self, binding: Any) -> None:
        pass

    def run(self, runner_input: Any, quant_info: Any, state: Any) -> Any:
        return runner_input


def pre(binding: Any) -> Any:
    return lambda dispatched, quant_info, config, state: dispatched.hidden_states


def post(binding: Any) -> Any:
    return lambda out, quant_info, config, state: StandardCombineInput(out)


def trivial(**changes: Any) -> MoePlan:
    like = runner_like("reference", "trivial", factory=Trivial, priority=999, adapter={"pre": pre, "post": post})
    registry = Registry(plugins=[fake_plugin("acme", **like)], autoload=False, settings=Settings())
    ranks = changes.pop("parallel", ParallelConfig())
    settings = Settings(runner="trivial", path="split")
    return moe_core.plan(LAYER, weights().shard(LAYER, ranks), ranks, registry=registry, settings=settings, **changes)


def core_plan(path: str) -> MoePlan:
    registry = Registry(autoload=False, settings=Settings())
    return moe_core.plan(LAYER, weights(), registry=registry, settings=Settings(runner="cpu", path=path))


def frames(function: Any, *arguments: Any) -> list[CodeType]:
    """The code of every Python frame that a second call enters."""
    function(*arguments)
    entered: list[CodeType] = []

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            entered.append(frame.f_code)

    before = sys.getprofile()
    sys.setprofile(enter)
    try:
        function(*arguments)
    finally:
        sys.setprofile(before)
    return entered


def names(entered: list[CodeType]) -> list[str]:
    return [f"{Path(code.co_filename).name}:{code.co_name}" for code in entered]


def refuse_strangers(entered: list[CodeType]) -> None:
    for code in entered:
        path = Path(code.co_filename)
        assert not (CORE in path.parents and path.name in PLANNING), names(entered)
        assert not any(part in STRANGERS for part in path.parts), names(entered)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"incoming": DroppedSlot.SINK},
        {"parallel": ParallelConfig(ep_size=2, placement="round_robin", reduce="caller")},
    ],
    ids=["plain", "sink", "ranks"],
)
def test_the_framework_enters_at_most_twelve_frames_on_the_split_path(changes: dict[str, Any]) -> None:
    entered = frames(trivial(**changes), *call())
    assert len(entered) <= LIMIT, names(entered)
    assert {"moe_plan.py:__call__", "standard.py:dispatch", "standard.py:combine"} <= set(names(entered))
    refuse_strangers(entered)


@pytest.mark.parametrize("path", ["fused", "split"])
def test_the_cpu_runner_adds_a_shell_of_few_frames_around_its_kernel(path: str) -> None:
    from moe_core.runners.cpu import kernel, op

    plan = core_plan(path)
    entered = frames(plan, *call())
    refuse_strangers(entered)
    inside = [i for i, code in enumerate(entered) if code.co_filename in (kernel.__file__, op.__file__)]
    first, last = inside[0], inside[-1]
    shell = entered[:first] + entered[last + 1 :]
    assert len(shell) <= LIMIT, names(shell)
    assert not any("torch" in Path(code.co_filename).parts for code in shell), names(shell)


def test_the_number_of_frames_does_not_depend_on_the_number_of_tokens() -> None:
    plan = trivial()
    assert len(frames(plan, *call(1))) == len(frames(plan, *call(64)))


def test_nothing_is_made_on_the_first_forward_that_the_second_would_find() -> None:
    plan = trivial()
    first: list[CodeType] = []

    def enter(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            first.append(frame.f_code)

    arguments = call()
    sys.setprofile(enter)
    try:
        plan(*arguments)
    finally:
        sys.setprofile(None)
    assert names(first) == names(frames(plan, *arguments))


def test_a_counter_that_counts_nothing_would_be_noticed() -> None:
    assert len(frames(lambda: sorted([2, 1], key=lambda x: x))) == 3


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("path", ["fused", "split"])
def test_a_plan_is_traced_without_a_graph_break(path: str) -> None:
    plan, (hidden, decision) = core_plan(path), call()
    torch.compiler.reset()
    compiled = torch.compile(lambda x, i, w: plan(x, TopKOutput(i, w)), fullgraph=True, backend="aot_eager")
    found = compiled(hidden, decision.topk_ids, decision.topk_weights)
    torch.testing.assert_close(found, plan(hidden, decision))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_layer_is_traced_without_a_graph_break() -> None:
    torch.compiler.reset()
    router = torch.randn(8, 32, generator=torch.Generator().manual_seed(2))
    registry = Registry(autoload=False, settings=Settings())
    layer = MoeLayer(LAYER, router, weights(), registry=registry, settings=Settings(runner="cpu"))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    hidden = call()[0].reshape(2, 2, 32)
    torch.testing.assert_close(compiled(hidden), layer(hidden))
