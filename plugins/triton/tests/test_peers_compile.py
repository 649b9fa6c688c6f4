"""The kernels of `symm_mem` compile for sm_90 and sm_100, and store 16 bytes a thread to peers.

Their addresses come from memory, so Triton knows nothing of their alignment but what the kernels say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

SCRIPT = """
import json, re, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moe_core_triton.peers.kernels import send_tokens, sum_results

K, H = 8, 7168
TYPES = {"hidden": "*i32", "scale": "*i32", "ids": "*i32", "weights": "*fp32", "owner": "*i32", "index": "*i32",
         "bases": "*i64", "epochs": "*i32", "failure": "*i32", "result": "*bf16", "out": "*bf16", "factor": "fp32"}
COMMON = {"R": 4, "K": K, "KP": 8, "DROPPED": -1, "P": 8192, "SEND": True, "WAIT": True, "TIMEOUT_NS": 10**10}
SEND = {"ROW": H // 4, "BLOCK": 2048, "SCALES": H // 128, "SP": 64, "QUANTIZE": False, "NATIVE": True}
CASES = {
    "bf16": (send_tokens, SEND | {"ROW": H // 2, "BLOCK": 4096, "SCALES": 0, "SP": 1}, {}),
    "fp8": (send_tokens, SEND, {}),
    "quantize": (send_tokens, SEND | {"QUANTIZE": True}, {"hidden": "*bf16"}),
    "sum": (sum_results, {"H": H, "BLOCK": 8192}, {}),
}
found = {}
for name, (kernel, constants, types) in CASES.items():
    given = COMMON | constants
    signature, divisible = {}, {}
    for place, argument in enumerate(kernel.arg_names):
        kind = "constexpr" if argument in given else (TYPES | types).get(argument, "i32")
        signature[argument] = kind
        if kind.startswith("*") or argument.endswith(("_at", "_stride")):
            divisible[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=signature, constexprs=given, attrs=divisible)
    ptx = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options={"num_warps": 8}).asm["ptx"]
    patterns = {"wide": r"st\\.global\\.v4", "narrow": r"st\\.global\\.b(?:8|16) ", "release": r"sys\\.release",
                "acquire": r"sys\\.acquire", "trap": r"\\btrap;"}
    found[name] = {kind: len(re.findall(pattern, ptx)) for kind, pattern in patterns.items()}
print(json.dumps(found))
"""


@pytest.mark.parametrize("capability", [90, 100])
def test_stores_are_wide_and_flags_ordered(capability: int, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    paths = os.pathsep.join(path for path in sys.path if path)
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": paths}
    command = [sys.executable, "-P", str(tmp_path / "script.py"), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, Any]] = json.loads(done.stdout)
    assert len(found) == 4
    for name, counts in found.items():
        assert counts["wide"] >= 3, (name, counts)
        assert counts["narrow"] == 0, (name, counts)
        assert counts["release"] == 3, (name, counts)
        assert counts["acquire"] >= 3, (name, counts)
        assert counts["trap"] >= 1, (name, counts)
