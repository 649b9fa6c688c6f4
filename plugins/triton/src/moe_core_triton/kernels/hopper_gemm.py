"""Grouped GEMMs for Hopper at prefill sizes: persistent, warp-specialised, in Gluon (sm_90a, Triton 3.6 and later).

One CTA an SM. Four producer warps fill a ring of `stages` slots in shared memory (weights by TMA; activations by TMA,
or gathered row by row with cp.async); two consumer warpgroups each own half of a tile's rows and all of its columns.

Protocol of a slot: `full[s]` completes when both operands have landed (the bytes that TMA announced, and for gathered
rows one arrival of each of the 128 producer threads, which the hardware makes when that thread's copies are done);
`empty[s]` completes when both consumers have arrived, each after the wgmma that read the slot has finished. Everybody
walks the same list of tiles in the same order and counts slots with the same counter `it`: slot it % stages, and the
parity (it // stages) & 1 of its `full`; the producer waits for the parity before that one of `empty`, which a fresh
barrier passes. So a consumer is at most `stages` slots behind the other, and may run its epilogue meanwhile.
A consumer whose half of a tile has no rows only passes the slots on: the other then has the tensor cores alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from moe_core_triton.kernels.launching import processors
from moe_core_triton.row_table import RowTable

try:
    from moe_core_triton.kernels.activation import activate as _triton_activate

    activate = gluon.jit(_triton_activate.fn)
except ImportError:

    @gluon.jit
    def activate(gate, up, ACT: gl.constexpr, alpha, beta, limit, HAS_LIMIT: gl.constexpr):
        """A stand-in: silu(gate) * up."""
        return gate / (1.0 + gl.exp(-gate)) * up


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How a kernel is cut. Tiles are table.block_m (128) x block_n; group_m tiles of rows share columns in L2."""

    block_n: int = 256
    block_k: int = 64
    stages: int = 4
    group_m: int = 8
    lag: int = 2  # slots by which the second consumer starts behind the first, so that their epilogues do not coincide
    fence: bool = True  # order cp.async's writes before wgmma's reads by a proxy fence, as PTX asks


DEFAULT = HopperConfig()


@gluon.jit
def _count_live(tile_expert, tiles):
    """Tiles that have an expert: the unused ones, with -1, are the tail of the table."""
    layout: gl.constexpr = gl.BlockedLayout([4], [32], [gl.num_warps()], [0])
    index = gl.arange(0, 1024, layout=layout)
    seen = gl.zeros([1024], gl.int32, layout)
    for first in range(0, tiles, 1024):
        expert = gl.load(tile_expert + first + index, mask=first + index < tiles, other=-1)
        seen += (expert >= 0).to(gl.int32)
    return gl.sum(seen, axis=0)


