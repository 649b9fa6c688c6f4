"""LoRA hooks: called once, for the rows that count, at the right place; what they change counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_core import Activation, MoeConfig
from moe_core.errors import ContractViolation, UnsupportedOverride
from moe_core.protocols import HookRows, RunnerHooks, RunningState

NAMES = ("after_gate_up", "after_down")


class Lora:
    """Adds (x A_e) B_e to the rows, and keeps the rows that it got."""

    def __init__(self, config: MoeConfig, name: str, device: str) -> None:
        random = torch.Generator().manual_seed(5)
        hidden = config.hidden_size
        width = config.gate_up_factor * config.intermediate_size if name == "after_gate_up" else hidden
        self.down = (torch.randn(config.num_experts, hidden, 4, generator=random) / hidden**0.5).to(device)
        self.up = torch.randn(config.num_experts, 4, width, generator=random).to(device)
        self.width, self.calls = width, 0
        self.rows: list[list[int]] = []

    def __call__(self, tensor: Tensor, rows: HookRows) -> None:
        assert tensor.shape == (rows.token_ids.numel(), self.width)
        for ids in (rows.token_ids, rows.slot_ids, rows.expert_ids):
            assert ids.dtype is torch.int64
        self.calls += 1
        tokens = rows.hidden_states.reshape(-1, self.down.shape[1])[rows.token_ids].float()
        small = torch.einsum("rh,rhk->rk", tokens, self.down[rows.expert_ids])
        tensor.add_(torch.einsum("rk,rkw->rw", small, self.up[rows.expert_ids]).to(tensor.dtype))
        self.rows += torch.stack([rows.token_ids, rows.slot_ids, rows.expert_ids], dim=1).tolist()


def _both(lab: Any, config: MoeConfig, names: tuple[str, ...], layer: Any, **more: Any) -> dict[str, Lora]:
    """The runner under test and the oracle with the same adapters; returns those of the runner."""
    results, loras = [], {}
    for runner in ("reference", lab.runner):
        loras = {name: Lora(config, name, lab.device) for name in names}
        state = RunningState(hooks=RunnerHooks(**loras))
        given = {"dispatcher": "standard"} if runner == "reference" else more
        plan = lab.plan(config, layer.weights, runner=runner, hooks=set(names), **given)
        results.append(plan(layer.hidden, layer.topk, state=state))
    lab.close(results[1], results[0], config, f"with {' and '.join(names)}")
    return loras


@pytest.mark.parametrize("names", [("after_gate_up",), ("after_down",), NAMES])
@pytest.mark.parametrize("pattern", ["uniform", "dropped", "duplicate"])
def test_rows_and_results(lab: Any, names: tuple[str, ...], pattern: str) -> None:
    config = lab.config(bias=True)
    layer = lab.layer(config, pattern=pattern)
    ids = layer.topk.topk_ids
    live = sorted([t, s, int(ids[t, s])] for t, s in (ids >= 0).nonzero().tolist())
    for name, lora in _both(lab, config, names, layer).items():
        assert lora.calls == 1, name
        assert sorted(lora.rows) == live, name


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scheme", ["fp8_channel", "fp8_block128", "int8_channel", "int4_w4a16", "mxfp4_w4a16"])
def test_quantized_layers(lab: Any, scheme: str, name: str) -> None:
    config = lab.config(scheme=scheme)
    _both(lab, config, (name,), lab.layer(config, pattern="dropped"))


@pytest.mark.parametrize(
    "changes",
    [
        {"activation": Activation(name="relu2", gated=False)},
        {"activation": Activation.swiglu_oai(limit=1.0)},
        {"router_weight_on_input": True},
        {"no_combine": True, "routed_scaling_factor": 2.5},
    ],
)
def test_options(lab: Any, changes: dict[str, Any]) -> None:
    """after_gate_up comes before the activation, after_down before the router weight and the scaling."""
    config = lab.config(**changes)
    _both(lab, config, NAMES, lab.layer(config, pattern="dropped"))


@pytest.mark.parametrize("dispatcher", ["testing_standard", "testing_batched", "testing_grouped"])
def test_other_formats(lab: Any, dispatcher: str) -> None:
    config = lab.config()
    layer = lab.layer(config, pattern="dropped")
    live = sorted(int(e) for e in layer.topk.topk_ids[layer.topk.topk_ids >= 0])
    for lora in _both(lab, config, NAMES, layer, dispatcher=dispatcher).values():
        assert sorted(expert for _, _, expert in lora.rows) == live


def test_no_rows(lab: Any) -> None:
    """Zero tokens, or none that is computed: whether a hook is called with no rows is open, the result is not."""
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, hooks=set(NAMES))
    for tokens in (0, 3):
        hooks = RunnerHooks(**{name: Lora(config, name, lab.device) for name in NAMES})
        hidden, topk = lab.tokens(config, tokens)
        topk.topk_ids.fill_(-1)
        assert not plan(hidden, topk, state=RunningState(hooks=hooks)).any()


def test_a_plan_for_hooks_runs_without_them(lab: Any) -> None:
    """A server with adapters has calls without any."""
    config = lab.config()
    layer = lab.layer(config)
    plan = lab.plan(config, layer.weights, hooks=set(NAMES))
    lab.close(plan(layer.hidden, layer.topk), lab.expected(config, *layer), config)
    half = RunningState(hooks=RunnerHooks(after_down=lambda tensor, rows: tensor.mul_(2)))
    doubled = plan(layer.hidden, layer.topk, state=half)
    lab.close(doubled, lab.expected(config, *layer) * 2, config)


def test_the_fused_func_gives_hooks_up(lab: Any) -> None:
    config = lab.config()
    layer = lab.layer(config)
    if not any(name == lab.runner for _, name in lab.registry.fused):
        pytest.skip(f"{lab.runner} has no fused func")
    with pytest.raises(UnsupportedOverride, match="gives up 'after_down'"):
        lab.plan(config, layer.weights, "fused", hooks={"after_down"})
    plan = lab.plan(config, layer.weights)
    state = RunningState(hooks=RunnerHooks(after_down=lambda tensor, rows: None))
    with pytest.raises(ContractViolation, match="made for none"):
        plan(layer.hidden, layer.topk, state=state)
