"""Who is measured: plans of moe_core, and peers. A contestant binds one copy of the weights and gives a call."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

import moe_core
from moe_core.config import MoeConfig
from moe_core.errors import ConfigError
from moe_core.registry import Registry, default_registry
from moe_core.settings import Settings
from moe_core.vocabulary import Phase
from moe_core.weights import CanonicalWeights

from .floors import OURS
from .making import Inputs

Bound = Callable[[Inputs], Tensor]
#: Runners with options of their own: name -> runner, options.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "triton-plain": ("triton", {"specialized": False}),
    "cutedsl_sm90-fused": ("cutedsl_sm90", {"fused_finalize": True}),
    "cutedsl_sm90-whole": ("cutedsl_sm90", {"sort": "flashinfer", "fused_finalize": True}),
}
#: The plan serves up to this many tokens as decode.
DECODE_TOKENS = 256


@dataclass(frozen=True, slots=True)
class Contestant:
    """bind(config, weights, most tokens) -> bound call. fits(config): why it cannot run the layer, or None."""

    name: str
    bind: Callable[[MoeConfig, CanonicalWeights, int], Bound]
    fits: Callable[[MoeConfig], str | None]


@lru_cache(maxsize=8)
def registry(runner: str) -> Registry:
    """The installed plugins, and the one of this repository that has `runner` where it is only on sys.path."""
    installed = default_registry()
    try:
        installed.runner(runner)
        return installed
    except ConfigError:
        # A plugin with several runners begins their names with its own.
        words = runner.split("_")
        names = (f"moe_core_{'_'.join(words[:count])}" for count in range(len(words), 0, -1))
        found = next((name for name in names if importlib.util.find_spec(name) is not None), f"moe_core_{runner}")
        return Registry([importlib.import_module(f"{found}.plugin").plugin])


def ours(runner: str) -> Contestant:
    """A plan with that runner, as a server makes it: framework time counts where no graph hides it.

    runner: a name, or one of `VARIANTS`.
    """
    name, options = VARIANTS.get(runner, (runner, {}))

    def bind(config: MoeConfig, weights: CanonicalWeights, max_tokens: int) -> Bound:
        graph: dict[str, Any] = {"graph_capture": tuple(Phase)} if weights.device.type == "cuda" else {}
        hardware = moe_core.detect_hardware() if weights.device.type == "cuda" else None
        settings = Settings(runner=name, options={name: options} if options else {})
        choice: dict[str, Any] = {"settings": settings, "registry": registry(name), "max_tokens": max_tokens}
        plan = moe_core.plan(config, weights, hardware=hardware, **choice, **graph)

        def call(batch: Inputs) -> Tensor:
            phase = Phase.DECODE if batch.hidden.shape[0] <= DECODE_TOKENS else Phase.PREFILL
            return plan(batch.hidden, batch.topk, phase=phase)

        return call

    return Contestant(f"{OURS} {runner}", bind, lambda config: None)


def _only_bf16(config: MoeConfig) -> str | None:
    return None if config.scheme == "bf16" and config.dtype == "bfloat16" else "bf16 only"


def torch_gmm() -> Contestant:
    """transformers' experts on torch's grouped_mm, called as its models do."""
    moe = importlib.import_module("transformers.integrations.moe")
    qwen = importlib.import_module("transformers.models.qwen3_moe.modeling_qwen3_moe")
    oss = importlib.import_module("transformers.models.gpt_oss.modeling_gpt_oss")

    def module(config: MoeConfig, weights: CanonicalWeights) -> Any:
        sizes = {"num_experts_per_tok": config.top_k, "hidden_size": config.hidden_size}
        biased = config.activation.name == "swiglu_oai"
        if biased:
            made = oss.GptOssConfig(
                num_local_experts=config.num_experts, intermediate_size=config.intermediate_size, **sizes
            )
            kind = oss.GptOssExperts
        else:
            made = qwen.Qwen3MoeConfig(
                num_experts=config.num_experts, moe_intermediate_size=config.intermediate_size, **sizes
            )
            kind = qwen.Qwen3MoeExperts
        with torch.device("meta"):
            experts = kind(made)
        tensors = {"gate_up_proj": weights.w13, "down_proj": weights.w2}
        if biased:  # gate and up rows alternate there, and matrices are [in, out]
            tensors = {
                "gate_up_proj": interleave(weights.w13).transpose(1, 2).contiguous(),
                "down_proj": weights.w2.transpose(1, 2).contiguous(),
                "gate_up_proj_bias": interleave(weights.w13_bias),
                "down_proj_bias": weights.w2_bias,
            }
        for name, tensor in tensors.items():
            setattr(experts, name, torch.nn.Parameter(tensor, requires_grad=False))
        return experts

    def bind(config: MoeConfig, weights: CanonicalWeights, max_tokens: int) -> Bound:
        experts = module(config, weights)
        return lambda batch: moe.grouped_mm_experts_forward(experts, batch.hidden, batch.ids64, batch.weights16)

    return Contestant("torch_gmm", bind, _only_bf16)


def interleave(w13: Tensor | None, rows: int = 1) -> Tensor:
    """[E, gate then up, ...] -> gate and up alternating, `rows` rows each."""
    if w13 is None:
        raise ValueError("the layer has no such tensor")
    halves = w13.unflatten(1, (2, -1, rows))
    return halves.transpose(1, 2).flatten(1, 3).contiguous()


def quack() -> Contestant:
    """QuACK's grouped GEMMs (gathering, gated) in their default configuration, with sort and sum in plain torch."""
    interface = importlib.import_module("quack.gemm_interface")

    def bind(config: MoeConfig, weights: CanonicalWeights, max_tokens: int) -> Bound:
        w13, w2 = interleave(weights.w13).transpose(1, 2), weights.w2.transpose(1, 2)

        def call(batch: Inputs) -> Tensor:
            tokens, top_k = batch.ids64.shape
            sorted_ids, order = batch.ids64.flatten().sort(stable=True)
            bounds = torch.arange(config.num_experts + 1, device=order.device)
            starts = torch.searchsorted(sorted_ids, bounds).int()
            source = (order // top_k).int()
            inner = batch.hidden.new_empty(tokens * top_k, config.intermediate_size)
            interface.gemm_gated_out(
                batch.hidden, w13, None, inner, activation="swiglu", cu_seqlens_m=starts, A_idx=source, tuned=False
            )
            down = interface.gemm(inner, w2, cu_seqlens_m=starts, tuned=False)
            place = torch.empty_like(order)
            place[order] = torch.arange(order.numel(), device=order.device)
            rows = down[place].view(tokens, top_k, -1)
            return torch.einsum("tkh,tk->th", rows, batch.weights16)

        return call

    def fits(config: MoeConfig) -> str | None:
        return "no biased swiglu_oai here" if config.bias else _only_bf16(config)

    return Contestant("quack_torch_glue", bind, fits)


def flashinfer() -> Contestant:
    """FlashInfer's CuTe DSL bf16 MoE for sm_90, with its default tactic."""
    fused_moe = importlib.import_module("flashinfer.fused_moe")
    wrapper = getattr(fused_moe, "CuteDslBf16MoEWrapper", None)
    if wrapper is None:
        raise ImportError("flashinfer.fused_moe has no CuteDslBf16MoEWrapper (nvidia-cutlass-dsl missing?)")

    def bind(config: MoeConfig, weights: CanonicalWeights, max_tokens: int) -> Bound:
        layer = wrapper(
            num_experts=config.num_experts,
            top_k=config.top_k,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
        )
        gate, up = weights.w13.chunk(2, dim=1)  # its rows alternate up and gate, 32 each
        w1 = interleave(torch.cat([up, gate], dim=1), rows=32)
        return lambda batch: layer.run(
            x=batch.hidden,
            token_selected_experts=batch.topk.topk_ids,
            token_final_scales=batch.topk.topk_weights,
            w1_weight=w1,
            w2_weight=weights.w2,
        )

    def fits(config: MoeConfig) -> str | None:
        return "silu without biases only" if config.bias else _only_bf16(config)

    return Contestant("flashinfer_cutedsl", bind, fits)


PEERS: dict[str, Callable[[], Contestant]] = {"torch_gmm": torch_gmm, "quack": quack, "flashinfer": flashinfer}


def load(runners: Iterable[str], peers: Iterable[str]) -> tuple[list[Contestant], dict[str, str]]:
    """Contestants, and why some peers are not among them."""
    found, missing = [ours(runner) for runner in runners], {}
    for name in peers:
        try:
            found.append(PEERS[name]())
        except Exception as error:  # a vendor package may fail in any way while it is imported
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return found, missing
