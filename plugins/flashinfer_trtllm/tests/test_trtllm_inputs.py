"""Tokens and choices as callers hand them over: views, column by column, ids of 64 bits."""

from __future__ import annotations

import pytest
import torch
from moe_core_flashinfer_trtllm.cutlass_weights import LAYOUTS as CUTLASS
from moe_core_flashinfer_trtllm.trtllm_weights import LAYOUTS as TRTLLM
from torch import Tensor
from trtllm_double import config, expected, layer_of, plan

from moe_core import TopKOutput
from moe_core.testing import assert_close

CASES = [("flashinfer_trtllm", scheme) for scheme in TRTLLM] + [("flashinfer_cutlass", scheme) for scheme in CUTLASS]


def by_columns(tensor: Tensor) -> Tensor:
    """The same values, one column after the other."""
    return tensor.t().contiguous().t()


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize(("runner", "scheme"), CASES)
def test_tensors_may_lie_in_any_way(runner: str, scheme: str) -> None:
    """The kernels read rows from a pointer; the double refuses what is not contiguous."""
    sizes = {"group_size": 32, "intermediate_size": 256} if scheme == "int4_w4a16" else {}
    layer = config(scheme, **({"num_experts": 8} | sizes))
    one = layer_of(layer, 4, tokens=9, pattern="dropped")
    bound, want = plan(runner, layer, one.weights), expected(layer, one)
    ids, weights = by_columns(one.topk.topk_ids), by_columns(one.topk.topk_weights)
    wide = torch.cat([one.hidden, one.hidden], 1)
    for hidden in (by_columns(one.hidden), wide[:, : layer.hidden_size]):
        assert not hidden.is_contiguous()
        for kind in (torch.int32, torch.int64):
            assert_close(bound(hidden, TopKOutput(ids.to(kind), weights)), want, layer.dtype, scheme)
