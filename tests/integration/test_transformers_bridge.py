"""The bridge on single experts modules: names, dropped slots, options, gradients, expert parallelism, compilation."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.finegrained_fp8 import FP8ExpertsInterface
from transformers.integrations.moe import ExpertsInterface, use_experts_implementation
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_core.integrations.transformers as bridge
from moe_core.errors import ConfigError, ContractViolation, UnsupportedOverride

Make = Callable[..., Any]
E = 6
HUGE = 2**40


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_registers_in_both_interfaces(register: Make) -> None:
    """transformers accepts a name that is in either interface, and fails later in the other."""
    ExpertsInterface.register("plain_only", lambda *_: None)
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    assert LlamaForCausalLM(tiny).get_correct_experts_implementation("plain_only") == "plain_only"
    with pytest.raises(KeyError, match="plain_only"):
        FP8ExpertsInterface().get_interface("plain_only", None)
    name = register("ours")
    assert ExpertsInterface().get_interface(name, None) is FP8ExpertsInterface().get_interface(name, None)


def test_agrees_with_eager_and_names_its_plans(experts: Make, call: Make, run_as: Make) -> None:
    model = nn.Sequential(nn.Identity(), experts())
    inputs = call()
    found = run_as(model[1], bridge.NAME, *inputs)
    close(found, run_as(model[1], "eager", *inputs))
    assert list(bridge.plans(model)) == ["1"]
    assert "runner:cpu" in bridge.plans(model)["1"].explain()
    bridge.release(model)
    assert bridge.plans(model) == {}
    close(run_as(model[1], bridge.NAME, *inputs), found, 0)


@pytest.mark.parametrize("options", [{}, {"runner": "reference"}], ids=["cpu", "reference"])
@pytest.mark.parametrize("dropped", [-1, -7, E, E + 1, HUGE, -HUGE])
@pytest.mark.parametrize("weight", [0.5, float("nan"), float("inf")])
def test_ids_outside_the_experts_are_dropped_slots(
    register: Make, experts: Make, call: Make, run_as: Make, options: Any, dropped: int, weight: float
) -> None:
    register(**options)
    module = experts()
    x, ids, weights = call()
    expected = run_as(module, bridge.NAME, x, ids, weights)
    around = (torch.full_like(ids, dropped), torch.full_like(weights, weight))
    more = torch.stack([ids, around[0]], -1).flatten(1), torch.stack([weights, around[1]], -1).flatten(1)
    close(run_as(module, bridge.NAME, x, *more), expected, 1e-6)
    assert not run_as(module, bridge.NAME, x, *around).any()


@pytest.mark.parametrize("weight", [0.0, float("nan")])
@pytest.mark.parametrize("top_k", [2, 5])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_expert_parallel_ranks_sum_to_the_layer(
    experts: Make, call: Make, run_as: Make, weight: float, top_k: int, dtype: torch.dtype
) -> None:
    """All-reduce EP marks the other ranks' experts with the number of local ones. 5 is more than live on a rank."""
    whole = experts()
    x, ids, weights = call(top_k=top_k)
    total = torch.zeros_like(x)
    for rank in range(3):
        part = copy.deepcopy(whole)
        part.num_experts, part._is_expert_parallel = 2, True
        for name, parameter in whole.named_parameters():
            setattr(part, name, nn.Parameter(parameter[2 * rank : 2 * rank + 2], requires_grad=False))
        local = (ids - 2 * rank >= 0) & (ids - 2 * rank < 2)
        local_ids = torch.where(local, ids - 2 * rank, 2).to(dtype)
        total += run_as(part, bridge.NAME, x, local_ids, torch.where(local, weights, weight))
    close(total, run_as(whole, "eager", x, ids, weights))


@pytest.mark.parametrize("tokens", [0, 1])
def test_no_token_and_one_token(experts: Make, call: Make, run_as: Make, tokens: int) -> None:
    module, inputs = experts(), call(1)
    inputs = tuple(t[:tokens] for t in inputs)
    assert run_as(module, bridge.NAME, *inputs).shape == (tokens, 64)


def test_gradients_are_refused(experts: Make, call: Make) -> None:
    module, (x, ids, weights) = experts(), call()
    for wanting in (0, 1):
        inputs = [x.clone(), weights.clone()]
        inputs[wanting].requires_grad_()
        with pytest.raises(ContractViolation, match=r"inference only[\s\S]*torch\.no_grad\(\)[\s\S]*grouped_mm"):
            module(inputs[0], ids, inputs[1])
        with torch.no_grad():
            expected = module(*(inputs[0], ids, inputs[1]))
        with torch.inference_mode():
            close(module(inputs[0], ids, inputs[1]), expected, 0)
    assert not module(x, ids, weights).requires_grad  # nobody wants a gradient
    module.down_proj.requires_grad_()
    with pytest.raises(ContractViolation, match="inference only"):
        module(x, ids, weights)


