"""What `make_request`, `plan` and `MoeConfig` take, and what they say about the rest."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import moe_core
from moe_core import CanonicalWeights, ConfigError, DroppedSlot, MoeConfig, Phase, Registry, Settings, Step
from moe_core.api import make_request

LAYER = MoeConfig(num_experts=4, top_k=2, hidden_size=16, intermediate_size=16, dtype="float32")
CORE = Registry(autoload=False, settings=Settings())


def test_names_stand_for_their_members() -> None:
    found = make_request(
        LAYER,
        None,
        "cpu",
        phases="decode",
        features="lora",
        hooks="after_down",
        graph_capture="decode",
        no_host_sync=["decode"],
        incoming="never",  # type: ignore[arg-type]
        caller_does="ep_reduce",
        caller_can=["topk_sum"],  # type: ignore[list-item]
        assume="targets",
    )
    assert found.phases == (Phase.DECODE,)
    assert (found.features, found.hooks) == ({"lora"}, {"after_down"})
    assert found.graph_capture == found.no_host_sync == {Phase.DECODE}
    assert found.incoming is DroppedSlot.NEVER
    assert (found.caller_does, found.caller_can) == ({Step.EP_REDUCE}, {Step.TOPK_SUM})
    assert found.assume == {"targets"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"phases": "decod"}, r"(?s)unknown phase 'decod'.*did you mean 'decode'"),
        ({"graph_capture": ["prefil"]}, r"(?s)unknown phase 'prefil'.*did you mean 'prefill'"),
        ({"incoming": "negativ"}, r"(?s)unknown incoming 'negativ'.*did you mean 'negative'"),
        ({"caller_does": "ep_reduc"}, r"(?s)unknown step 'ep_reduc'.*did you mean 'ep_reduce'"),
        ({"caller_can": [3]}, "unknown step '3'"),
    ],
)
def test_a_misspelled_name_is_met_with_help(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make_request(LAYER, None, "cpu", **changes)


def test_parallel_must_be_one() -> None:
    with pytest.raises(ConfigError, match=r"(?s)parallel must be a ParallelConfig, got 8.*ep_size=8"):
        make_request(LAYER, 8, "cpu")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"(?s)tokens must be .* got 'shared'.*did you mean 'sharded'"):
        moe_core.ParallelConfig(ep_size=2, tokens="shared")


@pytest.mark.parametrize("config", [None, "olmoe", 3, {}])
def test_a_plan_is_made_for_a_config_and_weights(config: Any) -> None:
    with pytest.raises(ConfigError, match=r"(?s)plan takes a MoeConfig and CanonicalWeights, got .*preset"):
        moe_core.plan(config, None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="got MoeConfig and NoneType"):
        moe_core.plan(LAYER, None)  # type: ignore[arg-type]


def test_the_values_of_a_config() -> None:
    assert LAYER.replace(dtype=torch.bfloat16).dtype == "bfloat16"
    with pytest.raises(ConfigError, match=r"(?s)activation=Activation.*Activation\(name='silu'\)"):
        LAYER.replace(activation="silu")
    for factor in (float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="routed_scaling_factor must be finite"):
            LAYER.replace(routed_scaling_factor=factor)


def test_options_of_nobody_are_refused() -> None:
    weights = CanonicalWeights(w13=torch.zeros(4, 32, 16), w2=torch.zeros(4, 16, 16))
    settings = Settings(options={"refrence": {"emulate_activations": False}})
    with pytest.raises(ConfigError, match=r"(?s)options are given for 'refrence', which is not here.*'reference'"):
        moe_core.plan(LAYER, weights, registry=CORE, settings=settings)
