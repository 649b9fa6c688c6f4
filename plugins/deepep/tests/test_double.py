"""The double of DeepEP V1 in two real processes over gloo: what it moves, what it leaves undefined, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_core.testing import run_ranks

#: Before a rank's script: `refused` and inputs, beside what `run_ranks` gives.
BEFORE = """
from deep_ep_double import Buffer, Config, DoubleError
E, K, H, M = 8, 3, 2048, 8
L = E // ranks
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn
NVL = Buffer.get_dispatch_config(ranks).get_nvl_buffer_size_hint(2 * H, ranks)
RDMA = Buffer.get_low_latency_rdma_size_hint(M, H, ranks, E)

def refused(name, work):
    "The message of a DoubleError, or what else came."
    try:
        work()
        said[name] = "nothing"
    except DoubleError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"

def both():
    return Buffer(group, NVL, RDMA, low_latency_mode=True, explicitly_destroy=True)

def inputs(tokens, dropped=True, k=K):
    "bfloat16 [T, H], int64 [T, K] with some -1, float32 [T, K]; other values on each rank."
    torch.manual_seed(rank + 10 * tokens)
    ids = torch.stack([torch.randperm(E)[:k] for _ in range(tokens)]) if tokens else torch.empty(0, k).long()
    if dropped:
        ids[::2, 0] = -1
        ids[3:4] = -1
    return torch.randn(tokens, H).to(BF16), ids, torch.rand(tokens, k)

def layout(buffer, ids):
    per_rank, node, per_expert, goes, event = buffer.get_dispatch_layout(ids, E)
    return dict(num_tokens_per_rank=per_rank, num_tokens_per_rdma_rank=node, is_token_in_rank=goes,
                num_tokens_per_expert=per_expert)

def expected(x, ids, weights, factor=lambda e: 1.0):
    "The weighted sum of experts that multiply by a factor, float32 [T, H]."
    total = torch.zeros(x.shape)
    for k in range(ids.shape[1]):
        scale = torch.tensor([factor(int(e)) if e >= 0 else 0.0 for e in ids[:, k]]) * weights[:, k]
        total += scale.unsqueeze(1) * x.float()
    return total

def far(result, x, ids, weights, factor=lambda e: 1.0):
    "The largest difference, relative; [T, H] in bfloat16 is checked too."
    want = expected(x, ids, weights, factor)
    assert result.shape == want.shape and result.dtype == BF16
    return float((result.float() - want).abs().max() / want.abs().max().clamp(min=1e-6)) if len(want) else 0.0

def widened(rows, scales):
    return (rows.float().unflatten(-1, (-1, 128)) * scales.unsqueeze(-1)).flatten(-2)

def factor(e):
    return 1.0 + e / 4

def run_experts(rows, ids, weights):
    "The runner's part of a normal call: local experts multiply by a factor, weighted and summed; bfloat16 [N, H]."
    factors = torch.tensor([factor(e + rank * L) for e in range(L)] + [0.0])
    kept = torch.where(ids >= 0, weights, 0.0)
    return (torch.where((ids >= 0).any(1, keepdim=True), rows.float(), 0.0)
            * (factors[ids] * kept).sum(1, keepdim=True)).to(BF16)

def batched(rows, counts):
    "The same without weights: bfloat16 [L, R * M, H]; rows past the counts stay garbage."
    factors = torch.tensor([factor(e + rank * L) for e in range(L)]).view(L, 1, 1)
    return (rows.float() * factors).to(BF16)
"""
Ranks = Callable[[str], list[dict[str, Any]]]


@pytest.fixture
def ranks(tmp_path: Path) -> Ranks:
    """Runs a script in two processes and gives what each one said."""

    def run(source: str, count: int = 2) -> list[dict[str, Any]]:
        return run_ranks(count, BEFORE + source, tmp_path, patience_s=60, paths=[Path(__file__).parent])

    return run


NORMAL = """
buffer = both()