@gluon.jit
def _place(tile, live, n_tiles, GROUP_M: gl.constexpr):
    """The tile of rows and the tile of columns of entry `tile` of the order: rows fastest, GROUP_M tiles at a time."""
    a_group = GROUP_M * n_tiles
    first = (tile // a_group) * GROUP_M
    size = gl.minimum(live - first, GROUP_M)
    within = tile % a_group
    return first + within % size, within // size


@gluon.jit
def _rows_of(m, table, BM: gl.constexpr):
    """Expert, first position and number of positions of a tile of rows; table: (tile_expert, tile_start, ends)."""
    expert = gl.load(table[0] + m)
    start = gl.load(table[1] + m)
    return expert, start, gl.minimum(gl.load(table[2] + expert) - start, BM)


@gluon.jit
def _produce_up(ring, table, slots, x, x_stride, w_desc, span, HAS_SLOTS: gl.constexpr, TOP_K: gl.constexpr,
                EVEN_K: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr):  # fmt: skip
    """Gathered rows of x, and the gate and up rows of an expert that make the same columns of h."""
    a_ring, b_ring, full, empty = ring
    live, n_tiles, inter, K = span
    BM: gl.constexpr = a_ring.shape[1]
    BN: gl.constexpr = b_ring.shape[1]
    BK: gl.constexpr = a_ring.shape[2]
    VEC: gl.constexpr = 128 // x.dtype.element_ty.primitive_bitwidth
    layout: gl.constexpr = gl.BlockedLayout([1, VEC], [32 * VEC // BK, BK // VEC], [gl.num_warps(), 1], [1, 0])
    rows = gl.arange(0, BM, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, BK, layout=gl.SliceLayout(0, layout))
    it = 0
    for tile in range(gl.program_id(0), live * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, live, n_tiles, GROUP_M)
        expert, start, count = _rows_of(m, table, BM)
        inside = rows < count
        token = start + rows
        if HAS_SLOTS:
            token = gl.load(slots + token, mask=inside, other=0)
        token = gl.where(inside, token // TOP_K, 0)
        source = x + token.to(gl.int64)[:, None] * x_stride + cols[None, :]
        gate_row = expert * (2 * inter) + n * (BN // 2)
        for k in range(0, K, BK):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            weights = b_ring.index(stage)
            mbarrier.expect(ready, BN * BK * (w_desc.dtype.primitive_bitwidth // 8))
            tma.async_copy_global_to_shared(w_desc, [gate_row, k], ready, weights.slice(0, BN // 2))
            tma.async_copy_global_to_shared(w_desc, [gate_row + inter, k], ready, weights.slice(BN // 2, BN // 2))
            mask = inside[:, None]
            if not EVEN_K:
                mask = mask & (k + cols < K)[None, :]
            async_copy.async_copy_global_to_shared(a_ring.index(stage), source + k, mask=mask)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            it += 1


@gluon.jit
def _produce_down(ring, table, h_desc, w_desc, span, GROUP_M: gl.constexpr, STAGES: gl.constexpr):
    """Positions of h, which are contiguous, and rows of w2; the second half of the positions only where it has any."""
    a_ring, b_ring, full, empty = ring
    live, n_tiles, columns, K = span
    BM: gl.constexpr = a_ring.shape[1]
    BN: gl.constexpr = b_ring.shape[1]
    BK: gl.constexpr = a_ring.shape[2]
    HALF: gl.constexpr = BM // 2
    BYTES: gl.constexpr = w_desc.dtype.primitive_bitwidth // 8
    it = 0
    for tile in range(gl.program_id(0), live * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, live, n_tiles, GROUP_M)
        expert, start, count = _rows_of(m, table, BM)
        both = count > HALF
        row = expert * columns + n * BN
        for k in range(0, K, BK):
            stage = it % STAGES
            mbarrier.wait(empty.index(stage), ((it // STAGES) & 1) ^ 1)
            ready = full.index(stage)
            rows = a_ring.index(stage)
            mbarrier.expect(ready, (BN + BM) * BK * BYTES, pred=both)
            mbarrier.expect(ready, (BN + HALF) * BK * BYTES, pred=count <= HALF)
            tma.async_copy_global_to_shared(w_desc, [row, k], ready, b_ring.index(stage))
            tma.async_copy_global_to_shared(h_desc, [start, k], ready, rows.slice(0, HALF))
            tma.async_copy_global_to_shared(h_desc, [start + HALF, k], ready, rows.slice(HALF, HALF), pred=both)
            it += 1


@gluon.constexpr_function
def _acc_layout(columns, bits):
    """Of one warpgroup's accumulator; bits: of an operand's element."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 256 // bits])


@gluon.jit
def _multiply(ring, it, steps, PART: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr, FENCE: gl.constexpr):
    """One tile's half of the rows: [BM / 2, BN] in float32. A slot's wgmma runs while the next slot is waited for."""
    gl.static_assert(LAG < STAGES)
    a_ring, b_ring, full, empty = ring
    HALF: gl.constexpr = a_ring.shape[1] // 2
    BN: gl.constexpr = b_ring.shape[1]
    layout: gl.constexpr = _acc_layout(BN, a_ring.dtype.primitive_bitwidth)
    acc = gl.zeros([HALF, BN], gl.float32, layout)
    if PART == 1 and LAG > 0:
        ahead = it + gl.minimum(LAG, steps - 1)
        mbarrier.wait(full.index(ahead % STAGES), (ahead // STAGES) & 1)
    for step in range(steps):
        stage = it % STAGES
        mbarrier.wait(full.index(stage), (it // STAGES) & 1)
        if FENCE:
            fence_async_shared()
        a = a_ring.index(stage).slice(PART * HALF, HALF)
        b = b_ring.index(stage).permute((1, 0))
        acc = warpgroup_mma(a, b, acc, use_acc=step > 0, is_async=True)
        acc = warpgroup_mma_wait(1, deps=(acc,))
        mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1, pred=step > 0)
        it += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((it + STAGES - 1) % STAGES), count=1)
    return acc


@gluon.jit
def _pass_on(ring, it, steps, STAGES: gl.constexpr):
    """A consumer without rows in this tile: it frees each slot as soon as the slot is full."""
    full, empty = ring[2], ring[3]
    for _ in range(steps):
        mbarrier.wait(full.index(it % STAGES), (it // STAGES) & 1)
        mbarrier.arrive(empty.index(it % STAGES), count=1)
        it += 1


@gluon.jit
def _halves(acc):
    """The left and the right half of the columns; a thread holds the same places of both."""
    M: gl.constexpr = acc.shape[0]
    N: gl.constexpr = acc.shape[1]
    return gl.split(acc.reshape([M, 2, N // 2]).permute(0, 2, 1))


@gluon.constexpr_function
def _store_layout(columns):
    """For the 16-bit stores of a warpgroup: sixteen bytes a thread, whole rows a warp."""
    lanes = min(columns // 8, 32)
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _consume_up(ring, table, h, h_stride, span, act, PART: gl.constexpr, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr,
                GROUP_M: gl.constexpr, STAGES: gl.constexpr, LAG: gl.constexpr,
                FENCE: gl.constexpr):  # fmt: skip
    live, n_tiles, inter, K = span
    BM: gl.constexpr = ring[0].shape[1]
    BK: gl.constexpr = ring[0].shape[2]
    COLS: gl.constexpr = ring[1].shape[1] // 2
    HALF: gl.constexpr = BM // 2
    layout: gl.constexpr = _store_layout(COLS)
    rows = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, COLS, layout=gl.SliceLayout(0, layout))
    steps = gl.cdiv(K, BK)
    it = 0
    for tile in range(gl.program_id(0), live * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, live, n_tiles, GROUP_M)
        _, start, count = _rows_of(m, table, BM)
        if count > PART * HALF:
            gate, up = _halves(_multiply(ring, it, steps, PART, STAGES, LAG, FENCE))
            out = activate(gate, up, ACT, act[0], act[1], act[2], HAS_LIMIT)
            out = gl.convert_layout(out.to(h.dtype.element_ty), layout)
            column = n * COLS + cols
            target = h + (start + rows).to(gl.int64)[:, None] * h_stride + column[None, :]
            gl.store(target, out, mask=(rows < count)[:, None] & (column < inter)[None, :])
        else:
            _pass_on(ring, it, steps, STAGES)
        it += steps


@gluon.jit
def _consume_down(ring, table, slots, row_weights, y, y_stride, span, scale, PART: gl.constexpr,
                  HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
                  LAG: gl.constexpr):  # fmt: skip
    live, n_tiles, columns, K = span
    BM: gl.constexpr = ring[0].shape[1]
    BK: gl.constexpr = ring[0].shape[2]
    BN: gl.constexpr = ring[1].shape[1]
    HALF: gl.constexpr = BM // 2
    layout: gl.constexpr = _store_layout(BN // 2)
    rows = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, layout))
    cols = gl.arange(0, BN // 2, layout=gl.SliceLayout(0, layout))
    acc_layout: gl.constexpr = _acc_layout(BN, ring[0].dtype.primitive_bitwidth)
    rows_mma = PART * HALF + gl.arange(0, HALF, layout=gl.SliceLayout(1, acc_layout))
    steps = gl.cdiv(K, BK)
    it = 0
    for tile in range(gl.program_id(0), live * n_tiles, gl.num_programs(0)):
        m, n = _place(tile, live, n_tiles, GROUP_M)
        _, start, count = _rows_of(m, table, BM)
        if count > PART * HALF:
            slot = start + rows
            slot_mma = start + rows_mma
            if HAS_SLOTS:
                slot = gl.load(slots + slot, mask=rows < count, other=0)
                slot_mma = gl.load(slots + slot_mma, mask=rows_mma < count, other=0)
            factor = gl.full([HALF], scale, gl.float32, rows_mma.type.layout)
            if HAS_WEIGHTS:
                factor *= gl.load(row_weights + slot_mma, mask=rows_mma < count, other=0.0)
            acc = _multiply(ring, it, steps, PART, STAGES, LAG, False)
            left, right = _halves(acc * factor[:, None])
            line = y + slot.to(gl.int64)[:, None] * y_stride
            column = n * BN + cols
            out = gl.convert_layout(left.to(y.dtype.element_ty), layout)
            gl.store(line + column[None, :], out, mask=(rows < count)[:, None] & (column < columns)[None, :])
            column += BN // 2
            out = gl.convert_layout(right.to(y.dtype.element_ty), layout)
            gl.store(line + column[None, :], out, mask=(rows < count)[:, None] & (column < columns)[None, :])
        else:
            _pass_on(ring, it, steps, STAGES)
        it += steps


@gluon.jit
def _make_ring(dtype: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
               FULL: gl.constexpr):  # fmt: skip
    """The slots and their barriers; FULL arrivals fill a slot, one of each consumer empties it."""
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BM, BK], dtype)
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BM, BK], layout)
    b_ring = gl.allocate_shared_memory(dtype, [STAGES, BN, BK], layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=FULL)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()
    return a_ring, b_ring, full, empty


@gluon.jit
def up_kernel(x, x_stride, w_desc, h, h_stride, tile_expert, tile_start, ends, slots, tiles, K, inter, alpha, beta,
              limit, ACT: gl.constexpr, HAS_LIMIT: gl.constexpr, HAS_SLOTS: gl.constexpr, TOP_K: gl.constexpr,
              EVEN_K: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr, BK: gl.constexpr, STAGES: gl.constexpr,
              GROUP_M: gl.constexpr, LAG: gl.constexpr, FENCE: gl.constexpr):  # fmt: skip
    ring = _make_ring(x.dtype.element_ty, BM, BN, BK, STAGES, 4 * 32 + 1)
    span = (_count_live(tile_expert, tiles), gl.cdiv(inter, BN // 2), inter, K)
    table = (tile_expert, tile_start, ends)
    act = (alpha, beta, limit)
    gl.warp_specialize(
        [
            (_consume_up, (ring, table, h, h_stride, span, act, 0, ACT, HAS_LIMIT, GROUP_M, STAGES, LAG, FENCE)),
            (_consume_up, (ring, table, h, h_stride, span, act, 1, ACT, HAS_LIMIT, GROUP_M, STAGES, LAG, FENCE)),
            (_produce_up, (ring, table, slots, x, x_stride, w_desc, span, HAS_SLOTS, TOP_K, EVEN_K, GROUP_M, STAGES)),
        ],
        [4, 4],
        [216, 72],
    )


@gluon.jit
def down_kernel(h_desc, w_desc, y, y_stride, tile_expert, tile_start, ends, slots, row_weights, scale, tiles, K,
                columns, HAS_SLOTS: gl.constexpr, HAS_WEIGHTS: gl.constexpr, BM: gl.constexpr, BN: gl.constexpr,
                BK: gl.constexpr, STAGES: gl.constexpr, GROUP_M: gl.constexpr,
                LAG: gl.constexpr):  # fmt: skip
    ring = _make_ring(h_desc.dtype, BM, BN, BK, STAGES, 1)
    span = (_count_live(tile_expert, tiles), gl.cdiv(columns, BN), columns, K)
    table = (tile_expert, tile_start, ends)
    gl.warp_specialize(
        [
            (_consume_down, (ring, table, slots, row_weights, y, y_stride, span, scale, 0, HAS_SLOTS, HAS_WEIGHTS,
                             GROUP_M, STAGES, LAG)),
            (_consume_down, (ring, table, slots, row_weights, y, y_stride, span, scale, 1, HAS_SLOTS, HAS_WEIGHTS,
                             GROUP_M, STAGES, LAG)),
            (_produce_down, (ring, table, h_desc, w_desc, span, GROUP_M, STAGES)),
        ],
        [4, 4],
        [232, 40],
    )  # fmt: skip


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout(min(128, columns * matrix.element_size()), 8 * matrix.element_size(), 2)
    return TensorDescriptor.from_tensor(matrix, [rows, columns], layout)


def up_gemm(x: Tensor, w13: Tensor, table: RowTable, h: Tensor, *, top_k: int, act: str = "silu", alpha: float = 1.0,
            beta: float = 0.0, limit: float | None = None, config: HopperConfig = DEFAULT) -> Tensor:  # fmt: skip
    """h[p] = act(gate, up) of x[table.slots[p] // top_k] and its expert's rows of w13 [E, 2 * I, H], for live p."""
    experts, twice, K = w13.shape
    inter = twice // 2
    grid = min(processors(x.device), table.tiles * -(-inter // (config.block_n // 2)))
    up_kernel[(grid,)](
        x, x.stride(0), _descriptor(w13.view(experts * twice, K), config.block_n // 2, config.block_k), h, h.stride(0),
        table.tile_expert, table.tile_start, table.ends, table.slots, table.tiles, K, inter, alpha, beta, limit or 0.0,
        ACT=act, HAS_LIMIT=limit is not None, HAS_SLOTS=table.slots is not None, TOP_K=top_k,
        EVEN_K=K % config.block_k == 0, BM=table.block_m, BN=config.block_n, BK=config.block_k, STAGES=config.stages,
        GROUP_M=config.group_m, LAG=config.lag, FENCE=config.fence, num_warps=4,
    )  # fmt: skip
    return h


def down_gemm(h: Tensor, w2: Tensor, table: RowTable, y: Tensor, *, row_weights: Tensor | None = None,
              scale: float = 1.0, config: HopperConfig = DEFAULT) -> Tensor:  # fmt: skip
    """y[table.slots[p]] = (h[p] times its expert's w2 [E, H, I]) * row_weights[table.slots[p]] * scale, for live p."""
    experts, columns, K = w2.shape
    grid = min(processors(h.device), table.tiles * -(-columns // config.block_n))
    down_kernel[(grid,)](
        _descriptor(h, table.block_m // 2, config.block_k),
        _descriptor(w2.view(experts * columns, K), config.block_n, config.block_k), y, y.stride(0), table.tile_expert,
        table.tile_start, table.ends, table.slots, row_weights, scale, table.tiles, K, columns,
        HAS_SLOTS=table.slots is not None, HAS_WEIGHTS=row_weights is not None, BM=table.block_m, BN=config.block_n,
        BK=config.block_k, STAGES=config.stages, GROUP_M=config.group_m, LAG=config.lag, num_warps=4,
    )  # fmt: skip
    return y
