"""LoRA hooks: called at the right place, with the right rows, and what they change counts."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_core.protocols import HookRows, RunnerHooks, RunningState
from moe_core.testing.case import Case, Setup
from moe_core.testing.layers import Layer
from moe_core.testing.registration import CheckFailed, check
from moe_core.vocabulary import STANDARD


class Adapter:
    """A LoRA of every expert: adds (x A) B to the rows, and remembers which rows it got."""

    def __init__(self, setup: Setup, width: int, device: torch.device) -> None:
        random = torch.Generator().manual_seed(5)
        config = setup.config
        self.hidden = config.hidden_size
        self.down = (torch.randn(config.num_experts, self.hidden, 4, generator=random) / self.hidden**0.5).to(device)
        self.up = torch.randn(config.num_experts, 4, width, generator=random).to(device)
        self.rows: list[tuple[int, int, int]] = []

    def __call__(self, tensor: Tensor, rows: HookRows) -> None:
        tokens = rows.hidden_states.reshape(-1, self.hidden)[rows.token_ids].double()
        small = torch.einsum("rh,rhk->rk", tokens, self.down.double()[rows.expert_ids])
        delta = torch.einsum("rk,rkw->rw", small, self.up.double()[rows.expert_ids])
        if delta.shape != tensor.shape:
            raise CheckFailed(f"the hook got {tuple(tensor.shape)} for rows of {tuple(delta.shape)}")
        tensor.add_(delta.to(tensor.dtype))
        named = torch.stack([rows.token_ids, rows.slot_ids, rows.expert_ids], dim=1)
        self.rows += [(t, s, e) for t, s, e in named.tolist()]


def _live(layer: Layer) -> list[tuple[int, int, int]]:
    ids = layer.topk.topk_ids
    return [(t, s, int(ids[t, s])) for t, s in (ids >= 0).nonzero().tolist()]


@check("numerics.hook", each="hook", needs=("hook:{}", "run"))
def hook(case: Case) -> None:
    """The hook is called for every slot that is not dropped, with its token and expert, and its change counts."""
    for setup in case.setups(case.param, request={"hooks": {case.param}}):
        config = setup.config
        width = (
            config.gate_up_factor * config.intermediate_size if case.param == "after_gate_up" else config.hidden_size
        )
        for pattern in ("uniform", "dropped", "duplicate"):
            layer = setup.layer(40, pattern=pattern)
            given, wanted = (Adapter(setup, width, layer.hidden.device) for _ in range(2))
            expected = setup.expected(layer, hooks=RunnerHooks(**{case.param: wanted}))
            state = RunningState(hooks=RunnerHooks(**{case.param: given}))
            result = setup.plan(layer.weights)(layer.hidden, layer.topk, state=state)
            _check_rows(setup, given, layer)
            setup.close(result, expected, f"the result with {case.param}, routing {pattern!r},")


def _check_rows(setup: Setup, given: Adapter, layer: Layer) -> None:
    live = _live(layer)
    if setup.lane.format == STANDARD:
        if sorted(given.rows) != sorted(live):
            wrong = sorted(set(given.rows) ^ set(live))[:4]
            raise CheckFailed(
                f"lane {setup.lane.label}: (token, slot, expert) rows are missing, extra or twice: {wrong}"
            )
    elif sorted(e for _, _, e in given.rows) != sorted(e for _, _, e in live):
        raise CheckFailed(f"lane {setup.lane.label}: the hook got {len(given.rows)} rows for {len(live)} live slots")
