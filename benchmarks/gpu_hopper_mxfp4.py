"""The mxfp4 part of gpu_hopper.py: the kernels of hopper_mxfp4.py on layers as GPT-OSS has them (biases, swiglu_oai).

    python benchmarks/gpu_hopper.py mxfp4-64       # tiles of 64 tokens
Errors are against float32 products of the dequantized weights. Times: microseconds and TFLOP/s of up and down over
live rows, and of `wide_order`, the kernel that orders the columns of x for up.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import gpu_hopper
import torch

# As in gpu_hopper.py: experts, top_k, H, I, T, share of the slots that are dropped.
TINY = {
    "tiny": (4, 2, 256, 256, 300, 0.0),
    "tails": (5, 3, 336, 208, 301, 0.3),
    "oneexpert": (3, 2, 128, 128, 7, 0.0),
    "busy": (7, 4, 640, 768, 3001, 0.1),
}
SHAPES = {f"gptoss {T}": (128, 4, 2880, 2880, T, 0.0) for T in (64, 256, 1024, 4096, 16384)}
#: x in order of position, so that up reads it by TMA: checked on these.
PRE = ("tails", "busy")
ALPHA, BETA, CLAMP, FACTOR = 1.702, 1.0, 7.0, 0.5
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass
class Matrix:
    """Codes and scales as the scheme stores them, and as the kernels read them."""

    codes: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor
    words: torch.Tensor
    padded: torch.Tensor

    def dense(self, expert):
        """float32 of one expert's weights."""
        codes = self.codes[expert]
        both = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2).long()
        table = torch.tensor((*E2M1, *(-value for value in E2M1)), device=codes.device)
        scale = torch.exp2(self.scale[expert].float() - 127).repeat_interleave(32, -1)
        return table[both] * scale[:, : both.shape[1]]


