"""MoeLayer: router, experts and shared experts together, against the same steps taken by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_core
from moe_core import (
    BypassedTopK,
    CanonicalWeights,
    ConfigError,
    ContractViolation,
    MoeConfig,
    MoeLayer,
    Owner,
    ParallelConfig,
    Registry,
    RoutingConfig,
    Settings,
    Step,
)
from moe_core.formats import StandardCombineInput
from moe_core.testing.fakes import dispatcher_like, fake_plugin, runner_like
from moe_core.testing.oracle import dense
from moe_core.vocabulary import TOPK_BYPASSED, TOPK_STANDARD

LAYER = MoeConfig(
    num_experts=8,
    top_k=2,
    hidden_size=32,
    intermediate_size=16,
    dtype="float32",
    routing=RoutingConfig(method="softmax", renormalize=True),
)
GROUPED = RoutingConfig(
    method="sigmoid", renormalize=True, correction_bias=True, num_groups=4, topk_groups=2, group_score="top2_sum"
)
CORE = Registry(autoload=False, settings=Settings())


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads cost more than they bring at these sizes, most of all on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


ROUTER = random(8, 32, seed=1)
BIAS = random(8, seed=2)
TOKENS = random(5, 32, seed=3)


def weights(seed: int = 4) -> CanonicalWeights:
    return CanonicalWeights(w13=random(8, 32, 32, seed=seed), w2=random(8, 32, 16, seed=seed + 1))


def make(config: MoeConfig = LAYER, router: Tensor = ROUTER, registry: Registry = CORE, **changes: Any) -> MoeLayer:
    changes.setdefault("settings", Settings())
    return MoeLayer(config, router, changes.pop("weights", weights()), registry=registry, **changes)


def by_hand(config: MoeConfig, hidden: Tensor = TOKENS, bias: Tensor | None = None, **changes: Any) -> Tensor:
    """Routing and experts, written out."""
    logits = hidden.to(ROUTER.dtype) @ ROUTER.t()
    scores = logits.sigmoid() if config.routing.method == "sigmoid" else logits.softmax(-1)
    choice = scores if bias is None else scores + bias
    if config.routing.num_groups > 1:
        best = choice.view(-1, 4, 2).sum(-1).topk(2).indices
        allowed = torch.zeros(len(hidden), 4, dtype=torch.bool).scatter_(1, best, True).repeat_interleave(2, dim=1)
        choice = choice.where(allowed, -torch.inf)
    ids = choice.topk(config.top_k).indices
    picked = scores.gather(1, ids)
    decision = moe_core.TopKOutput(ids, picked / picked.sum(-1, keepdim=True))
    return dense(config, changes.get("weights", weights()), hidden, decision)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("runner", ["cpu", "reference"])
def test_a_layer_routes_and_runs(runner: str) -> None:
    close(make(settings=Settings(runner=runner))(TOKENS), by_hand(LAYER))


def test_the_correction_bias_moves_the_choice_and_not_the_weights() -> None:
    config = replace(LAYER, routing=GROUPED, routed_scaling_factor=2.5)
    found = make(config, correction_bias=BIAS)(TOKENS)
    close(found, by_hand(config, bias=BIAS))
    strong = torch.zeros(8)
    strong[6:] = 10.0  # all tokens to the last group, and by the bias alone
    chosen = make(config, correction_bias=strong).route(TOKENS).topk_ids
    assert set(chosen.flatten().tolist()) == {6, 7}
    assert not torch.allclose(make(config, correction_bias=strong)(TOKENS), found)


@pytest.mark.parametrize(
    ("routing", "bias", "message"),
    [
        (GROUPED, None, "the routing has correction_bias=True, but the layer was given none"),
        (LAYER.routing, BIAS, "the routing has correction_bias=False, but the layer was given one"),
    ],
)
def test_a_bias_is_given_exactly_where_the_routing_has_one(
    routing: RoutingConfig, bias: Tensor | None, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        make(replace(LAYER, routing=routing), correction_bias=bias)


def test_a_router_of_another_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"router_weight has shape \(32, 8\), expected \(8, 32\)"):
        make(router=ROUTER.t())


@pytest.mark.parametrize("shape", [(32,), (0, 32), (1, 32), (2, 3, 32), (2, 1, 3, 32)])
def test_leading_dimensions_are_kept(shape: tuple[int, ...]) -> None:
    layer, hidden = make(), random(*shape, seed=9)
    found = layer(hidden)
    assert found.shape == shape
    close(found.reshape(-1, 32), by_hand(LAYER, hidden.reshape(-1, 32)))


def test_leading_dimensions_are_kept_without_the_sum() -> None:
    config = replace(LAYER, no_combine=True)
    assert make(config)(random(2, 3, 32)).shape == (2, 3, 2, 32)


def test_a_wrong_hidden_size_is_refused_before_the_router_runs() -> None:
    # Its elements would fill rows of the right size.
    with pytest.raises(ContractViolation, match=r"hidden_states has shape \(2, 3, 16\), expected \[..., 32\]"):
        make()(random(2, 3, 16))


def test_shared_experts_are_added() -> None:
    shared = nn.Linear(32, 32)
    layer = make(shared_experts=shared)
    with torch.no_grad():
        close(layer(TOKENS), by_hand(LAYER) + shared(TOKENS).double())
        assert layer(TOKENS.reshape(1, 5, 32)).shape == (1, 5, 32)
    close(make(shared_experts=lambda rows: rows * 3)(TOKENS), by_hand(LAYER) + 3 * TOKENS.double())


def test_shared_experts_have_nothing_to_be_added_to_without_the_sum() -> None:
    with pytest.raises(ConfigError, match="no_combine returns a row for each slot"):
        make(replace(LAYER, no_combine=True), shared_experts=nn.Identity())


def test_the_state_is_the_router_its_bias_and_the_shared_experts() -> None:
    assert set(make().state_dict()) == {"router_weight"}
    config = replace(LAYER, routing=GROUPED)
    full = make(config, correction_bias=BIAS, shared_experts=nn.Linear(32, 32, bias=False))
    assert set(full.state_dict()) == {"router_weight", "correction_bias", "shared_experts.weight"}
    assert not full.router_weight.requires_grad
    other = make(
        config, torch.zeros(8, 32), correction_bias=torch.zeros(8), shared_experts=nn.Linear(32, 32, bias=False)
    )
    other.load_state_dict(full.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(TOKENS), full(TOKENS))


def test_a_router_of_another_precision_computes_its_logits_there() -> None:
    config = replace(LAYER, dtype="bfloat16")
    halves = CanonicalWeights(w13=weights().w13.bfloat16(), w2=weights().w2.bfloat16())
    layer = make(config, weights=halves)
    hidden = TOKENS.bfloat16()
    assert torch.equal(layer.route(hidden).topk_weights, layer.route(hidden.float()).topk_weights)
    assert layer(hidden).dtype == torch.bfloat16


def test_no_gradient_is_recorded() -> None:
    layer = make(shared_experts=None)
    assert not layer(TOKENS).requires_grad
    with pytest.raises(ContractViolation, match="wants a gradient"):
        layer(TOKENS.clone().requires_grad_())


def test_new_expert_weights_take_the_place_of_the_old_ones() -> None:
    layer = make()
    layer.update_weights(weights(11))
    close(layer(TOKENS), by_hand(LAYER, weights=weights(11)))


def test_printing_a_layer_shows_its_plan() -> None:
    assert "<MoePlan standard+cpu/fused" in repr(make())


def idle_registry(**support: Any) -> Registry:
    """Its runner `lazy` is wanted most; neither it nor the dispatcher `idle` scales."""
    can = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM})
    lazy = runner_like(
        "reference", "lazy", last_resort=False, priority=500, adapter={"wants": {"can": can}}, support=support
    )
    offers = {"standard": replace(CORE.dispatchers["standard"].offers["standard"], can=can)}
    specs = {**lazy, **dispatcher_like("standard", "idle", offers=offers)}
    return Registry(plugins=[fake_plugin("acme", **specs)], autoload=False, settings=Settings())


IDLE = Settings(runner="lazy", dispatcher="idle")
SCALED = replace(LAYER, routed_scaling_factor=3.0)


@pytest.mark.parametrize(
    ("registry", "settings", "owner"),
    [
        (CORE, Settings(), Owner.RUNNER),
        (None, Settings(runner="lazy", dispatcher="standard"), Owner.DISPATCHER),
        (None, IDLE, Owner.CALLER),
    ],
    ids=["runner", "dispatcher", "layer"],
)
def test_the_routed_scaling_is_applied_once_whoever_owns_it(
    registry: Registry | None, settings: Settings, owner: Owner
) -> None:
    layer = make(SCALED, registry=registry or idle_registry(), settings=settings)
    assert layer.plan.step_owner(Step.ROUTED_SCALING) is owner
    close(layer(TOKENS), by_hand(SCALED))


def test_the_layer_does_not_scale_what_a_function_that_is_not_linear_gets() -> None:
    on_input = replace(SCALED, router_weight_on_input=True)
    close(make(on_input)(TOKENS), by_hand(on_input))
    with pytest.raises(moe_core.UnsupportedOverride, match="nobody would do routed_scaling"):
        make(on_input, registry=idle_registry(), settings=IDLE)


class Routes:
    """A runner that routes by itself: its result is the router's logits, widened."""

    def __init__(self, binding: Any) -> None:
        pass

    def run(self, runner_input: Any, quant_info: Any, state: Any) -> Any:
        return runner_input


