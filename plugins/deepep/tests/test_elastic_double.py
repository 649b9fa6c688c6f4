"""The double of DeepEP V2 in real processes over gloo: what it moves, what it leaves undefined, what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from moe_core.testing import run_ranks

#: Before a rank's script: `refused`, inputs and a whole call, beside what `run_ranks` gives.
BEFORE = """
from double_basics import DoubleError
from elastic_double import ElasticBuffer, EPHandle, WILD
E, K, H, M = 8, 3, 256, 8
L = E // ranks
BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn

def refused(name, work):
    "The message of a DoubleError, or what else came."
    try:
        work()
        said[name] = "nothing"
    except DoubleError as error:
        said[name] = str(error)
    except Exception as error:
        said[name] = f"{type(error).__name__}: {error}"

def made(tokens=M, **options):
    return ElasticBuffer(group, num_max_tokens_per_rank=tokens, hidden=H, num_topk=K,
                         **(dict(explicitly_destroy=True) | options))

def inputs(tokens):
    "bfloat16 [T, H], int64 [T, K] with some -1, float32 [T, K]; other values on each rank."
    torch.manual_seed(rank + 10 * tokens)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    ids[::2, 0] = -1
    ids[3:4] = -1
    return torch.randn(tokens, H).to(BF16), ids, torch.rand(tokens, K)

FACTORS = 1.0 + torch.arange(E) / 4

def far(result, x, ids, weights):
    "The largest difference from the weighted sum of experts that multiply, relative."
    scale = torch.where(ids >= 0, FACTORS[ids.clamp(min=0)] * weights, 0.0).sum(1, keepdim=True)
    want = scale * x.float()
    assert result.shape == want.shape and result.dtype == BF16
    return float((result.float() - want).abs().max() / want.abs().max())

