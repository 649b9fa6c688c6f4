"""What the tests' rank scripts share: layers over MoRI's double, compared with the same layer on one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import moe_core_mori
import pytest

from moe_core.testing import run_ranks

BEFORE = """
import gc
from dataclasses import replace
from moe_core import MoeConfig, ParallelConfig, Phase, RunningState, TopKOutput
from moe_core.registry import Registry
from moe_core.specs import Wants
from moe_core.testing import make_layer, probe
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace, Step
from moe_core_mori import buffers, calls, dispatcher, low_latency, machines, normal, testing, v2, wire

testing.install()
MOST = 8
FP8 = dict(scheme="fp8_block128", payload="fp8_group128")
MXFP4 = dict(scheme="mxfp4", payload="mxfp4")
PHASES = {"prefill": Phase.PREFILL, "decode": Phase.DECODE}


def config_of(**changes):
    sizes = dict(num_experts=8, top_k=3, hidden_size=256, intermediate_size=128, routed_scaling_factor=1.5)
    return MoeConfig(**(sizes | changes))


def planned(name, layer, config, *, phases=("prefill",), max_tokens=MOST, check=False, payload="bf16", **options):
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    chosen = {name: options} if options else {}
    settings = moe_core.Settings(runner="reference", dispatcher=name, options=chosen, check=check)
    return moe_core.plan(config, layer.weights.shard(config, parallel), parallel, group=group, max_tokens=max_tokens,
                         phases=[PHASES[phase] for phase in phases], registry=Registry([testing.OnCpu(payload)]),
                         settings=settings)


def mine(layer, counts):
    rows = slice(sum(counts[:rank]), sum(counts[: rank + 1]))
    return layer.hidden[rows], TopKOutput(layer.topk.topk_ids[rows], layer.topk.topk_weights[rows]), rows


def far(result, everything, rows):
    "The largest difference from one rank's result, relative to its largest value; NaN where there is one."
    expected = everything[rows]
    assert result.shape == expected.shape and result.dtype == expected.dtype, (result.shape, result.dtype)
    if not len(result):
        return 0.0
    return float((result.float() - expected.float()).abs().max() / everything.float().abs().max())


def compare(name, counts, *, phases=("prefill",), flights=1, pattern="uniform", drop=True, told=False, backwards=False,
            dtype="bfloat16", scheme="bf16", top_k=3, seed=5, **options):
    "As one rank has it, over phases and repeated calls; what was returned before must not change."
    counts = counts[:ranks]
    config = config_of(scheme=scheme, dtype=dtype, top_k=top_k)
    layers = [make_layer(config, seed + i, tokens=sum(counts), pattern=pattern) for i in range(flights)]
    for layer in layers if drop else ():
        layer.topk.topk_ids[::4, 0] = -1
        layer.topk.topk_weights[::4, 0] = float("nan")
        layer.topk.topk_ids[1::5] = -1  # rows that are padding
        layer.hidden[1::5] = float("nan")
    whole = moe_core.plan(config, layers[0].weights, runner="reference")
    plan = planned(name, layers[0], config, phases=phases, **options)
    assert plan.terms[STANDARD].payload == options.get("payload", "bf16")
    done, found = [], [0.0]
    for phase in phases:
        for _ in range(2):
            states, begun = [], []
            for i, layer in enumerate(layers):
                hidden, topk, _ = mine(layer, counts)
                state = RunningState(output=torch.full_like(hidden, float("nan")) if i else None)
                state.tokens_per_rank = counts if told else None
                states.append((state, state.output))
                if flights == 1:
                    begun.append(plan(hidden, topk, phase=PHASES[phase], state=state))
                else:
                    begun.append(plan.dispatch_begin(hidden, topk, state, phase=PHASES[phase]))
            if flights > 1:
                ran = [plan.run(plan.dispatch_finish(one, s), s) for one, (s, _) in zip(begun, states)]
                order = range(flights)[::-1] if backwards else range(flights)
                back = {i: plan.combine_begin(ran[i], states[i][0]) for i in order}
                begun = [plan.combine_finish(back[i], states[i][0]) for i in range(flights)]
            for layer, result, (_, output) in zip(layers, begun, states):
                assert output is None or result is output
                done.append((result, layer))
    for result, layer in done:
        found.append(far(result, whole(layer.hidden, layer.topk), mine(layer, counts)[2]))
    assert buffers._OPEN and testing.open_operators() == options.get("micro_batches", 2)
    plan.close()
    assert not buffers._OPEN and testing.open_operators() == 0
    return float(torch.tensor(found).max())  # NaN if any is


