"""What MoRI's dispatchers refuse, with which words, and that nothing stays behind: limits, close, reset, versions."""

from __future__ import annotations

from typing import Any

import pytest

SCRIPT = """
def calls_of(name, **options):
    config = config_of()
    layer = make_layer(config, 5, tokens=4)
    return planned(name, layer, config, **options), layer, config


def one_too_many(name):
    plan, layer, _ = calls_of(name)
    given = [plan.dispatch(layer.hidden, layer.topk, RunningState()) for _ in range(2)]
    text = refused(lambda: plan.dispatch(layer.hidden, layer.topk, RunningState()))
    state = RunningState()
    plan.combine(plan.run(given.pop(), state), state)  # the second of them: its operator is free again
    given.append(plan.dispatch(layer.hidden, layer.topk, RunningState()))
    for one in given:
        state = RunningState()
        plan.combine(plan.run(one, state), state)
    plan.close()
    return text


def over_two_layers():
    "Layers share operators, and so the number of results that may wait."
    (one, layer, _), (two, _, _) = calls_of("mori"), calls_of("mori")
    given = [plan.dispatch(layer.hidden, layer.topk, RunningState()) for plan in (one, two)]
    texts = [refused(lambda: plan.dispatch(layer.hidden, layer.topk, RunningState())) for plan in (one, two)]
    for plan, waits in zip((one, two), given):
        state = RunningState()
        plan.combine(plan.run(waits, state), state)
        plan.close()
    return texts


def given_up(name):
    "After an error in between, reset() on all ranks makes room; what was given up cannot be combined."
    plan, layer, config = calls_of(name)
    lost = [plan.dispatch(layer.hidden, layer.topk, RunningState()) for _ in range(2)]
    before = refused(lambda: plan(layer.hidden, layer.topk))
    ran = plan.run(lost[0], RunningState())
    plan.dispatcher.reset()
    late = refused(lambda: plan.combine(ran, RunningState()))
    whole = moe_core.plan(config, layer.weights, runner="reference")
    error = far(plan(layer.hidden, layer.topk), whole(layer.hidden, layer.topk), slice(None))
    assert testing.open_operators() == 2
    plan.close()
    return [before, late, error]


def twice(name):
    plan, layer, _ = calls_of(name)
    state = RunningState()
    given = plan.dispatch(layer.hidden, layer.topk, state)
    ran = plan.run(given, state)
    begun = plan.combine_begin(ran, state)
    text = refused(lambda: plan.combine_begin(ran, state))
    plan.combine_finish(begun, state)
    texts = [text, refused(lambda: plan.combine(ran, state))]
    plan.close()
    return texts


def finished_twice():
    plan, layer, _ = calls_of("mori_ll")
    state = RunningState()
    begun = plan.dispatch_begin(layer.hidden, layer.topk, state)
    given = plan.dispatch_finish(begun, state)
    text = refused(lambda: plan.dispatch_finish(begun, state))
    plan.combine(plan.run(given, state), state)
    plan.close()
    return text


def strange(change):
    plan, layer, _ = calls_of("mori")
    state = RunningState()
    given = plan.dispatch(layer.hidden, layer.topk, state)
    ran = plan.run(given, state)
    text = refused(lambda: plan.combine(change(ran), state))
    plan.combine(ran, state)
    plan.close()
    return text


def told(counts, check=False):
    plan, layer, _ = calls_of("mori", check=check)
    text = refused(lambda: plan(layer.hidden, layer.topk, state=RunningState(tokens_per_rank=counts)))
    plan.close()
    return text


def lied_to():
    "Every rank brings 4 tokens for three ranks in turn, and says that the others bring 1."
    plan, layer, _ = calls_of("mori", check=True)
    layer.topk.topk_ids[:] = (rank + torch.arange(3)) % ranks * (8 // ranks)
    counts = [1] * ranks
    counts[rank] = 4
    text = refused(lambda: plan.dispatch(layer.hidden, layer.topk, RunningState(tokens_per_rank=counts)))
    plan.dispatcher.reset()
    plan.close()
    return text


def after_closing():
    plan, layer, _ = calls_of("mori_ll")
    state = RunningState()
    begun = plan.dispatch_begin(layer.hidden, layer.topk, state)
    plan.close()
    plan.close()
    return [refused(lambda: plan(layer.hidden, layer.topk)), refused(lambda: plan.dispatch_finish(begun, state)),
            testing.open_operators()]


def shared():
    "A plan that is dropped counts until the end: ranks collect garbage at different times."
    plans = [calls_of("mori")[0] for _ in range(3)]
    other = calls_of("mori_ll")[0]
    seen = [len(buffers._OPEN), buffers._OPEN[0].users]
    plans[0].close()
    del plans[1]
    gc.collect()
    seen += [len(buffers._OPEN), buffers._OPEN[0].users]
    plans[-1].close()
    other.close()
    seen += [len(buffers._OPEN)]
    buffers._OPEN[0].users -= 1  # nobody else can
    buffers._OPEN.pop().close()
    return [*seen, testing.open_operators()]


def sizes_that_are_one():
    "Up to the fewest tokens that an operator is made for, and however the launch came about."
    plans = [calls_of("mori", max_tokens=n)[0] for n in (4, 8, 256)] + [calls_of("mori", warps=16)[0]]
    seen = len(buffers._OPEN)
    for plan in plans:
        plan.close()
    return [seen, len(buffers._OPEN)]


def bound(name, version=None, heap_gib=16, tokens=MOST, **options):
    testing.install(**({"version": version} if version else {}), heap_gib=heap_gib)
    try:
        plan = calls_of(name, max_tokens=tokens, **options)[0]
        plan.close()
        return "bound"
    except moe_core.errors.MoeCoreError as error:
        return f"{type(error).__name__}: {error}"
    finally:
        testing.install()


def broken(where, name, method):
    "With a method of the installed MoRI that lacks its last argument."
    before = getattr(where, name)
    setattr(where, name, method)
    try:
        return refused(lambda: calls_of("mori_ll"))
    finally:
        setattr(where, name, before)


def older_combine(self, input, weights, indices, block_num=-1, rdma_block_num=-1):
    pass


def apart(name, machine, **options):
    "With EP ranks on several machines."
    before, machines.here = machines.here, lambda: f"machine {machine(rank)}"
    try:
        return bound(name, **options)
    finally:
        machines.here = before


def another_heap():
    "Whatever else uses MoRI in this process has joined it to other ranks."
    testing.install()
    sys.modules["mori"].shmem = shmem = sys.modules["mori.shmem"]
    shmem.shmem_init_attr(2, 0, 1, shmem.shmem_get_unique_id())
    try:
        return refused(lambda: calls_of("mori"))
    finally:
        testing.install()
"""
WAITS = "2 results of MoRI's dispatch wait for their combine"
DONE = "this result of MoRI's dispatch was combined already"
COUNTS = "ContractViolation: tokens_per_rank is [4]"
OPS = "sys.modules['mori.ops']"
#: Name -> source, and parts of what it says, in turn.
REFUSED: dict[str, tuple[str, list[str]]] = {
    "third": ("one_too_many('mori')", [WAITS]),
    "third, ll": ("one_too_many('mori_ll')", [WAITS]),
    "third, v2": ("one_too_many('mori_v2')", [WAITS]),
    "two layers": ("over_two_layers()", [WAITS, WAITS]),
    "given up": ("given_up('mori')[:2]", [WAITS, DONE]),
    "given up, ll": ("given_up('mori_ll')[:2]", [WAITS, DONE]),
    "given up, v2": ("given_up('mori_v2')[:2]", [WAITS, DONE]),
    "twice": ("twice('mori')", [DONE, DONE]),
    "twice, ll": ("twice('mori_ll')", [DONE, DONE]),
    "twice, v2": ("twice('mori_v2')", [DONE, DONE]),
    "finished twice": ("finished_twice()", ["this dispatch was finished already"]),
    "fewer rows": ("strange(lambda r: replace(r, hidden_states=r.hidden_states[:2]))", ["a row for each of the"]),
    "other dtype": ("strange(lambda r: replace(r, hidden_states=r.hidden_states.float()))", ["torch.float32"]),
    "other handle": ("strange(lambda r: replace(r, handle=('x',)))", ["the combine input's handle is a tuple"]),
    "counts of few": ("told([4])", [COUNTS]),
    "counts that deny": ("told([3] * ranks)", ["ContractViolation: tokens_per_rank is [3, "]),
    "counts that lie": ("lied_to()", ["rows came, and tokens_per_rank allows for"]),
    "closed": ("after_closing()[:2]", ["ContractViolation: the plan was closed", "and MoRI's buffers with it"]),
    "no second interface": ("bound('mori_v2', '1.1.1')", ["mori.ops.dispatch_combine_v2 does not load"]),
    "kernel missing": ("bound('mori', '1.1.1', kernel='IntraNodeLL')", ["the installed MoRI has no kernel"]),
    "kernel of the other kind": ("bound('mori', kernel='InterNodeV1')", ["run IntraNode or IntraNodeLL"]),
    "argument missing": (
        f"broken({OPS}.EpDispatchCombineOp, 'combine', older_combine)",
        ["mori.ops.EpDispatchCombineOp.combine does not take warp_per_block"],
    ),
    "method missing": (
        f"broken({OPS}.EpDispatchCombineOp, 'dispatch_recv', None)",
        ["mori.ops.EpDispatchCombineOp.dispatch_recv is missing"],
    ),
    "heap": ("bound('mori', heap_gib=1, tokens=300000)", ["BindError: MoRI made no operator for 300000 tokens"]),
    "two machines": ("apart('mori', lambda r: r)", ["BindError: MoRI is told that EP ranks 0 to "]),
    "two machines, v2": ("apart('mori_v2', lambda r: r // (ranks // 2))", ["and they are on 2 machines"]),
    "ranks in turns": ("apart('mori_ll', lambda r: r % 2, gpus_per_node=2)", ["EP ranks 0 to 1 are on one node"]),
    "another heap": ("another_heap()", [" of MoRI's symmetric heap, and EP rank"]),
    "backend": ("bound('mori_v2', backend='cuda')", ["unknown kernel backend 'cuda'"]),
    "micro-batches": ("bound('mori', micro_batches=0)", ["the option micro_batches is a positive number, got 0"]),
    "node": ("bound('mori', gpus_per_node=3)", ["the option gpus_per_node is 1, 2, 4 or 8, got 3"]),
    "blocks": ("bound('mori', blocks=0)", ["at least one block, got 16 and 0"]),
    "warps": ("bound('mori_ll', warps=32)", ["1 to 16 warps"]),
    "rdma": ("bound('mori_ll', rdma_blocks=64)", ["at least one of its 64 blocks and not all, got 64"]),
    "no option": ("bound('mori_v2', blocks=8)", ["ConfigError: 'mori_v2' has no option 'blocks'"]),
}
BOUND = {
    "the oldest": "bound('mori', '1.1.1')",
    "the oldest, ll": "bound('mori_ll', '1.1.1')",
    "the first with V2": "bound('mori_v2', '1.2.2')",
    "many tokens": "bound('mori', tokens=4096)",
    "two nodes": "apart('mori', lambda r: r // (ranks // 2), gpus_per_node=ranks // 2)",
}

