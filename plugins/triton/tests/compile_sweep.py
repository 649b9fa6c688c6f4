"""What the launchers are asked for when the kernels are compiled ahead of time: layers, formats, options, routers.

Tensors lie on the CPU and hold zeros; `planned_for` makes the plugin choose as it would on the target. A layer has few
experts, to be small, and gets the configurations that a real one of its sizes would get.
"""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any
from unittest import mock

import torch
from moe_core_triton import planning
from moe_core_triton import plugin as declared
from moe_core_triton.configs import device as devices
from moe_core_triton.configs.candidates import candidates, specialized
from moe_core_triton.configs.config import LayerConfig, Problem
from moe_core_triton.configs.device import KNOWN, Device
from moe_core_triton.configs.specialized import HEIGHTS, computes
from moe_core_triton.kernels import launching

import moe_core
from moe_core import Activation, CanonicalWeights, MoeConfig, ParallelConfig
from moe_core.dispatchers.torch_distributed.groups import Groups
from moe_core.formats import StandardCombineInput
from moe_core.protocols import RunnerHooks, RunningState
from moe_core.quant import builtin_scheme
from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.specs import Offers, Terms
from moe_core.testing import fake_plugin, make_routing
from moe_core.testing.dispatchers import TESTING_STANDARD
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.vocabulary import STANDARD, DroppedSlot, IdSpace

RUNNER = "triton_aot"
SCHEMES = (
    "bf16",
    "fp8_tensor",
    "fp8_channel",
    "fp8_block128",
    "int8_channel",
    "int8_w8a16",
    "int4_w4a16",
    "mxfp4_w4a16",
)
#: The decode path, small and middle tiles, and prefill.
TOKENS = (1, 8, 64, 512, 8192)
#: From here on layers get the specialised kernels too, where they have any.
PREFILL = 512


@dataclass(frozen=True)
class Layer:
    """A layer to launch. experts: of the real layer; eight are made. limit: configurations a token count."""

    name: str
    changes: dict[str, Any] = field(default_factory=dict)
    tokens: tuple[int, ...] = (4, 512)
    limit: int = 1
    experts: int = 128
    dispatcher: str = "standard"
    path: str | None = None
    hooks: tuple[str, ...] = ()
    static: bool = False
    zero_points: bool = False
    parallel: ParallelConfig | None = None

    @property
    def config(self) -> MoeConfig:
        """With eight experts."""
        values: dict[str, Any] = {"num_experts": 8, "top_k": 4, "hidden_size": 2048, "intermediate_size": 1024}
        return MoeConfig(**(values | self.changes))

    def problem(self, arch: str) -> Problem:
        """With all experts. The specialised kernels are the default on sm_90, for the layers that they compute."""
        c = self.config
        gated = c.activation.gated
        sizes = (c.hidden_size, c.intermediate_size)
        theirs = arch == "sm_90" and computes(c, c.intermediate_size)
        return Problem(self.experts, c.top_k, *sizes, gated, c.dtype, c.scheme, c.group_size, theirs)