def normal(tokens, fp8=False, asynchronous=False, **options):
    x, ids, weights = inputs(tokens)
    sent = x
    if fp8:
        scales = x.float().unflatten(1, (-1, 128)).abs().amax(-1).clamp(min=1e-4) / 448
        sent = ((x.float().unflatten(1, (-1, 128)) / scales.unsqueeze(-1)).flatten(1).to(FP8), scales)
    rows, local, kept, counts, handle, event = buffer.dispatch(
        sent, topk_idx=ids, topk_weights=weights, async_finish=asynchronous, **layout(buffer, ids), **options)
    if asynchronous:
        assert not len(rows) or rows.isnan().all()
        event.current_stream_wait()
    if fp8:
        assert rows[0].dtype == FP8 and rows[1].dtype == torch.float32
        rows = widened(*rows)
    assert local.dtype == torch.int64 and local.shape == kept.shape == (len(rows), K)
    assert int(local.min() if len(local) else -1) >= -1 and int(local.max() if len(local) else -1) < L
    real = local[: int(handle[3].numel())]
    alignment, found = options.get("expert_alignment", 1), [int((local == e).sum()) for e in range(L)]
    if options.get("num_worst_tokens"):
        assert counts == [] and len(rows) == options["num_worst_tokens"]
        tail = (local == -1).all(1)
        assert tail[-1] and rows[-1].isnan().all() and kept[-1].isnan().all()
    else:
        assert counts == [-(-n // alignment) * alignment for n in found]
        assert (kept[local < 0] == 0).all()
    result = run_experts(rows, local, kept)
    out, weight_sums, event = buffer.combine(result, handle, async_finish=asynchronous)
    assert weight_sums is None
    if asynchronous:
        assert not len(out) or out.isnan().all()
        event.current_stream_wait()
    return far(out, x, ids, weights, factor)

say("even", lambda: normal(6))
say("uneven", lambda: normal((2, 7)[rank]))
say("empty rank", lambda: normal((5, 0)[rank]))
say("all empty", lambda: normal(0))
say("aligned", lambda: normal(6, expert_alignment=16))
say("fp8", lambda: normal(6, fp8=True))
say("worst case", lambda: normal((5, 2)[rank], num_worst_tokens=20))
say("fp8 worst case", lambda: normal((5, 0)[rank], fp8=True, num_worst_tokens=20))
say("async", lambda: normal((5, 3)[rank], asynchronous=True))

def grouped():
    x = torch.full((3, H), 1.0 + rank, dtype=BF16)
    ids = torch.tensor([[0, L], [0, 1], [-1, L]])
    weights = torch.tensor([[0.5, 0.25], [1.0, 2.0], [float("nan"), 4.0]])
    rows, local, kept, counts, handle, _ = buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout(buffer, ids))
    out, sums, _ = buffer.combine(rows, handle, topk_weights=kept)
    return [rows[:, 0].tolist(), local.tolist(), kept.tolist(), counts, out[:, 0].tolist(), sums.tolist()]

say("grouped", grouped)
"""


def test_normal_calls_give_the_weighted_sum(ranks: Ranks) -> None:
    for said in ranks(NORMAL):
        grouped = said.pop("grouped")
        assert all(isinstance(far, float) for far in said.values()), said
        assert max(far for name, far in said.items() if "fp8" not in name) < 1e-2, said
        assert max(far for name, far in said.items() if "fp8" in name) < 5e-2, said
        rows, local, kept, counts, out, sums = grouped
        assert rows == [1.0, 1.0, 2.0, 2.0]  # by source rank
        assert out[1] in (1.0, 2.0)
        assert out == [2 * out[1], out[1], out[1]]  # the first row went to both ranks, once to each
        assert sums == [[0.5, 0.25], [1.0, 2.0], [0.0, 4.0]]
        if counts == [4, 2, 0, 0]:
            assert local == [[0, -1], [0, 1]] * 2
            assert kept == [[0.5, 0.0], [1.0, 2.0]] * 2
        else:
            assert counts == [4, 0, 0, 0]
            assert local == [[-1, 0], [-1, 0]] * 2
            assert kept == [[0.0, 0.25], [0.0, 4.0]] * 2


LOW_LATENCY = """
buffer = both()

def low_latency(tokens, fp8=False, hooked=False, asynchronous=False, zero_copy=False, out=None):
    x, ids, weights = inputs(tokens)
    weights[ids < 0] = float("nan")
    rows, counts, handle, event, hook = buffer.low_latency_dispatch(
        x, ids, M, E, use_fp8=fp8, return_recv_hook=hooked, async_finish=asynchronous)
    assert (hook is not None) == hooked
    one = rows[0] if fp8 else rows
    assert one.shape == (L, ranks * M, H) and counts.shape == (L,) and counts.dtype == torch.int32
    if hooked or asynchronous:
        assert one.float().isnan().all() and (counts == -1).all()
        hook() if hooked else event.current_stream_wait()
    if fp8:
        assert one.dtype == FP8 and rows[1].dtype == torch.float32
        assert rows[1].shape == (L, ranks * M, H // 128)
        assert rows[1].stride() == (ranks * M * H // 128, 1, ranks * M)
        rows = widened(*rows)
    live = ~rows.isnan().any(-1)
    assert (live.sum(1) == counts).all() and all(live[e, : counts[e]].all() for e in range(L))
    done = batched(rows, counts)
    if zero_copy:
        view = buffer.get_next_low_latency_combine_buffer(handle)
        assert not view.is_contiguous() and view.shape == done.shape
        view[:] = done
        done = torch.full_like(done, float("nan"))
    into = torch.zeros(tokens, H, dtype=BF16) if out else None
    result, event, hook = buffer.low_latency_combine(
        done, ids, weights, handle, zero_copy=zero_copy, return_recv_hook=hooked, async_finish=asynchronous, out=into)
    assert into is None or result is into
    if hooked or asynchronous:
        assert result.isnan().all()
        hook() if hooked else event.current_stream_wait()
    weights[ids < 0] = 0
    return far(result, x, ids, weights, factor)

say("even", lambda: low_latency(6))
say("uneven", lambda: low_latency((1, 8)[rank]))
say("empty rank", lambda: low_latency((0, 5)[rank]))
say("all empty", lambda: low_latency(0))
say("fp8", lambda: low_latency((3, 8)[rank], fp8=True))
say("hook", lambda: low_latency((3, 4)[rank], hooked=True))
say("fp8 hook", lambda: low_latency((3, 0)[rank], fp8=True, hooked=True))
say("async", lambda: low_latency((3, 4)[rank], asynchronous=True))
say("zero copy", lambda: low_latency((3, 4)[rank], zero_copy=True))
say("out", lambda: low_latency((3, 4)[rank], out=True, hooked=True))

def two_held():
    calls = [inputs(tokens) for tokens in (3, 5)]
    held = [buffer.low_latency_dispatch(x, ids, M, E, use_fp8=False) for x, ids, _ in calls]
    done = []
    for (x, ids, weights), (rows, counts, handle, _, _) in zip(calls, held):
        result = buffer.low_latency_combine(batched(rows, counts), ids, weights, handle)[0]
        done.append(far(result, x, ids, weights, factor))
    return max(done)

say("two held", two_held)
"""


def test_low_latency_calls_give_the_weighted_sum(ranks: Ranks) -> None:
    for said in ranks(LOW_LATENCY):
        assert all(isinstance(far, float) for far in said.values()), said
        assert max(far for name, far in said.items() if "fp8" not in name) < 1e-2, said
        assert max(far for name, far in said.items() if "fp8" in name) < 5e-2, said


REFUSED_NORMAL = """
buffer = both()
x, ids, weights = inputs(4)
told = layout(buffer, ids)

def dispatch(x=x, buffer=buffer, **changes):
    return buffer.dispatch(x, **(dict(topk_idx=ids, topk_weights=weights, **told) | changes))

refused("float32 rows", lambda: dispatch(x.float()))
refused("fp8 without scales", lambda: dispatch(x.to(FP8)))
refused("strided rows", lambda: dispatch(x.T.contiguous().T))
refused("odd rows", lambda: dispatch(x[:, :1000].contiguous()))
refused("long rows", lambda: dispatch(torch.zeros(4, 8192, dtype=BF16)))
refused("scales shape", lambda: dispatch((x.to(FP8), torch.ones(4, H // 64))))
refused("int32 ids", lambda: buffer.get_dispatch_layout(ids.int(), E))
refused("high ids", lambda: buffer.get_dispatch_layout(ids + 1 + E, E))
refused("low ids", lambda: buffer.get_dispatch_layout(ids - 1, E))
refused("odd experts", lambda: buffer.get_dispatch_layout(ids, E + 1))
refused("bfloat16 weights", lambda: dispatch(topk_weights=weights.to(BF16)))
refused("other layout", lambda: dispatch(topk_idx=ids.flip(0).contiguous()))
refused("int64 counts", lambda: dispatch(num_tokens_per_rank=told["num_tokens_per_rank"].long()))
refused("no layout", lambda: dispatch(is_token_in_rank=None))
refused("small buffer", lambda: dispatch(buffer=Buffer(group, NVL - 128)))
refused("odd SMs", lambda: dispatch(config=Config(21, 24, 256)))
refused("alien stream", lambda: dispatch(allocate_on_comm_stream=True))
refused("small worst case", lambda: dispatch(num_worst_tokens=1))
refused("replay", lambda: buffer.dispatch(x, handle=(1,)))

handle = dispatch()[4]
rows = handle[3].numel()
refused("few rows", lambda: buffer.combine(torch.zeros(rows - 1, H, dtype=BF16), handle))
refused("float32 result", lambda: buffer.combine(torch.zeros(rows, H), handle))
refused("other SMs", lambda: buffer.combine(torch.zeros(rows, H, dtype=BF16), handle, config=Config(16, 10, 256)))
refused("alien handle", lambda: both().combine(torch.zeros(rows, H, dtype=BF16), handle))
refused("not async", lambda: buffer.combine(torch.zeros(rows, H, dtype=BF16), handle)[2].current_stream_wait())
refused("used handle", lambda: buffer.combine(torch.zeros(rows, H, dtype=BF16), handle))
refused("ranks differ", lambda: dispatch(expert_alignment=1 + rank))

refused("unaligned bytes", lambda: Buffer(group, 100))
refused("odd SM count", lambda: Buffer.set_num_sms(3))
refused("ranks unknown", lambda: Buffer.get_dispatch_config(3))
refused("implicit", lambda: Buffer(group, NVL).destroy())
buffer.destroy()
refused("destroyed", lambda: buffer.get_dispatch_layout(ids, E))
refused("twice destroyed", lambda: buffer.destroy())
Buffer.capture().current_stream_wait()
"""


def test_normal_preconditions(ranks: Ranks) -> None:
    parts = {
        "float32 rows": "x is torch.float32",
        "fp8 without scales": "x is torch.float8",
        "strided rows": "not contiguous",
        "odd rows": "multiple of 32",
        "long rows": "up to 16368",
        "scales shape": "scales is",
        "int32 ids": "topk_idx is torch.int32",
        "high ids": "outside",
        "low ids": "outside",
        "odd experts": "not a multiple",
        "bfloat16 weights": "topk_weights is",
        "other layout": "not that of topk_idx",
        "int64 counts": "the layout is torch.int64",
        "no layout": "the layout is NoneType",
        "small buffer": "below the hint",
        "odd SMs": "even",
        "alien stream": "needs previous_event",
        "small worst case": "past 1",
        "replay": "not implemented",
        "few rows": "x is [",
        "float32 result": "x is torch.float32",
        "other SMs": "SMs changed",
        "alien handle": "not a handle of this buffer",
        "not async": "no event",
        "used handle": "combined already",
        "ranks differ": "ranks differ",
        "unaligned bytes": "multiple of 128",
        "odd SM count": "even",
        "ranks unknown": "3 ranks",
        "implicit": "explicitly_destroy",
        "destroyed": "is destroyed",
        "twice destroyed": "is destroyed",
    }
    for said in ranks(REFUSED_NORMAL):
        assert said.keys() == parts.keys()
        assert {name: text for name, text in said.items() if parts[name] not in text} == {}


REFUSED_LOW_LATENCY = """
buffer = both()
x, ids, weights = inputs(4)

def dispatch(x=x, ids=ids, m=M, e=E, buffer=buffer, **options):
    return buffer.low_latency_dispatch(x, ids, m, e, use_fp8=False, **options)

refused("normal buffer", lambda: dispatch(buffer=Buffer(group, NVL)))
refused("small buffer", lambda: dispatch(buffer=Buffer(group, 0, RDMA - 256, low_latency_mode=True)))
refused("RDMA bytes", lambda: Buffer(group, 0, RDMA))
refused("float32 rows", lambda: dispatch(x.float()))
refused("hidden", lambda: dispatch(x[:, :1024].contiguous()))
refused("many tokens", lambda: dispatch(*inputs(9)[:2]))
refused("large M", lambda: dispatch(m=1025))
refused("queue depth", lambda: dispatch(m=512))
refused("slots", lambda: dispatch(m=5))
refused("experts", lambda: dispatch(m=4, e=9))
refused("top-k", lambda: dispatch(ids=torch.arange(12).expand(4, 12).contiguous() % E))
refused("ids", lambda: dispatch(ids=ids + E))
refused("few QPs", lambda: dispatch(buffer=Buffer(group, 0, RDMA, low_latency_mode=True, num_qps_per_rank=1)))
refused("both ways", lambda: dispatch(async_finish=True, return_recv_hook=True))

buffer.dispatch(x, topk_idx=ids, topk_weights=weights, **layout(buffer, ids))
refused("dirty", dispatch)
buffer.clean_low_latency_buffer(M, H, E)

rows, counts, handle, event, hook = dispatch(return_recv_hook=True)
refused("hook open", dispatch)
refused("combine before hook", lambda: buffer.low_latency_combine(rows, ids, weights, handle))
hook()
refused("hook twice", hook)
refused("hook has no event", event.current_stream_wait)
rows = rows.nan_to_num()
second = dispatch()
refused("third", dispatch)

def combine(x=rows, ids=ids, weights=weights, handle=handle, **options):
    return buffer.low_latency_combine(x, ids, weights, handle, **options)

refused("other ids", lambda: combine(ids=ids.clamp(min=0)))
refused("bfloat16 weights", lambda: combine(weights=weights.to(BF16)))
refused("float32 result", lambda: combine(rows.float()))
refused("result shape", lambda: combine(rows[:, :-1].contiguous()))
refused("out", lambda: combine(out=torch.empty(5, H, dtype=BF16)))
refused("normal handle", lambda: combine(handle=(1, 2, 3, 4, 5, 6)))
refused("other sizes", lambda: combine(handle=(*handle[:2], M + 2, H, E)))
refused("not staged", lambda: combine(zero_copy=True))
view = buffer.get_next_low_latency_combine_buffer(handle)
refused("strided view", lambda: combine(view, zero_copy=True))
buffer.low_latency_combine(second[0].nan_to_num(), ids, weights, second[2])
refused("stale view", lambda: combine(zero_copy=True))
said["fewer ids"] = str(float(combine(ids=torch.full_like(ids, -1))[0].abs().max()))
refused("used handle", combine)
refused("ranks differ", lambda: dispatch(e=E * (1 + rank), m=4))
"""


def test_low_latency_preconditions(ranks: Ranks) -> None:
    parts = {
        "normal buffer": "low_latency_mode",
        "small buffer": "below the hint",
        "RDMA bytes": "without low_latency_mode",
        "float32 rows": "x is torch.float32",
        "hidden": "1024 values",
        "many tokens": "9 tokens",
        "large M": "1025",
        "queue depth": "NVSHMEM_QP_DEPTH",
        "slots": "multiple of 4",
        "experts": "multiple of the ranks",
        "top-k": "1 to 11",
        "ids": "outside",
        "few QPs": "num_qps_per_rank",
        "both ways": "excludes",
        "dirty": "clean_low_latency_buffer",
        "hook open": "before the hook",
        "combine before hook": "before the hook",
        "hook twice": "already",
        "hook has no event": "no event",
        "third": "two results",
        "other ids": "did not send to",
        "bfloat16 weights": "topk_weights is",
        "float32 result": "x is torch.float32",
        "result shape": "x is [",
        "out": "out is [",
        "normal handle": "not a handle",
        "other sizes": "the handle says",
        "not staged": "right before",
        "strided view": "not contiguous",
        "stale view": "right before",
        "fewer ids": "0.0",
        "used handle": "combined already",
        "ranks differ": "ranks differ",
    }
    for said in ranks(REFUSED_LOW_LATENCY):
        assert said.keys() == parts.keys()
        assert {name: text for name, text in said.items() if parts[name] not in text} == {}


def test_sizes_are_those_of_deepep(ranks: Ranks) -> None:
    source = """
config = Buffer.get_dispatch_config
said["normal"] = [config(r).get_nvl_buffer_size_hint(7168 * 2, r) >> 20 for r in (2, 4, 8)]
said["rdma"] = config(8).get_rdma_buffer_size_hint(7168 * 2, 8)
said["ll"] = [Buffer.get_low_latency_rdma_size_hint(m, 7168, 8, e) >> 20 for e in (128, 256) for m in (128, 256, 512)]
"""
    assert ranks(source)[0] == {"normal": [80, 160, 320], "rdma": 0, "ll": [910, 1820, 3640, 1820, 3640, 7280]}