AGAIN = {f"again {name}": f"given_up({name!r})[2]" for name in ("mori", "mori_ll", "mori_v2")}
SOURCES = {
    **{name: source for name, (source, _) in REFUSED.items()},
    **BOUND,
    **AGAIN,
    "shared": "shared()",
    "one": "sizes_that_are_one()",
    "left": "after_closing()[2]",
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words(name: str, said: list[dict[str, Any]]) -> None:
    for rank in said:
        texts = rank[name] if isinstance(rank[name], list) else [rank[name]]
        parts = REFUSED[name][1]
        assert len(texts) == len(parts), texts
        assert all(part in text for part, text in zip(parts, texts, strict=True)), texts


@pytest.mark.parametrize("name", BOUND)
def test_binds_with_what_is_installed(name: str, said: list[dict[str, Any]]) -> None:
    assert {rank[name] for rank in said} == {"bound"}


def test_after_an_error_in_between_reset_makes_room(said: list[dict[str, Any]]) -> None:
    for name in AGAIN:
        found = [rank[name] for rank in said]
        assert all(isinstance(error, float) and error <= 2e-2 for error in found), found


def test_layers_share_operators_until_all_of_them_are_closed(said: list[dict[str, Any]]) -> None:
    assert all(rank["shared"] == [2, 3, 2, 2, 1, 0] for rank in said), [rank["shared"] for rank in said]
    assert all(rank["one"] == [1, 0] for rank in said), [rank["one"] for rank in said]
    assert all(rank["left"] == 0 for rank in said), [rank["left"] for rank in said]
