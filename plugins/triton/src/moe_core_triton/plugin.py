"""What this plugin offers to moe_core, as data. Never imports torch or triton."""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import AdapterSpec, DispatcherSpec, FusedSpec, Offers, PluginInfo, RunnerSpec, Wants
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

_FP8_ARCHS = (">=sm_89", "gfx942", "gfx950")

_TRITON = Requires(
    module="triton",
    submodule="language",
    distribution="triton",
    min_version="3.4",
    hint="GPU builds of torch bring their own Triton; elsewhere: pip install 'moe-core-triton[interpreter]'",
)

_ACTIVATIONS = frozenset({"silu", "gelu", "gelu_tanh", "relu", "relu2", "swiglu_oai", "identity"})
_FEATURES = frozenset({"bias", "router_weight_on_input", "no_combine", "inplace", "lora", "deterministic"})

RUNNER = RunnerSpec(
    name="triton",
    summary="fused Triton kernels for every format of the core, on NVIDIA and AMD GPUs",
    factory="moe_core_triton.runner:TritonRunner",
    prepare="moe_core_triton.weights:prepare",
    update="moe_core_triton.weights:update",
    router="moe_core_triton.routing:router",
    quantizer="moe_core_triton.inputs:quantizer",
    tune="moe_core_triton.tune:tune",
    layouts=frozenset({"rows"}),
    # Evidence: docs/maturity.md.
    maturity={
        "sm_90": Maturity.EXECUTED,
        "sm_100": Maturity.COMPILED,
        "gfx942": Maturity.COMPILED,
        "gfx950": Maturity.COMPILED,
    },
    options={
        "specialized": "true: the warp-specialized kernels of sm_90 where they are the fastest; false: only ordinary "
        "kernels (default: true)"
    },
    support=Support(
        devices={"cuda": (">=sm_80",), "rocm": ("gfx90a", "gfx942", "gfx950")},
        schemes=frozenset(
            {
                "bf16",
                "fp8_tensor",
                "fp8_channel",
                "fp8_block128",
                "int8_channel",
                "int8_w8a16",
                "int4_w4a16",
                "mxfp4_w4a16",
            }
        ),
        scheme_archs={name: _FP8_ARCHS for name in ("fp8_tensor", "fp8_channel", "fp8_block128")},
        dtypes=frozenset({"bfloat16", "float16", "float32"}),
        activations=_ACTIVATIONS,
        gated=frozenset({True, False}),
        activation_limit=True,
        features=_FEATURES,
        hooks=frozenset({"after_gate_up", "after_down"}),
        graph_capture=frozenset(Phase),
        group_sizes=frozenset({32, 64, 128}),
        max_experts=1024,
        requires=(_TRITON,),
    ),
    why_not="moe_core_triton.limits:hooks",
)

# The same kernels on a CPU, in Triton's interpreter: for tests and for reading along, hundreds of times slower than any
# other runner. numpy has neither bfloat16 nor fp8.
INTERPRETER = RunnerSpec(
    name="triton_interpreter",
    summary="the same kernels in Triton's interpreter on a CPU, with TRITON_INTERPRET=1: for tests",
    factory=RUNNER.factory,
    prepare=RUNNER.prepare,
    update=RUNNER.update,
    layouts=RUNNER.layouts,
    support=replace(
        RUNNER.support,
        devices={"cpu": ("*",)},
        scheme_archs={},
        dtypes=frozenset({"float16", "float32"}),
        graph_capture=frozenset(),
    ),
    maturity={"x86_64": Maturity.EXECUTED},
    priority=-1,
    last_resort=True,
    why_not="moe_core_triton.limits:interpreter",
)

# Tokens that arrive quantized as the layer's scheme asks save half the traffic and a kernel here.
_PAYLOADS = ("fp8_group128", "fp8_token", "int8_token", "bf16")

_LOCAL = Wants(id_spaces=(IdSpace.LOCAL,), payloads=_PAYLOADS, ids_dtypes=("int32", "int64"))
# Global ids will do where the dispatcher says which of them live here.
_STANDARD = (_LOCAL, replace(_LOCAL, id_spaces=(IdSpace.GLOBAL,), extras=frozenset({"expert_map"})))

