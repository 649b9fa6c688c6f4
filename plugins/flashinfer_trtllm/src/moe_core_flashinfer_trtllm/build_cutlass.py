"""Build the part of FlashInfer's CUTLASS module for Hopper that some schemes need: minutes instead of an hour and more.

    python -m moe_core_flashinfer_trtllm.build_cutlass --schemes bf16,fp8_block128 --out fused_moe_90.so --install

FlashInfer compiles `fused_moe_90` on first use, all 248 sources for all data types: more than 20 hours of CPU time.
This compiles the sources of the named schemes alone, with FlashInfer's own generator and flags. What is left out is
filled with functions that raise "not in this build", so another scheme ends in an error and not in a crash, and
FlashInfer's tuner passes over kernels that are not there. It needs nvcc, ninja, g++ and nm, but no GPU.

--install copies the result to where FlashInfer looks for modules that need no compiler: `data/aot` of its package.
There it hides the whole module from every user of that installation; --uninstall takes it away again.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

MODULE = "fused_moe_90"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """What one scheme needs of the module.

    kernels: fixed sources by their stem. pair: the types of the generated grouped GEMMs, as they stand in the sources.
    runners: instantiations of FlashInfer's class template `CutlassMoeFCRunner`.
    """

    kernels: tuple[str, ...]
    runners: tuple[str, ...]
    pair: str | None = None


PARTS = {
    "bf16": Part(
        kernels=("moe_gemm_kernels_bf16_bf16",),
        pair="__nv_bfloat16, __nv_bfloat16,",
        runners=("__nv_bfloat16, __nv_bfloat16",),
    ),
    "fp8_block128": Part(
        kernels=("moe_gemm_kernels_bf16_fp8",), runners=("__nv_bfloat16, __nv_fp8_e4m3, __nv_bfloat16",)
    ),
    "fp8_tensor": Part(
        kernels=("moe_gemm_kernels_fp8_fp8",),
        pair="__nv_fp8_e4m3, __nv_fp8_e4m3,",
        runners=("__nv_fp8_e4m3, __nv_fp8_e4m3, __nv_bfloat16",),
    ),
    "mxfp4_w4a16": Part(
        kernels=("moe_gemm_kernels_bf16_fp4",), pair="__nv_bfloat16, SafeFP4,", runners=("__nv_bfloat16, Fp4Type",)
    ),
}
#: Needed whatever the scheme.
COMMON = (
    "moe_gemm_tma_warp_specialized_input",
    "fp8_blockscale_gemm",
    "moe_gemm_mixed_utils",
    "flashinfer_cutlass_fused_moe_binding",
    "deepgemm_jit_setup",
    "envUtils",
    "logger",
    "stringUtils",
    "tllmException",
    "memoryUtils",
    "preQuantScaleKernel",
    "cutlass_heuristic",
    "lora",
)
_GENERATED, _GROUPED = ".generated.cu", "gemm_grouped/90"
_INSTANTIATION = """// Written by moe_core_flashinfer_trtllm.build_cutlass.
#include "fused_moe/cutlass_backend/cutlass_fused_moe_kernels.cuh"
#include "moe_kernels.h"

namespace tensorrt_llm::kernels::cutlass_kernels {{
{runners}
INSTANTIATE_FINALIZE_MOE_ROUTING(half, half, half);
INSTANTIATE_FINALIZE_MOE_ROUTING(float, float, float);
INSTANTIATE_FINALIZE_MOE_ROUTING(__nv_bfloat16, __nv_bfloat16, __nv_bfloat16);
}}  // namespace tensorrt_llm::kernels::cutlass_kernels
"""
_ABSENT = """// Written by moe_core_flashinfer_trtllm.build_cutlass: {count} symbols of kernels that were not built.
#include <stdexcept>
extern "C" [[noreturn]] __attribute__((visibility("hidden"))) void moe_core_absent() {{
  throw std::runtime_error("this kernel is not in this build of FlashInfer's CUTLASS module, which has {schemes} "
                           "(moe_core_flashinfer_trtllm.build_cutlass)");
}}
#if defined(__aarch64__)
#define JUMP "b moe_core_absent"
#else
#define JUMP "jmp moe_core_absent"
#endif
#define ABSENT_FUNCTION(name) __asm__(".text\\n.weak " name "\\n.type " name ", %function\\n" name ": " JUMP "\\n");
#define ABSENT_OBJECT(name) \\
  __asm__(".bss\\n.balign 16\\n.weak " name "\\n.type " name ", %object\\n" name ": .zero 1024\\n.text\\n");
{symbols}
"""
#: Mangled names of what FlashInfer itself defines: everything else comes from libraries at run time.
_OURS = re.compile(r"^_ZT?[A-Z]*N?K?.*(tensorrt_llm|flashinfer)")


def select(sources: Iterable[Path], schemes: Sequence[str]) -> list[Path]:
    """Of the whole module's sources, those that `schemes` need (the instantiation is written anew)."""
    parts = [PARTS[scheme] for scheme in schemes]
    fixed = {*COMMON, *(name for part in parts for name in part.kernels)}
    pairs = [part.pair for part in parts if part.pair is not None]
    chosen = []
    for source in sources:
        if source.name.endswith(_GENERATED):
            text = source.read_text(encoding="utf-8") if _GROUPED in source.as_posix() else ""
            # A generated file holds kernels of one pair of types.
            if any(pair in text for pair in pairs):
                chosen.append(source)
        elif source.stem in fixed:
            chosen.append(source)
    missing = fixed - {source.stem for source in chosen}
    if missing:
        raise SystemExit(f"this FlashInfer has no source {', '.join(sorted(missing))}: the recipe is for 0.7")
    for scheme, part in zip(schemes, parts, strict=True):
        if part.pair is not None and not any(part.pair in s.read_text() for s in chosen if _GENERATED in s.name):
            raise SystemExit(f"this FlashInfer generates no kernels of {part.pair} for {scheme}: the recipe is for 0.7")
    return chosen


