"""Compile every kernel of this plugin ahead of time, in every variant that its launchers ask for, without a GPU.

    python plugins/triton/tests/compile_report.py --targets sm_90,sm_100,gfx942,gfx950 --out report/
    python plugins/triton/tests/compile_report.py --subset --targets sm_90,gfx942        # what the test suite runs

The kernels are launched through the plugin's own code on CPU tensors (compile_sweep.py), and every launch is caught
before it reaches a driver: `record` asks Triton's own binder what it would compile. Then each variant is compiled in a
process of its own, so that a crash of the compiler is a line in the report. Writes report.json and report.md.
"""

from __future__ import annotations

import argparse
import ast
import json
import multiprocessing.connection
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

PACKAGE = "moe_core_triton"


@dataclass(frozen=True)
class Target:
    """What is compiled for. shared: bytes of shared memory (LDS) that one program may use. product: see hardware.py."""

    name: str
    gpu: GPUTarget
    shared: int
    product: str


TARGETS = {
    "sm_90": Target("sm_90", GPUTarget("cuda", 90, 32), 227 * 1024, "h200"),
    "sm_100": Target("sm_100", GPUTarget("cuda", 100, 32), 227 * 1024, "b200"),
    "gfx942": Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * 1024, "mi300x"),
    "gfx950": Target("gfx950", GPUTarget("hip", "gfx950", 64), 160 * 1024, "mi355x"),
}


@dataclass
class Variant:
    """One compilation, as Triton's binder describes it. origins: what led to it."""

    fn: Any
    target: Target
    signature: dict[str, Any]
    constexprs: dict[Any, Any]
    attrs: dict[Any, Any]
    options: dict[str, Any]
    origins: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        """Equal for launches that share a binary."""
        values = [getattr(v, "cache_key", v) for v in self.constexprs.values()]
        parts = (
            self.fn.__module__,
            self.fn.__name__,
            self.target.name,
            self.signature,
            values,
            self.attrs,
            self.options,
        )
        return repr(parts)

    @property
    def text(self) -> str:
        """Tensor types, constants and options, for people."""
        names = list(self.signature)
        types = [t for t in self.signature.values() if isinstance(t, str) and t.startswith(("*", "tensordesc"))]
        constants = {names[path[0]]: v for path, v in self.constexprs.items() if len(path) == 1 and v is not None}
        shown = {n: getattr(v, "__name__", v) for n, v in constants.items() if v not in ("", False)}
        words = [" ".join(types), *(f"{n}={v}" for n, v in shown.items())]
        return " ".join(words) + f" | warps={self.options['num_warps']} stages={self.options['num_stages']}"


def variant_of(fn: Any, target: Target, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Variant:
    """What a launch with these arguments would compile. As JITFunction.run does it, for a target that is not here."""
    backend = make_backend(target.gpu)
    given = kwargs | {"debug": kwargs.get("debug", False)}
    given["instrumentation_mode"] = knobs.compilation.instrumentation_mode
    bound, specialization, options = create_function_from_signature(fn.signature, fn.params, backend)(*args, **given)
    options, signature, constexprs, attrs = fn._pack_args(backend, given, bound, specialization, options)
    return Variant(fn, target, signature, constexprs, attrs, dict(options.__dict__))


@contextmanager
def recording(target: Target, into: dict[str, Variant], origin: list[str]) -> Iterator[None]:
    """Launches are noted instead of made; `origin[-1]` says where they come from. Fresh tensors hold zeros.

    No kernel writes anything, so what the host does with results must not meet garbage.
    """

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        variant = variant_of(self, target, args, kwargs)
        into.setdefault(variant.key, variant).origins.append(origin[-1])

    def zeroed(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **kwargs: make(*args, **kwargs).zero_()

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", run))
        for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
            stack.enter_context(mock.patch.object(owner, name, zeroed(getattr(owner, name))))
        yield


def record(call: Callable[[], Any], target: Target) -> list[Variant]:
    """The variants that `call` launches, each once."""
    found: dict[str, Variant] = {}
    with recording(target, found, [getattr(call, "__name__", "call")]):
        call()
    return list(found.values())


def compile_one(variant: Variant) -> dict[str, Any]:
    """Compile, and say what came out. Raises what the compiler raises."""
    source = ASTSource
    if variant.fn.is_gluon():
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource
    start = time.perf_counter()
    made = triton.compile(
        source(variant.fn, variant.signature, variant.constexprs, variant.attrs),
        target=variant.target.gpu,
        options=variant.options,
    )
    row: dict[str, Any] = {"seconds": round(time.perf_counter() - start, 2), "shared": made.metadata.shared}
    if variant.target.gpu.backend == "cuda":
        row |= _nvidia(made.asm["ptx"], made.asm["cubin"])
    else:
        row |= _amd(made.asm["amdgcn"])
    return row


def _nvidia(ptx: str, cubin: bytes) -> dict[str, Any]:
    tool = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": numbers["REG"],
        # Registers that do not fit live on the stack; so do arrays that are indexed, of which Triton makes none.
        "spill_bytes": numbers["STACK"] + numbers["LOCAL"],
        "mma": ptx.count("mma.sync"),
        "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"),
        "tma": ptx.count("cp.async.bulk.tensor"),
        "cp_async": len(re.findall(r"cp\.async\.c[ag]", ptx)),
        "pdl": ptx.count("griddepcontrol"),
    }