# The ids of these two formats are the sender's and pass through untouched, so any kind of them will do.
_EXPERT_MAJOR = Wants(
    id_spaces=(IdSpace.LOCAL, IdSpace.GLOBAL),
    dropped=(DroppedSlot.NEGATIVE, DroppedSlot.SINK, DroppedSlot.NEVER),
    payloads=_PAYLOADS,
    ids_dtypes=("int32", "int64"),
    # One row a slot: the sum over slots needs the tokens' order, which only the dispatcher knows.
    can=frozenset({Step.ROUTER_WEIGHT, Step.ROUTED_SCALING}),
)
_WANTS: dict[str, Wants | tuple[Wants, ...]] = {STANDARD: _STANDARD, BATCHED: _EXPERT_MAJOR, GROUPED: _EXPERT_MAJOR}
_RUNNERS = (RUNNER, INTERPRETER)

ADAPTERS = tuple(
    AdapterSpec(
        runner=runner.name,
        format=format_id,
        pre=f"moe_core_triton.adapters:pre_{format_id}",
        post=f"moe_core_triton.adapters:post_{format_id}",
        wants=wants,
    )
    for runner in _RUNNERS
    for format_id, wants in _WANTS.items()
)

FUSED = tuple(
    FusedSpec(
        runner=runner.name,
        format=STANDARD,
        target="moe_core_triton.adapters:fused_standard",
        wants=_STANDARD,
        gives_up=frozenset({"lora", "after_gate_up", "after_down"}),
    )
    for runner in _RUNNERS
)


DISPATCHER = DispatcherSpec(
    name="symm_mem",
    summary="tokens and results by stores into the memory of the host's other GPUs; no host sync",
    factory="moe_core_triton.peers.dispatcher:SymmMemDispatcher",
    formats=dict.fromkeys(Phase, STANDARD),
    offers={
        STANDARD: Offers(
            id_spaces=frozenset(IdSpace),
            dropped=frozenset({DroppedSlot.NEGATIVE, DroppedSlot.SINK}),
            payloads=frozenset({"bf16", "fp8_group128", "fp8_token", "int8_token"}),
            extras=frozenset({"expert_map", "expert_mask"}),
            can=frozenset({Step.ROUTED_SCALING, Step.TP_REDUCE}),
            always=frozenset({Step.EP_REDUCE}),
        )
    },
    # By name only, in effect: it was the fastest at every point measured on two H200s (docs/benchmarks.md), but how its
    # programs count calls was mended after that, and has not run on GPUs. Once it has, it belongs above the others.
    priority=95,
    split_phases=True,
    maturity={"sm_90": Maturity.COMPILED, "sm_100": Maturity.COMPILED},
    why_not="moe_core_triton.limits:one_host",
    options={
        "equal_tokens": "promise that all ranks bring the same number of tokens to a call (default False: without "
        "RunningState.tokens_per_rank, everybody's are padded to max_tokens; padding does not travel)",
        "programs": "thread blocks of a communication kernel, 1 to 8192 (default: one for each row): fewer leave room "
        "for other kernels",
        "timeout_s": "seconds that a kernel waits for another rank before it ends the process (default 60)",
    },
    support=Support(
        devices={"cuda": (">=sm_80",)},
        dtypes=frozenset({"bfloat16", "float16", "float32"}),
        tokens=frozenset({"sharded"}),
        graph_capture=frozenset(Phase),
        hidden_multiple=16,
        max_top_k=64,
        needs_max_tokens=True,
        ep_sizes=(2, 8),
        requires=(_TRITON,),
    ),
)


class TritonPlugin:
    """The hooks of the entry point `triton`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(name="triton", summary="Triton kernels for NVIDIA and AMD GPUs")

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """Tokens between the GPUs of one host."""
        return (DISPATCHER,)

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        """The runner, and its like for the interpreter."""
        return _RUNNERS

    @hookimpl
    def moe_core_adapters(self) -> tuple[AdapterSpec, ...]:
        """Their adapters for every format of the core."""
        return ADAPTERS

    @hookimpl
    def moe_core_fused_funcs(self) -> tuple[FusedSpec, ...]:
        """Their fused funcs."""
        return FUSED


plugin = TritonPlugin()
