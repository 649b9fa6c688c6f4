"""EP layers in two and four real processes: every dispatcher of `standard`, over the doubles of AITER, DeepEP and MoRI.

Each rank's result is held against the layer of one rank on the reference runner.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_core_aiter
import moe_core_deepep
import moe_core_mori
import pytest

from moe_core.testing import run_ranks

PLUGINS = Path(__file__).parents[2]
PACKAGES = (moe_core_aiter, moe_core_deepep, moe_core_mori)
PATHS = (*(Path(package.__file__).parents[1] for package in PACKAGES), PLUGINS / "deepep/tests")

SCRIPT = """
import deep_ep_double
sys.modules["deep_ep"] = deep_ep_double

from dataclasses import replace
from moe_core import Activation, MoeConfig, ParallelConfig, RunningState, TopKOutput, hookimpl
from moe_core.registry import Registry
from moe_core.testing import make_layer
from moe_core.testing.layers import make_routing
from moe_core.testing.tolerances import assert_close, relative_error
from moe_core_aiter.testing import AiterDouble, OnCpu
from moe_core_deepep.plugin import DeepEpPlugin
from moe_core_mori import testing as mori, wire

FNUZ = wire._FNUZ_ARCH


class DeepEpOnCpu(DeepEpPlugin):
    "The same dispatchers, where the double runs."

    @hookimpl
    def moe_core_dispatchers(self):
        here = dict(devices={"cpu": ("*",)}, requires=())
        return tuple(replace(spec, support=replace(spec.support, **here)) for spec in super().moe_core_dispatchers())


OAI = Activation.swiglu_oai()
MORE = {"int4_w4a16": dict(group_size=32), "mxfp4_w4a16": dict(activation=OAI, bias=True)}


def compare(arch, dispatcher, scheme, counts, placement="linear", pattern="skewed", flights=1):
    "What travelled, and the relative error of this rank's rows; raises where the tolerance is exceeded."
    double = AiterDouble(arch)
    before = double.install()
    mori.install(arch=arch)
    # The plans are a CPU's, so the rule about gfx942's eight-bit floats is told its name.
    wire._FNUZ_ARCH = moe_core.hardware.detect_cpu().arch if arch == "gfx942" else FNUZ
    try:
        return compared(double, dispatcher, scheme, counts[:ranks], placement, pattern, flights)
    finally:
        double.restore(before)


def compared(double, dispatcher, scheme, counts, placement, pattern, flights):
    sizes = dict(num_experts=8, top_k=3, hidden_size=256, intermediate_size=256, routed_scaling_factor=1.5)
    config = MoeConfig(scheme=scheme, **sizes, **MORE.get(scheme, {}))
    shared = dispatcher == "standard"
    owners = tuple((3 * e + 1) % ranks for e in range(8)) if placement == "map" else placement
    tokens = "replicated" if shared else "sharded"
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens=tokens, placement=owners)
    layers = [make_layer(config, 5 + i, tokens=sum(counts)) for i in range(flights)]
    for i, layer in enumerate(layers):
        topk = make_routing(pattern, sum(counts), 8, 3, 7 + i)
        topk.topk_ids[::4, 0], topk.topk_weights[::4, 0] = -1, float("nan")
        topk.topk_ids[1:2], topk.topk_weights[1:2] = -1, float("nan")  # a token of padding
        layer.topk.topk_ids, layer.topk.topk_weights = topk.topk_ids, topk.topk_weights
    whole = moe_core.plan(config, layers[0].weights, runner="reference", registry=Registry(autoload=False))
    plan = moe_core.plan(config, layers[0].weights.shard(config, parallel), parallel, group=group, max_tokens=16,
                         registry=Registry([OnCpu(), DeepEpOnCpu(), mori.OnCpu()], autoload=False), runner="aiter",
                         dispatcher=dispatcher)
    rows = slice(None) if shared else slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    states = [RunningState() for _ in layers]
    given = [(layer.hidden[rows], TopKOutput(layer.topk.topk_ids[rows], layer.topk.topk_weights[rows]))
             for layer in layers]
    if flights == 1:
        results = [plan(*one, state=state) for one, state in zip(given, states)]
    else:
        begun = [plan.dispatch_begin(*one, state) for one, state in zip(given, states)]
        done = [plan.run(plan.dispatch_finish(one, state), state) for one, state in zip(begun, states)]
        back = [plan.combine_begin(one, state) for one, state in zip(done, states)]
        results = [plan.combine_finish(one, state) for one, state in zip(back, states)]
    plan.close()
    worst = 0.0
    for layer, result in zip(layers, results):
        wanted = whole(layer.hidden, layer.topk)[rows]
        assert_close(result, wanted, "bfloat16", scheme, arch=double.arch)
        assert not bool(result[(layer.topk.topk_ids[rows] < 0).all(1)].any()), "padding is not zero"
        worst = max(worst, relative_error(result, wanted) if len(result) else 0.0)
    call = double.calls[-1] if double.calls else None
    terms = plan.terms["standard"]
    return [worst, terms.payload, str(terms.id_space), str(terms.dropped), call and call["expert_mask"].tolist()]
