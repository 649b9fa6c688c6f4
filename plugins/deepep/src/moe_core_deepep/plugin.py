"""What this plugin offers to moe_core, as data. Never imports torch or deep_ep.

DeepEP's `Buffer` (V1) has normal kernels for throughput and low-latency kernels for decode; `ElasticBuffer` (V2) is one
API for both. Ids are int64 on the wire; the dispatcher casts to what the terms say.
"""

from __future__ import annotations

from dataclasses import replace

from moe_core import hookimpl
from moe_core.capability import Requires, Support
from moe_core.specs import DispatcherSpec, Offers, PluginInfo
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, DroppedSlot, IdSpace, Maturity, Phase, Step

_ARCHS = ("sm_90..sm_103",)
# Evidence: tests/test_layers.py, tests/test_elastic_layers.py, and on two H200s tests/distributed/test_gpu_ranks.py.
_SEEN = {"sm_90": Maturity.CONTRACT, "sm_100": Maturity.CONTRACT}
_RAN = {"sm_90": Maturity.EXECUTED, "sm_100": Maturity.CONTRACT}
_HINT = "build it from source against the installed torch: github.com/deepseek-ai/DeepEP (not PyPI's 'deep-ep')"
_DEEP_EP = Requires(module="deep_ep", hint=_HINT)
_ELASTIC = Requires(module="deep_ep", submodule="buffers.elastic", hint=f"a DeepEP with ElasticBuffer (V2): {_HINT}")

#: Hidden sizes that the low-latency kernels are compiled for.
_LL_HIDDEN = frozenset({2048, 2560, 3072, 4096, 5120, 6144, 7168, 8192})
_LL_TOP_K = 11
_LINEAR = frozenset({"linear"})
#: Rows may travel in fp8; combine adds up bfloat16 only.
_DTYPES = frozenset({"bfloat16"})
_NUM_SMS = "SMs that the communication kernels take from the experts (even)"

# One copy of a row goes to each rank; combine adds up rows that the runner has weighted and summed.
_NORMAL_OFFER = Offers(
    id_spaces=frozenset({IdSpace.LOCAL}),
    dropped=frozenset({DroppedSlot.NEGATIVE, DroppedSlot.SINK}),
    payloads=frozenset({"bf16", "fp8_group128"}),
    ids_dtypes=frozenset({"int32", "int64"}),
    extras=frozenset({"expert_mask"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.EP_REDUCE}),
)
_COUNTED_OFFER = replace(_NORMAL_OFFER, extras=frozenset({"expert_mask", "host_counts"}))
_ELASTIC_OFFER = replace(_NORMAL_OFFER, extras=frozenset({"expert_mask", "num_valid"}))
# Expanded: one row for each (token, local expert), weighted by the runner and summed by combine.
_EXPANDED_OFFER = Offers(
    id_spaces=frozenset({IdSpace.LOCAL}),
    dropped=frozenset({DroppedSlot.NEGATIVE}),
    payloads=frozenset({"bf16", "fp8_group128"}),
    ids_dtypes=frozenset({"int32", "int64"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.TOPK_SUM, Step.EP_REDUCE}),
)
# The low-latency combine applies the router weights, which the runner never sees.
_LL_OFFER = Offers(
    id_spaces=frozenset({IdSpace.GLOBAL}),
    dropped=frozenset({DroppedSlot.NEGATIVE}),
    payloads=frozenset({"bf16", "fp8_group128"}),
    ids_dtypes=frozenset({"int64"}),
    can=frozenset({Step.ROUTED_SCALING}),
    always=frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.EP_REDUCE}),
)

AUTO = DispatcherSpec(
    name="deepep",
    summary="DeepEP by phase: normal kernels for prefill, low-latency kernels for decode",
    factory="moe_core_deepep.auto:AutoDispatcher",
    formats={Phase.PREFILL: STANDARD, Phase.DECODE: BATCHED},
    offers={STANDARD: _COUNTED_OFFER, BATCHED: _LL_OFFER},
    priority=150,
    split_phases=True,
    maturity=_SEEN,
    why_not="moe_core_deepep.rules:auto",
    options={
        "num_sms": _NUM_SMS,
        "decode_max_tokens": "the most tokens of a rank in one decode call, at most 1024; sizes the low-latency buffer",
    },
    support=Support(
        devices={"cuda": _ARCHS},
        dtypes=_DTYPES,
        graph_capture=frozenset({Phase.DECODE}),
        host_sync=frozenset({Phase.PREFILL}),
        hidden_sizes=_LL_HIDDEN,
        max_top_k=_LL_TOP_K,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, 160),
        placements=_LINEAR,
        even_experts=True,
        requires=(_DEEP_EP,),
    ),
)

NORMAL = DispatcherSpec(
    name="deepep_normal",
    summary="DeepEP's normal kernels; the host waits for the number of received rows",
    factory="moe_core_deepep.normal:NormalDispatcher",
    formats={Phase.PREFILL: STANDARD, Phase.DECODE: STANDARD},
    offers={STANDARD: _COUNTED_OFFER},
    priority=140,
    split_phases=True,
    maturity=_RAN,
    why_not="moe_core_deepep.rules:normal",
    options={"num_sms": _NUM_SMS},
    support=Support(
        devices={"cuda": _ARCHS},
        dtypes=_DTYPES,
        host_sync=frozenset(Phase),
        hidden_multiple=256,
        max_top_k=32,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, 160),
        placements=_LINEAR,
        even_experts=True,
        requires=(_DEEP_EP,),
    ),
)