def _amd(asm: str) -> dict[str, Any]:
    def number(name: str) -> int:
        return max((int(value) for value in re.findall(rf"\.{name}:\s*(\d+)", asm)), default=0)

    return {
        "registers": number("vgpr_count"),
        "sgprs": number("sgpr_count"),
        "agprs": number("agpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
        "vgpr_spills": number("vgpr_spill_count"),
        "sgpr_spills": number("sgpr_spill_count"),
        "mfma": len(re.findall(r"v_mfma", asm)),
        "mfma_names": sorted(set(re.findall(r"\bv_mfma_\w+", asm))),
        "direct_to_lds": len(re.findall(r"_load_\S*\s.*\blds\b|buffer_load_lds|global_load_lds", asm)),
    }


def _child(variant: Variant, pipe: Any) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # a crash prints the whole module
    try:
        pipe.send(compile_one(variant))
    except BaseException as error:
        pipe.send({"error": f"{type(error).__name__}: {error}"[:600]})


def compile_all(variants: list[Variant], jobs: int = 2, limit_s: float = 300.0) -> list[dict[str, Any]]:
    """A row a variant, in their order. Each is compiled in a forked process: crashes and hangs become rows too."""
    context = multiprocessing.get_context("fork")
    rows: list[dict[str, Any]] = [{} for _ in variants]
    waiting, running = list(range(len(variants)))[::-1], {}
    while waiting or running:
        while waiting and len(running) < jobs:
            index = waiting.pop()
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(variants[index], theirs))
            process.start()
            theirs.close()
            running[index] = process, ours, time.monotonic() + limit_s
        multiprocessing.connection.wait([ours for _, ours, _ in running.values()], timeout=1.0)
        for index, (process, ours, deadline) in list(running.items()):
            if ours.poll():
                try:
                    rows[index] = ours.recv()
                except EOFError:
                    process.join()
                    rows[index] = {"error": f"the compiler crashed (exit {process.exitcode})"}
            elif time.monotonic() > deadline:
                process.kill()
                rows[index] = {"error": f"took more than {limit_s:.0f} s"}
            else:
                continue
            process.join()
            del running[index]
    return [_row(variant, row) for variant, row in zip(variants, rows, strict=True)]


def _row(variant: Variant, found: dict[str, Any]) -> dict[str, Any]:
    row = {
        "kernel": variant.fn.__name__,
        "module": variant.fn.__module__.removeprefix(f"{PACKAGE}.kernels."),
        "target": variant.target.name,
        "variant": variant.text,
        "num_warps": variant.options["num_warps"],
        "num_stages": variant.options["num_stages"],
        "origins": sorted(set(variant.origins))[:4],
    }
    if found.get("shared", 0) > variant.target.shared:
        found["error"] = f"{found['shared']} bytes of shared memory, {variant.target.shared} are there"
    return row | found


def entry_kernels(package: str = PACKAGE) -> dict[str, Any]:
    """Every jitted function of the package that no other one uses: what is launched from the host."""
    found = {
        f"{fn.__module__}.{fn.__name__}": fn
        for name, module in list(sys.modules.items())
        if name.startswith(package)
        for fn in vars(module).values()
        if isinstance(fn, JITFunction) and fn.__module__.startswith(package)
    }
    # Called, or handed on by name as the parts of a warp-specialised kernel are.
    used = {n.id for fn in found.values() for n in ast.walk(fn.parse()) if isinstance(n, ast.Name)}
    return {name: fn for name, fn in found.items() if fn.__name__ not in used}


def summary(rows: list[dict[str, Any]], missing: list[str]) -> dict[str, Any]:
    """Numbers for people and tests."""
    return {
        "triton": triton.__version__,
        "variants": len(rows),
        "failed": sum("error" in row for row in rows),
        "spilled": sum(row.get("spill_bytes", 0) > 0 for row in rows),
        "kernels": sorted({row["kernel"] for row in rows}),
        "never_launched": missing,
        "seconds": round(sum(row.get("seconds", 0.0) for row in rows), 1),
    }


