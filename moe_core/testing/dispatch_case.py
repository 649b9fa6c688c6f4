"""Means for checking a dispatcher: plans that join it with the probe runner on chosen terms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from moe_core.api import plan as make_plan
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import SelectionError
from moe_core.moe_plan import MoePlan
from moe_core.quant import BUILTIN_SCHEMES, roundtrip_activation
from moe_core.settings import Settings
from moe_core.specs import Offers, Wants
from moe_core.testing import probe
from moe_core.testing.case import Case
from moe_core.testing.layers import Layer, make_layer
from moe_core.testing.registration import CheckSkipped
from moe_core.testing.stage import MAX_TOKENS, any_config, sentence
from moe_core.testing.tolerances import assert_close
from moe_core.topk import TopKOutput
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD, DroppedSlot, IdSpace, Phase, Step

ALL_STEPS = frozenset({Step.ROUTER_WEIGHT, Step.TOPK_SUM, Step.ROUTED_SCALING})


@dataclass(frozen=True)
class Meeting:
    """One dispatcher, giving one format, and the probe runner."""

    case: Case
    format: str

    def __post_init__(self) -> None:
        if self.format not in (STANDARD, BATCHED, GROUPED):
            raise CheckSkipped(f"the kit has no probe for the format {self.format!r}")
        if self.offers.always & {Step.EP_REDUCE, Step.TP_REDUCE}:
            raise CheckSkipped("it sums over ranks, which one process has not: see dispatcher.ranks")

    @property
    def offers(self) -> Offers:
        """What the dispatcher offers in this format."""
        offers: Offers = self.case.component.spec.offers[self.format]
        return offers

    @property
    def phase(self) -> Phase:
        """A phase in which it gives the format."""
        formats: Mapping[Phase, str] = self.case.component.spec.formats
        return next(phase for phase, format_id in formats.items() if format_id == self.format)

    @property
    def able(self) -> frozenset[Step]:
        """Steps that a runner can do in this format: only `standard` rows know their token."""
        return ALL_STEPS if self.format == STANDARD else ALL_STEPS - {Step.TOPK_SUM}

    def config(self, **changes: Any) -> MoeConfig:
        """A layer that the dispatcher takes."""
        values: dict[str, Any] = {"dtype": "float32", "scheme": "bf16", **changes}
        return any_config(self.case.component, **values)

    def wants(self, **changes: Any) -> Wants:
        """Terms that the offer admits, with changes: by default its preferred values, and every step for the runner."""
        offers = self.offers
        dropped = DroppedSlot.NEGATIVE if DroppedSlot.NEGATIVE in offers.dropped else max(offers.dropped)
        values: dict[str, Any] = {
            "id_spaces": (min(offers.id_spaces, key=lambda s: s is not IdSpace.LOCAL),),
            "dropped": (dropped,),
            "payloads": ("bf16" if "bf16" in offers.payloads else min(offers.payloads),),
            "ids_dtypes": (min(offers.ids_dtypes),),
            "can": self.able - offers.always,
        }
        return Wants(**(values | changes))

    def plan(
        self,
        wants: Wants,
        config: MoeConfig | None = None,
        parallel: ParallelConfig | None = None,
        incoming: DroppedSlot = DroppedSlot.NEGATIVE,
    ) -> MoePlan:
        """The dispatcher and the probe runner on these terms. Raises CheckSkipped where they do not come together."""
        case, layer = self.case, config or self.config()
        registry = case.stage.with_plugin(probe.probe_plugin(self.format, wants))
        weights = make_layer(layer, tokens=0, parallel=parallel, device=case.site.device).weights
        settings = Settings(runner=probe.NAME, dispatcher=case.component.name)
        try:
            return make_plan(
                layer,
                weights,
                parallel,
                case.site.hardware,
                registry=registry,
                settings=settings,
                phases=(self.phase,),
                incoming=incoming,
                max_tokens=min(MAX_TOKENS, case.component.support.max_tokens or MAX_TOKENS),
            )
        except SelectionError as error:
            said = [r for r in error.reasons if not r.code.startswith("override.")]
            raise CheckSkipped(f"it does not come together with the probe runner: {sentence(said)}") from None

    def call(self, tokens: int = 12, pattern: str = "uniform", seed: int = 0, config: MoeConfig | None = None) -> Layer:
        """Tokens and a routing; the weights are nobody's business here."""
        layer = config or self.config()
        device = self.case.site.device
        return make_layer(layer, seed, tokens=tokens, pattern=pattern, device=device)

    def verify(self, plan: MoePlan, call: Layer, what: str, config: MoeConfig | None = None) -> None:
        """One call against the sum of weighted multiples."""
        layer = config or self.config()
        result = plan(call.hidden, call.topk, phase=self.phase)
        payload = plan.terms[self.format].payload
        try:
            seen = call.hidden if payload == "bf16" else roundtrip_activation(call.hidden.float(), payload)
            self.close(result, probe.expected(layer, seen, call.topk), what, plan)
        except AssertionError:
            if payload == "bf16":
                raise
            # Another way to choose the scales than the reference codec's; they must be as good.
            self.close(result, probe.expected(layer, call.hidden, call.topk), what, plan)

    def close(self, result: torch.Tensor, wanted: torch.Tensor, what: str, plan: MoePlan) -> None:
        """Within the tolerance of the payload: quantized tokens are as exact as a scheme that quantizes activations."""
        payload = plan.terms[self.format].payload
        assert_close(result, wanted, "float32", scheme_of(payload) or "bf16", what=what)


def scheme_of(payload: str) -> str | None:
    """The core's scheme that quantizes activations to a payload: a layer admits no other, and its tolerance holds."""
    return next((s.id for s in BUILTIN_SCHEMES if s.activation == payload), None)


def incoming_as(topk: TopKOutput, incoming: DroppedSlot, experts: int) -> TopKOutput:
    """The same decision with dropped slots written as the caller writes them."""
    if incoming is not DroppedSlot.SINK:
        return topk
    return TopKOutput(torch.where(topk.topk_ids < 0, experts, topk.topk_ids), topk.topk_weights)
