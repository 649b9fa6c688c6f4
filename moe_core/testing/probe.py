"""A runner for checking dispatchers: expert e multiplies its rows by `factor(e)`, so a token that went wrong shows.

It takes every core format on any terms, refuses rows that break them, and leaves rows that nobody may read as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from moe_core.capability import Support
from moe_core.config import DTYPES, MoeConfig
from moe_core.formats import BatchedCombineInput, GroupedCombineInput, StandardCombineInput
from moe_core.protocols import Binding, RunningState
from moe_core.quant import BUILTIN_SCHEMES, dequantize_activation
from moe_core.specs import AdapterSpec, RunnerSpec, Terms, Wants
from moe_core.testing.fakes import fake_plugin
from moe_core.topk import TopKOutput
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, DroppedSlot, IdSpace, Step

NAME: Final = "testing_probe"


class ContractBroken(AssertionError):
    """What the dispatcher gave breaks the agreed terms."""


def factor(experts: Tensor) -> Tensor:
    """What an expert, by global id, multiplies by."""
    return 1.0 + experts.double() / 4.0


def expected(config: MoeConfig, hidden: Tensor, topk: TopKOutput) -> Tensor:
    """The layer of these experts, float64."""
    ids = topk.topk_ids.long()
    live = (ids >= 0) & (ids < config.num_experts)
    slots = hidden.double()[:, None, :] * torch.where(live, factor(ids), 0.0)[..., None]
    slots = slots * torch.where(live, topk.topk_weights.double(), 0.0)[..., None] * config.routed_scaling_factor
    return slots if config.no_combine else slots.sum(dim=1)


@dataclass(slots=True)
class ProbeWeights:
    """There are none."""

    scheme: str
    layout: str = "none"


def prepare(weights: Any, binding: Binding) -> ProbeWeights:
    """Nothing is needed."""
    return ProbeWeights(binding.config.scheme)


class ProbeRunner:
    """The work is done by the pre-permute; this passes it on."""

    def __init__(self, binding: Binding) -> None:
        """Nothing is kept."""

    def run(self, runner_input: Any, quant_info: Any, state: RunningState) -> Any:
        """The combine input as it is."""
        return runner_input


def post(binding: Binding) -> Callable[..., Any]:
    """The post-permute of every format."""
    return lambda out, quant_info, config, state: out


def pre(binding: Binding) -> Callable[..., Any]:
    """The pre-permute of every format: dispatch output -> combine input."""
    terms = binding.terms
    if terms is None:
        raise TypeError("adapters are bound with terms")
    compute = {STANDARD: _standard, BATCHED: _batched, GROUPED: _grouped}[binding.format]

    def run(d: Any, quant_info: Any, config: MoeConfig, state: RunningState) -> Any:
        return compute(d, binding, terms)

    return run


def _tokens(d: Any, terms: Terms) -> Tensor:
    hidden: Tensor = d.hidden_states
    if terms.payload == "bf16":
        return hidden
    data, scale = hidden.reshape(-1, hidden.shape[-1]), d.hidden_scale
    if isinstance(scale, Tensor) and scale.dim() == 3:
        scale = scale.reshape(-1, scale.shape[-1])
    return dequantize_activation(data, scale, terms.payload).reshape(*hidden.shape[:-1], -1)


def _local_experts(binding: Binding) -> Tensor:
    """Global ids of this rank's experts, in local order."""
    return torch.tensor(binding.parallel.local_experts(binding.config.num_experts), device=binding.device)


def _scaling(binding: Binding, terms: Terms) -> float:
    return binding.config.routed_scaling_factor if terms.runner_does(Step.ROUTED_SCALING) else 1.0


def _standard(d: Any, binding: Binding, terms: Terms) -> StandardCombineInput:
    rows, ids = _tokens(d, terms), d.topk_ids
    _expect(str(ids.dtype) == f"torch.{terms.ids_dtype}", f"ids are {ids.dtype}, agreed is {terms.ids_dtype}")
    valid = torch.arange(ids.shape[0], device=ids.device) < (ids.shape[0] if d.num_valid is None else d.num_valid)
    local, experts = _local_experts(binding), binding.config.num_experts
    count = experts if terms.id_space is IdSpace.GLOBAL else len(local)
    dropped = {DroppedSlot.NEGATIVE: -1, DroppedSlot.SINK: count}.get(terms.dropped)
    inside = (ids >= 0) & (ids < count)
    bad = ~inside & valid[:, None] & (ids != dropped if dropped is not None else torch.ones_like(inside))
    _expect(not bool(bad.any()), f"ids {ids[bad][:4].tolist()} are outside [0, {count}), dropped slots are {dropped}")
    names = ids.long().clamp(0, count - 1)
    here = inside & valid[:, None]
    if terms.id_space is IdSpace.GLOBAL:
        here, chosen = here & torch.isin(names, local), names
    else:
        chosen = local[names]
    _extras(d, binding, terms, local)
    out = rows[:, None, :].double() * torch.where(here, factor(chosen), 0.0)[..., None]
    out = torch.where(here[..., None], out, 0.0)
    if terms.runner_does(Step.ROUTER_WEIGHT):
        out = out * torch.where(here, d.topk_weights.double(), 0.0)[..., None]
    out = out * _scaling(binding, terms)
    out = out.sum(dim=1) if terms.runner_does(Step.TOPK_SUM) else out
    return StandardCombineInput(out.to(binding.dtype), d.handle)


