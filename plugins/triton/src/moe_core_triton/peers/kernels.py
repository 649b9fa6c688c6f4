"""Tokens to the ranks that need them, results back: stores to peers' memory, with flags in place of collectives.

Every program of a launch has its own flags and waits for the same program of each other rank alone; the kernel ends
when all have, so the next kernel of the stream finds everything. Flags and epochs only count up, which a replayed graph
does as well. A program counts what it has sent, and expects as much of the others: calls that were given up between
their two phases, on all ranks, leave both alike.

More programs than a GPU holds at a time end because programs start in the order of their numbers, on every rank.

Addresses of peers are numbers to Triton, without known alignment: `tl.multiple_of` says that rows are of 16 bytes, or
stores would be two bytes wide.

Roofline: the bytes that leave a GPU over its link (450 GB/s with NVLink 4), a token's row to each other rank that has
one of its experts, and back in the layer's dtype. Few tokens: two crossings of the link, about 3 us, a launch each.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moe_core_triton.kernels.quantize import encode, magnitude_bits, scale_of


@triton.jit
def _await(flag, wanted, failure, code, TIMEOUT_NS: tl.constexpr):
    """Until the counter at `flag` has reached `wanted`. Ends the process's context after TIMEOUT_NS (0: never)."""
    seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
    if seen - wanted < 0:
        if TIMEOUT_NS > 0:
            began = tl.extra.cuda.globaltimer()
            while seen - wanted < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")
                if tl.extra.cuda.globaltimer() - began > TIMEOUT_NS:
                    tl.store(failure, code)
                    tl.inline_asm_elementwise(
                        "membar.sys; nanosleep.u32 1000000; trap; mov.b32 $0, $1;", "=r,r", [seen], tl.int32, False, 1
                    )
        else:
            while seen - wanted < 0:
                seen = tl.atomic_add(flag, 0, sem="acquire", scope="sys")


@triton.jit
def _signal(bases, flags_at, epochs, me, R: tl.constexpr, P: tl.constexpr):
    """To the same program of every other rank: what this one had to write is written. Returns its number of times."""
    pid = tl.program_id(0)
    times = tl.load(epochs + pid) + 1
    tl.debug_barrier()
    for j in tl.static_range(1, R):
        base = tl.load(bases + (me + j) % R)
        flag = (base + flags_at).to(tl.pointer_type(tl.int32)) + me * P + pid
        tl.atomic_add(flag, 1, sem="release", scope="sys")
    tl.store(epochs + pid, times)
    return times


@triton.jit
def _await_all(bases, flags_at, wanted, failure, me, R: tl.constexpr, P: tl.constexpr, TIMEOUT_NS: tl.constexpr):
    """For the same program of every other rank."""
    pid = tl.program_id(0)
    own = (tl.load(bases + me) + flags_at).to(tl.pointer_type(tl.int32))
    for j in tl.static_range(1, R):
        source = (me + j) % R
        _await(own + source * P + pid, wanted, failure, source + 1, TIMEOUT_NS)
    tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "rows", "me", "experts"])
