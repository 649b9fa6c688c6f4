"""The core's own specs, registered through the same hooks as everyone else's."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from moe_core.capability import Support
from moe_core.config import ACTIVATIONS, DTYPES
from moe_core.formats import BUILTIN_FORMATS
from moe_core.hardware import HardwareInfo, detect
from moe_core.hookspecs import hookimpl
from moe_core.quant import ACTIVATION_PAYLOADS, BUILTIN_SCHEMES, QuantScheme
from moe_core.specs import (
    AdapterSpec,
    DispatcherSpec,
    FormatSpec,
    FusedSpec,
    Offers,
    PluginInfo,
    RunnerSpec,
    Wants,
)
from moe_core.vocabulary import (
    BATCHED,
    GROUPED,
    STANDARD,
    TOPK_BYPASSED,
    TOPK_STANDARD,
    DroppedSlot,
    IdSpace,
    Maturity,
    Phase,
    Step,
)

_ALL_FEATURES: Final = frozenset({"bias", "router_weight_on_input", "no_combine", "deterministic", "lora", "inplace"})
_HOOKS: Final = frozenset({"after_gate_up", "after_down"})
_SUMS: Final = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.ROUTED_SCALING})
# Evidence: the CPU job of CI runs them, and benchmarks/results/cpu holds dated measurements.
_RAN_HERE: Final = {"x86_64": Maturity.EXECUTED}
# Evidence: benchmarks/results/h200/, the conformance kit on that machine.
_RAN_ON_GPU: Final = {**_RAN_HERE, "sm_90": Maturity.EXECUTED}

STANDARD_DISPATCHER: Final = DispatcherSpec(
    name="standard",
    summary="no all-to-all: TP, and EP over replicated tokens; owns expert map and mask",
    factory="moe_core.dispatchers.standard:StandardDispatcher",
    formats=dict.fromkeys(Phase, STANDARD),
    offers={
        STANDARD: Offers(
            id_spaces=frozenset(IdSpace),
            dropped=frozenset(DroppedSlot),
            ids_dtypes=frozenset({"int32", "int64"}),
            extras=frozenset({"expert_map", "expert_mask"}),
            can=frozenset(Step),
        )
    },
    support=Support(
        devices={"*": ("*",)},
        tokens=frozenset({"replicated"}),
        features=frozenset({"no_combine", "compile", "deterministic"}),
        topk_formats=frozenset({TOPK_STANDARD, TOPK_BYPASSED}),
        graph_capture=frozenset(Phase),
    ),
    maturity=_RAN_ON_GPU,
)

# A scale a row can travel with its row; one for the whole tensor would have to be agreed upon first.
_ROW_PAYLOADS: Final = frozenset(
    {"bf16", *(p.id for p in ACTIVATION_PAYLOADS.values() if p.scale.granularity != "tensor" and not p.global_scale)}
)

# What `allgather` and `alltoall` give: they differ in how rows travel, not in what a runner gets.
_SHARDED_ROWS: Final = Offers(
    id_spaces=frozenset(IdSpace),
    dropped=frozenset({DroppedSlot.NEGATIVE, DroppedSlot.SINK}),
    payloads=_ROW_PAYLOADS,
    ids_dtypes=frozenset({"int32", "int64"}),
    extras=frozenset({"expert_map", "expert_mask"}),
    can=frozenset(Step) - {Step.EP_REDUCE},
    always=frozenset({Step.EP_REDUCE}),
)

ALLGATHER_DISPATCHER: Final = DispatcherSpec(
    name="allgather",
    summary="gathers the tokens of all ranks, reduce-scatters the results (torch.distributed); no host sync",
    factory="moe_core.dispatchers.torch_distributed.allgather:AllGatherDispatcher",
    formats=dict.fromkeys(Phase, STANDARD),
    offers={STANDARD: _SHARDED_ROWS},
    support=Support(
        devices={"*": ("*",)},
        tokens=frozenset({"sharded"}),
        features=frozenset({"no_combine"}),
        graph_capture=frozenset(Phase),
        needs_max_tokens=True,
        ep_sizes=(2, None),
    ),
    split_phases=True,
    maturity=_RAN_ON_GPU,
    options={
        "equal_tokens": "promise that all ranks bring the same number of tokens to a call (default False: without "
        "RunningState.tokens_per_rank, everybody's are padded to max_tokens)"
    },
)

_ALLTOALL_SUPPORT: Final = Support(
    devices={"*": ("*",)},
    tokens=frozenset({"sharded"}),
    host_sync=frozenset(Phase),
    ep_sizes=(2, None),
)

ALLTOALL_DISPATCHER: Final = DispatcherSpec(
    name="alltoall",
    summary="a token travels once to each rank that it needs (torch.distributed); one host sync a call",
    factory="moe_core.dispatchers.torch_distributed.alltoall:AllToAllDispatcher",
    formats=dict.fromkeys(Phase, STANDARD),
    offers={STANDARD: _SHARDED_ROWS},
    support=replace(_ALLTOALL_SUPPORT, features=frozenset({"no_combine"})),
    priority=90,
    split_phases=True,
    maturity=_RAN_ON_GPU,
)

ALLTOALL_GROUPED_DISPATCHER: Final = DispatcherSpec(
    name="alltoall_grouped",
    summary="as alltoall, with rows sorted by expert, one a slot",
    factory="moe_core.dispatchers.torch_distributed.alltoall:GroupedAllToAllDispatcher",
    formats=dict.fromkeys(Phase, GROUPED),
    offers={
        GROUPED: Offers(
            id_spaces=frozenset({IdSpace.LOCAL}),
            dropped=frozenset({DroppedSlot.NEGATIVE}),
            payloads=_ROW_PAYLOADS,
            ids_dtypes=frozenset({"int32", "int64"}),
            can=frozenset({Step.ROUTER_WEIGHT, Step.ROUTED_SCALING, Step.TP_REDUCE}),
            always=frozenset({Step.TOPK_SUM, Step.EP_REDUCE}),
        )
    },
    support=_ALLTOALL_SUPPORT,
    priority=85,
    split_phases=True,
    maturity=_RAN_ON_GPU,
)

REFERENCE_RUNNER: Final = RunnerSpec(
    name="reference",
    summary="the oracle: every scheme, format and option on any device, float32 accumulation, slow",
    factory="moe_core.runners.reference:ReferenceRunner",
    prepare="moe_core.runners.reference:prepare",
    layouts=frozenset({"canonical"}),
    support=Support(
        devices={"*": ("*",)},
        schemes=frozenset(s.id for s in BUILTIN_SCHEMES),
        dtypes=frozenset(DTYPES),
        activations=ACTIVATIONS,
        gated=frozenset({True, False}),
        activation_limit=True,
        features=_ALL_FEATURES,
        hooks=_HOOKS,
        group_sizes=frozenset(g for s in BUILTIN_SCHEMES for g in s.group_sizes),
        host_sync=frozenset(Phase),
    ),
    priority=0,
    maturity=_RAN_ON_GPU,
    options={"emulate_activations": "quantize activations as the scheme says (default True)"},
    last_resort=True,
)

CPU_RUNNER: Final = RunnerSpec(
    name="cpu",
    summary="unquantized layers on a CPU, through oneDNN's prepacked products",
    factory="moe_core.runners.cpu.runner:CpuRunner",
    prepare="moe_core.runners.cpu.runner:prepare",
    update="moe_core.runners.cpu.runner:update",
    layouts=frozenset({"onednn_blocked", "rows"}),
    support=Support(
        devices={"cpu": ("*",)},
        schemes=frozenset({"bf16"}),
        dtypes=frozenset({"bfloat16", "float16", "float32"}),
        activations=ACTIVATIONS,
        gated=frozenset({True, False}),
        activation_limit=True,
        features=_ALL_FEATURES | {"compile"},
        hooks=_HOOKS,
        host_sync=frozenset(Phase),
    ),
    priority=100,
    maturity=_RAN_HERE,
    options={
        "pack_weights": 'copy weights into oneDNN\'s layout (a second copy): True, False, "auto" (default: if it pays)'
    },
)

_ROWS_ONLY: Final = frozenset({Step.ROUTER_WEIGHT, Step.ROUTED_SCALING})
_PAYLOADS: Final = ("bf16", *(name for name in ACTIVATION_PAYLOADS if name != "nvfp4"))
_ANY_DROPPED: Final = (DroppedSlot.NEGATIVE, DroppedSlot.NEVER)


def _reference_adapter(format_id: str, can: frozenset[Step]) -> AdapterSpec:
    wants = Wants(dropped=_ANY_DROPPED, payloads=_PAYLOADS, ids_dtypes=("int32", "int64"), can=can)
    if format_id != STANDARD:
        # The ids of expert-major rows are the sender's and pass through untouched, so any kind of them will do.
        wants = replace(wants, id_spaces=(IdSpace.LOCAL, IdSpace.GLOBAL), dropped=(*_ANY_DROPPED, DroppedSlot.SINK))
    return AdapterSpec(
        runner="reference",
        format=format_id,
        pre=f"moe_core.runners.reference:pre_{format_id}",
        post=f"moe_core.runners.reference:post_{format_id}",
        wants=wants,
    )


_CPU_WANTS: Final = Wants(dropped=_ANY_DROPPED, ids_dtypes=("int32", "int64"), can=_SUMS)


class CorePlugin:
    """What `moe_core` itself brings."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        return PluginInfo(name="core", summary="standard and torch.distributed dispatchers, reference and CPU runners")

    @hookimpl
    def moe_core_formats(self) -> tuple[FormatSpec, ...]:
        return BUILTIN_FORMATS

    @hookimpl
    def moe_core_quant_schemes(self) -> tuple[QuantScheme, ...]:
        return BUILTIN_SCHEMES

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        return (STANDARD_DISPATCHER, ALLGATHER_DISPATCHER, ALLTOALL_DISPATCHER, ALLTOALL_GROUPED_DISPATCHER)

    @hookimpl
    def moe_core_runners(self) -> tuple[RunnerSpec, ...]:
        return (REFERENCE_RUNNER, CPU_RUNNER)

    @hookimpl
    def moe_core_adapters(self) -> tuple[AdapterSpec, ...]:
        return (
            _reference_adapter(STANDARD, _SUMS),
            _reference_adapter(BATCHED, _ROWS_ONLY),
            _reference_adapter(GROUPED, _ROWS_ONLY),
            AdapterSpec(
                runner="cpu",
                format=STANDARD,
                pre="moe_core.runners.cpu.runner:pre_standard",
                post="moe_core.runners.cpu.runner:post_standard",
                wants=_CPU_WANTS,
            ),
        )

    @hookimpl
    def moe_core_fused_funcs(self) -> tuple[FusedSpec, ...]:
        return (
            FusedSpec(
                runner="cpu",
                format=STANDARD,
                target="moe_core.runners.cpu.runner:fused_standard",
                wants=_CPU_WANTS,
            ),
        )

    @hookimpl(trylast=True)
    def moe_core_detect_hardware(self) -> HardwareInfo:
        return detect()


plugin = CorePlugin()
