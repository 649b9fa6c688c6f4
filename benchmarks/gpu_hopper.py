"""Experiment: the warp-specialised Gluon GEMMs (plugins/triton, kernels/hopper_*.py) on an H200: correct? fast?

    python benchmarks/gpu_hopper.py                # every variant, each in its own process with a time limit
    python benchmarks/gpu_hopper.py fp8 mxfp4-64   # these
Per shape: microseconds and TFLOP/s of up and down over live rows, and both together as a share of 790 TFLOP/s (fp8:
1580). Before every timed burst of at most 30 ms the GPU rests for 50 ms, so that its power limit does not decide. The
variants with mxfp4 weights are in gpu_hopper_mxfp4.py.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "plugins" / "triton" / "src"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

LIMIT = 120
DEVICE = "cuda"
IDLE, BURST, BURSTS = 0.05, 0.025, 5


@dataclass
class Variant:
    """Tiles of rows that share columns in L2, of up and down; rows of a tile; timed shapes, None for all."""

    group_m: tuple = (8, 8)
    fp8: bool = False
    block_m: int = 128
    only: tuple | None = None
    pre: bool = False  # the rows of x lie in order of position already: up reads them by TMA, without slots


SHORT = ("qwen30 4k", "dsv3ep8 4k")
PACKED = "mxfp4-"
VARIANTS = {
    "fp8": Variant(fp8=True),
    "fp8group": Variant((16, 16), fp8=True, only=SHORT),
    "fp8pre": Variant(fp8=True, pre=True, only=SHORT),
    "base": Variant(),
    "base16": Variant((16, 16)),
    "base4": Variant((4, 4), only=SHORT),
    "192": Variant(block_m=192),
    "group": Variant((16, 4), only=SHORT),
    "192group": Variant((4, 16), block_m=192, only=SHORT),
    "pre": Variant(pre=True, only=SHORT),
    "192pre": Variant(block_m=192, pre=True, only=SHORT),
}
NAMES = (*VARIANTS, f"{PACKED}32", f"{PACKED}64", f"{PACKED}192")
# name: (experts, top_k, H, I, T, share of the slots that are dropped)
TINY = {
    "tiny": (4, 2, 256, 256, 300, 0.0),
    "tails": (5, 3, 320 + 16, 208, 301, 0.3),
    "oneexpert": (3, 2, 64, 128, 7, 0.0),
}
TINY_FP8 = {
    "tiny": (4, 2, 256, 256, 300, 0.0),
    "tails": (5, 3, 1152, 1408, 301, 0.3),
    "oneexpert": (3, 2, 128, 128, 7, 0.0),
    "busy": (7, 4, 640, 768, 3001, 0.1),
}
SHAPES = {
    "mixtral 1k": (8, 2, 4096, 14336, 1024, 0.0),
    "olmoe 1k": (64, 8, 2048, 1024, 1024, 0.0),
    "qwen30 4k": (128, 8, 2048, 768, 4096, 0.0),
    "qwen30 16k": (128, 8, 2048, 768, 16384, 0.0),
    "dsv3ep8 4k": (32, 8, 7168, 2048, 4096, 0.0),
    "gptoss 4k": (128, 4, 2880, 2880, 4096, 0.0),
    "mixtral 4k": (8, 2, 4096, 14336, 4096, 0.0),
}


@dataclass
class Problem:
    x: object
    w13: object
    w2: object
    weights: object
    table: object
    h: object
    y: object
    live: int
    top_k: int
    up_table: object  # the table for up: without slots where x is in order of position
    x_scale: object = None
    w13_scale: object = None
    w2_scale: object = None
    h_scale: object = None


def fp8_weights(experts, rows, width):
    """Random e4m3 weights and block scales that differ: [E, rows, width], [E, rows / 128, width / 128]."""
    import torch

    w = torch.empty(experts, rows, width, dtype=torch.float8_e4m3fn, device=DEVICE)
    for one in w:
        one.copy_(torch.randn(rows, width, dtype=torch.bfloat16, device=DEVICE) * 64)
    return w, (torch.rand(experts, rows // 128, width // 128, device=DEVICE) + 0.5) * (width**-0.5 / 64)


def routed(shape, block_m):
    """A random routing in tiles of that height, and how many slots have an expert."""
    import torch
    from moe_core_triton.row_table import RowTable, most_tiles

    experts, top_k, _, _, T, dropped = shape
    device = {"device": DEVICE}
    ids = torch.rand(T, experts, **device).argsort(1)[:, :top_k].reshape(-1)
    ids = torch.where(torch.rand(T * top_k, **device) < dropped, experts, ids)
    slots = ids.argsort(stable=True).to(torch.int32)
    counts = torch.bincount(ids, minlength=experts + 1)[:experts]
    ends = counts.cumsum(0)
    starts = ends - counts
    tiles = most_tiles(T * top_k, experts, block_m)
    expert_of, start_of = [], []
    for expert, (start, count) in enumerate(zip(starts.tolist(), counts.tolist(), strict=True)):
        for first in range(0, count, block_m):
            expert_of.append(expert)
            start_of.append(start + first)
    live = int(counts.sum())
    slots[live:] = -1
    pad = tiles - len(expert_of)
    table = RowTable(
        positions=T * top_k, block_m=block_m, starts=starts.to(torch.int32), ends=ends.to(torch.int32),
        tile_expert=torch.tensor(expert_of + [-1] * pad, dtype=torch.int32, **device),
        tile_start=torch.tensor(start_of + [0] * pad, dtype=torch.int32, **device),
        ticket=torch.zeros(1, dtype=torch.int32, **device), slots=slots,
    )  # fmt: skip
    return table, live


def make(shape, variant):
    import torch

    experts, top_k, H, I, T, _ = shape  # noqa: E741
    torch.manual_seed(T)
    device = {"device": DEVICE}
    x = torch.randn(T, H, dtype=torch.bfloat16, **device)
    table, live = routed(shape, variant.block_m)
    slots, up_table = table.slots, table
    if variant.pre:
        x = x[slots.clamp(min=0).long() // top_k]
        up_table = replace(table, slots=None)
    nan = float("nan")
    y = torch.full((T * top_k, H), nan, dtype=torch.bfloat16, **device)
    rest = (torch.rand(T * top_k, **device), table)
    if variant.fp8:
        from moe_core_triton.kernels.quantize import quantize_rows

        w13, w13_scale = fp8_weights(experts, 2 * I, H)
        w2, w2_scale = fp8_weights(experts, H, I)
        # Rows of different size, and one of zeros.
        x *= torch.rand(x.shape[0], 1, dtype=torch.bfloat16, **device) + 0.1
        x[0] = 0
        x, x_scale = quantize_rows(x, "fp8_group128")
        h = torch.full((T * top_k, I), 0x7F, dtype=torch.uint8, **device).view(torch.float8_e4m3fn)
        h_scale = torch.full((T * top_k, I // 128), nan, **device)
        return Problem(x, w13, w2, *rest, h, y, live, top_k, up_table, x_scale, w13_scale, w2_scale, h_scale)
    w13 = torch.randn(experts, 2 * I, H, dtype=torch.bfloat16, **device).mul_(H**-0.5)
    w2 = torch.randn(experts, H, I, dtype=torch.bfloat16, **device).mul_(I**-0.5)
    h = torch.full((T * top_k, I), nan, dtype=torch.bfloat16, **device)
    return Problem(x, w13, w2, *rest, h, y, live, top_k, up_table)


def apart(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def wide(x, scale, block=1):
    """float32 of e4m3 rows under scales a group of 128 columns (and of `block` rows), or of 16 bits without scales."""
    if scale is None:
        return x.float()
    return x.float() * scale.repeat_interleave(block, 0).repeat_interleave(128, 1)


def part(scale, e):
    return None if scale is None else scale[e]


def check(p, experts):
    """Largest relative error of up and down over some experts, and whether exactly the dropped rows are untouched."""
    import torch

    fp8 = p.x_scale is not None
    worst = {"up": 0.0, "down": 0.0}
    for e in experts:
        start, end = int(p.table.starts[e]), int(p.table.ends[e])
        if start == end:
            continue
        slots = p.table.slots[start:end].long()
        rows = slice(start, end) if p.up_table.slots is None else slots // p.top_k
        x = wide(p.x[rows], part(p.x_scale, rows))
        gate, up = (x @ wide(p.w13[e], part(p.w13_scale, e), 128).T).chunk(2, dim=1)
        want = torch.nn.functional.silu(gate) * up
        got = wide(p.h[start:end], part(p.h_scale, slice(start, end)))
        if fp8:
            groups = want.view(want.shape[0], -1, 128)
            scale = groups.abs().amax(2) / 448
            scale = torch.where(scale == 0, 1.0, scale)
            worst["scale"] = max(worst.get("scale", 0.0), apart(p.h_scale[start:end], scale))
            worst["raw"] = max(worst.get("raw", 0.0), apart(got, want) / 4)  # the rounding to e4m3 itself is 2.6e-2
            want = wide((groups / scale[:, :, None]).view(want.shape).to(torch.float8_e4m3fn), scale)
        out = (got @ wide(p.w2[e], part(p.w2_scale, e), 128).T) * p.weights[slots, None] * 0.5
        worst["up"] = max(worst["up"], apart(got, want))
        worst["down"] = max(worst["down"], apart(p.y[slots], out))
    dropped = p.table.positions - p.live
    empty = (p.h.view(torch.uint8) == 0x7F) | (p.h.view(torch.uint8) == 0xFF) if fp8 else p.h.isnan()
    clean = int(empty.any(1).sum()) == dropped and int(p.y.isnan().any(1).sum()) == dropped
    clean = clean and (dropped == 0 or bool(empty[p.live :].all()))
    if fp8:
        clean = clean and int(p.h_scale.isnan().sum()) == dropped * p.h_scale.shape[1]
    # Two roundings to e4m3 of sums that differ in the last place differ here and there by a whole e4m3 step.
    ok = clean and all(error < (1.5e-2 if name == "up" and fp8 else 1e-2) for name, error in worst.items())
    return ok, " ".join(f"{k} {v:.1e}" for k, v in worst.items()) + ("" if clean else " WRONG ROWS WRITTEN")


def microseconds(function):
    """Median over bursts, each after a rest."""
    import torch

    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    with torch.cuda.graph(graph):
        function()
    began.record()
    graph.replay()
    ended.record()
    torch.cuda.synchronize()
    calls = max(1, min(400, int(BURST / (began.elapsed_time(ended) * 1e-3))))
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        for _ in range(calls):
            function()
    graph.replay()
    times = []
    for _ in range(BURSTS):
        torch.cuda.synchronize()
        time.sleep(IDLE)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended) * 1e3 / calls)
    return statistics.median(times)


def run_variant(name):
    import torch
    from moe_core_triton.kernels import hopper_fp8, hopper_gemm

    v = VARIANTS[name]
    peak = 1580e12 if v.fp8 else 790e12
    print(f"== {name}: group_m {v.group_m} rows {v.block_m} pre {v.pre}", flush=True)
    a = torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE)
    us = microseconds(lambda: torch.mm(a, a))
    print(f"   torch bf16 8192^3: {2 * 8192**3 / us / 1e6:.0f} TFLOP/s", flush=True)
    tiny = TINY_FP8 if v.fp8 else TINY
    for label, shape in {**tiny, **SHAPES}.items():
        if v.only is not None and label not in v.only and label not in tiny:
            continue
        try:
            p = make(shape, v)

            def up(p=p):
                how = {"top_k": 1 if v.pre else p.top_k, "group_m": v.group_m[0]}
                if v.fp8:
                    hopper_fp8.up_gemm_fp8(p.x, p.x_scale, p.w13, p.w13_scale, p.up_table, p.h, p.h_scale, **how)
                else:
                    hopper_gemm.up_gemm(p.x, p.w13, p.up_table, p.h, **how)

            def down(p=p):
                how = {"row_weights": p.weights, "factor": 0.5, "group_m": v.group_m[1]}
                if v.fp8:
                    hopper_fp8.down_gemm_fp8(p.h, p.h_scale, p.w2, p.w2_scale, p.table, p.y, **how)
                else:
                    hopper_gemm.down_gemm(p.h, p.w2, p.table, p.y, **how)

            began = time.time()
            up()
            torch.cuda.synchronize()
            middle = time.time()
            down()
            torch.cuda.synchronize()
            compiled = f"first calls {middle - began:.1f} + {time.time() - middle:.1f} s"
            experts = shape[0]
            ok, errors = check(p, range(experts) if label in tiny else (0, experts // 2, experts - 1))
            line = f"   {label:11s} {'ok   ' if ok else 'WRONG'} {errors}"
            if label in tiny:
                print(f"{line}  {compiled}", flush=True)
                continue
            print(line, end="  ", flush=True)
            up_us = microseconds(up)
            down_us = microseconds(down)
            _, _, H, I, _, _ = shape  # noqa: E741
            up_ops, down_ops = 4 * p.live * H * I, 2 * p.live * H * I
            rate = (up_ops + down_ops) / (up_us + down_us) * 1e6
            print(
                f"up {up_us:8.1f} us {up_ops / up_us / 1e6:4.0f}  "
                f"down {down_us:8.1f} us {down_ops / down_us / 1e6:4.0f}  "
                f"both {rate / 1e12:4.0f} TFLOP/s = {100 * rate / peak:.1f} %",
                flush=True,
            )
        except Exception as problem:  # the next shape may still work
            print(f"   {label}: {type(problem).__name__}: {str(problem)[-600:]}", flush=True)
            if "CUDA error" in str(problem):
                return
        finally:
            p = None
            torch.cuda.empty_cache()


def main():
    if len(sys.argv) == 3 and sys.argv[1] == "--variant":
        name = sys.argv[2]
        if name.startswith(PACKED):
            import gpu_hopper_mxfp4

            gpu_hopper_mxfp4.run(int(name.removeprefix(PACKED)))
        else:
            run_variant(name)
        return
    for name in sys.argv[1:] or NAMES:
        began = time.time()
        try:
            subprocess.run([sys.executable, __file__, "--variant", name], timeout=LIMIT, check=False)
        except subprocess.TimeoutExpired:
            print(f"\n== {name}: stopped after {LIMIT} s", flush=True)
        print(f"   ({time.time() - began:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