def layers(subset: bool) -> Iterator[Layer]:
    """Everything, or one configuration of the layers that differ most."""
    if subset:
        yield Layer("bf16", tokens=(1, 512))
        yield Layer("fp8_block128", {"scheme": "fp8_block128"}, tokens=(512,))
        yield Layer("mxfp4", {"scheme": "mxfp4_w4a16", "bias": True, "activation": Activation.swiglu_oai()}, (64, 512))
        yield Layer("bf16-2056", {"hidden_size": 2056, "intermediate_size": 264}, (512,))
        yield Layer("batched", dispatcher="testing_batched", tokens=(64,))
        return
    for scheme in SCHEMES:
        yield Layer(scheme, {"scheme": scheme}, TOKENS, limit=4)
        odd = {"hidden_size": 2880, "intermediate_size": 2880}
        if scheme != "int4_w4a16":
            yield Layer(f"{scheme}-2880", {"scheme": scheme, **odd}, (1, 64, 2048), limit=2, experts=32)
        for dispatcher in ("testing_batched", "testing_grouped", "testing_global"):
            yield Layer(f"{scheme}-{dispatcher}", {"scheme": scheme}, dispatcher=dispatcher)
        yield Layer(f"{scheme}-hooks", {"scheme": scheme}, hooks=("after_gate_up", "after_down"))
        yield Layer(f"{scheme}-float16", {"scheme": scheme, "dtype": "float16"})
        plain = Activation(name="relu2", gated=False)
        yield Layer(f"{scheme}-plain", {"scheme": scheme, "activation": plain}, (1, 512))
        yield Layer(f"{scheme}-bias", {"scheme": scheme, "bias": True, "activation": Activation.swiglu_oai()}, (1, 512))
    for name in ("gelu", "gelu_tanh", "relu", "relu2", "identity"):
        yield Layer(name, {"activation": Activation(name=name)}, (1, 512))
    yield Layer("limit", {"activation": Activation(limit=7.0)}, (1, 512))
    yield Layer("float32", {"dtype": "float32"}, (1, 64, 2048), limit=2)
    yield Layer("multiples of 8", {"hidden_size": 2056, "intermediate_size": 264}, (1, 512, 4096))
    yield Layer("small", {"hidden_size": 96, "intermediate_size": 80}, (1, 512))
    yield Layer("top_1-on_input", {"top_k": 1, "router_weight_on_input": True}, (1, 512))
    yield Layer("on_input", {"router_weight_on_input": True}, (1, 512))
    yield Layer("on_input-fp8", {"router_weight_on_input": True, "scheme": "fp8_channel"}, (1, 512))
    yield Layer("no_combine", {"no_combine": True}, (1, 512))
    yield Layer("no_combine-hooks", {"no_combine": True}, hooks=("after_down",))
    yield Layer("scaled", {"routed_scaling_factor": 2.5}, (1, 512))
    yield Layer("static", {"scheme": "fp8_tensor"}, (1, 512), static=True)
    for size in (32, 64, 128):
        for zero in (False, True):
            changes = {"scheme": "int4_w4a16", "group_size": size}
            yield Layer(f"int4-{size}-{zero}", changes, (1, 512), limit=2, zero_points=zero)
    yield Layer("ep", parallel=ParallelConfig(ep_size=2, reduce="caller"), dispatcher="testing_global")
    yield Layer("many_tokens", tokens=(16384,), limit=8)
    yield Layer("many_tokens-fp8", {"scheme": "fp8_block128"}, (16384,), limit=8)


def weights_of(layer: Layer) -> CanonicalWeights:
    """Zeros in the right shapes: nothing looks at values."""
    config = layer.config
    scheme = builtin_scheme(config.scheme)
    rows = config.gate_up_factor * config.intermediate_size
    experts = len(layer.parallel.local_experts(8)) if layer.parallel else 8
    tensors: dict[str, torch.Tensor] = {}
    for name, (n, k) in {
        "w13": (rows, config.hidden_size),
        "w2": (config.hidden_size, config.intermediate_size),
    }.items():
        stored = config.dtype if scheme.scale is None else scheme.storage_dtype
        tensors[name] = torch.zeros(experts, *scheme.storage_shape(n, k), dtype=getattr(torch, stored))
        shape = scheme.scale_shape(n, k, config.group_size)
        if scheme.scale is not None and shape is not None:
            dtype = getattr(torch, scheme.scale.storage_dtype)
            tensors[f"{name}_scale"] = torch.zeros(experts, *shape, dtype=dtype)
            if layer.zero_points:
                tensors[f"{name}_zero"] = torch.zeros(experts, *shape, dtype=torch.uint8)
        if config.bias:
            tensors[f"{name}_bias"] = torch.zeros(experts, n, dtype=getattr(torch, config.dtype))
        if layer.static:
            tensors[f"{name}_input_scale"] = torch.ones(experts)
    return CanonicalWeights(**tensors)


