"""The double of MoRI by itself: what it moves, leaves undefined and refuses, and that it has MoRI's signatures."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from moe_core_mori import facts
from moe_core_mori.testing import first, second

RANKS = (2,)
SCRIPT = """
from moe_core_mori.testing import world
from moe_core_mori.testing.first import EpDispatchCombineConfig as Config1, EpDispatchCombineOp as Op1
from moe_core_mori.testing.first import EpDispatchCombineKernelType as Kernel
from moe_core_mori.testing.second import Communicator, EpDispatchCombineConfig as Config2, EpDispatchCombineOp as Op2
E_RANK, K, H = 4, 2, 64
BF16 = torch.bfloat16


def shared(value):
    said_ = [value]
    dist.broadcast_object_list(said_, src=0)
    return said_[0]


def op1(**changes):
    calls.join_symmetric_memory(rank, ranks, shared)
    fields = dict(data_type=BF16, rank=rank, world_size=ranks, hidden_dim=H, scale_dim=0, scale_type_size=4,
                  max_token_type_size=2, max_num_inp_token_per_rank=256, num_experts_per_rank=E_RANK,
                  num_experts_per_token=K, gpu_per_node=ranks, kernel_type=Kernel.IntraNode)
    return Op1(Config1(**(fields | changes)))


def op2(**changes):
    communicator = calls.make_communicator(rank, ranks, 1 << 28, shared)
    fields = dict(rank=rank, world_size=ranks, hidden_dim=H, max_num_inp_token_per_rank=256,
                  num_experts_per_rank=E_RANK, num_experts_per_token=K)
    return Op2(Config2(**(fields | changes)), communicator)


def inputs(tokens=6):
    torch.manual_seed(rank + 10)
    ids = torch.stack([torch.randperm(ranks * E_RANK)[:K] for _ in range(tokens)]) if tokens else torch.empty(0, K)
    return torch.randn(tokens, H).to(BF16), torch.rand(tokens, K), ids.to(torch.int32)


