"""The double bites: a dispatcher with a mistake in it is refused by the double, or gives another result.

Every rank brings the same number of tokens here, so that all of them fail in the same call and none waits for another.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

RANKS = (2,)
SCRIPT = """
def mutated(work, *patches):
    "What comes of it with (owner, name, mistake) in place: the difference, or the words of what was raised."
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    for owner, name, mistake in patches:
        setattr(owner, name, mistake(getattr(owner, name)))
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    finally:
        for owner, name, original in before:
            setattr(owner, name, original)
        buffers._OPEN.clear()
        testing.install()


def layer(name="mori", **more):
    return compare(name, [6] * ranks, **more)


def probe_all(name="mori", **more):
    extras = ["expert_mask", "expert_map", "num_valid"]
    return probed(name, dropped=DroppedSlot.SINK, extras=extras, **more)[0]


def first_stale(original):
    "The rows go back where the received ids say, not this rank's own."
    def output(self, given, handle):
        handle.ids = given[3][:len(handle.ids)].clone()
        return original(self, given, handle)
    return output


def weighs_again(original):
    kept = []
    def output(self, given, handle):
        kept.append((handle, given[1][:handle.rows].clone()))
        return original(self, given, handle)
    def returning(self, combine_input):
        slot, handle, rows = returns(self, combine_input)
        weights = next(w for h, w in kept if h is handle)
        return slot, handle, rows * weights[:, 1:2].to(rows.dtype)
    returns = dispatcher.MoriDispatcher._returning
    dispatcher.MoriDispatcher._returning = returning
    return output


def twice_weighed():
    before = dispatcher.MoriDispatcher._returning
    try:
        return mutated(lambda: layer(drop=False), (dispatcher.MoriDispatcher, "_output", weighs_again))
    finally:
        dispatcher.MoriDispatcher._returning = before


def with_weights(original):
    return lambda op, rows, ids, launch: op.combine(
        input=rows, weights=torch.ones(ids.shape), indices=ids, block_num=8, rdma_block_num=0, warp_per_block=8)[0]


def small(work):
    testing.install(compute_units=64)
    return mutated(work)


def gfx942(work):
    testing.install(arch="gfx942")
    return mutated(work)