def registry() -> Registry:
    """The runner under another name that takes CPU tensors and asks for no hardware."""
    support = replace(declared.RUNNER.support, devices={"cpu": ("*",)}, scheme_archs={}, requires=())
    spec = replace(declared.RUNNER, name=RUNNER, support=support, why_not=None)
    offers: Offers = replace(TESTING_STANDARD.offers[STANDARD], id_spaces=frozenset({IdSpace.GLOBAL}))
    aot = fake_plugin(
        "triton_aot",
        runners=(spec,),
        adapters=tuple(replace(a, runner=RUNNER) for a in declared.ADAPTERS if a.runner == "triton"),
        fused=tuple(replace(f, runner=RUNNER) for f in declared.FUSED if f.runner == "triton"),
        dispatchers=(replace(TESTING_STANDARD, name="testing_global", offers={STANDARD: offers}),),
    )
    return Registry(plugins=[testing_plugin, aot], autoload=False, settings=Settings())


@contextmanager
def planned_for(arch: str) -> Iterator[Any]:
    """The plugin takes every device for one of `arch`; yields a function that fixes the configuration of all layers."""
    device: Device = next(found for _, found in KNOWN if found.arch == arch)
    major, minor = divmod(int(arch.removeprefix("sm_")), 10) if arch.startswith("sm_") else (0, 0)
    chosen: list[Any] = [None, None]
    changes = {
        "_capability": lambda where: (major, minor),
        "processors": lambda where: device.processors,
        "this_device": lambda where: device,
    }

    def first(self: Any, tokens: int) -> Any:
        return chosen[0]

    def second(self: Any, tokens: int) -> Any:
        return chosen[1]

    with ExitStack() as stack:
        # Names that modules imported from one another are patched wherever they are.
        originals = {name: getattr(launching, name, None) for name in ("_capability", "processors")}
        originals["this_device"] = devices.this_device
        for name, original in originals.items():
            for module in [m for n, m in sys.modules.items() if n.startswith("moe_core_triton") and original]:
                if getattr(module, name, None) is original:
                    stack.enter_context(mock.patch.object(module, name, changes[name]))
        stack.enter_context(mock.patch.object(planning.Planner, "__call__", first))
        stack.enter_context(mock.patch.object(planning.Planner, "tiles", second))

        def fix(problem: Problem, tokens: int, limit: int) -> Iterator[str]:
            """Makes one configuration after the other the one that all layers get."""
            found = candidates(problem, tokens, device, limit)
            if problem.specialized and tokens >= PREFILL:
                # Chosen where somebody measured it to be the fastest: the model alone may not think so.
                theirs = [(m, specialized(problem, m)) for m in HEIGHTS[problem.scheme]]
                found = list(dict.fromkeys((*found, *(LayerConfig("tiles", m, one, one) for m, one in theirs))))
            tiles = next((c for c in candidates(problem, tokens, device, 32) if c.path != "tiny"), None)
            for config in found:
                chosen[:] = config, tiles if config.path == "tiny" else config
                yield config.text

        yield fix


def sweep(target: Any, origin: list[str], *, subset: bool) -> None:
    """Launch everything once. The caller catches the launches."""
    package = importlib.import_module("moe_core_triton")
    for module in pkgutil.walk_packages(package.__path__, "moe_core_triton."):
        importlib.import_module(module.name)  # so that kernels which nothing launches are known, and named
    known = registry()
    with planned_for(target.name) as fix:
        for layer in layers(subset):
            try:
                _launch(layer, known, fix, origin, target.name)
            except Exception as error:
                error.add_note(f"while launching {origin[-1]} for {target.name}")
                raise
        origin[-1] = "router"
        _routers(subset)
        if target.name.startswith("sm_"):
            _peers(known, origin, subset)


def _launch(layer: Layer, known: Registry, fix: Any, origin: list[str], arch: str) -> None:
    config = layer.config
    origin[-1] = layer.name
    settings = Settings(runner=RUNNER, dispatcher=layer.dispatcher, path=layer.path)
    plan = moe_core.plan(
        config, weights_of(layer), layer.parallel, registry=known, settings=settings, hooks=set(layer.hooks)
    )
    hooks = RunnerHooks(**{name: lambda tensor, rows: None for name in layer.hooks}) if layer.hooks else None
    for tokens in layer.tokens:
        hidden = torch.zeros(tokens, config.hidden_size, dtype=getattr(torch, config.dtype))
        topk = make_routing("uniform", tokens, 8, config.top_k)
        for text in fix(layer.problem(arch), tokens, layer.limit):
            origin[-1] = f"{layer.name} T={tokens} {text}"
            plan(hidden, topk, state=RunningState(hooks=hooks))