"""

ODD, ZERO = [5, 0, 8, 1], [0, 0, 0, 0]
SOME = ("bf16", "fp8_block128", "int4_w4a16", "mxfp4")
SCHEMES = (*SOME, "fp8_tensor", "fp8_channel", "int8_channel", "mxfp8", "mxfp4_w4a16")
MORI = ("mori", "mori_ll", "mori_v2")
DISPATCHERS = {"standard": SOME, "allgather": SOME, "alltoall": SCHEMES, "deepep_normal": SCHEMES}
DISPATCHERS |= {"mori": SCHEMES, "mori_ll": SOME, "mori_v2": SOME}
LAYERS: dict[str, tuple[Any, ...]] = {
    f"{dispatcher}, {scheme}": ("gfx950", dispatcher, scheme, ODD)
    for dispatcher, schemes in DISPATCHERS.items()
    for scheme in schemes
}
for one in DISPATCHERS:
    LAYERS[f"{one}, fnuz"] = ("gfx942", one, "fp8_block128", ODD)
    LAYERS[f"{one}, nobody"] = ("gfx950", one, "bf16", ZERO)
    LAYERS[f"{one}, one expert"] = ("gfx950", one, "bf16", ODD, "linear", "one_hot")
    LAYERS[f"{one}, in flight"] = ("gfx950", one, "bf16", ODD, "linear", "uniform", 2)
    if one not in ("deepep_normal", *MORI):  # linear only
        LAYERS[f"{one}, placed"] = ("gfx950", one, "bf16", ODD, "map")


@pytest.fixture(scope="module", params=[2, 4])
def said(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank said to every call."""
    lines = (f"say({name!r}, lambda: compare(*{arguments!r}))\n" for name, arguments in LAYERS.items())
    return run_ranks(request.param, SCRIPT + "".join(lines), tmp_path_factory.mktemp("gloo"), paths=PATHS, limit_s=240)


@pytest.mark.parametrize("name", LAYERS)
def test_as_one_rank(name: str, said: list[dict[str, Any]]) -> None:
    found = [rank[name] for rank in said]
    assert all(isinstance(one, list) for one in found), found


PAYLOAD = {"fp8_block128": "fp8_group128", "fp8_channel": "fp8_token", "mxfp4": "mxfp4"}


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_ids_masks_and_payloads(dispatcher: str, said: list[dict[str, Any]]) -> None:
    local = 8 // len(said)
    for rank, answers in enumerate(said):
        for scheme in DISPATCHERS[dispatcher]:
            _, payload, space, dropped, mask = answers[f"{dispatcher}, {scheme}"]
            if dispatcher == "standard":
                assert payload == "bf16"
            elif dispatcher in MORI:
                assert payload == (PAYLOAD.get(scheme, "bf16") if scheme != "fp8_channel" else "bf16")
            elif dispatcher != "deepep_normal" or scheme == "fp8_block128":
                assert payload == PAYLOAD.get(scheme, "bf16")
            assert dropped == "sink"
            if dispatcher == "deepep_normal":
                assert space == "local"
                assert mask in ([1] * local + [0], None)
            else:
                own = [int(e // local == rank) for e in range(8)]
                assert space == "global"
                assert mask in ([*own, 0], None)
