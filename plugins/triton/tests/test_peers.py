"""`symm_mem` without a GPU: all ranks in this process, their memory on the CPU, kernels in Triton's interpreter.

Every rank sends before any waits, as split phases do; several GPUs run tests/distributed/test_gpu_ranks.py.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from moe_core_triton.peers import dispatcher as peers
from moe_core_triton.peers import memory as peers_memory
from moe_core_triton.peers.memory import PROGRAMS, WINDOWS, Memory, Need, Window
from moe_core_triton.peers.turns import Mark, Turns

import moe_core
from moe_core import MoeConfig, ParallelConfig, RunningState, TopKOutput
from moe_core.dispatchers.torch_distributed.groups import Groups
from moe_core.errors import BindError, CommunicationError, ContractViolation
from moe_core.formats import StandardCombineInput
from moe_core.quant import dequantize_activation, quantize_activation
from moe_core.specs import Terms
from moe_core.testing import make_layer
from moe_core.vocabulary import DroppedSlot, IdSpace, Owner, Step

MOST = 6


class Host:
    """The memory of all ranks: what `shared_memory` gives each of them."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def __call__(self, group: Any, members: tuple[int, ...], need: Need, device: torch.device) -> Any:
        place, size = need.places()
        if not self.buffers:  # bytes that nobody wrote are no tokens
            self.buffers = [torch.full((WINDOWS * size,), 0xFF, dtype=torch.uint8) for _ in members]
            for buffer in self.buffers:
                for number in range(WINDOWS):
                    flags = 2 * 4 * need.ranks * PROGRAMS
                    buffer[number * size : number * size + flags] = 0
        windows = [
            Window(
                self.buffers[group][number * size : (number + 1) * size],
                [buffer.data_ptr() + number * size for buffer in self.buffers],
                place,
            )
            for number in range(WINDOWS)
        ]
        memory = Memory.__new__(Memory)
        memory.windows, memory.failure = windows, torch.zeros(1, dtype=torch.int32)
        memory.processors, memory.turns = 4, Turns(device)
        return memory


def ranks_of(
    config: MoeConfig, ranks: int, monkeypatch: pytest.MonkeyPatch, *, payload: str = "bf16", **more: Any
) -> list[peers.SymmMemDispatcher]:
    """A dispatcher for each rank, in memory of its own."""
    placement, dropped = more.pop("placement", "linear"), more.pop("dropped", DroppedSlot.NEGATIVE)
    id_space, extras = more.pop("id_space", IdSpace.LOCAL), more.pop("extras", ())
    monkeypatch.setattr(peers, "shared_memory", Host())
    layer = make_layer(config, 1, tokens=1)
    found = []
    for rank in range(ranks):
        monkeypatch.setattr(peers, "make_groups", lambda b, r=rank: Groups(r, None, tuple(range(ranks))))
        parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, placement=placement, reduce="caller")
        plan = moe_core.plan(config, layer.weights.shard(config, parallel), parallel, runner="reference")
        terms = Terms(
            id_space=id_space, dropped=dropped, payload=payload, ids_dtype="int32", extras=frozenset(extras),
            steps={Step.ROUTED_SCALING: Owner.DISPATCHER},
        )  # fmt: skip
        found.append(
            peers.SymmMemDispatcher(replace(plan._binding, terms=terms, max_tokens=MOST, options=more, group=None))
        )
    return found


def config_of(**changes: Any) -> MoeConfig:
    sizes = {"num_experts": 10, "top_k": 3, "hidden_size": 256, "intermediate_size": 128, "dtype": "float32"}
    return MoeConfig(**(sizes | {"routed_scaling_factor": 1.5} | changes))


def tokens_of(config: MoeConfig, counts: list[int], seed: int = 0) -> list[tuple[torch.Tensor, TopKOutput]]:
    """Of every rank, with dropped slots."""
    made = [make_layer(config, 10 * seed + rank, tokens=count) for rank, count in enumerate(counts)]
    for layer in made:
        layer.topk.topk_ids[::2, 0] = -1
        layer.topk.topk_weights[::2, 0] = float("nan")
    return [(layer.hidden, layer.topk) for layer in made]