def markdown(rows: list[dict[str, Any]], total: dict[str, Any]) -> str:
    """The report as tables: failures first, then a line a kernel and target, then those that spill."""
    lines = ["# Kernels compiled ahead of time", "", f"Triton {total['triton']}: {total['variants']} variants, "]
    lines[-1] += f"{total['failed']} failed, {total['spilled']} spill registers. Never launched: "
    lines[-1] += ", ".join(total["never_launched"]) or "none"
    lines += ["", "| kernel | target | variants | registers | most spilled | most shared | instructions |"]
    lines += ["|---|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["kernel"], row["target"]), []).append(row)
    kinds = ("wgmma", "tcgen05", "mma", "tma", "cp_async", "pdl", "mfma", "direct_to_lds")
    for (kernel, target), group in sorted(groups.items()):
        good = [row for row in group if "error" not in row] or [{}]
        registers = [row.get("registers", 0) for row in good]
        uses = [
            f"{kind} {sum(bool(row.get(kind)) for row in good)}" for kind in kinds if any(r.get(kind) for r in good)
        ]
        lines.append(
            f"| {kernel} | {target} | {len(group)} | {min(registers)}-{max(registers)} "
            f"| {max(r.get('spill_bytes', 0) for r in good)} | {max(r.get('shared', 0) for r in good)} "
            f"| {', '.join(uses)} |"
        )
    lines += _matrix_instructions(rows)
    for title, chosen in (
        ("Failed", [row for row in rows if "error" in row]),
        ("Spilling", sorted((r for r in rows if r.get("spill_bytes")), key=lambda r: -r["spill_bytes"])),
    ):
        lines += ["", f"## {title}: {len(chosen)}", ""]
        for row in chosen:
            what = row.get("error") or f"{row['spill_bytes']} bytes, {row['registers']} registers"
            lines.append(f"- `{row['kernel']}` {row['target']}: {what} ({row['variant']}; {', '.join(row['origins'])})")
    return "\n".join(lines) + "\n"


def _matrix_instructions(rows: list[dict[str, Any]]) -> list[str]:
    """AMD's by name: eight-bit floats that are not the hardware's own are widened without a word from the compiler."""
    found: dict[tuple[str, str, str], set[str]] = {}
    for row in rows:
        if row.get("mfma_names"):
            kind = row["origins"][0].split(" ")[0]
            found.setdefault((row["kernel"], row["target"], kind), set()).update(row["mfma_names"])
    if not found:
        return []
    lines = ["", "| kernel | target | layer | matrix instructions |", "|---|---|---|---|"]
    return lines + [f"| {' | '.join(key)} | {', '.join(sorted(names))} |" for key, names in sorted(found.items())]


def main(arguments: list[str] | None = None) -> int:
    """The command. 1 where something does not compile, or a kernel is never launched (not with --subset)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--subset", action="store_true", help="one configuration of a few layers")
    parser.add_argument("--only", default="", help="kernels whose name matches this expression")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--out", type=Path, help="folder for report.json and report.md")
    parser.add_argument("--list", action="store_true", help="say what would be compiled")
    options = parser.parse_args(arguments)
    sys.path.insert(0, str(Path(__file__).parent))
    from compile_sweep import sweep

    found: dict[str, Variant] = {}
    for name in options.targets.split(","):
        origin = ["?"]
        with recording(TARGETS[name], found, origin):
            sweep(TARGETS[name], origin, subset=options.subset)
    variants = [v for v in found.values() if re.search(options.only, v.fn.__name__)]
    missing = sorted(set(entry_kernels()) - {f"{v.fn.__module__}.{v.fn.__name__}" for v in found.values()})
    if "sm_90" not in options.targets.split(","):
        missing = [name for name in missing if ".kernels.hopper_" not in name]  # no other architecture has them
    if not any(name.startswith("sm_") for name in options.targets.split(",")):
        missing = [name for name in missing if ".peers." not in name]  # NVIDIA's alone
    if options.list:
        print("\n".join(f"{v.fn.__name__} {v.target.name} {v.text}" for v in variants))
        print(f"{len(variants)} variants; never launched: {missing}")
        return 0
    rows = compile_all(variants, options.jobs)
    total = summary(rows, missing)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "report.json").write_text(json.dumps({"summary": total, "rows": rows}, indent=1) + "\n")
        (options.out / "report.md").write_text(markdown(rows, total))
    for row in rows:
        if "error" in row:
            print(f"FAILED {row['kernel']} {row['target']} {row['variant']}: {row['error']}")
    print(json.dumps(total))
    return 1 if total["failed"] or (missing and not options.subset) else 0


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        sys.exit("TRITON_INTERPRET=1 decorates the kernels for the interpreter: unset it")
    with tempfile.TemporaryDirectory(prefix="moe_core_aot_") as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        sys.exit(main())