def probed(name, *, payload="bf16", spaces=(IdSpace.GLOBAL,), ids_dtype="int32", dropped=DroppedSlot.NEGATIVE,
           incoming=DroppedSlot.NEGATIVE, extras=(), told=False, most=MOST, **options):
    "Experts that multiply, on any terms: the weighted sum. The probe checks masks, ids and rows past num_valid."
    counts = [5, 0, 8, 1][:ranks]
    scheme = {"bf16": "bf16", "fp8_group128": "fp8_block128", "mxfp4": "mxfp4"}[payload]
    config = config_of(scheme=scheme)
    wants = Wants(payloads=(payload,), id_spaces=spaces, dropped=(dropped,), ids_dtypes=(ids_dtype,),
                  extras=frozenset(extras), can=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM}))
    parallel = ParallelConfig(ep_size=ranks, ep_rank=rank, tokens="sharded")
    layer = make_layer(config, 100 + rank, tokens=counts[rank])
    if incoming is not DroppedSlot.NEVER:
        layer.topk.topk_ids[::4, 0] = -1
    hidden = layer.hidden if payload == "bf16" else moe_core.quant.roundtrip_activation(layer.hidden, payload)
    expected = probe.expected(config, hidden, layer.topk)
    if incoming is DroppedSlot.SINK:
        layer.topk.topk_ids[layer.topk.topk_ids < 0] = config.num_experts
    plan = moe_core.plan(config, make_layer(config, 5, tokens=1).weights.shard(config, parallel), parallel, group=group,
                         max_tokens=most, registry=Registry([testing.OnCpu(), probe.probe_plugin(STANDARD, wants)]),
                         incoming=incoming, settings=moe_core.Settings(
                             runner=probe.NAME, dispatcher=name, options={name: options} if options else {}))
    terms = plan.terms[STANDARD]
    assert (terms.payload, terms.ids_dtype, terms.dropped) == (payload, ids_dtype, dropped), terms
    assert set(extras) <= terms.extras
    state = RunningState(tokens_per_rank=counts if told else None)
    given = plan.dispatch(layer.hidden, layer.topk, state)
    assert given.hidden_states.is_contiguous() and given.topk_ids.is_contiguous()
    space = config.num_experts if spaces[0] is IdSpace.GLOBAL else config.num_experts // ranks
    low, high = given.topk_ids.min(), given.topk_ids.max()
    assert low >= (-1 if dropped is DroppedSlot.NEGATIVE else 0), low
    assert high <= (space if dropped is DroppedSlot.SINK else space - 1), high  # in rows past num_valid too
    if "num_valid" in terms.extras:
        assert given.num_valid.shape == () and given.num_valid.dtype == torch.int32
        assert 0 <= int(given.num_valid) <= len(given.topk_ids)
    rows = len(given.hidden_states)
    result = plan.combine(plan.run(given, state), state)
    plan.close()
    error = float((result.double() - expected).abs().max() / expected.abs().max()) if len(result) else 0.0
    return [error, rows]


def refused(work):
    "The message, of one of our errors only."
    try:
        work()
    except moe_core.errors.MoeCoreError as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"
"""

PATHS = (Path(moe_core_mori.__file__).parents[1],)
Said = list[dict[str, Any]]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """In as many processes as the module's `RANKS` say."""
    if "everything" in metafunc.fixturenames:
        metafunc.parametrize("everything", _ranks_of(metafunc.module), indirect=True, scope="session")


def _ranks_of(module: Any) -> tuple[int, ...]:
    return getattr(module, "RANKS", (2, 4))


@pytest.fixture(scope="session")
def everything(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Said:
    """What each rank says to the `SOURCES` of all test modules here, after their `SCRIPT`, in one start."""
    here = Path(__file__).parent
    modules = {item.module.__name__: item.module for item in request.session.items if item.path.parent == here}
    modules = {name: module for name, module in modules.items() if request.param in _ranks_of(module)}
    script = [BEFORE]
    for name, module in modules.items():
        script += ["testing.install()\n", getattr(module, "SCRIPT", "")]
        script += [f"say({f'{name}:{key}'!r}, lambda: {s})\n" for key, s in getattr(module, "SOURCES", {}).items()]
    folder = tmp_path_factory.mktemp("gloo")
    return run_ranks(request.param, "".join(script), folder, patience_s=60, limit_s=300, paths=PATHS)


@pytest.fixture
def said(request: pytest.FixtureRequest, everything: Said) -> Said:
    """What each rank said to the sources of this module."""
    prefix = f"{request.module.__name__}:"
    mine = ({key: value for key, value in rank.items() if key.startswith(prefix)} for rank in everything)
    return [{key.removeprefix(prefix): value for key, value in rank.items()} for rank in mine]
