"""Both runners behind dispatchers that send rows to the ranks of their experts, in two real processes."""

from __future__ import annotations

from pathlib import Path

import moe_core_flashinfer_trtllm

from moe_core.testing import run_ranks

PATHS = (Path(moe_core_flashinfer_trtllm.__file__).parents[1], Path(__file__).parent)

SCRIPT = """
import os
os.environ["XDG_CACHE_HOME"] = os.getcwd()

class Patch:
    def setitem(self, mapping, name, value): mapping[name] = value
    def delitem(self, mapping, name): mapping.pop(name, None)

import trtllm_double
trtllm_double.install(Patch())

from moe_core import ParallelConfig, TopKOutput
from moe_core.testing.tolerances import relative_error

COUNTS = [5, 8]

def worst(runner, dispatcher, scheme):
    "How far this rank's tokens are from the layer of one rank, and the id space."
    layer = trtllm_double.config(scheme, num_experts=8)
    whole = trtllm_double.layer_of(layer, 5, tokens=sum(COUNTS), pattern="dropped")
    want = trtllm_double.expected(layer, whole)
    rows = slice(sum(COUNTS[:rank]), sum(COUNTS[: rank + 1]))
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    settings = moe_core.Settings(runner=runner, dispatcher=dispatcher)
    plan = moe_core.plan(layer, whole.weights.shard(layer, parallel), parallel, group=group, settings=settings,
                         registry=trtllm_double.registry(), max_tokens=max(COUNTS))
    topk = TopKOutput(whole.topk.topk_ids[rows], whole.topk.topk_weights[rows])
    result = plan(whole.hidden[rows], topk)
    return [relative_error(result, want[rows]), str(plan.terms["standard"].id_space)]

for runner in ("flashinfer_trtllm", "flashinfer_cutlass"):
    for dispatcher in ("allgather", "alltoall"):
        for scheme in ("bf16", "fp8_block128"):
            say(f"{runner} {dispatcher} {scheme}", lambda: worst(runner, dispatcher, scheme))
"""


def test_tokens_travel_to_their_experts_and_back(tmp_path: Path) -> None:
    said = run_ranks(2, SCRIPT, tmp_path, paths=PATHS)
    assert len(said) == 2
    spaces = set()
    for answers in said:
        assert len(answers) == 8
        for name, answer in answers.items():
            assert isinstance(answer, list), (name, answer)
            assert answer[0] < (1e-2 if "bf16" in name else 4e-2), name
            spaces.add((name.split()[1], answer[1]))
    assert {dispatcher for dispatcher, _ in spaces} == {"allgather", "alltoall"}