def _peers(known: Registry, origin: list[str], subset: bool) -> None:
    """`symm_mem`, whole calls and split ones, few rows and many; each rank's memory is this process's."""
    from moe_core_triton.peers import dispatcher as peers
    from moe_core_triton.peers.memory import Memory, Need, Window
    from moe_core_triton.peers.turns import Turns

    def memory(group: Any, members: tuple[int, ...], need: Need, device: torch.device) -> Memory:
        place, size = need.places()
        made = Memory.__new__(Memory)
        made.windows = [Window(torch.zeros(size, dtype=torch.uint8), [0] * need.ranks, place)]
        made.failure, made.processors, made.turns = torch.zeros(1, dtype=torch.int32), 132, Turns(device)
        return made

    payloads = ("bf16", "fp8_group128") if subset else ("bf16", "fp8_group128", "fp8_token", "int8_token")
    points = [("bfloat16", 2, 7168), *([] if subset else [("float32", 2, 2048), ("float16", 8, 2880)])]
    for dtype, ranks, hidden in points:
        layout = ParallelConfig(ep_size=ranks, ep_rank=1, reduce="caller")
        layer = Layer("symm_mem", {"top_k": 8, "hidden_size": hidden, "intermediate_size": 128, "dtype": dtype})
        weights = weights_of(replace(layer, parallel=layout))
        plan = moe_core.plan(layer.config, weights, layout, registry=known, settings=Settings(runner="reference"))
        for payload in payloads:
            terms = Terms(
                id_space=IdSpace.LOCAL, dropped=DroppedSlot.NEGATIVE, payload=payload, ids_dtype="int32",
                extras=frozenset(), steps={},
            )  # fmt: skip
            binding = replace(plan._binding, terms=terms, max_tokens=1024, options={"equal_tokens": True})
            with (
                mock.patch.object(peers, "shared_memory", memory),
                mock.patch.object(peers, "make_groups", lambda _, n=ranks: Groups(None, None, tuple(range(n)))),
            ):
                made = peers.SymmMemDispatcher(binding)
            for tokens in (8,) if subset else (8, 1024):
                origin[-1] = f"symm_mem {payload} {dtype} EP{ranks} T={tokens}"
                rows, state = torch.zeros(tokens, hidden, dtype=getattr(torch, dtype)), RunningState()
                result = rows.new_zeros(ranks * tokens, hidden)
                topk = make_routing("uniform", tokens, 8, layer.config.top_k)
                given = made.dispatch(rows, topk, state)
                made.combine(StandardCombineInput(result, given.handle), state)
                given = made.dispatch_finish(made.dispatch_begin(rows, topk, state), state)
                made.combine_finish(made.combine_begin(StandardCombineInput(result, given.handle), state), state)


def _routers(subset: bool) -> None:
    """The routing kernel with every method, and with groups."""
    from moe_core_triton.kernels.router import route

    from moe_core import RoutingConfig

    experts = (128,) if subset else (8, 60, 128, 256, 384)
    for count in experts:
        for method in ("softmax",) if subset else ("softmax", "topk_softmax", "sigmoid", "topk_sigmoid"):
            for renormalize in (True,) if subset else (True, False):
                routing = RoutingConfig(method=method, renormalize=renormalize)
                route(torch.zeros(64, count, dtype=torch.bfloat16), 4, routing, None, 1.0)
                if not subset:
                    route(torch.zeros(64, count), 4, routing, None, 1.0)
        biased = RoutingConfig(method="sigmoid", correction_bias=True, renormalize=True)
        if not subset:
            route(torch.zeros(64, count), 4, biased, torch.zeros(count), 2.5)
        if count % 8 == 0 and count > 8:
            for score in ("top2_sum",) if subset else ("max", "top2_sum"):
                grouped = replace(biased, num_groups=8, topk_groups=4, group_score=score)
                route(torch.zeros(64, count), 4, grouped, torch.zeros(count), 2.5)