def experts_of(given: Any, rank: int, owners: list[list[int]], scale: Any = None) -> StandardCombineInput:
    """Expert e multiplies by e + 1, and every rank sums its slots; rows of no slot hold NaN."""
    ids, weights = given.topk_ids, given.topk_weights
    here = torch.tensor(owners[rank] + [0])
    live = (ids >= 0) & (ids < len(owners[rank]))
    factor = torch.where(live, (here[ids.clamp(min=0).long()] + 1) * weights, 0.0).sum(dim=1, keepdim=True)
    hidden = given.hidden_states
    if given.hidden_scale is not None:
        hidden = dequantize_activation(hidden, given.hidden_scale, scale).float()
    rows = torch.where(live.any(dim=1, keepdim=True), hidden.float() * factor, float("nan"))
    return StandardCombineInput(rows, given.handle)


def wanted(config: MoeConfig, hidden: torch.Tensor, topk: TopKOutput) -> torch.Tensor:
    ids, weights = topk.topk_ids, topk.topk_weights
    factor = torch.where(ids >= 0, (ids + 1) * weights, 0.0).sum(dim=1, keepdim=True)
    return hidden.float() * factor * config.routed_scaling_factor


def owners_of(config: MoeConfig, ranks: int, placement: Any) -> list[list[int]]:
    layout = ParallelConfig(ep_size=ranks, placement=placement, reduce="caller")
    return [list(replace(layout, ep_rank=rank).local_experts(config.num_experts)) for rank in range(ranks)]