def matrix(experts, n, k):
    """Random weights: any code, scales that give sums of about one."""
    from moe_core_triton.packing import halves, pad_groups

    device = {"device": gpu_hopper.DEVICE}
    codes = torch.randint(0, 256, (experts, n, k // 2), dtype=torch.uint8, **device)
    scale = torch.randint(118, 123, (experts, n, -(-k // 32)), dtype=torch.uint8, **device)
    bias = torch.randn(experts, n, dtype=torch.bfloat16, **device)
    return Matrix(codes, scale, bias, halves(codes, 128, words=True), pad_groups(scale, k, 128, 32).contiguous())


@dataclass
class Problem:
    x: torch.Tensor
    w13: Matrix
    w2: Matrix
    weights: torch.Tensor
    table: object
    up_table: object  # without slots where x is in order of position
    h: torch.Tensor
    y: torch.Tensor
    live: int
    top_k: int


def make(shape, block_m, pair, pre):
    _, top_k, H, I, T, _ = shape  # noqa: E741
    torch.manual_seed(T)
    device = {"device": gpu_hopper.DEVICE}
    x = torch.randn(T, H, dtype=torch.bfloat16, **device)
    table, live = gpu_hopper.routed(shape, block_m)
    up_table = replace(table, slots=None) if pre else table
    if pre:
        x = x[table.slots.clamp(min=0).long() // top_k]
    h = torch.full((T * top_k, I), float("nan"), dtype=torch.bfloat16, **device)
    y = torch.full((T * top_k, H), float("nan"), dtype=torch.bfloat16, **device)
    return Problem(x, *pair, torch.rand(T * top_k, **device), table, up_table, h, y, live, top_k)


def check(p, experts):
    """Largest relative error of up and down over some experts, and whether exactly the dropped rows are untouched."""
    from moe_core_triton.hopper import natural

    worst = {"up": 0.0, "down": 0.0}
    for e in experts:
        start, end = int(p.table.starts[e]), int(p.table.ends[e])
        if start == end:
            continue
        slots = p.table.slots[start:end].long()
        x = p.x[start:end] if p.up_table.slots is None else p.x[slots // p.top_k]
        gate, up = (x.float() @ p.w13.dense(e).T + p.w13.bias[e].float()).chunk(2, dim=1)
        gate, up = gate.clamp(max=CLAMP), up.clamp(-CLAMP, CLAMP)
        want = gate * torch.sigmoid(ALPHA * gate) * (up + BETA)
        got = natural(p.h[start:end]).float()
        out = (got @ p.w2.dense(e).T + p.w2.bias[e].float()) * p.weights[slots, None] * FACTOR
        worst["up"] = max(worst["up"], gpu_hopper.apart(got, want))
        worst["down"] = max(worst["down"], gpu_hopper.apart(p.y[slots], out))
    dropped = p.table.positions - p.live
    clean = int(p.h.isnan().any(1).sum()) == dropped == int(p.y.isnan().any(1).sum())
    clean = clean and bool(p.h[p.live :].isnan().all())
    ok = clean and all(error < 1e-2 for error in worst.values())
    return ok, " ".join(f"{k} {v:.1e}" for k, v in worst.items()) + ("" if clean else " WRONG ROWS WRITTEN")


def run_shape(label, shape, block_m, pair, pre=False):
    from moe_core_triton.kernels import hopper_mxfp4
    from moe_core_triton.kernels.hopper_unpack import wide_order

    experts, _, H, I, _, _ = shape  # noqa: E741
    p = make(shape, block_m, pair, pre)
    ordered = wide_order(p.x)
    how = {"act": "swiglu_oai", "alpha": ALPHA, "beta": BETA, "limit": CLAMP, "top_k": 1 if pre else p.top_k}

    def up():
        hopper_mxfp4.up_gemm_mxfp4(ordered, p.w13.words, p.w13.padded, p.up_table, p.h, bias=p.w13.bias, **how)

    def down():
        given = {"bias": p.w2.bias, "row_weights": p.weights, "factor": FACTOR}
        hopper_mxfp4.down_gemm_mxfp4(p.h, p.w2.words, p.w2.padded, p.table, p.y, **given)

    began = time.time()
    up()
    torch.cuda.synchronize()
    middle = time.time()
    down()
    torch.cuda.synchronize()
    compiled = f"first calls {middle - began:.1f} + {time.time() - middle:.1f} s"
    ok, errors = check(p, range(experts) if label in TINY else (0, experts // 2, experts - 1))
    line = f"   {label:12s} {'ok   ' if ok else 'WRONG'} {errors}"
    if label in TINY:
        print(f"{line}  {compiled}{' pre' if pre else ''}", flush=True)
        return
    print(line, end="  ", flush=True)
    up_us, down_us, order_us = (gpu_hopper.microseconds(f) for f in (up, down, lambda: wide_order(p.x)))
    ops = 2 * p.live * H * I
    rate = 3 * ops / (up_us + down_us + order_us) / 1e6
    print(
        f"up {up_us:8.1f} us {2 * ops / up_us / 1e6:4.0f}  down {down_us:8.1f} us {ops / down_us / 1e6:4.0f}  "
        f"order {order_us:5.1f} us  all {rate:4.0f} TFLOP/s",
        flush=True,
    )


def run(block_m):
    """Every shape with tiles of `block_m` tokens."""
    print(f"== mxfp4: tiles of {block_m} tokens", flush=True)
    sizes, pair = None, None
    for label, shape in (TINY | SHAPES).items():
        try:
            experts, _, H, I, _, _ = shape  # noqa: E741
            if sizes != (experts, H, I):  # the large weights are made once
                sizes = (experts, H, I)
                pair = None  # before the next ones, to have the memory
                pair = matrix(experts, 2 * I, H), matrix(experts, H, I)
            for pre in (False, True) if label in PRE else (False,):
                run_shape(label, shape, block_m, pair, pre)
        except Exception as problem:  # the next shape may still work
            print(f"   {label}: {type(problem).__name__}: {str(problem)[-600:]}", flush=True)
            if "CUDA error" in str(problem):
                return
        torch.cuda.empty_cache()