def test_plan_options(register: Make, experts: Make, call: Make, run_as: Make) -> None:
    module, inputs = experts(), call()
    expected = run_as(module, "eager", *inputs)
    register("packed")
    register("rows", options={"cpu": {"pack_weights": False}})
    register("slow", runner="reference")
    # One model under several names: each gets its own plan, and nothing of the others.
    for name, layout in [("rows", "rows"), ("slow", "canonical"), ("rows", "rows"), ("packed", None)]:
        close(run_as(module, name, *inputs), expected)
        found = bridge.plans(module)[""].quant_info
        assert layout in (None, found.layout)
    rows = run_as(module, "rows", *inputs)
    assert bridge.plans(module)[""].quant_info.w2[0].data_ptr() == module.down_proj.data_ptr()
    register("rows", options={"cpu": {"pack_weights": True}})
    close(run_as(module, "rows", *inputs), rows)
    register("typo", options={"cpu": {"pack_weight": False}})
    with pytest.raises(ConfigError, match="did you mean 'pack_weights'"):
        run_as(module, "typo", *inputs)
    register("unknown", runner="refrence")
    with pytest.raises(ConfigError, match="did you mean 'reference'"):
        run_as(module, "unknown", *inputs)
    register("setting", runer="reference")
    with pytest.raises(ConfigError, match="did you mean 'runner'"):
        run_as(module, "setting", *inputs)
    register("forced", runner="cpu")
    with pytest.raises(UnsupportedOverride, match="cpu"):
        run_as(experts(dtype=torch.float64), "forced", inputs[0].double(), *inputs[1:])


def test_other_dtype_of_tokens_than_of_weights(experts: Make, call: Make, run_as: Make) -> None:
    """Under autocast a norm hands over float32 where the weights are bfloat16; grouped_mm casts, and so does this."""
    module, (x, ids, weights) = experts(dtype=torch.bfloat16), call()
    found = run_as(module, bridge.NAME, x, ids, weights)
    assert found.dtype == torch.float32
    close(found, run_as(module, bridge.NAME, x.bfloat16(), ids, weights).float(), 0)
    close(found, run_as(module, "grouped_mm", x, ids, weights), 3e-2)


@use_experts_implementation(has_post_expert_norm=True)
class NormedExperts(MixtralExperts):
    def post_expert_norm(self, x: Tensor) -> Tensor:
        return x


@use_experts_implementation(has_gate=False)
class GatelessExperts(MixtralExperts):
    """Says that it has `up_proj`, and has not."""


def test_modules_that_no_layer_expresses(experts: Make, call: Make, run_as: Make) -> None:
    with pytest.raises(ConfigError, match=r"NormedExperts normalizes[\s\S]*post_expert_norm[\s\S]*experts_implement"):
        run_as(experts(NormedExperts), bridge.NAME, *call())
    with pytest.raises(ConfigError, match="GatelessExperts has no up_proj"):
        run_as(experts(GatelessExperts), bridge.NAME, *call())


def test_compiles_after_a_first_run(experts: Make, call: Make, run_as: Make) -> None:
    module, inputs = experts(), call()
    torch._dynamo.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        with pytest.raises(torch._dynamo.exc.Unsupported, match="run the model once before"):
            compiled(*inputs)
        torch._dynamo.reset()
        expected = module(*inputs)
        close(compiled(*inputs), expected)
        # In place: the graph reads the same plan, once an eager forward has noticed. Swapped: a new plan and graph.
        for change in ("in place", "swapped"):
            if change == "in place":
                module.down_proj.mul_(2)
            else:
                module.down_proj.data = module.down_proj.data * 2
            changed = module(*inputs)
            assert (changed - expected).abs().max() > 0.1
            close(compiled(*inputs), changed)
            expected = changed


def test_compiles_with_graph_breaks_before_a_first_run(experts: Make, call: Make, run_as: Make) -> None:
    module, inputs = experts(), call()
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(module, backend="aot_eager")(*inputs)
    close(found, run_as(module, "eager", *inputs))
    assert bridge.plans(module)


def test_what_is_no_experts_implementation_at_all() -> None:
    tiny = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = LlamaForCausalLM(tiny)
    assert bridge.plans(model) == {}
    bridge.release(model)


def test_a_transformers_without_the_interfaces(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.integrations.moe as module

    monkeypatch.delattr(module, "ExpertsInterface")
    with pytest.raises(ConfigError, match=r"has no experts interface[\s\S]*transformers 5 or newer"):
        bridge.register()