D, I, R, S = dispatcher.MoriDispatcher, wire.Ids, wire.Rows, buffers.Shared
"""

#: Name -> source, and what the double (or the check of the terms) says; None: the numbers differ.
MUTATIONS: dict[str, tuple[str, str | None]] = {
    "-1 kept": ("mutated(layer, (I, 'sent', lambda f: lambda self, ids: ids.to(torch.int32)))", "an id is outside"),
    "-1 kept, ll": (
        "mutated(lambda: layer('mori_ll'), (I, 'sent', lambda f: lambda self, ids: ids.to(torch.int32)))",
        "an id is outside",
    ),
    "-1 kept, v2": (
        "mutated(lambda: layer('mori_v2'), (I, 'sent', lambda f: lambda self, ids: ids.to(torch.int32)))",
        "an id is outside",
    ),
    "-1 made expert 0": (
        "mutated(lambda: layer(), (I, 'sent', lambda f: lambda self, ids: f(self, ids.clamp(min=0))))",
        None,
    ),
    "int64 ids": ("mutated(layer, (I, 'sent', lambda f: lambda *a: f(*a).long()))", "indices is torch.int64"),
    "strided ids": (
        "mutated(layer, (I, 'sent', lambda f: lambda *a: f(*a).T.contiguous().T))",
        "indices is not contiguous",
    ),
    "received ids in combine": ("mutated(layer, (D, '_output', first_stale))", "indices are not those that this rank"),
    "received ids, ll": (
        "mutated(lambda: layer('mori_ll'), (D, '_output', first_stale))",
        "indices are not those that this rank",
    ),
    "weights applied twice": ("twice_weighed()", None),
    "own weights in combine": ("mutated(layer, (calls, 'combine_v1', with_weights))", "weights of 6 rows, and"),
    "slice missing": (
        "mutated(layer, (D, '_result', lambda f: lambda self, summed, handle: summed.clone()))",
        "AssertionError: (torch.Size([256, 256])",
    ),
    "result left in MoRI's buffer": (
        "mutated(lambda: layer(drop=False), "
        "(D, '_result', lambda f: lambda s, summed, h: summed[: h.tokens].mul_(1.5)))",
        None,
    ),
    "mask off by one": (
        "mutated(probe_all, (dispatcher, 'expert_mask', lambda f: lambda *a, **k: f(*a, **k).roll(1)))",
        "ContractBroken: the dispatch output breaks the terms: expert_mask is",
    ),
    "mask without the sink": (
        "mutated(probe_all, (dispatcher, 'expert_mask', lambda f: lambda *a, **k: f(*a, sink=False)))",
        "expert_mask is",
    ),
    "an expert map as mask": (
        "mutated(probe_all, (dispatcher, 'expert_mask', lambda f: lambda b, sink: dispatcher.expert_map(b)))",
        "expert_mask is",
    ),
    "bool mask": (
        "mutated(probe_all, (dispatcher, 'expert_mask', lambda f: lambda *a, **k: f(*a, **k).bool()))",
        "expert_mask is",
    ),
    "wire ids handed on": ("mutated(probe_all, (I, 'agreed', lambda f: lambda self, ids, n: ids.clone()))", "Error"),
    "rows past the count kept": (
        "mutated(probe_all, (I, 'agreed', lambda f: lambda self, ids, n: f(self, ids, torch.tensor([len(ids)]))))",
        "Error",
    ),
    "rows cut off": (
        "mutated(lambda: layer(drop=False), "
        "(calls, 'combine_v1', lambda f: lambda op, rows, ids, n: f(op, rows[:1], ids, n)))",
        "were received",
    ),
    "one operator for two": (
        "mutated(lambda: layer(flights=2), (S, 'take', lambda f: lambda self, handle: self.slots[0]))",
        "a dispatch before the last one was combined",
    ),
    "one operator for two, v2": (
        "mutated(lambda: layer('mori_v2', flights=2), (S, 'take', lambda f: lambda self, handle: self.slots[0]))",
        "a dispatch before the last one was combined",
    ),
    "weights in bfloat16": (
        "mutated(layer, (calls, 'dispatch_v1', lambda f: lambda op, r, w, s, i, n: f(op, r, w.bfloat16(), s, i, n)))",
        "weights is torch.bfloat16",
    ),
    "scales forgotten": (
        "mutated(lambda: layer(**FP8), (R, 'sent', lambda f: lambda *a: (f(*a)[0], None)))",
        "scales do not fit",
    ),
    "scales of others": (
        "mutated(lambda: layer(**FP8), (R, 'sent', lambda f: lambda *a: (f(*a)[0], f(*a)[1].roll(1, 0) + (1 << 23))))",
        None,
    ),
    "a receive forgotten": (
        "mutated(lambda: layer('mori_ll'), (calls, 'dispatch_receive', lambda f: lambda *a: None))",
        "Error",
    ),
    "sums not received": (
        "mutated(lambda: layer('mori_ll', flights=2), (calls, 'combine_receive', lambda f: lambda *a: None))",
        "Error",
    ),
    "made for few tokens": (
        "mutated(layer, (buffers, 'FEWEST_TOKENS', lambda n: 1))",
        "fewer than 256 tokens a rank were seen to corrupt rows",
    ),
    "experts without a sink": (
        "mutated(layer, (buffers.calls, 'make_v1', lambda f: lambda **k: f(**k | {'experts_a_rank': 8 // ranks})))",
        "an id is outside",
    ),
    "blocks past the device": ("small(layer)", "80 blocks wait for each other on 64 units"),
    "eight-bit floats of the other kind": (
        "gfx942(lambda: layer(**FP8))",
        "input is torch.float8_e4m3fn, not",
    ),
    "numbers of kernels": (
        "mutated(layer, (buffers.calls, 'kernel_type', lambda f: lambda name: f('InterNodeV1')))",
        "InterNode kernels run across nodes",
    ),
}
SOURCES = {name: source for name, (source, _) in MUTATIONS.items()}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_mistake_shows(name: str, said: list[dict[str, Any]]) -> None:
    expected = MUTATIONS[name][1]
    found = [rank[name] for rank in said]
    if expected is None:
        assert all(isinstance(one, float) and (math.isnan(one) or one > 2e-2) for one in found), found
    else:
        assert all(isinstance(one, str) and expected in one for one in found), found
