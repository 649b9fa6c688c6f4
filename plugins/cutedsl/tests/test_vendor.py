"""Against the FlashInfer that is installed (skipped without one): signatures, layouts, and that its kernels compile.

In processes of their own: importing FlashInfer takes seconds, writes a log, and other tests put doubles in its place.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import moe_core_cutedsl
import pytest

import moe_core

HERE = Path(__file__).parent
MISSING = [name for name in ("flashinfer", "cutlass", "triton") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)}")


def run(*arguments: str, folder: Path) -> str:
    """What a Python process prints, with this plugin and these tests on its path."""
    paths = [str(Path(module.__file__).parents[1]) for module in (moe_core, moe_core_cutedsl)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([*paths, str(HERE), os.environ.get("PYTHONPATH", "")]),
        "FLASHINFER_WORKSPACE_BASE": str(folder),
    }
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


SIGNATURES = """
import importlib, inspect
import doubling, double_nvfp4, double_sm90
from moe_core_cutedsl import nvfp4_masked, nvfp4_standard, sm90, vendor
from moe_core_cutedsl.activations import keywords
from moe_core.config import Activation

entries = [sm90.GEMM1, sm90.GEMM2, sm90.WHOLE, nvfp4_masked.GEMM, nvfp4_masked.QUANTIZE, nvfp4_masked.ACTIVATE,
           nvfp4_standard.MAKE, nvfp4_standard.RUN, nvfp4_standard.QUANTIZE]
for entry in entries:
    real = inspect.signature(vendor.load(entry)).parameters
    place, _, method = entry.name.partition(".")
    double = doubling.PLACES[entry.module][place]
    recorded = inspect.signature(getattr(double, method) if method else double).parameters
    assert [(p.name, p.kind) for p in recorded.values()] == [(p.name, p.kind) for p in real.values()], entry
    for name, parameter in recorded.items():
        given = real[name].default
        if name != "nvfp4_4over6":  # its default is a sentinel of its own
            assert parameter.default == given or int(given) == parameter.default, (entry.path, name, given)
kinds = vendor.find("flashinfer.fused_moe", "ActivationType")
assert all(kinds[member.name] == member for member in double_sm90.ActivationType)
assert keywords(Activation())["swiglu_limit"] == importlib.import_module("flashinfer.tllm_enums").DEFAULT_SWIGLU_LIMIT
print(len(entries))
"""


def test_signatures(tmp_path: Path) -> None:
    """Ours bind, and the doubles' are the real ones."""
    assert run("-c", SIGNATURES, folder=tmp_path) == "9\n"


LAYOUTS = """
import importlib, torch
from moe_core_cutedsl.layouts import alternate, swizzled
from moe_core_cutedsl.sm90_tactics import GEMM1_COLUMNS, GEMM2_COLUMNS, most_tiles

cute = "flashinfer.fused_moe.cute_dsl."
w13 = torch.randn(3, 384, 40)
theirs = importlib.import_module(cute + "sm90_contiguous_gather_grouped_gemm_act_fusion").interleave_up_gate_sm90
assert torch.equal(alternate(w13, torch.empty_like(w13), 32), theirs(w13))
prepare = importlib.import_module("flashinfer.fused_moe.prepare")
up_gate = torch.cat([w13[:, 192:], w13[:, :192]], 1)  # theirs takes up first
assert torch.equal(alternate(w13, torch.empty_like(w13), 64), prepare._interleave_linear_and_gate(up_gate, 64, 1))

scales = torch.randint(0, 256, (3, 256, 16), dtype=torch.uint8)
made = swizzled(scales)
memory = made.permute(5, 2, 4, 0, 1, 3).contiguous()
view = importlib.import_module("flashinfer.cute_dsl").convert_sf_to_mma_layout(memory.flatten(), 256, 256, 3)
assert torch.equal(view, made) and view.stride() == made.stride()
# Where the documentation of that function says a row and a column go.
m, k = torch.meshgrid(torch.arange(256), torch.arange(16), indexing="ij")
assert torch.equal(made[m % 32, m % 128 // 32, m // 128, k % 4, k // 4].permute(2, 0, 1), scales)

utils = importlib.import_module(cute + "moe_utils")
for slots in (1, 7, 64, 1000):
    for local in (1, 8, 100):
        for rows in (64, 128):
            assert most_tiles(slots, local, rows) == utils.get_max_num_tiles(slots, 1, local, rows)

kernels = [importlib.import_module(cute + "hopper." + name) for name in
           ("contiguous_gather_grouped_gemm_act_fusion", "contiguous_grouped_gemm_finalize_fusion")]
classes = [kernels[0].Sm90ContiguousGatherGroupedGemmActFusionKernel,
           kernels[1].Sm90ContiguousGroupedGemmFinalizeFusionKernel]
for kind, table in zip(classes, (GEMM1_COLUMNS, GEMM2_COLUMNS)):
    for rows, columns in table.items():
        assert all(kind.is_valid_tile_and_cluster_shape((rows, c), (1, 1)) for c in columns)
print("same")
"""


def test_layouts_and_tiles(tmp_path: Path) -> None:
    """Rows and scales as FlashInfer's own functions order them; every tile of ours is one of its kernels'."""
    assert run("-c", LAYOUTS, folder=tmp_path) == "same\n"


@pytest.mark.slow
@pytest.mark.parametrize(("arch", "kernels"), [("sm_90a", 24), ("sm_100a", 5)])
def test_kernels_compile(arch: str, kernels: int, tmp_path: Path) -> None:
    assert len(run(str(HERE / "compile_vendor.py"), arch, folder=tmp_path).splitlines()) == kernels