def bypassed_pre(binding: Any) -> Any:
    def pre(dispatched: Any, quant_info: Any, config: Any, state: Any) -> Tensor:
        assert dispatched.topk_ids is None
        assert dispatched.topk_weights is None
        state.private["bias"] = dispatched.correction_bias
        return dispatched.router_logits.repeat(1, 4)

    return pre


def bypassed_post(binding: Any) -> Any:
    def post(out: Tensor, quant_info: Any, config: Any, state: Any) -> StandardCombineInput:
        return StandardCombineInput(out + state.private["bias"].sum())

    return post


def test_a_kernel_that_routes_itself_gets_logits_and_bias() -> None:
    config = replace(LAYER, routing=GROUPED)
    takes = {"topk_formats": frozenset({TOPK_STANDARD, TOPK_BYPASSED})}
    like = runner_like(
        "reference",
        "routes",
        factory=Routes,
        support=takes,
        adapter={"pre": bypassed_pre, "post": bypassed_post},
        priority=900,
    )
    registry = Registry(plugins=[fake_plugin("acme", **like)], autoload=False, settings=Settings())
    layer = make(config, registry=registry, correction_bias=BIAS, topk_format=TOPK_BYPASSED)
    assert layer.plan.resolution.require().runner == "routes"
    decision = layer.route(TOKENS)
    assert isinstance(decision, BypassedTopK)
    torch.testing.assert_close(layer(TOKENS), (TOKENS @ ROUTER.t()).repeat(1, 4) + BIAS.sum())


def test_the_layer_offers_no_scaling_to_a_kernel_that_routes_itself() -> None:
    """It has no weights to scale then, and a factor that nobody applies must not go unnoticed."""
    registry = idle_registry(topk_formats=frozenset({TOPK_BYPASSED}))
    with pytest.raises(moe_core.UnsupportedOverride, match="nobody would do routed_scaling"):
        make(SCALED, registry=registry, settings=IDLE, topk_format=TOPK_BYPASSED)


def test_a_rank_of_a_layer_gives_its_part() -> None:
    parts = []
    for rank in range(2):
        ranks = ParallelConfig(ep_size=2, ep_rank=rank, reduce="caller")
        parts.append(make(weights=weights().shard(LAYER, ranks), parallel=ranks)(TOKENS))
    close(parts[0] + parts[1], by_hand(LAYER))
