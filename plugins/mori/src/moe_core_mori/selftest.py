"""MoRI under this plugin on real GPUs: whole layers against one rank, a captured graph, and times.

    torchrun --nproc-per-node=8 -m moe_core_mori.selftest --out mori_mi300x.json
    torchrun --nproc-per-node=2 -m moe_core_mori.selftest --double --out dry.json     # on CPUs, over the double

Every rank brings its own tokens. The experts are the reference runner's, so what differs is MoRI's doing. Writes what
was found, with versions and the device, as JSON; ends with 1 where a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

import torch
import torch.distributed as dist
from torch import Tensor

import moe_core
from moe_core import MoeConfig, ParallelConfig, Phase, RunningState, TopKOutput
from moe_core.errors import MoeCoreError
from moe_core.formats import StandardCombineInput
from moe_core.registry import Registry
from moe_core.testing import make_layer
from moe_core_mori import testing

NAMES: Final = ("mori", "mori_ll", "mori_v2")
PAYLOADS: Final = {"bf16": "bf16", "fp8_block128": "fp8_group128", "mxfp4": "mxfp4"}
ALLOWED: Final = 2e-2
TIMED: Final = (8, 128, 1024, 4096)


class Bench:
    """One run on this rank. tiny: for the double, which no size makes truer."""

    def __init__(self, device: torch.device, *, tiny: bool) -> None:
        self.rank, self.ranks, self.device, self.tiny = dist.get_rank(), dist.get_world_size(), device, tiny
        self.found: list[dict[str, Any]] = []

    def plan(self, name: str, config: MoeConfig, weights: Any, payload: str, tokens: int) -> Any:
        """A plan over MoRI with the reference runner."""
        parallel = ParallelConfig(ep_size=self.ranks, ep_rank=self.rank, tokens="sharded")
        plugin = testing.OnCpu(payload) if self.device.type == "cpu" else testing.Narrowed(payload)
        return moe_core.plan(
            config,
            weights.shard(config, parallel),
            parallel,
            group=dist.group.WORLD,
            max_tokens=tokens,
            registry=Registry([plugin]),
            settings=moe_core.Settings(runner="reference", dispatcher=name),
        )

    def say(self, name: str, work: Callable[[], float]) -> None:
        """Keep the largest error of all ranks, or what was raised."""
        try:
            mine: Any = work()
        except (MoeCoreError, AssertionError, RuntimeError, ValueError, NotImplementedError) as error:
            mine = f"{type(error).__name__}: {error}"
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        wrong = [text for text in everyone if isinstance(text, str)]
        error_ = None if wrong else float(torch.tensor(everyone).max())
        passed = error_ is not None and error_ <= ALLOWED
        self.found.append({"check": name, "passed": passed, "error": error_, "raised": wrong[0] if wrong else None})

    def layer(
        self,
        name: str,
        scheme: str,
        counts: list[int],
        *,
        pattern: str = "uniform",
        flights: int = 1,
        told: bool = False,
    ) -> float:
        """The largest difference from the same layer on one rank, relative to its largest value."""
        experts = 4 * self.ranks
        config = MoeConfig(num_experts=experts, top_k=4, hidden_size=256, intermediate_size=128, scheme=scheme)
        layers = [
            make_layer(config, 7 + i, tokens=sum(counts), pattern=pattern, device=self.device) for i in range(flights)
        ]
        whole = moe_core.plan(config, layers[0].weights, runner="reference")
        plan = self.plan(name, config, layers[0].weights, PAYLOADS[scheme], max(8, *counts))
        rows, worst = slice(sum(counts[: self.rank]), sum(counts[: self.rank + 1])), [0.0]
        for phase in (Phase.PREFILL, Phase.DECODE):
            states = [RunningState(phase, tokens_per_rank=counts if told else None) for _ in layers]
            own = [(x.hidden[rows], TopKOutput(x.topk.topk_ids[rows], x.topk.topk_weights[rows])) for x in layers]
            begun = [plan.dispatch_begin(*one, s) for one, s in zip(own, states, strict=True)]
            ran = [plan.run(plan.dispatch_finish(b, s), s) for b, s in zip(begun, states, strict=True)]
            back = [plan.combine_begin(r, s) for r, s in zip(ran, states, strict=True)]
            for one, waiting, s in zip(layers, back, states, strict=True):
                result, expected = plan.combine_finish(waiting, s).float(), whole(one.hidden, one.topk).float()
                if len(result):
                    worst.append(float((result - expected[rows]).abs().max() / expected.abs().max()))
        plan.close()
        return float(torch.tensor(worst).max())

    def identity(self, name: str, hidden: int, tokens: int) -> tuple[Any, Callable[[Tensor, TopKOutput], Tensor]]:
        """A plan, and a call of it whose experts do nothing: a token comes back once from each rank it went to."""
        experts = 4 * self.ranks if self.tiny else 256
        config = MoeConfig(num_experts=experts, top_k=4, hidden_size=hidden, intermediate_size=128)
        plan = self.plan(name, config, make_layer(config, 1, tokens=1, device=self.device).weights, "bf16", tokens)

        def call(x: Tensor, topk: TopKOutput) -> Tensor:
            state = RunningState()
            given = plan.dispatch(x, topk, state)
            result: Tensor = plan.combine(StandardCombineInput(given.hidden_states, given.handle), state)
            return result

        return plan, call

    def routed(self, tokens: int, experts: int, seed: int) -> TopKOutput:
        """Uniform, another one on each rank."""
        random = torch.Generator().manual_seed(100 * seed + self.rank)
        ids = torch.rand(tokens, experts, generator=random).topk(4).indices.to(torch.int32)
        return TopKOutput(ids.to(self.device), torch.full((tokens, 4), 0.25, device=self.device))

    def graph(self, name: str) -> float:
        """Captured once, replayed with other tokens and another routing."""
        plan, call = self.identity(name, 512, 64)
        experts = plan.resolution.request.config.num_experts
        x = torch.zeros(64, 512, dtype=torch.bfloat16, device=self.device)
        topk, worst = self.routed(64, experts, 0), 0.0
        for _ in range(3):
            call(x, topk)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call(x, topk)
        for seed in range(1, 4):
            other = self.routed(64, experts, seed)
            topk.topk_ids.copy_(other.topk_ids)
            x.normal_()
            dist.barrier()
            graph.replay()
            owners = topk.topk_ids.long() // (experts // self.ranks)
            goes = (owners.unsqueeze(-1) == torch.arange(self.ranks, device=self.device)).any(1).sum(1, keepdim=True)
            worst = max(worst, float((result.float() - goes * x.float()).abs().max() / 16))
        del graph
        plan.close()
        return worst

    def time(self, name: str, tokens: int) -> dict[str, Any]:
        """Microseconds of dispatch and combine together, experts doing nothing: the median of the slowest rank."""
        hidden = 256 if self.tiny else 7168
        plan, call = self.identity(name, hidden, tokens)
        experts, took = plan.resolution.request.config.num_experts, []
        x = torch.randn(tokens, hidden, device=self.device).to(torch.bfloat16)
        for i in range(3 if self.tiny else 25):
            topk = self.routed(tokens, experts, i)
            dist.barrier()
            self._wait()
            began = time.perf_counter()
            call(x, topk)
            self._wait()
            took.append((time.perf_counter() - began) * 1e6)
        plan.close()
        everyone: list[Any] = [None] * self.ranks
        dist.all_gather_object(everyone, statistics.median(took[len(took) // 5 :]))
        return {"dispatcher": name, "tokens": tokens, "hidden": hidden, "us": round(max(everyone), 1)}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def run(self) -> dict[str, Any]:
        """All of it, for what is installed."""
        odd = [5, 0, 8, 1, 3, 8, 2, 7] * self.ranks
        many = [3] * self.ranks if self.tiny else [300] * self.ranks
        few = odd[: self.ranks]
        for name in NAMES:
            for scheme in PAYLOADS:
                self.say(f"{name}, {scheme}", partial(self.layer, name, scheme, few))
            for pattern in ("one_hot", "skewed", "dropped", "duplicate"):
                self.say(f"{name}, {pattern}", partial(self.layer, name, "bf16", many, pattern=pattern))
            self.say(f"{name}, nobody", partial(self.layer, name, "bf16", [0] * self.ranks))
            self.say(f"{name}, counts told", partial(self.layer, name, "bf16", few, told=True))
            self.say(f"{name}, two in flight", partial(self.layer, name, "bf16", many, flights=2))
            if self.device.type == "cuda":
                self.say(f"{name}, captured", partial(self.graph, name))
        usable = [name for name in NAMES if any(f["passed"] and f["check"].startswith(f"{name},") for f in self.found)]
        times = [self.time(name, tokens) for name in usable for tokens in (TIMED[:1] if self.tiny else TIMED)]
        return {**_where(self.device), "ranks": self.ranks, "double": self.tiny, "checks": self.found, "times": times}


def _where(device: torch.device) -> dict[str, Any]:
    def of(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    hardware = moe_core.hardware.detect(device) if device.type == "cuda" else moe_core.hardware.detect_cpu()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(hardware),
        "arch": hardware.arch,
        "torch": torch.__version__,
        "mori": of("amd-mori"),
        "moe_core": moe_core.__version__,
        "environment": {key: value for key, value in os.environ.items() if key.startswith("MORI_")},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command, on each rank of torchrun."""
    about = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="torchrun -m moe_core_mori.selftest", description=about)
    parser.add_argument("--out", type=Path, required=True, help="file for the result, written by rank 0")
    parser.add_argument("--double", action="store_true", help="over the double, on CPUs")
    given = parser.parse_args(arguments)
    if given.double:
        testing.install()
    elif not torch.cuda.is_available():
        parser.error("there is no GPU here; --double runs the script over the double")
    device = torch.device("cpu") if given.double else torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" not in os.environ:
        parser.error("start it with torchrun --nproc-per-node=N -m moe_core_mori.selftest")
    dist.init_process_group("gloo" if given.double else "cpu:gloo,cuda:nccl")
    try:
        result = Bench(device, tiny=given.double).run()
    finally:
        dist.destroy_process_group()
    if int(os.environ["RANK"]) == 0:
        given.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        for row in result["checks"]:
            print("ok  " if row["passed"] else "FAIL", row["check"], row["raised"] or f"{row['error']:.1e}")
    return int(not all(row["passed"] for row in result["checks"]))


if __name__ == "__main__":
    sys.exit(main())