def instantiation(schemes: Sequence[str]) -> str:
    """The source that instantiates FlashInfer's runners for `schemes` alone."""
    runners = [runner for scheme in schemes for runner in PARTS[scheme].runners]
    return _INSTANTIATION.format(runners="\n".join(f"template class CutlassMoeFCRunner<{r}>;" for r in runners))


def undefined(library: Path) -> list[str]:
    """FlashInfer's own symbols that a linked library needs and does not have."""
    listed = subprocess.run(["nm", "-D", "--undefined-only", str(library)], capture_output=True, text=True, check=True)
    names = {line.split()[-1].partition("@")[0] for line in listed.stdout.splitlines() if line.split()}
    return sorted(name for name in names if _OURS.match(name))


def absent(symbols: Sequence[str], schemes: Sequence[str]) -> str:
    """A source that defines `symbols` so that calling one raises."""
    lines = [f'ABSENT_{"OBJECT" if name.startswith(("_ZTV", "_ZTI", "_ZTS")) else "FUNCTION"}("{name}")'
             for name in symbols]  # fmt: skip
    return _ABSENT.format(count=len(symbols), schemes=", ".join(schemes), symbols="\n".join(lines))


def build(schemes: Sequence[str], work: Path | None = None, jobs: int | None = None) -> Path:
    """Compile and link; returns the library. What was compiled already (same work folder) is kept.

    work: where FlashInfer keeps its cache; it reads the variable when it is imported.
    """
    if work is not None:
        os.environ["FLASHINFER_WORKSPACE_BASE"] = str(work)
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    if jobs is not None:
        os.environ["MAX_JOBS"] = str(jobs)
    from flashinfer.jit import fused_moe

    whole: Any = fused_moe.gen_cutlass_fused_moe_sm90_module()
    # One folder for every choice of schemes: what they have in common is compiled once.
    name = f"{MODULE}_part"
    written = whole.build_dir.parent / name / "written"
    written.mkdir(parents=True, exist_ok=True)
    runners, gaps = written / "instantiation.cu", written / "absent.cpp"
    _write(runners, instantiation(schemes))
    # Symbols that another choice of schemes lacked must not be filled in here: template instantiations are weak too.
    if not gaps.exists() or f'has {", ".join(schemes)} "' not in gaps.read_text(encoding="utf-8"):
        _write(gaps, absent((), schemes))
    spec = replace(whole, name=name, sources=[*select(whole.sources, schemes), runners, gaps])
    print(f"{len(spec.sources)} of {len(whole.sources)} sources in {spec.build_dir}", flush=True)
    # Linked once to see what is missing, and again with that filled in.
    for _ in range(2):
        spec.build(verbose=True)
        library = Path(spec.jit_library_path)
        missing = undefined(library)
        if not missing:
            return library
        known = re.findall(r'^ABSENT_\w+\("(\w+)"\)', gaps.read_text(encoding="utf-8"), re.MULTILINE)
        _write(gaps, absent(sorted({*known, *missing}), schemes))
    spec.build(verbose=True)
    if still := undefined(library):
        raise SystemExit(f"{library} needs symbols that nobody defines: {', '.join(still[:5])}")
    return library


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def installed() -> Path:
    """Where FlashInfer looks for the module before it compiles."""
    from flashinfer.jit import env

    return Path(env.FLASHINFER_AOT_DIR) / MODULE / f"{MODULE}.so"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--schemes", default="fp8_block128", help=f"of {', '.join(PARTS)}; comma-separated")
    parser.add_argument("--work", type=Path, help="folder of FlashInfer's cache (FLASHINFER_WORKSPACE_BASE)")
    parser.add_argument("--jobs", type=int, help="compilers at a time; each takes up to 6 GB of memory")
    parser.add_argument("--out", type=Path, help="copy the library here")
    parser.add_argument("--install", action="store_true", help="put it where FlashInfer finds it without a compiler")
    parser.add_argument("--uninstall", action="store_true", help="take it away from there, and do nothing else")
    given = parser.parse_args(arguments)
    if given.uninstall:
        installed().unlink(missing_ok=True)
        return 0
    schemes = sorted(set(given.schemes.split(",")))
    unknown = [scheme for scheme in schemes if scheme not in PARTS]
    if unknown:
        parser.error(f"no recipe for {', '.join(unknown)}; known: {', '.join(PARTS)}")
    library = build(schemes, given.work, given.jobs)
    targets = [given.out] if given.out else []
    if given.install:
        targets.append(installed())
    for target in targets:
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(library, target)
    print(f"built {library}" + "".join(f", copied to {target}" for target in targets))
    return 0


if __name__ == "__main__":
    sys.exit(main())