def send_tokens(
    hidden, scale, ids, weights, owner, index, bases, epochs, failure,
    flags_at, hidden_at, scale_at, ids_at, weights_at, tokens, rows, experts, me,
    R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, ROW: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr,
    SP: tl.constexpr, QUANTIZE: tl.constexpr, NATIVE: tl.constexpr, DROPPED: tl.constexpr, P: tl.constexpr,
    SEND: tl.constexpr, WAIT: tl.constexpr, TIMEOUT_NS: tl.constexpr,
):  # fmt: skip
    """SEND: rows of this rank to whom they concern. WAIT: for those of the others.

    hidden: int32 words [tokens, ROW], and scale: int32 words [tokens, SCALES]; or, with QUANTIZE, hidden: floating
    point [tokens, SCALES * 128], which becomes e4m3 with a scale for each 128 on the way, bit for bit as
    `kernels.quantize` does it. ids [tokens, K] of any integer dtype, weights float32 [tokens, K]; owner, index: int32
    [experts], the rank of an expert and its number there. bases: int64 [R], each rank's buffer; *_at: offsets in it, in
    bytes. A rank's part has `rows` rows there, `tokens` or more; ids of experts elsewhere, and of rows that are no
    token, become DROPPED.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    if SEND:
        k = tl.arange(0, KP)
        part = tl.arange(0, SP)
        if QUANTIZE:
            word = part[:, None] * 128 + tl.arange(0, 128)[None, :]
            inside = (part < SCALES)[:, None]
        else:
            word = tl.arange(0, BLOCK)
            inside = word < ROW
        for t in tl.range(pid, rows, programs):
            token = tl.full((), 0, tl.int64) + t
            there = t < tokens
            slot = token * K + k
            e = tl.load(ids + slot, mask=there & (k < K), other=-1).to(tl.int32)
            live = (e >= 0) & (e < experts)
            rank = tl.load(owner + e, mask=live, other=-1)
            number = tl.load(index + e, mask=live, other=0)
            weight = tl.load(weights + slot, mask=live, other=0.0)
            if QUANTIZE:
                value = tl.load(hidden + token * (SCALES * 128) + word, mask=there & inside, other=0.0)
                value = value.to(tl.float32)
                factors = scale_of(tl.max(magnitude_bits(value), 1), 448.0)
                row = encode(value, tl.broadcast_to(factors[:, None], value.shape), False, NATIVE)
            else:
                row = tl.load(hidden + token * ROW + word, mask=there & inside, other=0)
                if SCALES > 0:
                    factors = tl.load(scale + token * SCALES + part, mask=there & (part < SCALES), other=0)
            at = me * rows + token
            for j in tl.static_range(R):
                peer = (me + j) % R
                base = tl.load(bases + peer)
                mine = rank == peer
                to_ids = (base + ids_at).to(tl.pointer_type(tl.int32)) + at * K + k
                tl.store(to_ids, tl.where(mine, number, DROPPED), mask=k < K)
                to_weights = (base + weights_at).to(tl.pointer_type(tl.float32)) + at * K + k
                tl.store(to_weights, tl.where(mine, weight, 0.0), mask=k < K)
                needed = tl.max(mine.to(tl.int32), axis=0) > 0
                to_row = (base + hidden_at + at * (ROW * 4)).to(tl.pointer_type(row.dtype))
                tl.store(tl.multiple_of(to_row, 16) + word, row, mask=needed & inside)
                if SCALES > 0:
                    to_scale = (base + scale_at).to(tl.pointer_type(factors.dtype)) + at * SCALES + part
                    tl.store(to_scale, factors, mask=needed & (part < SCALES))
        times = _signal(bases, flags_at, epochs, me, R, P)
    else:
        times = tl.load(epochs + pid)
    if WAIT:
        _await_all(bases, flags_at, times, failure, me, R, P, TIMEOUT_NS)


@triton.jit(do_not_specialize=["tokens", "rows", "me", "experts", "factor"])
def sum_results(
    result, out, ids, owner, bases, epochs, failure,
    flags_at, results_at, ids_at, out_stride, tokens, rows, experts, factor, me,
    R: tl.constexpr, K: tl.constexpr, KP: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr,
    DROPPED: tl.constexpr, P: tl.constexpr, SEND: tl.constexpr, WAIT: tl.constexpr, TIMEOUT_NS: tl.constexpr,
):  # fmt: skip
    """SEND: results of other ranks' tokens to them. WAIT: for those of the others, and sum them up.

    result: [R * rows, H] of this rank's experts; rows without a slot here are not read. ids: [tokens, K], this rank's
    own, as `send_tokens` got them; those that it was sent lie at ids_at. out: [tokens, H], `factor` times the sum over
    ranks, in the order of ranks and in float32.
    """
    pid, programs = tl.program_id(0), tl.num_programs(0)
    k = tl.arange(0, KP)
    h = tl.arange(0, BLOCK)
    own = tl.load(bases + me)
    if SEND:
        got = (own + ids_at).to(tl.pointer_type(tl.int32))
        for t in tl.range(pid, rows, programs):
            token = tl.full((), 0, tl.int64) + t
            to = me * rows + token
            for j in tl.static_range(1, R):
                peer = (me + j) % R
                row = peer * rows + token
                number = tl.load(got + row * K + k, mask=k < K, other=DROPPED)
                needed = tl.max((number != DROPPED).to(tl.int32), axis=0) > 0
                value = tl.load(result + row * H + h, mask=needed & (h < H), other=0.0)
                base = tl.load(bases + peer)
                to_row = (base + results_at).to(result.dtype) + to * H
                tl.store(tl.multiple_of(to_row, 16) + h, value, mask=needed & (h < H))
        times = _signal(bases, flags_at, epochs, me, R, P)
    else:
        times = tl.load(epochs + pid)
    if WAIT:
        _await_all(bases, flags_at, times, failure, me, R, P, TIMEOUT_NS)
        come = tl.multiple_of((own + results_at).to(result.dtype), 16)
        for t in tl.range(pid, tokens, programs):
            token = tl.full((), 0, tl.int64) + t
            e = tl.load(ids + token * K + k, mask=k < K, other=-1).to(tl.int32)
            live = (e >= 0) & (e < experts)
            rank = tl.load(owner + e, mask=live, other=-1)
            total = tl.zeros((BLOCK,), tl.float32)
            for source in tl.static_range(R):
                needed = tl.max((rank == source).to(tl.int32), axis=0) > 0
                here = source == me
                row = (source * rows + token) * H + h
                total += tl.load(come + row, mask=needed & (here == 0) & (h < H), other=0.0).to(tl.float32)
                total += tl.load(result + row, mask=needed & here & (h < H), other=0.0).to(tl.float32)
            tl.store(out + token * out_stride + h, (total * factor).to(out.dtype.element_ty), mask=h < H)
