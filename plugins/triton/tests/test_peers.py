"""`symm_mem` without a GPU: all ranks in this process, their memory on the CPU, kernels in Triton's interpreter.

Every rank sends before any waits, as split phases do; several GPUs run tests/distributed/test_gpu_ranks.py.
"""

from __future__ import annotations

import os
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

if torch.cuda.is_available():
    pytest.skip("the interpreter's", allow_module_level=True)
os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton")
from moe_core_triton.peers import dispatcher as peers
from moe_core_triton.peers.memory import PROGRAMS, WINDOWS, Need, Window

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
        free = lambda: next(w for w in windows if w.free)  # noqa: E731
        return SimpleNamespace(windows=windows, window=free, failure=torch.zeros(1, dtype=torch.int32))


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


@pytest.mark.parametrize("options", [{"programs": 0}, {"programs": PROGRAMS + 1}, {"timeout_s": 0}])
def test_options_out_of_range(options: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BindError, match="the option programs is 1 to 8192, and timeout_s positive"):
        ranks_of(config_of(), 2, monkeypatch, **options)


def test_a_third_flight_is_refused() -> None:
    from moe_core_triton.peers.memory import Memory

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
