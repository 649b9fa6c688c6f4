"""A layer and its ranks: what is refused and why, who owns which expert, and the canonical form of a question."""

from __future__ import annotations

import json
import pickle
from dataclasses import FrozenInstanceError, replace
from typing import Any

import pytest

from moe_core._frozen import FrozenDict
from moe_core.config import Activation, MoeConfig, ParallelConfig, RoutingConfig
from moe_core.errors import ConfigError
from moe_core.hardware import HardwareInfo, profile
from moe_core.request import PlanRequest
from moe_core.settings import Settings
from moe_core.vocabulary import DroppedSlot, Phase, Step


def layer(**changes: Any) -> MoeConfig:
    return MoeConfig(**{"num_experts": 8, "top_k": 2, "hidden_size": 64, "intermediate_size": 96, **changes})


def request(config: MoeConfig | None = None, **changes: Any) -> PlanRequest:
    return PlanRequest(**{"config": config or layer(), "hardware": profile("cpu"), **changes})


@pytest.mark.parametrize("name", ["num_experts", "top_k", "hidden_size", "intermediate_size"])
@pytest.mark.parametrize("value", [0, -1, 2.0, True, "8", None])
def test_sizes_are_positive_integers(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"MoeConfig.{name} must be a positive integer, got {value!r}"):
        layer(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 9}, "top_k is 9, but there are only 8 experts"),
        ({"dtype": "bf16"}, r"(?s)unknown dtype 'bf16'.*did you mean 'bfloat16'"),
        ({"dtype": "float23"}, r"(?s)unknown dtype 'float23'.*did you mean 'float32'"),
        (
            {"routing": RoutingConfig(method="sigmoid", num_groups=3, topk_groups=1)},
            "8 experts cannot be divided into 3 routing groups",
        ),
        (
            {"no_combine": True, "router_weight_on_input": True, "routed_scaling_factor": 2.0},
            "leaves no step to carry routed_scaling_factor",
        ),
    ],
)
def test_a_layer_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        layer(**changes)


def test_the_scheme_and_the_activation_are_open_names() -> None:
    found = layer(scheme="acme_int3", activation=Activation(name="acme_glu"))
    assert (found.scheme, found.activation.name) == ("acme_int3", "acme_glu")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "swiglu_oai", "gated": False}, "'swiglu_oai' was asked for with gated=False"),
        ({"limit": 0.0}, "limit must be positive or None, got 0.0"),
        ({"limit": -7}, "limit must be positive or None, got -7"),
        ({"limit": float("nan")}, "limit must be positive or None, got nan"),
    ],
)
def test_an_activation_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Activation(**changes)


def test_gated_layers_have_two_rows_of_w13_a_unit() -> None:
    assert layer().gate_up_factor == 2
    assert layer(activation=Activation(name="relu2", gated=False)).gate_up_factor == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": "softmx"}, r"(?s)unknown routing method 'softmx'.*did you mean 'softmax'"),
        ({"group_score": "mx"}, r"(?s)unknown group_score 'mx'.*did you mean 'max'"),
        ({"num_groups": 4, "topk_groups": 5}, r"topk_groups must be between 1 and num_groups \(4\), got 5"),
        ({"topk_groups": 0}, "topk_groups must be between 1"),
        ({"method": "topk_softmax", "num_groups": 2}, "'topk_softmax' has no groups, got num_groups=2"),
    ],
)
def test_a_routing_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RoutingConfig(**changes)


def test_a_changed_copy_is_validated_again() -> None:
    assert layer().replace(top_k=4).top_k == 4
    with pytest.raises(ConfigError, match="top_k is 9"):
        layer().replace(top_k=9)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tp_size": 2, "tp_rank": 2}, r"tp_rank must be in \[0, tp_size\), got rank 2 of 2"),
        ({"ep_size": 0}, r"ep_rank must be in \[0, ep_size\), got rank 0 of 0"),
        ({"ep_rank": -1}, r"ep_rank must be in .*got rank -1 of 1"),
        ({"placement": "lineal"}, r"(?s)unknown placement 'lineal'.*did you mean 'linear'.*a tuple"),
        ({"ep_size": 2, "placement": (0, 1, 2, 5)}, r"placement names ranks \[2, 5\], but ep_size is 2"),
        ({"reduce": "caler"}, r"(?s)reduce must be .* got 'caler'.*did you mean 'caller'"),
    ],
)
def test_ranks_that_make_no_sense_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**changes)


@pytest.mark.parametrize(
    ("placement", "expected"),
    [
        ("linear", [(0, 1, 2, 3), (4, 5, 6), (7, 8, 9)]),
        ("round_robin", [(0, 3, 6, 9), (1, 4, 7), (2, 5, 8)]),
        ((2, 2, 0, 1, 2, 0, 0, 2, 2, 2), [(2, 5, 6), (3,), (0, 1, 4, 7, 8, 9)]),
        ((0, 0, 0, 0, 0, 2, 2, 2, 2, 2), [(0, 1, 2, 3, 4), (), (5, 6, 7, 8, 9)]),
    ],
)
def test_every_expert_has_one_owner_and_local_ids_ascend(placement: Any, expected: list[tuple[int, ...]]) -> None:
    ranks = [ParallelConfig(ep_size=3, ep_rank=r, placement=placement) for r in range(3)]
    assert [p.local_experts(10) for p in ranks] == expected
    assert sorted(e for p in ranks for e in p.local_experts(10)) == list(range(10))
    assert [ranks[0].local_experts(10, rank) for rank in range(3)] == expected
    assert all(ranks[1].owners(10)[e] == r for r, owned in enumerate(expected) for e in owned)


