"""Expert parallelism on one host: dispatch and combine, and whole layers against their compute alone.

    PYTHONPATH=.:plugins/triton/src python benchmarks/gpu_ep.py --ranks 2 --out "$OUT"
    python benchmarks/gpu_ep.py --dry --ranks 2       # tiny layers over gloo: every step, no meaning

Every rank brings its own tokens, T each, with uniform random routing. Times are medians, of the slowest rank. `remote`
is what a rank sends to others in dispatch and combine together, and its rate over their time; the floor is that at 450
GB/s (NVLink 4, one direction). `compute` is `plan.run` on what was dispatched; efficiency is compute / layer. The
result is checked in the same run, against the dispatcher `standard` on the tokens of all ranks.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
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
from _gpu.contestants import registry
from shapes import TINY, Shape, find

import moe_core
from moe_core import ParallelConfig, RunningState, Settings, TopKOutput
from moe_core.vocabulary import Phase

LINK: Final = 450e9
TOKENS: Final = (8, 128, 1024, 4096, 8192)
LAYERS: Final = ("qwen3-235b-a22b:fp8_block128", "qwen3-235b-a22b:bf16", "deepseek-v3:fp8_block128")
DISPATCHERS: Final = ("allgather", "alltoall", "alltoall_grouped")
#: Whole models' layers that are not one GPU's.
WHOLE: Final = {"deepseek-v3": Shape("deepseek-v3", "DeepSeek-V3", 256, 8, 7168, 2048)}
READINGS, WARM = 15, 3
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
    dispatch_us: float
    compute_us: float
    combine_us: float
    layer_us: float
    graph_us: float | None
    remote_bytes: int
    error: float

    @property
    def rate(self) -> float:
        """Remote GB/s while tokens travel."""
        return self.remote_bytes / (self.dispatch_us + self.combine_us) / 1e3

    @property
    def floor_us(self) -> float:
        """Of dispatch and combine together."""
        return 1e6 * self.remote_bytes / LINK

    @property
    def efficiency(self) -> float:
        """Compute over the whole layer, in a graph where there is one."""
        return self.compute_us / (self.layer_us if self.graph_us is None else self.graph_us)


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

    def graph(self, work: Callable[[], Any]) -> float | None:
        """The same of a captured call; None on a CPU."""
        if self.device.type != "cuda":
            return None
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        return self.timed(graph.replay)

    def layer(self, name: str, scheme: str) -> list[Row]:
        """Every dispatcher and number of tokens for one layer."""
        options, shape = self.options, WHOLE.get(name) or find(name)
        config = shape.config(scheme)
        if options.dry:
            config = config.replace(dtype="float32")
        local = config.replace(num_experts=config.num_experts // options.ranks, top_k=1)
        weights = making.random_weights(local, self.device, 100 + self.rank)
        place = {"ep_size": options.ranks, "ep_rank": self.rank}
        most, rows = max(options.tokens), []

        def plan(dispatcher: str, tokens: str, **more: Any) -> moe_core.MoePlan:
            chosen = Settings(runner=options.runner, dispatcher=dispatcher, options=more)
            given: dict[str, Any] = {
                "settings": chosen,
                "group": dist.group.WORLD,
                "registry": registry(options.runner),
            }
            return moe_core.plan(
                config, weights, ParallelConfig(**place, tokens=tokens), max_tokens=most * options.ranks, **given
            )

        summed = plan("standard", "replicated")
        for dispatcher in options.dispatchers:
            more = {"allgather": {"equal_tokens": True}} if dispatcher == "allgather" else {}
            bound = plan(dispatcher, "sharded", **more)
            for tokens in options.tokens:
                if self.slowest(float(time.monotonic() > options.deadline)):
                    return rows
                rows.append(self.point(f"{name}:{scheme}", shape, bound, summed, dispatcher, tokens))
        return rows

    def point(self, layer: str, shape: Shape, plan: Any, summed: Any, dispatcher: str, tokens: int) -> Row:
        """One dispatcher and number of tokens."""
        made = making.random_inputs(shape, tokens, "uniform", self.device, 1000 * tokens + self.rank)
        hidden, topk = made.hidden.to(plan._binding.dtype), made.topk
        dispatched = plan.dispatch(hidden, topk, RunningState(Phase.PREFILL))
        done = plan.run(dispatched, RunningState(Phase.PREFILL))

        def combine() -> Any:
            return plan.combine(done, RunningState(Phase.PREFILL))

        # The others wait for the host.
        graph = self.graph(lambda: plan(hidden, topk)) if dispatcher == "allgather" else None
        return Row(
            layer,
            dispatcher,
            tokens,
            self.timed(lambda: plan.dispatch(hidden, topk, RunningState(Phase.PREFILL))),
            self.timed(lambda: plan.run(dispatched, RunningState(Phase.PREFILL))),
            self.timed(combine),
            self.timed(lambda: plan(hidden, topk)),
            graph,
            int(self.slowest(self.remote(dispatched, plan, hidden, tokens))),
            self.slowest(self.apart(plan(hidden, topk), summed, hidden, topk)),
        )

    def remote(self, dispatched: Any, plan: Any, hidden: Any, tokens: int) -> float:
        """Bytes that this rank sends to others: tokens with ids and weights, and results."""
        route = getattr(dispatched.handle, "route", None)
        others = (self.options.ranks - 1) * tokens
        if route is not None:
            others = sum(route.sent_rows) - route.sent_rows[self.rank]
        payload = dispatched.hidden_states.dtype.itemsize * hidden.shape[1]
        scale = dispatched.hidden_scale
        payload += 0 if scale is None else scale.shape[-1] * scale.dtype.itemsize
        return float(others * (payload + 8 * plan._config.top_k + hidden.dtype.itemsize * hidden.shape[1]))

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
    table = Table(title="microseconds, medians of the slowest rank")
    headers = (
        "layer",
        "dispatcher",
        "T a rank",
        "dispatch",
        "compute",
        "combine",
        "layer",
        "in a graph",
        "remote GB/s",
    )
    for header in (*headers, "x floor", "efficiency", "error"):
        table.add_column(header, justify="left" if header in headers[:2] else "right")
    for row in rows:
        travel = row.dispatch_us + row.combine_us
        numbers = (row.dispatch_us, row.compute_us, row.combine_us, row.layer_us)
        table.add_row(
            row.layer,
            row.dispatcher,
            str(row.tokens),
            *(f"{number:.0f}" for number in numbers),
            "-" if row.graph_us is None else f"{row.graph_us:.0f}",
            f"{row.rate:.0f}",
            f"{travel / row.floor_us:.1f}",
            f"{100 * row.efficiency:.0f} %",
            f"{row.error:.1e}",
        )
    return table


@click.command()
@click.option("--ranks", default=2, show_default=True, help="GPUs of this host.")
@click.option("--layers", default=",".join(LAYERS), show_default=True, help="shape:scheme,...")
@click.option("--dispatchers", default=",".join(DISPATCHERS), show_default=True)
@click.option("--tokens", default=",".join(map(str, TOKENS)), show_default=True, help="Of a rank.")
@click.option("--runner", default="triton", show_default=True)
@click.option("--budget", default=300.0, show_default=True, help="Seconds after which no further point begins.")
@click.option("--out", type=click.Path(path_type=Path), default=lambda: Path(os.environ.get("OUT", "bench-out")))
@click.option("--dry", is_flag=True, help="Tiny layers over gloo on this CPU.")
def main(
    ranks: int, layers: str, dispatchers: str, tokens: str, runner: str, budget: float, out: Path, dry: bool
) -> None:
    """Measure, print a table and write gpu_ep.json. Exit code 1 where a result is wrong."""
    if not dry and torch.cuda.device_count() < ranks:
        raise click.ClickException(f"{ranks} GPUs are needed, torch sees {torch.cuda.device_count()}")
    if dry:
        layers, tokens, runner = ",".join(f"{name}:bf16" for name in TINY if "biased" not in name), "3,5", "reference"
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