def call(buffer, tokens, *, fp8=False, expand=False, counted=True, later=False, alignment=1, m=None):
    x, ids, weights = inputs(tokens)
    sent = x
    if fp8:
        groups = x.float().unflatten(1, (-1, 128))
        scales = groups.abs().amax(-1).clamp(min=1e-4) / 448
        sent = ((groups / scales.unsqueeze(-1)).flatten(1).to(FP8), scales)
    rows, local, kept, handle, event = buffer.dispatch(
        sent, ids, weights, num_experts=E, num_max_tokens_per_rank=m, expert_alignment=alignment, num_sms=8,
        do_cpu_sync=counted, do_expand=expand, async_with_compute_stream=later)
    one = rows[0] if fp8 else rows
    psum = handle.psum_num_recv_tokens_per_scaleup_rank
    if later:
        assert one.float().isnan().all() and (psum == -1).all() and kept.isnan().all()
        event.current_stream_wait()
    if fp8:
        assert one.dtype == FP8 and rows[1].dtype == torch.float32 and rows[1].shape == (len(one), H // 128)
        rows = (one.float().unflatten(1, (-1, 128)) * rows[1].unsqueeze(-1)).flatten(1)
    came, room = int(psum[-1]), (m or M) * ranks
    assert handle.recv_src_metadata.shape == (came if counted else room, K + 2)
    ends = handle.psum_num_recv_tokens_per_expert
    if expand:
        assert local is None and kept.shape == (len(rows),)
        starts = ends - handle.num_unaligned_recv_tokens_per_expert
        assert (starts % alignment == 0).all() and int(starts[0]) == 0
        out, live = torch.full_like(rows, float("nan")), torch.zeros(len(rows), dtype=torch.bool)
        for e, (a, b) in enumerate(zip(starts.tolist(), ends.tolist())):
            live[a:b] = True
            out[a:b] = rows[a:b] * FACTORS[rank * L + e] * kept[a:b, None]
        assert live.equal(kept.isfinite()) and live.equal(rows.isfinite().all(1))
        worst = room * min(K, L) + (alignment - 1) * L
        assert len(rows) == -(-(int(ends[-1]) if counted else worst) // alignment) * alignment
        slots = handle.recv_src_metadata[:came, 2:]
        assert sorted(slots[slots >= 0].tolist()) == live.nonzero().flatten().tolist()
    else:
        assert local.shape == kept.shape == (len(rows), K) and len(rows) == (came if counted else room)
        assert (local[came:] == WILD).all() and rows[came:].isnan().all() and local[:came].max() < L
        assert (local[:came] >= 0).any(1).all() and kept[:came].isfinite().all()
        per_expert = torch.bincount(local[:came][local[:came] >= 0], minlength=L)
        assert ends.tolist() == (-(-per_expert // alignment) * alignment).cumsum(0).tolist()
        chosen = torch.where(local[:came] >= 0, FACTORS[local[:came].clamp(min=0) + rank * L] * kept[:came], 0.0)
        out = torch.full_like(rows, float("nan"))
        out[:came] = rows[:came] * chosen.sum(1, keepdim=True)
    listed = handle.num_recv_tokens_per_expert_list
    assert bool(listed) == counted and all(n % alignment == 0 for n in listed)
    result, none, event = buffer.combine(out.to(BF16), handle, num_sms=8, async_with_compute_stream=later)
    assert none is None
    if later:
        assert result.isnan().all()
        event.current_stream_wait()
    return far(result, x, ids, weights)
"""
CALLS = """
T = [6, 1][rank]
for expand in (False, True):
    for counted in (True, False):
        for more in ({}, {"fp8": True}, {"later": True}, {"alignment": 16}, {"m": 16}):
            buffer = made(more.get("m", M), use_fp8_dispatch=more.get("fp8", False))
            say(f"{expand} {counted} {more}", lambda: call(buffer, T, expand=expand, counted=counted, **more))

def order():
    "Where the tokens of one rank end up, of five calls with the same tokens: in any order."
    x, ids, weights = inputs(8)
    ids[:] = torch.tensor([0, L, -1])
    seen = set()
    for _ in range(5):
        rows, _, _, handle, _ = made().dispatch(x, ids, weights, num_experts=E)
        seen.add(tuple(handle.recv_src_metadata[:, 0].tolist()))
        assert sorted(seen.copy().pop()) == [r * M + t for r in range(ranks) for t in range(8)]
    return len(seen) > 1

say("order", order)
"""


def test_calls_give_the_weighted_sum(said: Said) -> None:
    for rank in said("calls"):
        assert rank.pop("order") is True
        assert all(isinstance(far, float) for far in rank.values()), rank
        assert max(far for name, far in rank.items() if "fp8" not in name) < 1e-2, rank
        assert max(far for name, far in rank.items() if "fp8" in name) < 5e-2, rank


HANDLE = """
buffer = made()
x = torch.full((2, H), 1.0 + rank, dtype=BF16)
ids = torch.tensor([[0, 1, L], [-1, L, -1]])
weights = torch.tensor([[0.5, 0.25, 1.0], [float("nan"), 2.0, 7.0]])
rows, local, kept, handle, _ = buffer.dispatch(x, ids, weights, num_experts=E, expert_alignment=4)
by_token = handle.recv_src_metadata[:, 0].argsort()
said["came"] = [rows[by_token, 0].tolist(), local[by_token].tolist(), kept[by_token].nan_to_num(-1).tolist()]
said["meta"] = handle.recv_src_metadata[by_token].tolist()
said["counts"] = [handle.psum_num_recv_tokens_per_scaleup_rank.tolist(),
                  handle.psum_num_recv_tokens_per_expert.tolist(), handle.num_recv_tokens_per_expert_list]
said["sum"] = buffer.combine(rows, handle)[0][:, 0].tolist()
rows, local, kept, handle, _ = buffer.dispatch(x, ids, weights, num_experts=E, expert_alignment=4, do_expand=True)
said["expanded"] = [handle.psum_num_recv_tokens_per_expert.tolist(), len(rows), sorted(kept.nan_to_num(-1).tolist())]
said["copies"] = buffer.combine(rows, handle)[0][:, 0].tolist()
"""


def test_a_handle_says_where_rows_came_from_and_a_row_goes_to_a_rank_once(said: Said) -> None:
    first, second = said("handle")
    wild = 0x7F7F7F7F
    # Each rank's first token has two experts on rank 0; weights of the other rank's experts come along.
    assert first["came"] == [[1.0, 2.0], [[0, 1, -1]] * 2, [[0.5, 0.25, 1.0]] * 2]
    assert first["meta"] == [[0, 0, wild, wild, wild], [8, 3, wild, wild, wild]]
    assert first["counts"] == [[1, 2], [4, 8, 8, 8], [4, 4, 0, 0]]
    assert second["came"][1] == [[-1, -1, 0], [-1, 0, -1]] * 2
    assert second["came"][2] == [[0.5, 0.25, 1.0], [-1.0, 2.0, 7.0]] * 2
    assert [row[:2] for row in second["meta"]] == [[0, 2], [1, 1], [8, 5], [9, 4]]
    assert second["counts"] == [[2, 4], [4, 4, 4, 4], [4, 0, 0, 0]]
    assert first["sum"] == [2.0, 1.0]  # once from each rank
    assert second["sum"] == [4.0, 2.0]
    assert first["expanded"] == [[2, 6, 8, 8], 8, [-1.0] * 4 + [0.25, 0.25, 0.5, 0.5]]
    assert second["expanded"] == [[4, 4, 4, 4], 4, [1.0, 1.0, 2.0, 2.0]]
    assert first["copies"] == [3.0, 1.0]  # two copies on rank 0
    assert second["copies"] == [6.0, 2.0]


REFUSED = """
buffer = made()
x, ids, weights = inputs(4)

def dispatch(x=x, ids=ids, weights=weights, buffer=buffer, **changes):
    return buffer.dispatch(x, ids, weights, **(dict(num_experts=E) | changes))

refused("float32 rows", lambda: dispatch(x.float()))
refused("fp8 without scales", lambda: dispatch(x.to(FP8)))
refused("strided rows", lambda: dispatch(x.T.contiguous().T))
refused("odd rows", lambda: dispatch(x[:, :100].contiguous()))
refused("wide scales", lambda: dispatch((x.to(FP8), torch.ones(4, 2, dtype=torch.float64))))
refused("few scales", lambda: dispatch((x.to(FP8), torch.ones(3, 2))))
refused("int32 ids", lambda: dispatch(ids=ids.int()))
refused("ids shape", lambda: dispatch(ids=ids[:3].contiguous()))
refused("strided ids", lambda: dispatch(ids=ids.T.contiguous().T))
refused("high ids", lambda: dispatch(ids=ids + E))
refused("low ids", lambda: dispatch(ids=ids - 1))
refused("twice", lambda: dispatch(ids=torch.zeros_like(ids)))
refused("odd experts", lambda: dispatch(num_experts=E + 1))
refused("many experts", lambda: dispatch(num_experts=1024))
refused("bfloat16 weights", lambda: dispatch(weights=weights.to(BF16)))
refused("no weights", lambda: dispatch(weights=None))
refused("many tokens", lambda: dispatch(num_max_tokens_per_rank=2))
refused("no tokens", lambda: dispatch(x[:0], ids[:0], weights[:0]))
refused("small buffer", lambda: dispatch(num_max_tokens_per_rank=1 << 16))
refused("many SMs", lambda: dispatch(num_sms=200))
refused("many queues", lambda: dispatch(num_qps=1000))
refused("alien stream", lambda: dispatch(previous_event=buffer.capture()))
refused("alignment", lambda: dispatch(expert_alignment=0))
refused("replay", lambda: dispatch(handle=1))
refused("zeroed", lambda: dispatch(do_zero_padding=True, do_expand=True))
refused("ranks differ", lambda: dispatch(num_max_tokens_per_rank=4 + rank))
if rank:
    refused("other call", lambda: dispatch())
else:
    refused("other call", lambda: made())

rows, local, kept, handle, event = dispatch()
zeros = torch.zeros_like(rows)
refused("few rows", lambda: buffer.combine(zeros[:-1], handle))
refused("float32 result", lambda: buffer.combine(zeros.float(), handle))
refused("strided result", lambda: buffer.combine(zeros.T.contiguous().T, handle))
refused("short result", lambda: buffer.combine(zeros[:, :128].contiguous(), handle))
refused("weights", lambda: buffer.combine(zeros, handle, topk_weights=kept))
refused("alien handle", lambda: made().combine(zeros, handle))
refused("no handle", lambda: buffer.combine(zeros, None))
refused("not async", event.current_stream_wait)
handle.topk_idx = handle.topk_idx.flip(0)
refused("changed ids", lambda: buffer.combine(zeros, handle))
expanded, _, _, handle, _ = dispatch(do_expand=True)
refused("few copies", lambda: buffer.combine(torch.zeros_like(expanded)[:-1], handle))
flying, _, _, handle, event = dispatch(async_with_compute_stream=True)
refused("not filled", lambda: buffer.combine(torch.zeros_like(flying), handle))
event.current_stream_wait()
ids_of_mine, kept_ids = ids.clone(), dispatch(do_handle_copy=False)[3].topk_idx
said["shares ids"] = str(kept_ids is ids and dispatch()[3].topk_idx is not ids)

refused("odd bytes", lambda: ElasticBuffer(group, 100))
refused("no sizes", lambda: ElasticBuffer(group))
refused("host memory", lambda: ElasticBuffer(group, 1 << 21, 1 << 21))
refused("sorted", lambda: made(deterministic=True))
refused("implicit", lambda: made(explicitly_destroy=False).destroy())
buffer.destroy()
refused("destroyed", dispatch)
refused("twice destroyed", buffer.destroy)
"""


def test_preconditions(said: Said) -> None:
    parts = {
        "float32 rows": "x is torch.float32",
        "fp8 without scales": "x is torch.float8",
        "strided rows": "not contiguous",
        "odd rows": "multiple of 16",
        "wide scales": "4 bytes",
        "few scales": "scales is",
        "int32 ids": "topk_idx is torch.int32",
        "ids shape": "topk_idx is [",
        "strided ids": "topk_idx is not contiguous",
        "high ids": "outside",
        "low ids": "outside",
        "twice": "an expert twice",
        "odd experts": "do not fit",
        "many experts": "do not fit",
        "bfloat16 weights": "topk_weights is",
        "no weights": "not implemented",
        "many tokens": "4 tokens, at most 2",
        "no tokens": "no tokens",
        "small buffer": "bytes for dispatch",
        "many SMs": "200 SMs",
        "many queues": "1000 queue pairs",
        "alien stream": "needs allocate_on_comm_stream",
        "alignment": "positive",
        "replay": "not implemented",
        "zeroed": "not implemented",
        "ranks differ": "ranks differ",
        "other call": "ranks differ",
        "few rows": "x is [",
        "float32 result": "x is torch.float32",
        "strided result": "not contiguous",
        "short result": "multiple of 256",
        "weights": "not implemented",
        "alien handle": "not a handle",
        "no handle": "not a handle",
        "not async": "no event",
        "changed ids": "than topk_idx",
        "few copies": "x is [",
        "not filled": "not waited for",
        "shares ids": "True",
        "odd bytes": "2 MiB",
        "no sizes": "positive",
        "host memory": "not implemented",
        "sorted": "not implemented",
        "implicit": "explicitly_destroy",
        "destroyed": "is destroyed",
        "twice destroyed": "is destroyed",
    }
    for rank in said("refused"):
        assert rank.keys() == parts.keys()
        assert {name: text for name, text in rank.items() if parts[name] not in text} == {}


SIZES = """
class Eight:
    size = staticmethod(lambda: 8)

size = ElasticBuffer.get_buffer_size_hint
said["mib"] = [size(Eight, 4096, 7168, 8) >> 20, size(Eight, 4096, 7168, 8, True) >> 20, size(Eight, 1, 256) >> 20]
"""


def test_sizes_are_those_of_deepep(said: Said) -> None:
    """By hand from its layouts: 8 * 4096 rows of 14336 + 112 bytes, and 8 * 4096 of 14336 + 64 where fp8 comes back."""
    assert said("sizes")[0] == {"mib": [452, 450, 2]}


Said = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> Said:
    """A script's name -> what each of two ranks said in it."""
    scripts = {"calls": CALLS, "handle": HANDLE, "refused": REFUSED, "sizes": SIZES}
    parts = (f"said = {{}}\n{script}\neverything[{name!r}] = said\n" for name, script in scripts.items())
    source = "everything = {}\n" + "".join(parts) + "said = everything\n"
    folder = tmp_path_factory.mktemp("gloo")
    found = run_ranks(2, BEFORE + source, folder, patience_s=60, paths=[Path(__file__).parent])
    return lambda name: [rank[name] for rank in found]