@pytest.mark.parametrize("programs", [2, PROGRAMS])
@pytest.mark.parametrize("placement", ["linear", "round_robin"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_weighted_sum(ranks: int, placement: str, programs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uneven and empty ranks, several calls on the same memory, two of them in flight."""
    config, counts = config_of(), [5, 0, 6][:ranks]
    here = ranks_of(config, ranks, monkeypatch, placement=placement, programs=programs)
    owners = owners_of(config, ranks, placement)
    for call in range(3):
        flights = [tokens_of(config, counts, seed) for seed in (2 * call, 2 * call + 1)]
        states = [RunningState() for _ in here]
        sent = [[d.dispatch_begin(*one, s) for d, one, s in zip(here, f, states, strict=True)] for f in flights]
        for tokens, handles in zip(flights, sent, strict=True):
            given = [d.dispatch_finish(one, s) for d, one, s in zip(here, handles, states, strict=True)]
            for rank, one in enumerate(given):
                assert one.hidden_states.shape == (ranks * MOST, config.hidden_size)
                assert int(one.topk_ids.max()) < len(owners[rank])
            done = [experts_of(one, rank, owners) for rank, one in enumerate(given)]
            back = [d.combine_begin(one, s) for d, one, s in zip(here, done, states, strict=True)]
            for rank, (d, one) in enumerate(zip(here, back, strict=True)):
                result = d.combine_finish(one, states[rank])
                torch.testing.assert_close(result, wanted(config, *tokens[rank]), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("payload", ["fp8_group128", "fp8_token", "int8_token"])
def test_quantized_tokens_have_the_codecs_bits(payload: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(num_experts=2, top_k=2, dtype="float16")  # every token goes everywhere
    here = ranks_of(config, 2, monkeypatch, payload=payload, equal_tokens=True)
    tokens, state = tokens_of(config, [4, 4]), RunningState()
    for _, topk in tokens:
        topk.topk_ids[:] = torch.tensor([0, 1])
    sent = [d.dispatch_begin(*one, state) for d, one in zip(here, tokens, strict=True)]
    for d, one in zip(here, sent, strict=True):
        given = d.dispatch_finish(one, state)
        data, scale = quantize_activation(torch.cat([hidden for hidden, _ in tokens]), payload)
        assert torch.equal(given.hidden_states.view(torch.uint8), data.view(torch.uint8))
        assert torch.equal(given.hidden_scale, scale)


def test_a_row_travels_only_to_the_ranks_that_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of(top_k=1)
    here = ranks_of(config, 2, monkeypatch, equal_tokens=True)
    hidden = torch.ones(4, 256)
    ids = torch.tensor([[0], [9], [-1], [4]], dtype=torch.int32)  # rank 0 has experts 0 to 4
    topk, state = TopKOutput(ids, torch.ones(4, 1)), RunningState()
    sent = [d.dispatch_begin(hidden, topk, state) for d in here]
    given = [d.dispatch_finish(one, state) for d, one in zip(here, sent, strict=True)]
    came = [one.hidden_states.eq(1.0).all(dim=1).tolist() for one in given]
    assert came == [[True, False, False, True] * 2, [False, True, False, False] * 2]
    assert given[0].topk_ids.flatten().tolist() == [0, -1, -1, 4] * 2
    assert given[1].topk_ids.flatten().tolist() == [-1, 4, -1, -1] * 2


def test_the_sink(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    here = ranks_of(config, 2, monkeypatch, dropped=DroppedSlot.SINK, extras=["expert_mask"])
    state = RunningState()
    sent = [d.dispatch_begin(*one, state) for d, one in zip(here, tokens_of(config, [3, 2]), strict=True)]
    for d, one in zip(here, sent, strict=True):
        given = d.dispatch_finish(one, state)
        assert int(given.topk_ids.min()) >= 0
        assert int(given.topk_ids.max()) <= 5
        assert given.expert_mask.tolist() == [1] * 5 + [0]


@pytest.mark.parametrize("dropped", [DroppedSlot.NEGATIVE, DroppedSlot.SINK])
def test_global_ids(dropped: DroppedSlot, monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of(top_k=2), RunningState()
    here = ranks_of(
        config, 2, monkeypatch, dropped=dropped, id_space=IdSpace.GLOBAL, extras=["expert_map"], equal_tokens=True
    )
    topk = TopKOutput(torch.tensor([[7, 2], [-1, 5]], dtype=torch.int32), torch.ones(2, 2))
    sent = [d.dispatch_begin(torch.ones(2, 256), topk, state) for d in here]
    given = [d.dispatch_finish(one, state) for d, one in zip(here, sent, strict=True)]
    none = 10 if dropped is DroppedSlot.SINK else -1
    assert given[0].topk_ids.tolist() == [[none, 2], [none, none]] * 2
    assert given[1].topk_ids.tolist() == [[7, none], [none, 5]] * 2
    assert given[1].expert_map.tolist() == [-1] * 5 + [0, 1, 2, 3, 4]


def test_the_callers_output(monkeypatch: pytest.MonkeyPatch) -> None:
    config = config_of()
    here, owners = ranks_of(config, 2, monkeypatch, equal_tokens=True), owners_of(config, 2, "linear")
    tokens = tokens_of(config, [3, 3])
    outputs = [torch.full((3, 256), float("nan")) for _ in here]
    states = [RunningState(output=output) for output in outputs]
    sent = [d.dispatch_begin(*one, s) for d, one, s in zip(here, tokens, states, strict=True)]
    given = [d.dispatch_finish(one, s) for d, one, s in zip(here, sent, states, strict=True)]
    back = [
        d.combine_begin(experts_of(one, r, owners), states[r])
        for r, (d, one) in enumerate(zip(here, given, strict=True))
    ]
    for d, one, output, call in zip(here, back, outputs, tokens, strict=True):
        assert d.combine_finish(one, RunningState()) is output
        torch.testing.assert_close(output, wanted(config, *call), rtol=1e-5, atol=1e-5)


def test_a_dead_rank_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a kernel has waited in vain, which the interpreter cannot: the word that it writes says so to each call."""
    config = config_of()
    here = ranks_of(config, 2, monkeypatch, timeout_s=7)
    here[0]._memory.failure[0] = 2
    with pytest.raises(CommunicationError, match="EP rank 0 waited 7 s for EP rank 1"):
        here[0].dispatch_begin(*tokens_of(config, [3, 3])[0], RunningState())


def test_a_combine_names_the_dead_rank_too(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of(), RunningState()
    here = ranks_of(config, 2, monkeypatch, equal_tokens=True)
    sent = [d.dispatch_begin(*one, state) for d, one in zip(here, tokens_of(config, [2, 2]), strict=True)]
    given = [d.dispatch_finish(one, state) for d, one in zip(here, sent, strict=True)]
    here[1]._memory.failure[0] = 1
    with pytest.raises(CommunicationError, match="EP rank 1 waited 60 s for EP rank 0"):
        here[1].combine_begin(experts_of(given[1], 1, owners_of(config, 2, "linear")), state)


def test_calls_that_all_ranks_give_up_leave_the_counts_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a later call would find its flags raised already, and read what has not come."""
    config, state = config_of(), RunningState()
    here, owners = ranks_of(config, 2, monkeypatch, equal_tokens=True), owners_of(config, 2, "linear")
    for call in range(2 * WINDOWS):  # dispatches between their phases, then combines between theirs
        sent = [d.dispatch_begin(*one, state) for d, one in zip(here, tokens_of(config, [3, 3], call), strict=True)]
        if call >= WINDOWS:
            given = [d.dispatch_finish(one, state) for d, one in zip(here, sent, strict=True)]
            done = [experts_of(one, rank, owners) for rank, one in enumerate(given)]
            back = [d.combine_begin(one, state) for d, one in zip(here, done, strict=True)]
            del given, done, back
        del sent
    for d in here:
        for window, calls in zip(d._memory.windows, ([3, 2], [1, 0]), strict=True):
            for number, name in enumerate(("sent", "returned")):
                flags = window.part(name, 2, torch.int32, PROGRAMS)
                assert int(flags[1 - d._me].max()) == calls[number]
                assert torch.equal(flags[1 - d._me], window.epochs[number])


def test_an_abandoned_window_is_the_last_to_be_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks find out at different times that a failed call's handle is gone, and must not take different windows."""
    config, state = config_of(), RunningState()
    late, soon = ranks_of(config, 2, monkeypatch, equal_tokens=True)
    tokens = tokens_of(config, [3, 3])
    held = late.dispatch_begin(*tokens[0], state)  # a traceback holds it, say
    soon.dispatch_begin(*tokens[1], state)
    assert [d._memory.windows.index(d._memory.window()) for d in (late, soon)] == [1, 1]
    del held
    assert late._memory.windows.index(late._memory.window()) == 1


def test_tokens_that_begin_at_an_odd_address(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of(dtype="bfloat16", top_k=1), RunningState()
    here = ranks_of(config, 2, monkeypatch, equal_tokens=True)
    hidden = torch.arange(1 + 2 * 256).to(torch.bfloat16)[1:].view(2, 256)
    topk = TopKOutput(torch.tensor([[0], [1]]), torch.ones(2, 1))  # int64, both of rank 0
    sent = [d.dispatch_begin(hidden, topk, state) for d in here]
    given = here[0].dispatch_finish(sent[0], state)
    assert torch.equal(given.hidden_states, torch.cat([hidden, hidden]))


def test_a_result_that_another_ranks_memory_would_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    config, state = config_of(dtype="float16"), RunningState()
    here = ranks_of(config, 2, monkeypatch, equal_tokens=True)
    sent = [d.dispatch_begin(*one, state) for d, one in zip(here, tokens_of(config, [2, 2]), strict=True)]
    given = here[0].dispatch_finish(sent[0], state)
    for wrong in (torch.zeros(4, 256), torch.zeros(5, 256, dtype=torch.float16)):
        with pytest.raises(ContractViolation, match=r"expected torch.float16 \[4, 256\]"):
            here[0].combine_begin(StandardCombineInput(wrong, given.handle), state)


def test_all_ranks_launch_as_the_smallest_gpu_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs wait for those of the same number, and GPUs of one architecture have not all as many processors."""
    made: list[dict[str, Any]] = []

    class Group:
        """What can be referred to weakly."""

    class Made:
        def __init__(self, *_: Any, **more: Any) -> None:
            made.append(more)

    def gather(into: list[Any], mine: Any, group: Any) -> None:
        into[:] = [mine, (False, 3)]

    monkeypatch.setattr(peers_memory, "Memory", Made)
    monkeypatch.setattr(peers_memory.dist, "get_world_size", lambda group: 2)
    monkeypatch.setattr(peers_memory.dist, "all_gather_object", gather)
    group = Group()
    held = [
        peers_memory.shared_memory(group, (0, 1), Need(2, 4, size, 0, 512, 2), torch.device("cpu"))
        for size in (256, 512)
    ]
    assert [one["processors"] for one in made] == [3, 3]
    assert len(held) == 2
    assert made[0]["turns"] is made[1]["turns"]  # kernels of two memories are in each other's way as well


class Stream:
    """Remembers what it was told to wait for."""

    device = torch.device("cuda", 0)

    def __init__(self, name: str, captured: bool = False) -> None:
        self.name, self.captured, self.waits = name, captured, list[str]()

    def wait_event(self, event: Event) -> None:
        self.waits.append(event.where)

    def wait_stream(self, other: Stream) -> None:
        self.waits.append(f"all of {other.name}")

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event


class Event:
    """Where it was recorded last."""

    def record(self, stream: Stream) -> None:
        assert not stream.captured
        self.where = stream.name


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`with on(stream):`, without a GPU."""
    current: list[Stream] = []

    @contextmanager
    def on(stream: Stream) -> Iterator[None]:
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: current[-1].captured)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return on


def test_kernels_that_wait_take_turns_on_all_streams(on: Any) -> None:
    one, two, turns = Stream("one"), Stream("two"), Turns(torch.device("cuda", 0))
    for stream in (one, one, two, two, one):
        with on(stream):
            turns.wait()
            turns.end()
    assert (one.waits, two.waits) == (["two"], ["one"])
    with on(two):  # sends alone: in nobody's way, but behind the combine that gave it its window
        turns.wait()
    with on(one):
        turns.wait()
    assert (one.waits, two.waits) == (["two"], ["one", "one"])


def test_turns_in_a_capture_know_that_capture_alone(on: Any) -> None:
    eager, turns = Stream("eager"), Turns(torch.device("cuda", 0))
    first, second, other = (Stream(name, captured=True) for name in ("first", "second", "other"))
    for stream in (eager, first, second):
        with on(stream):
            turns.wait()
            turns.end()
    assert (first.waits, second.waits) == ([], ["all of first"])
    second.captured = False  # that capture has ended
    for stream in (other, second):
        with on(stream):
            turns.wait()
    assert (other.waits, second.waits) == ([], ["all of first", "eager"])


def test_the_second_phase_on_another_stream(on: Any) -> None:
    read: list[Any] = []

    class Tensor:
        def record_stream(self, stream: Stream) -> None:
            read.append(stream)

    begun, ended = Stream("begun"), Stream("ended")
    with on(begun):
        mark = Mark(torch.device("cuda", 0))
        mark.follow(Tensor())  # type: ignore[arg-type]
    with on(ended):
        mark.follow(Tensor())  # type: ignore[arg-type]
    assert (begun.waits, ended.waits, read) == ([], ["begun"], [ended])


@pytest.mark.parametrize("options", [{"programs": 0}, {"programs": PROGRAMS + 1}, {"timeout_s": 0}])
def test_options_out_of_range(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BindError, match="the option programs is 1 to 8192, and timeout_s positive"):
        ranks_of(config_of(), 2, monkeypatch, **options)


def test_a_third_flight_is_refused() -> None:
    memory = Memory.__new__(Memory)
    size = Need(2, 4, 256, 0, 512, 2).places()[1]
    memory.windows = [Window(torch.zeros(size, dtype=torch.uint8), [0, 0], {}) for _ in range(WINDOWS)]

    class User:
        """Anything that can be held."""

    users = [User() for _ in range(WINDOWS)]
    for user in users:
        memory.window().take(user)
    with pytest.raises(ContractViolation, match="2 results of dispatches wait for their combine"):
        memory.window()
    del users[0], user
    assert memory.window() is memory.windows[0]  # a call that failed before its combine blocks none for ever