def _extras(d: Any, binding: Binding, terms: Terms, local: Tensor) -> None:
    experts = binding.config.num_experts
    table = torch.full((experts,), -1, dtype=torch.int32, device=binding.device)
    table[local] = torch.arange(len(local), dtype=torch.int32, device=binding.device)
    mask = (
        torch.ones_like(local, dtype=torch.int32) if terms.id_space is IdSpace.LOCAL else (table >= 0).to(torch.int32)
    )
    if terms.dropped is DroppedSlot.SINK:
        mask = torch.cat([mask, mask.new_zeros(1)])
    for name, wanted in (("expert_map", table), ("expert_mask", mask)):
        if name in terms.extras:
            given = getattr(d, name)
            same = given is not None and given.dtype is torch.int32 and torch.equal(given, wanted)
            _expect(same, f"{name} is {given}, expected int32 {wanted.tolist()}")


def _batched(d: Any, binding: Binding, terms: Terms) -> BatchedCombineInput:
    rows, local = _tokens(d, terms), _local_experts(binding)
    _expect(rows.shape[0] == len(local), f"{rows.shape[0]} expert rows for {len(local)} local experts")
    _expect(
        d.masked_m.dtype is torch.int32 and tuple(d.masked_m.shape) == (len(local),), "masked_m is not int32 [E_local]"
    )
    _expect(bool((d.masked_m <= rows.shape[1]).all()), f"masked_m {d.masked_m.tolist()} for {rows.shape[1]} rows")
    live = torch.arange(rows.shape[1], device=rows.device) < d.masked_m[:, None]
    out = rows.double() * factor(local)[:, None, None]
    out = _finish(out, live, d.row_weights, binding, terms)
    return BatchedCombineInput(out, d.topk_ids, d.topk_weights, d.handle)


def _grouped(d: Any, binding: Binding, terms: Terms) -> GroupedCombineInput:
    rows, local, offsets = _tokens(d, terms), _local_experts(binding), d.offsets.long()
    _expect(
        d.offsets.dtype is torch.int32 and tuple(offsets.shape) == (len(local) + 1,),
        "offsets is not int32 [E_local + 1]",
    )
    sizes = offsets[1:] - offsets[:-1]
    _expect(bool((sizes >= 0).all()) and int(offsets[-1]) <= rows.shape[0], f"offsets are {offsets.tolist()}")
    _expect(not bool((sizes % d.alignment).any()), f"groups of {sizes.tolist()} rows, alignment {d.alignment}")
    position = torch.arange(rows.shape[0], device=rows.device)
    expert = torch.searchsorted(offsets[1:].contiguous(), position, right=True)
    live = position < offsets[-1]
    if d.row_ids is not None:
        live = live & (d.row_ids >= 0)
    out = rows.double() * factor(local[expert.clamp(max=len(local) - 1)])[:, None]
    return GroupedCombineInput(_finish(out, live, d.row_weights, binding, terms), d.handle)


def _finish(out: Tensor, live: Tensor, weights: Tensor | None, binding: Binding, terms: Terms) -> Tensor:
    if terms.runner_does(Step.ROUTER_WEIGHT):
        _expect(weights is not None, "the runner applies the router weight, and row_weights is missing")
        out = out * (weights if weights is not None else out)[..., None]
    return torch.where(live[..., None], out * _scaling(binding, terms), float("nan")).to(binding.dtype)


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ContractBroken(f"the dispatch output breaks the terms: {message}")


def probe_plugin(format_id: str, wants: Wants) -> Any:
    """The runner as a plugin, for one format, on exactly these terms."""
    here = __name__
    spec = RunnerSpec(
        name=NAME,
        summary="multiplies by a number that tells the expert",
        factory=f"{here}:ProbeRunner",
        prepare=f"{here}:prepare",
        layouts=frozenset({"none"}),
        support=Support(
            devices={"*": ("*",)},
            schemes=frozenset(scheme.id for scheme in BUILTIN_SCHEMES),
            dtypes=frozenset(DTYPES),
            activations=frozenset({"silu"}),
            gated=frozenset({True}),
            features=frozenset({"no_combine"}),
        ),
    )
    adapter = AdapterSpec(runner=NAME, format=format_id, pre=f"{here}:pre", post=f"{here}:post", wants=wants)
    return fake_plugin("testing_probe_plugin", runners=(spec,), adapters=(adapter,))