def trip(op, tokens=6, halves=False, **launch):
    "Experts that do nothing: a token comes back as often as it went to different ranks. The received part, checked."
    x, weights, ids = inputs(tokens)
    out, got_weights, scales, got_ids, total = op.dispatch(x, weights, None, ids, **launch)[:5]
    if halves:
        assert bool(out.isnan().all()) and int(got_ids.min()) == int(total) == world.NO_ID
        op.dispatch_recv()
    n, owners = int(total), got_ids[: int(total)].long() // E_RANK
    assert scales is None and bool((owners == rank).any(1).all())  # a row came because of an expert here
    assert bool(out[n:].isnan().all()) and bool(got_weights[n:].isnan().all())
    assert bool((got_ids[n:] == world.NO_ID).all())
    summed = op.combine(out.clone(), None, ids)[0]
    if halves:
        assert bool(summed.isnan().all())
        op.combine_recv()
    goes = torch.tensor([len(set(row)) for row in (ids.long() // E_RANK).tolist()]).view(-1, 1)
    assert bool(summed[tokens:].isnan().all()) and len(summed) == 256
    assert int(total) == 0 and bool(out.isnan().all())  # peers may write there again
    return float((summed[:tokens].float() - goes * x.float()).abs().max()) if tokens else 0.0


def trip2(op, tokens=6):
    x, weights, ids = inputs(tokens)
    out, _, _, got_ids, total, routing = op.dispatch(x, weights, None, ids, return_routing=True)
    assert bool(out[int(total):].isnan().all()) and bool((got_ids[int(total):] == world.NO_ID).all())
    summed = op.combine(out.clone(), routing=routing)[0]
    goes = torch.tensor([len(set(row)) for row in (ids.long() // E_RANK).tolist()]).view(-1, 1)
    return float((summed.float() - goes * x.float()).abs().max()) if tokens else 0.0


def orders_differ():
    "Received rows have no order: two equal dispatches lie differently."
    op, seen = op1(), []
    x, weights, ids = inputs(40)
    for _ in range(2):
        out, _, _, _, total = op.dispatch(x, weights, None, ids)
        seen.append(out[: int(total)].clone())
        op.combine(out.clone(), None, ids)
    same = seen[0].shape == seen[1].shape and bool((seen[0] == seen[1]).all())
    return not same and bool((seen[0].float().sum(0) - seen[1].float().sum(0)).abs().max() < 1.0)


def scales_lie_strided():
    op = op2(scale_dim=3, scale_type_size=4)
    x, weights, ids = inputs()
    scales = torch.arange(18, dtype=torch.int32).view(6, 3)
    _, _, words, _, total, _ = op.dispatch(x, weights, scales, ids, return_routing=True)
    return [list(words.shape), words.is_contiguous(), int(words[: int(total)].max()) < 18]


def says(work):
    "The words of a DoubleError or ValueError, or what else came; the next operator starts afresh."
    try:
        work()
        return "nothing"
    except (testing.DoubleError, ValueError, NotImplementedError) as error:
        return f"{type(error).__name__}: {error}"
    finally:
        testing.install()


def sent(op, **changes):
    x, weights, ids = inputs()
    arguments = dict(input=x, weights=weights, scales=None, indices=ids)
    return op.dispatch(**(arguments | {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}))


def back(**changes):
    op = op1()
    x, weights, ids = inputs()
    out = op.dispatch(x, weights, None, ids)
    arguments = dict(input=out[0].clone(), weights=None, indices=ids)
    return op.combine(**(arguments | {k: v(arguments[k]) if callable(v) else v for k, v in changes.items()}))


def unjoined():
    testing.install()
    return says(lambda: Op1(Config1(BF16, rank, ranks, H, 0, 4, 2, 256, E_RANK, K)))


def one_rank_says_otherwise():
    op = op1()
    x, weights, ids = inputs()
    return op.dispatch(x, weights, None, ids, block_num=8 + rank)
"""
ZERO = {
    "within a node": "trip(op1())",
    "no tokens": "trip(op1(), 0 if rank else 5)",
    "nobody": "trip(op1(), 0)",
    "across nodes": "trip(op1(kernel_type=Kernel.InterNodeV1, gpu_per_node=1, rdma_block_num=8))",
    "in halves": "trip(op1(kernel_type=Kernel.AsyncLL, rdma_block_num=8), halves=True)",
    "second": "trip2(op2())",
    "second, no tokens": "trip2(op2(), 0 if rank else 5)",
}
SAID = {
    "float16": ("sent(op1(), input=lambda x: x.half())", "input is torch.float16"),
    "strided rows": ("sent(op1(), input=lambda x: x.T.contiguous().T)", "input is not contiguous"),
    "wider rows": ("sent(op1(), input=lambda x: x.repeat(1, 2))", "rows of 128 values, the config has 64"),
    "wider elements": ("sent(op1(), input=lambda x: x.float())", "elements of 4 bytes, past max_token_type_size"),
    "too many tokens": (
        "sent(op1(), input=lambda x: x[:1].repeat(257, 1))",
        "257 tokens, past max_num_inp_token_per_rank",
    ),
    "int64 ids": ("sent(op1(), indices=lambda i: i.long())", "indices is torch.int64"),
    "more ids": ("sent(op1(), indices=lambda i: i.repeat(1, 2))", "indices is ["),
    "-1": ("sent(op1(), indices=lambda i: i - 99)", "an id is outside"),
    "id past the experts": ("sent(op1(), indices=lambda i: i + 99)", "an id is outside"),
    "float64 weights": ("sent(op1(), weights=lambda w: w.double())", "weights is torch.float64"),
    "scales unannounced": ("sent(op1(), scales=torch.ones(6, 2))", "scales without scale_dim"),
    "scales missing": ("sent(op1(scale_dim=2))", "scales do not fit"),
    "scales of another size": ("sent(op1(scale_dim=2), scales=torch.ones(6, 2).double())", "scales do not fit"),
    "too many blocks": ("sent(op1(), block_num=300)", "300 blocks wait for each other"),
    "no blocks for RDMA": (
        "sent(op1(kernel_type=Kernel.InterNodeV1, gpu_per_node=1, rdma_block_num=0))",
        "0 of 80 blocks for RDMA",
    ),
    "twice": ("(lambda op: (sent(op), sent(op)))(op1())", "a dispatch before the last one was combined"),
    "combine alone": ("op1().combine(inputs()[0], None, inputs()[2])", "combine without a dispatch"),
    "other ids back": ("back(indices=lambda i: i.flip(0))", "indices are not those that this rank dispatched"),
    "fewer ids back": ("back(indices=lambda i: i[:2])", "indices are not those that this rank dispatched"),
    "fp8 back": ("back(input=lambda x: x.to(torch.float8_e4m3fn))", "input is torch.float8_e4m3fn"),
    "own weights back": ("back(weights=inputs()[1][:1])", "weights of 1 rows"),
    "rows cut off": ("back(input=lambda x: x[:1])", "1 rows, and"),
    "halves not joined": (
        "(lambda op: (sent(op), op.combine(inputs()[0], None, inputs()[2])))"
        "(op1(kernel_type=Kernel.AsyncLL, rdma_block_num=8))",
        "combine without a dispatch that was received",
    ),
    "receive alone": ("op1(kernel_type=Kernel.AsyncLL).dispatch_recv()", "a receive without a send"),
    "receive of another kernel": ("op1().dispatch_recv()", "ValueError: dispatch_recv only supports AsyncLL"),
    "few tokens": ("op1(max_num_inp_token_per_rank=64)", "fewer than 256 tokens"),
    "odd node": ("op1(gpu_per_node=3)", "gpu_per_node is 3"),
    "within, across nodes": ("op1(gpu_per_node=1)", "IntraNode kernels run within a node"),
    "across, within a node": ("op1(kernel_type=Kernel.InterNodeV1LL)", "InterNode kernels run across nodes"),
    "wide top-k": ("op1(num_experts_per_token=64)", "a wave holds 63 experts"),
    "another rank": ("op1(rank=7)", "rank and world_size are not those of shmem"),
    "ranks differ": ("one_rank_says_otherwise()", "ranks differ"),
    "second: one dtype": ("op2(dispatch_data_type=BF16)", "ValueError: dispatch_data_type and combine_data_type"),
    "second: odd rows": ("op2(hidden_dim=60)", "ValueError: rows are a multiple of 16 bytes"),
    "second: room": ("op2(hidden_dim=1 << 18)", "are left of per_rank_vmm"),
    "second: too many tokens": (
        "sent(op2(), input=lambda x: x[:1].repeat(257, 1), return_routing=True)",
        "ValueError: 257 tokens",
    ),
    "second: -1": ("sent(op2(), indices=lambda i: i - 99, return_routing=True)", "and nothing guards"),
    "second: twice": (
        "(lambda op: (sent(op, return_routing=True), sent(op, return_routing=True)))(op2())",
        "a dispatch before the last one was combined",
    ),
    "second: old routing": (
        "(lambda op: [op.combine(g[0].clone(), routing=g[5]) for g in [sent(op, return_routing=True)] * 2])(op2())",
        "the routing is not that of the last dispatch",
    ),
    "second: closed": ("(lambda op: (op.close(), sent(op, return_routing=True)))(op2())", "the operator is closed"),
}
SOURCES = {
    **ZERO,
    **{name: f"says(lambda: {source})" for name, (source, _) in SAID.items()},
    "unjoined": "unjoined()",
    "orders": "orders_differ()",
    "strided": "scales_lie_strided()",
}


@pytest.mark.parametrize("name", ZERO)
def test_tokens_come_back_once_from_each_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(error, float) and error <= 0.05 for error in found), found


@pytest.mark.parametrize("name", SAID)
def test_refused_by_the_double(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(SAID[name][1] in text for text in found), found


def test_what_is_undefined_and_how_it_lies(said: list[dict[str, Any]]) -> None:
    assert all(rank["orders"] is True for rank in said), said
    assert all(rank["strided"] == [[256 * len(said), 3], False, True] for rank in said), said
    assert all("shmem is not initialized" in rank["unjoined"] for rank in said)


FACES = {
    "mori.ops": first,
    "mori.shmem": first,
    "mori.ops.dispatch_combine_v2": second,
    "mori.cco": second,
}


@pytest.mark.parametrize("name", facts.load(facts.NEWEST).callables)
def test_it_has_the_signatures_of_the_newest_version(name: str) -> None:
    module = max((m for m in FACES if name.startswith(f"{m}.")), key=len)
    found: Any = FACES[module]
    for part in name.removeprefix(f"{module}.").split("."):
        found = getattr(found, part)
    theirs = facts.load(facts.NEWEST).callables[name]
    ours = [p for p in inspect.signature(found).parameters.values() if p.name != "self"]
    assert [p.name for p in ours] == [p.name for p in theirs]
    assert [p.kind is p.KEYWORD_ONLY for p in ours] == [p.keyword_only for p in theirs]
    for mine, real in zip(ours, theirs, strict=True):
        assert (mine.default is mine.empty) == (real.default is None), mine.name
        if mine.default is not mine.empty and real.default != "DEFAULT_PER_RANK_VMM":
            assert str(mine.default) == str(real.default).strip("'"), mine.name


def test_its_kernels_are_those_of_the_newest_version() -> None:
    kernels = facts.load(facts.NEWEST).enums["EpDispatchCombineKernelType"]
    assert sorted(kind.name for kind in first.EpDispatchCombineKernelType) == sorted(kernels)