def test_a_placement_map_has_one_entry_an_expert() -> None:
    with pytest.raises(ConfigError, match="placement has 3 entries for 8 experts"):
        ParallelConfig(ep_size=2, placement=(0, 1, 0)).owners(8)


def test_a_placement_given_as_a_list_is_frozen() -> None:
    parallel = ParallelConfig(ep_size=2, placement=[0, 1, 1, 0])  # type: ignore[arg-type]
    assert parallel.placement == (0, 1, 1, 0)
    assert hash(parallel) == hash(ParallelConfig(ep_size=2, placement=(0, 1, 1, 0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": ()}, "phases is empty: name prefill, decode or both"),
        ({"max_tokens": 0}, "max_tokens must be positive or None, got 0"),
        ({"parallel": ParallelConfig(tp_size=5)}, "intermediate size 96 cannot be divided by tp_size 5"),
        ({"parallel": ParallelConfig(ep_size=9)}, "ep_size 9 is larger than the number of experts 8"),
        ({"parallel": ParallelConfig(ep_size=2, placement=(0, 1))}, "placement has 2 entries for 8 experts"),
    ],
)
def test_a_question_that_makes_no_sense_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request(**changes)


def test_local_sizes_are_those_of_the_rank() -> None:
    found = request(parallel=ParallelConfig(tp_size=3, ep_size=3, ep_rank=2))
    assert (found.num_local_experts, found.local_intermediate_size) == (2, 32)
    assert request(parallel=ParallelConfig(ep_size=3)).num_local_experts == 3


def test_a_layer_implies_its_features() -> None:
    assert request().layer_features == frozenset()
    every = layer(bias=True, no_combine=True, router_weight_on_input=True)
    assert request(every).layer_features == {"bias", "no_combine", "router_weight_on_input"}


@pytest.mark.parametrize(
    ("changes", "parallel", "expected"),
    [
        ({}, ParallelConfig(), {Step.ROUTER_WEIGHT, Step.TOPK_SUM}),
        ({"no_combine": True}, ParallelConfig(), {Step.ROUTER_WEIGHT}),
        (
            {"routed_scaling_factor": 2.5},
            ParallelConfig(tp_size=2, ep_size=2),
            set(Step),
        ),
    ],
)
def test_the_steps_of_a_layer_follow_from_it(
    changes: dict[str, Any], parallel: ParallelConfig, expected: set[Step]
) -> None:
    assert request(layer(**changes), parallel=parallel).steps == expected


def test_equal_questions_are_equal_and_hash_alike() -> None:
    def ask() -> PlanRequest:
        return request(
            features=frozenset({"b", "a"}),
            parallel=ParallelConfig(ep_size=2, placement=(0, 1) * 4),
            settings=Settings(options={"cpu": {"pack_weights": False}}),
        )

    assert ask() == ask()
    assert len({ask(), ask()}) == 1
    assert pickle.loads(pickle.dumps(ask())) == ask()
    assert replace(ask(), max_tokens=8) != ask()


def test_nothing_of_a_question_can_be_changed() -> None:
    for frozen, name in ((request(), "phases"), (layer(), "top_k"), (ParallelConfig(), "ep_rank")):
        with pytest.raises(FrozenInstanceError):
            setattr(frozen, name, 1)


def test_the_json_form_is_canonical_and_complete() -> None:
    one = request(
        features=frozenset({"lora", "bias", "compile"}),
        caller_can=frozenset(Step),
        graph_capture=frozenset(Phase),
        settings=Settings(options={"b": {"y": 1, "x": 2}, "a": {}}),
    )
    two = request(
        features=frozenset({"compile", "lora", "bias"}),
        caller_can=frozenset(reversed(list(Step))),
        graph_capture=frozenset(reversed(list(Phase))),
        settings=Settings(options={"a": {}, "b": {"x": 2, "y": 1}}),
    )
    text = json.dumps(one.to_json())
    assert text == json.dumps(two.to_json())
    back = json.loads(text)
    assert back == one.to_json()
    assert back["features"] == ["bias", "compile", "lora"]
    assert back["phases"] == ["prefill", "decode"]
    assert back["incoming"] == DroppedSlot.NEGATIVE.value
    assert list(back["settings"]["options"]) == ["a", "b"]
    assert back["hardware"]["device_type"] == "cpu"
    assert set(back) == set(PlanRequest.__dataclass_fields__)


def test_frozen_mappings_hash_and_compare_by_content() -> None:
    one, two = FrozenDict({"a": 1, "b": 2}), FrozenDict({"b": 2, "a": 1})
    assert one == two == {"a": 1, "b": 2}
    assert hash(one) == hash(two)
    assert one != FrozenDict({"a": 1})
    assert pickle.loads(pickle.dumps(one)) == one
    assert not hasattr(one, "__setitem__")


def test_profiles_are_known_by_name_in_any_case_and_typos_are_met_with_help() -> None:
    assert profile("H200") == profile("h200")
    with pytest.raises(ConfigError, match=r"(?s)unknown hardware profile 'h20'.*did you mean 'h200'.*all: cpu"):
        profile("h20")


def test_rocm_devices_are_cuda_to_torch() -> None:
    assert profile("mi300x").torch_device_type == "cuda"
    assert profile("cpu").torch_device_type == "cpu"
    assert "not this machine" in str(profile("b200"))
    here = HardwareInfo(device_type="cpu", arch="x86_64", product="CPU", memory_bytes=2**31, runtime="r", present=True)
    assert str(here) == "CPU x86_64 2 GiB r"
