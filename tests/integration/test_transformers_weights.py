"""The bridge and weights that change: converted once, refreshed when needed, never anybody else's memory written."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moe_core.integrations.transformers as bridge
from moe_core.errors import BindError
from moe_core.moe_plan import MoePlan

Make = Callable[..., Any]
OPTIONS: dict[str, dict[str, Any]] = {
    "packed": {},
    "rows": {"options": {"cpu": {"pack_weights": False}}},
    "reference": {"runner": "reference"},
}


class Counter:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[str] = []
        for owner, name, what in ((bridge, "make_plan", "plan"), (MoePlan, "update_weights", "update")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name), what))

    def _counting(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.seen.append(what)
            return function(*args, **kwargs)

        return counted

    def take(self) -> list[str]:
        seen, self.seen = self.seen, []
        return seen


@pytest.fixture
def count(monkeypatch: pytest.MonkeyPatch) -> Counter:
    return Counter(monkeypatch)


@pytest.fixture(params=OPTIONS)
def name(request: pytest.FixtureRequest, register: Make) -> str:
    return register(request.param, **OPTIONS[request.param])


@pytest.fixture(params=[(MixtralExperts, MixtralConfig), (GptOssExperts, GptOssConfig)], ids=["mixtral", "gpt_oss"])
def module(request: pytest.FixtureRequest, experts: Make, name: str) -> nn.Module:
    cls, config_class = request.param
    made = experts(cls, config_class=config_class)
    made.config._experts_implementation = name
    return made


@pytest.fixture
def check(module: nn.Module, call: Make, run_as: Make, count: Counter) -> Callable[..., None]:
    """check(*expected): a forward agrees with eager, after exactly these conversions."""
    x, ids, weights = call()

    def run(*expected: str, mode: Any = torch.no_grad, dtype: torch.dtype = torch.float32) -> None:
        inputs = (x.to(dtype), ids, weights.to(dtype))
        tolerance = 1e-5 if dtype == torch.float32 else 5e-2
        with mode():
            found = module(*inputs)
        assert count.take() == list(expected)
        torch.testing.assert_close(found, run_as(module, "eager", *inputs), rtol=tolerance, atol=tolerance)

    return run


def test_converted_once_and_updated_in_place(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan")
    check()
    check(mode=torch.inference_mode)
    for parameter in module.parameters():
        with torch.no_grad():
            parameter.mul_(1.25)
        check("update")
        check()
    plan = bridge.plans(module)[""]
    module.load_state_dict({k: 0.8 * v for k, v in module.state_dict().items()})
    check("update")
    check()
    assert bridge.plans(module)[""] is plan
    bridge.release(module)
    check("plan")


def test_replaced_weights_get_a_new_plan(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan")
    module.down_proj.data = module.down_proj.data * 2
    check("plan")
    # Twice, so that the second may lie where the first plan's weights lay.
    module.down_proj.data = module.down_proj.data.clone()
    module.down_proj.data = module.down_proj.data * 0.5
    check("plan")
    module.load_state_dict({k: v * 1.5 for k, v in module.state_dict().items()}, assign=True)
    module.requires_grad_(False)
    check("plan")
    check()


def test_a_part_of_one_buffer_after_another(module: nn.Module, check: Callable[..., None]) -> None:
    """The same storage, another place in it."""
    both = torch.stack([module.down_proj.data, module.down_proj.data * 2])
    for part in both:
        module.down_proj.data = part
        check("plan")


def test_weights_that_are_swapped_out_keep_their_values(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan")
    first = module.down_proj.data
    kept, second = first.clone(), torch.randn_like(first)
    for data in (second, first, second):
        module.down_proj.data = data
        check("plan")
    assert torch.equal(first, kept)


def test_dtype_change(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan")
    module.to(torch.bfloat16)
    check("plan", dtype=torch.bfloat16)
    check(dtype=torch.bfloat16)
    module.to(torch.float32)
    check("plan")


def test_planned_in_inference_mode_and_used_outside(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan", mode=torch.inference_mode)
    with torch.no_grad():
        module.gate_up_proj.mul_(1.25)
    check("update")
    with torch.no_grad():
        module.down_proj.mul_(1.25)
    check("update", mode=torch.inference_mode)


def test_weights_made_in_inference_mode(module: nn.Module, check: Callable[..., None]) -> None:
    """Such tensors do not count their changes: release() is for them."""
    with torch.inference_mode():
        module.down_proj.data = module.down_proj.data * 2
        module.down_proj = nn.Parameter(module.down_proj.data.clone(), requires_grad=False)
    check("plan")
    check(mode=torch.inference_mode)
    with torch.inference_mode():
        module.down_proj.mul_(2)
    bridge.release(module)
    check("plan")


def test_top_k_change(module: nn.Module, call: Make, run_as: Make, count: Counter) -> None:
    for top_k, expected in ((2, ["plan"]), (3, ["plan"]), (3, []), (1, ["plan"])):
        inputs = call(top_k=top_k)
        with torch.no_grad():
            found = module(*inputs)
        assert count.take() == expected
        torch.testing.assert_close(found, run_as(module, "eager", *inputs), rtol=1e-5, atol=1e-5)


def test_registered_again_with_the_same_options(
    module: nn.Module, name: str, register: Make, check: Callable[..., None]
) -> None:
    check("plan")
    register(name, **copy.deepcopy(OPTIONS[name]))
    check()
    register(name, runner="reference", options={"reference": {"emulate_activations": False}})
    check("plan")


def test_copies_make_their_own_plan(module: nn.Module, check: Callable[..., None], call: Make, run_as: Make) -> None:
    check("plan")
    plan = bridge.plans(module)[""]
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    for made in (copy.deepcopy(module), torch.load(file, weights_only=False), pickle.loads(pickle.dumps(module))):
        assert bridge.plans(made) == {}
        bridge.release(made)
        with torch.no_grad():
            made.down_proj.mul_(3)
        inputs = call()
        found = run_as(made, module.config._experts_implementation, *inputs)
        torch.testing.assert_close(found, run_as(made, "eager", *inputs), rtol=1e-5, atol=1e-5)
    assert bridge.plans(module)[""] is plan


def test_a_saved_model_does_not_name_moe_core(module: nn.Module, check: Callable[..., None]) -> None:
    check("plan")
    module.config._experts_implementation = "eager"
    assert b"moe_core.integrations" not in pickle.dumps(module)
    assert not any("moe_core" in key for key in module.state_dict())


def test_nothing_keeps_replaced_weights_or_plans_alive(module: nn.Module, call: Make) -> None:
    inputs = call()
    with torch.no_grad():
        module(*inputs)
        old = [weakref.ref(module.down_proj.untyped_storage()), weakref.ref(bridge.plans(module)[""].runner)]
        module.down_proj.data = module.down_proj.data * 2
        module(*inputs)
    gc.collect()
    assert [reference() for reference in old] == [None, None]


def test_a_runner_that_cannot_update_gets_a_new_plan(
    module: nn.Module, check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: MoePlan, weights: Any) -> None:
        raise BindError("cannot be updated in place")

    check("plan")
    monkeypatch.setattr(MoePlan, "update_weights", refuse)
    with torch.no_grad():
        module.down_proj.mul_(2)
    check("plan")


def test_a_failure_leaves_no_half_made_plan(module: nn.Module, call: Make, run_as: Make) -> None:
    inputs: tuple[Tensor, ...] = call()
    name = module.config._experts_implementation
    run_as(module, name, *inputs)
    good = module.down_proj.data
    module.down_proj.data = good[..., :-1]
    with pytest.raises(Exception, match=r"w13|w2|shape"):
        run_as(module, name, *inputs)
    assert bridge.plans(module) == {}
    module.down_proj.data = good
    torch.testing.assert_close(run_as(module, name, *inputs), run_as(module, "eager", *inputs), rtol=1e-5, atol=1e-5)
