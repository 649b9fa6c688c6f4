"""Expert parallelism on one host: dispatch and combine, and whole layers against their compute alone.

    PYTHONPATH=.:plugins/triton/src python benchmarks/gpu_ep.py --ranks 2 --out bench-out
    python benchmarks/gpu_ep.py --dry --ranks 2       # tiny layers over gloo: every step, no meaning

Every rank brings its own tokens, T each, with uniform random routing. Times are medians, of the slowest rank, in CUDA
graphs where the dispatcher can be captured. `travel` is dispatch and combine with nothing between them; `remote` is
what a rank sends to others in both, and its rate over `travel`; the floor is that at 450 GB/s (NVLink 4, one
direction). `compute` is `plan.run` on what was dispatched; efficiency is compute / layer. The result is checked in the
same run, against the dispatcher `standard` on the tokens of all ranks. Dispatchers that are not installed are left out.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent))

from _gpu import making
from shapes import TINY, Shape, find

import moe_core
from moe_core import ParallelConfig, RunningState, Settings, TopKOutput
from moe_core.errors import MoeCoreError
from moe_core.registry import Registry
from moe_core.vocabulary import Phase

LINK: Final = 450e9
TOKENS: Final = (8, 128, 1024, 4096, 8192)
LAYERS: Final = ("qwen3-235b-a22b:fp8_block128", "qwen3-235b-a22b:bf16", "deepseek-v3:fp8_block128")
DISPATCHERS: Final = ("allgather", "alltoall", "alltoall_grouped")
#: Of plugins: symm_mem of triton, the others of deepep, where DeepEP is installed.
PLUGINS: Final = ("symm_mem", "deepep_normal", "deepep_normal_static", "deepep_ll")
#: Dispatchers of low latency serve this many tokens a rank at most.
DECODE: Final = 128
#: Dispatcher -> phase that it is planned for, and its options. Others: prefill, none.
HOW: Final[dict[str, tuple[Phase, dict[str, Any]]]] = {
    "allgather": (Phase.PREFILL, {"equal_tokens": True}),
    "symm_mem": (Phase.PREFILL, {"equal_tokens": True}),
    "deepep_ll": (Phase.DECODE, {}),
}
#: Those that wait for the host cannot be captured.
CAPTURED: Final = ("symm_mem", "allgather", "deepep_normal_static", "deepep_ll")
#: Whole models' layers that are not one GPU's.
WHOLE: Final = {"deepseek-v3": Shape("deepseek-v3", "DeepSeek-V3", 256, 8, 7168, 2048)}
READINGS, WARM = 15, 3
#: Calls in a graph.
CALLS: Final = 4
#: Relative RMS between two ways to the same sum.
ALLOWED: Final = {"bf16": 1e-2, "fp8_block128": 5e-2}


@dataclass(frozen=True)
class Options:
    """All that a rank needs to know."""

    ranks: int
    layers: tuple[str, ...]
    dispatchers: tuple[str, ...]
    tokens: tuple[int, ...]
    runner: str
    dry: bool
    deadline: float


@dataclass(frozen=True)
class Row:
    """One point. Microseconds of the slowest rank; bytes that the busiest one sends to others."""

    layer: str
    dispatcher: str
    tokens: int
    captured: bool
    travel_us: float
    compute_us: float
    layer_us: float
    remote_bytes: int
    error: float

    @property
    def rate(self) -> float:
        """Remote GB/s while tokens travel."""
        return self.remote_bytes / self.travel_us / 1e3

    @property
    def floor_us(self) -> float:
        """Of dispatch and combine together."""
        return 1e6 * self.remote_bytes / LINK

    @property
    def efficiency(self) -> float:
        """Compute over the whole layer."""
        return self.compute_us / self.layer_us


@functools.cache
def registry() -> Registry:
    """The plugins of this repository that are on the path, installed or not."""
    found = []
    for name in ("triton", "deepep"):
        with contextlib.suppress(ImportError):
            found.append(importlib.import_module(f"moe_core_{name}.plugin").plugin)
    return Registry(found)


class Rank:
    """One process of the benchmark."""

    def __init__(self, rank: int, options: Options) -> None:
        self.rank, self.options = rank, options
        self.device = torch.device("cpu" if options.dry else f"cuda:{rank}")

    def slowest(self, value: float) -> float:
        """The largest of all ranks."""
        held = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MAX)
        return float(held)

    def timed(self, work: Callable[[], Any]) -> float:
        """Median microseconds, of the slowest rank. All ranks begin together."""
        found = []
        for reading in range(WARM + READINGS):
            dist.barrier()
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                began.record()
                work()
                ended.record()
                torch.cuda.synchronize()
                microseconds = 1e3 * began.elapsed_time(ended)
            else:
                start = time.perf_counter()
                work()
                microseconds = 1e6 * (time.perf_counter() - start)
            if reading >= WARM:
                found.append(microseconds)
        return self.slowest(statistics.median(found))

    def measured(self, work: Callable[[], Any], captured: bool) -> float:
        """`timed`, of several calls in a CUDA graph where that can be."""
        if not captured:
            return self.timed(work)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(CALLS):
                work()
        return self.timed(graph.replay) / CALLS

    def plan(self, config: Any, weights: Any, dispatcher: str, most: int) -> Any:
        """This rank's plan for at most `most` tokens a rank. None where the dispatcher is not installed."""
        options = self.options
        phase, chosen = HOW.get(dispatcher, (Phase.PREFILL, {}))
        captured = dispatcher in CAPTURED and self.device.type == "cuda"
        tokens = "replicated" if dispatcher == "standard" else "sharded"
        parallel = ParallelConfig(ep_size=options.ranks, ep_rank=self.rank, tokens=tokens)
        settings = Settings(
            runner=options.runner, dispatcher=dispatcher, options={dispatcher: chosen} if chosen else {}
        )
        more: dict[str, Any] = {"settings": settings, "group": dist.group.WORLD, "registry": registry()}
        more |= {"phases": (phase,), "graph_capture": (phase,) if captured else ()}
        try:
            return moe_core.plan(config, weights, parallel, max_tokens=most, **more)
        except MoeCoreError as error:
            if dispatcher in DISPATCHERS:
                raise
            if self.rank == 0:
                print(f"{dispatcher} is left out: {error}", flush=True)
            return None

    def layer(self, name: str, scheme: str) -> list[Row]:
        """Every dispatcher and number of tokens for one layer."""
        options, shape = self.options, WHOLE.get(name) or find(name)
        config = shape.config(scheme)
        if options.dry:
            config = config.replace(dtype="float32")
        local = config.replace(num_experts=config.num_experts // options.ranks, top_k=1)
        weights = making.random_weights(local, self.device, 100 + self.rank)
        most, rows = max(options.tokens), list[Row]()
        summed = self.plan(config, weights, "standard", most * options.ranks)
        for dispatcher in options.dispatchers:
            decode = HOW.get(dispatcher, (Phase.PREFILL,))[0] is Phase.DECODE
            limit = min(most, DECODE) if decode else most
            bound = self.plan(config, weights, dispatcher, limit)
            for tokens in options.tokens if bound is not None else ():
                if tokens > limit:
                    continue
                if self.slowest(float(time.monotonic() > options.deadline)):
                    break
                rows.append(self.point(f"{name}:{scheme}", shape, bound, summed, dispatcher, tokens))
            if bound is not None:
                bound.close()
        return rows

    def point(self, layer: str, shape: Shape, plan: Any, summed: Any, dispatcher: str, tokens: int) -> Row:
        """One dispatcher and number of tokens."""
        made = making.random_inputs(shape, tokens, "uniform", self.device, 1000 * tokens + self.rank)
        hidden, topk = made.hidden.to(plan._binding.dtype), made.topk
        phase = HOW.get(dispatcher, (Phase.PREFILL,))[0]
        state = RunningState(phase)
        captured = dispatcher in CAPTURED and self.device.type == "cuda"
        dispatched = plan.dispatch(hidden, topk, state)
        sent = self.remote(dispatcher, dispatched, plan, hidden, topk)
        done = plan.run(dispatched, state)
        plan.combine(done, state)

        def travel() -> Any:
            given = plan.dispatch(hidden, topk, RunningState(phase))
            return plan.combine(replace(done, handle=given.handle), RunningState(phase))

        return Row(
            layer,
            dispatcher,
            tokens,
            captured,
            self.measured(travel, captured),
            self.measured(lambda: plan.run(dispatched, RunningState(phase)), captured),
            self.measured(lambda: plan(hidden, topk, phase=phase), captured),
            int(self.slowest(sent)),
            self.slowest(self.apart(plan(hidden, topk, phase=phase), summed, hidden, topk)),
        )

    def remote(self, dispatcher: str, dispatched: Any, plan: Any, hidden: Any, topk: Any) -> float:
        """Bytes that this rank sends to others: tokens with ids and weights, and results.

        Of `allgather`, every token to every rank. Of batches by expert, a row for each of a token's experts elsewhere;
        of the others, a row for each rank that has some.
        """
        ranks, config = self.options.ranks, plan._config
        owners = topk.topk_ids // (config.num_experts // ranks)
        if dispatched.format == "batched":
            others = int((owners != self.rank).sum())
        elif dispatcher == "allgather":
            others = (ranks - 1) * hidden.shape[0]
        else:
            others = sum(int((owners == rank).any(dim=1).sum()) for rank in range(ranks) if rank != self.rank)
        payload = dispatched.hidden_states.dtype.itemsize * hidden.shape[1]
        scale = dispatched.hidden_scale
        payload += 0 if scale is None else scale.shape[-1] * scale.dtype.itemsize
        travelling = 0 if dispatched.format == "batched" else 8 * config.top_k
        return float(others * (payload + travelling + hidden.dtype.itemsize * hidden.shape[1]))

    def apart(self, result: Any, summed: Any, hidden: Any, topk: Any) -> float:
        """Relative RMS from the sum over replicated tokens."""
        parts = []
        for part in (hidden, topk.topk_ids, topk.topk_weights):
            whole = part.new_empty(self.options.ranks * part.shape[0], *part.shape[1:])
            dist.all_gather_into_tensor(whole, part.contiguous())
            parts.append(whole)
        wanted = summed(parts[0], TopKOutput(parts[1], parts[2]))
        wanted = wanted[self.rank * hidden.shape[0] :][: hidden.shape[0]].float()
        return float((result.float() - wanted).norm() / wanted.norm())


def _run(rank: int, options: Options, rendezvous: str, out: str) -> None:
    backend = "gloo" if options.dry else "nccl"
    if options.dry:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(rank)
    dist.init_process_group(backend, init_method=f"file://{rendezvous}", rank=rank, world_size=options.ranks)
    me, rows = Rank(rank, options), list[Row]()
    with torch.no_grad():
        for layer in options.layers:
            name, _, scheme = layer.partition(":")
            rows += me.layer(name, scheme)
            if options.dry is False:
                torch.cuda.empty_cache()
    if rank == 0:
        Path(out).write_text(json.dumps([asdict(row) for row in rows]))
    dist.barrier()
    os._exit(0)  # gloo's threads now and then end a process in std::terminate while it is torn down


def show(rows: list[Row]) -> Table:
    """A line a point."""
    table = Table(title="microseconds, medians of the slowest rank; *: in a CUDA graph")
    left = ("layer", "dispatcher")
    numbers = ("T a rank", "travel", "compute", "layer", "remote GB/s", "x floor", "efficiency", "error")
    for header in (*left, *numbers):
        table.add_column(header, justify="left" if header in left else "right")
    for row in rows:
        table.add_row(
            row.layer,
            row.dispatcher + ("*" if row.captured else ""),
            str(row.tokens),
            *(f"{number:.0f}" for number in (row.travel_us, row.compute_us, row.layer_us, row.rate)),
            f"{row.travel_us / row.floor_us:.2f}",
            f"{100 * row.efficiency:.0f} %",
            f"{row.error:.1e}",
        )
    return table


@click.command()
@click.option("--ranks", default=2, show_default=True, help="GPUs of this host.")
@click.option("--layers", default=",".join(LAYERS), show_default=True, help="shape:scheme,...")
@click.option("--dispatchers", default=",".join(DISPATCHERS + PLUGINS), show_default=True)
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="Of a rank.")
@click.option("--runner", default="triton", show_default=True)
@click.option("--budget", default=300.0, show_default=True, help="Seconds after which no further point begins.")
@click.option("--out", type=click.Path(path_type=Path), default=Path("bench-out"), show_default=True)
@click.option("--dry", is_flag=True, help="Tiny layers over gloo on this CPU.")
def main(
    ranks: int, layers: str, dispatchers: str, tokens: str, runner: str, budget: float, out: Path, dry: bool
) -> None:
    """Measure, print a table and write gpu_ep.json. Exit code 1 where a result is wrong."""
    if not dry and torch.cuda.device_count() < ranks:
        raise click.ClickException(f"{ranks} GPUs are needed, torch sees {torch.cuda.device_count()}")
    if dry:
        layers, tokens, runner = ",".join(f"{name}:bf16" for name in TINY if "biased" not in name), "3,5", "reference"
        dispatchers = ",".join(DISPATCHERS)
    options = Options(
        ranks,
        tuple(layers.split(",")),
        tuple(dispatchers.split(",")),
        tuple(map(int, tokens.split(","))),
        runner,
        dry,
        time.monotonic() + budget,
    )
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found = f"{folder}/rows.json"
        mp.spawn(_run, args=(options, f"{folder}/rendezvous", found), nprocs=ranks)
        rows = [Row(**row) for row in json.loads(Path(found).read_text())]
    Console(width=170).print(show(rows))
    device = "CPU" if dry else torch.cuda.get_device_name()
    about = {"device": device, "ranks": ranks, "torch": torch.__version__, "link_gb_s": LINK / 1e9}
    (out / "gpu_ep.json").write_text(
        json.dumps({"environment": about, "rows": [asdict(row) for row in rows]}, indent=1)
    )
    wrong = [row for row in rows if not row.error <= ALLOWED[row.layer.rpartition(":")[2]]]
    for row in wrong:
        click.echo(f"WRONG: {row.layer} {row.dispatcher} T={row.tokens}: {row.error:.2g}", err=True)
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