STATIC = DispatcherSpec(
    name="deepep_normal_static",
    summary="DeepEP's normal kernels within a node, with a worst-case number of rows and no host sync",
    factory="moe_core_deepep.normal:StaticDispatcher",
    formats={Phase.PREFILL: STANDARD, Phase.DECODE: STANDARD},
    offers={STANDARD: _NORMAL_OFFER},
    priority=120,
    split_phases=True,
    maturity=_RAN,
    why_not="moe_core_deepep.rules:normal",
    options={"num_sms": _NUM_SMS},
    support=Support(
        devices={"cuda": _ARCHS},
        dtypes=_DTYPES,
        graph_capture=frozenset(Phase),
        hidden_multiple=256,
        max_top_k=32,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, 8),
        placements=_LINEAR,
        even_experts=True,
        requires=(_DEEP_EP,),
    ),
)

LOW_LATENCY = DispatcherSpec(
    name="deepep_ll",
    summary="DeepEP's low-latency kernels, for few tokens",
    factory="moe_core_deepep.low_latency:LowLatencyDispatcher",
    formats={Phase.PREFILL: BATCHED, Phase.DECODE: BATCHED},
    offers={BATCHED: _LL_OFFER},
    priority=145,
    split_phases=True,
    maturity=_RAN,
    why_not="moe_core_deepep.rules:low_latency",
    support=Support(
        devices={"cuda": _ARCHS},
        dtypes=_DTYPES,
        graph_capture=frozenset(Phase),
        hidden_sizes=_LL_HIDDEN,
        max_top_k=_LL_TOP_K,
        max_tokens=1024,
        needs_max_tokens=True,
        tokens=frozenset({"sharded"}),
        ep_sizes=(2, None),
        placements=_LINEAR,
        even_experts=True,
        requires=(_DEEP_EP,),
    ),
)

_ELASTIC_OPTIONS = {
    "num_sms": f"{_NUM_SMS}; DeepEP's own choice needs `nvidia-smi nvlink -s`",
    "decode_max_tokens": "the most tokens of a rank in one decode call, which has room for ep_size times as many",
    "distinct_experts": "true: no token names an expert twice (no router does), so that it need not be looked for",
}
_ELASTIC_SUPPORT = Support(
    devices={"cuda": _ARCHS},
    dtypes=_DTYPES,
    # Prefill waits for the real counts: a worst case there would be gigabytes.
    graph_capture=frozenset({Phase.DECODE}),
    host_sync=frozenset({Phase.PREFILL}),
    # Combine's vectors: 32 lanes of 16 bytes.
    hidden_multiple=256,
    max_top_k=32,
    max_experts=2048,
    needs_max_tokens=True,
    tokens=frozenset({"sharded"}),
    ep_sizes=(2, 1024),
    placements=_LINEAR,
    even_experts=True,
    requires=(_ELASTIC,),
)

ELASTIC = DispatcherSpec(
    name="deepep_v2",
    summary="DeepEP's ElasticBuffer, token-major; the host waits for the number of received rows in prefill",
    factory="moe_core_deepep.elastic:ElasticDispatcher",
    formats={Phase.PREFILL: STANDARD, Phase.DECODE: STANDARD},
    offers={STANDARD: _ELASTIC_OFFER},
    priority=130,
    split_phases=True,
    maturity=_SEEN,
    why_not="moe_core_deepep.rules:elastic",
    options=_ELASTIC_OPTIONS,
    support=_ELASTIC_SUPPORT,
)

EXPANDED = DispatcherSpec(
    name="deepep_v2_grouped",
    summary="DeepEP's ElasticBuffer, rows sorted by expert; the host waits as for deepep_v2",
    factory="moe_core_deepep.elastic:ExpandedDispatcher",
    formats={Phase.PREFILL: GROUPED, Phase.DECODE: GROUPED},
    offers={GROUPED: _EXPANDED_OFFER},
    priority=125,
    split_phases=True,
    maturity=_SEEN,
    why_not="moe_core_deepep.rules:expanded",
    options={**_ELASTIC_OPTIONS, "alignment": "rows of each expert are padded to a multiple of this; 1 unless set"},
    support=_ELASTIC_SUPPORT,
)


class DeepEpPlugin:
    """The hooks of the entry point `deepep`."""

    @hookimpl
    def moe_core_plugin_info(self) -> PluginInfo:
        """Who this is."""
        return PluginInfo(
            name="deepep", summary="DeepEP dispatch and combine", url="https://github.com/deepseek-ai/DeepEP"
        )

    @hookimpl
    def moe_core_dispatchers(self) -> tuple[DispatcherSpec, ...]:
        """All its forms."""
        return (AUTO, NORMAL, STATIC, LOW_LATENCY, ELASTIC, EXPANDED)


plugin = DeepEpPlugin()
