"""What a check gets: one component (and one value), and the means to build layers and plans for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moe_core.api import plan as make_plan
from moe_core.config import MoeConfig, ParallelConfig
from moe_core.settings import Settings
from moe_core.testing.components import Component, Lane
from moe_core.testing.layer_search import Search, candidates
from moe_core.testing.registration import CheckFailed, CheckSkipped
from moe_core.testing.stage import MAX_TOKENS, Site, Stage, is_environment, sentence
from moe_core.testing.tolerances import assert_close
from moe_core.vocabulary import BATCHED, GROUPED, STANDARD

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.moe_plan import MoePlan
    from moe_core.quant import QuantScheme
    from moe_core.registry import Registry
    from moe_core.testing.layers import Layer
    from moe_core.topk import TopKOutput
    from moe_core.weights import CanonicalWeights


@dataclass(frozen=True)
class Case:
    """One component on one stage. `param` is the value of a check that ranges over some."""

    component: Component
    stage: Stage
    param: str = ""

    @property
    def site(self) -> Site:
        """Where it runs; raises CheckSkipped where it cannot."""
        return self.stage.site(self.component)

    @property
    def by_name(self) -> dict[str, Any]:
        """Settings that force this component."""
        component = self.component
        if component.kind in ("dispatcher", "fused_path"):
            return {"dispatcher": component.name}
        return {"runner": component.runner.name} if component.runner else {}

    @property
    def lane(self) -> Lane:
        """The lane that `param` names."""
        return next(lane for lane in self.component.lanes if lane.label == self.param)

    def lanes(self, *features: str) -> list[Lane]:
        """All lanes; those that give up one of `features` must be refused for it, and are left out."""
        kept = []
        for lane in self.component.lanes:
            lost = sorted(lane.gives_up.intersection(features))
            if lost:
                self._refused_lane(lane, lost[0])
            else:
                kept.append(lane)
        if not kept:
            raise CheckSkipped("no lane leads into this runner" if not self.component.lanes else "no lane has it")
        return kept

    def _refused_lane(self, lane: Lane, feature: str) -> None:
        from moe_core.testing.refusals import demand
        from moe_core.testing.stage import any_config

        wanted = demand(("hook:" if feature in lane.runner.support.hooks else "feature:") + feature)
        asked = {"dispatcher": self.dispatchers(lane)[0], "path": lane.kind, **wanted.request}
        found = self.stage.ask(
            any_config(self.component, **wanted.config), self.site.hardware, runner=lane.runner.name, **asked
        )
        if found.chosen is not None:
            raise CheckFailed(f"lane {lane.label} gives up {feature!r}, and was chosen for a layer that needs it")

    def dispatchers(self, lane: Lane) -> list[str]:
        """Names of dispatchers that can feed a lane, the kit's own first."""
        if lane.kind == "whole":
            return [lane.spec.name]  # type: ignore[union-attr]
        first = {STANDARD: "standard", BATCHED: "testing_batched", GROUPED: "testing_grouped"}.get(lane.format)
        others = [d.name for d in self.stage.registry.dispatchers.values() if lane.format in d.formats.values()]
        names = list(dict.fromkeys([*([first] if first else []), *sorted(others)]))
        if not names:
            raise CheckSkipped(f"no dispatcher gives the format {lane.format!r}")
        return names

    def setup(
        self,
        lane: Lane | None = None,
        *,
        dispatcher: str | None = None,
        parallel: ParallelConfig | None = None,
        request: dict[str, Any] | None = None,
        **wanted: Any,
    ) -> Setup:
        """A legal layer with the wanted properties on a lane (default: `param`'s).

        wanted: see `layer_search.Search`. Raises CheckFailed where the component declares them and refuses every such
        layer, CheckSkipped where only the machine or the lack of a dispatcher stands against it.
        """
        lane, request = lane or self.lane, request or {}
        key = (self.component.id, lane.label, dispatcher, parallel, repr(sorted(wanted.items())), repr(request))
        if key not in self.stage.cache:
            self.stage.cache[key] = self._search(lane, dispatcher, parallel, request, Search(**wanted))
        chosen, config = self.stage.cache[key]
        return Setup(self, lane, chosen, config, request, parallel)

    def _search(
        self, lane: Lane, dispatcher: str | None, parallel: ParallelConfig | None, request: dict[str, Any], want: Search
    ) -> tuple[str, MoeConfig]:
        site, names = self.site, [dispatcher] if dispatcher else self.dispatchers(lane)
        against: list[Any] = []
        paths: list[Any] = []
        for config in candidates(self.component.support, want, self.stage.registry.schemes, parallel):
            for name in names:
                found = self.stage.ask(
                    config, site.hardware, **self._settings(lane, name), parallel=parallel, **request
                )
                if found.chosen is not None:
                    return name, config
                reasons = [r for v in self.stage.verdicts(self.component, found) for r in v.reasons]
                if reasons:
                    against += [r for r in reasons if r not in against]
                    break  # no dispatcher will change that
                paths += [r for r in found.reasons if r not in paths and not r.code.startswith("override.")]
        if against and not paths and not all(is_environment(r) for r in against):
            raise CheckFailed(f"it declares {want}, and refuses every such layer: {sentence(against)}")
        raise CheckSkipped(f"no dispatcher of one process can feed lane {lane.label}: {sentence(paths or against)}")

    def _settings(self, lane: Lane, dispatcher: str) -> dict[str, str]:
        return {"runner": lane.runner.name, "dispatcher": dispatcher, "path": lane.kind}

    def setups(self, *features: str, **wanted: Any) -> Iterator[Setup]:
        """`setup` for every lane that has `features`; skipped only if no lane could be fed."""
        skipped: list[str] = []
        made = 0
        for lane in self.lanes(*features):
            try:
                found = self.setup(lane, **wanted)
            except CheckSkipped as error:
                skipped.append(str(error))
                continue
            made += 1
            yield found
        if not made:
            raise CheckSkipped("; ".join(skipped))


@dataclass(frozen=True)
class Setup:
    """A lane and a layer that it can serve."""

    case: Case
    lane: Lane
    dispatcher: str
    config: MoeConfig
    request: dict[str, Any]
    parallel: ParallelConfig | None = None

    @property
    def scheme(self) -> QuantScheme:
        """The description of the layer's scheme."""
        return self.case.stage.registry.schemes[self.config.scheme]

    @property
    def can_be_expected(self) -> bool:
        """Whether the float64 formula knows the activation."""
        from moe_core.testing.oracle import ACTIVATIONS

        return self.config.activation.name in ACTIVATIONS

    def layer(self, seed: int = 0, *, tokens: int = 16, pattern: str = "uniform") -> Layer:
        """All experts, and tokens."""
        from moe_core.testing.layers import make_layer

        needed = self.config.scheme in self.lane.runner.support.needs_input_scales
        device = self.case.site.device
        return make_layer(
            self.config, seed, tokens=tokens, pattern=pattern, scheme=self.scheme, input_scales=needed, device=device
        )

    def plan(
        self, weights: CanonicalWeights, parallel: ParallelConfig | None = None, registry: Registry | None = None
    ) -> MoePlan:
        """Bind the rank's share of `weights`, which are all experts."""
        parallel = parallel or self.parallel
        local = weights if parallel is None else weights.shard(self.config, parallel, self.scheme)
        return make_plan(
            self.config,
            local,
            parallel,
            self.case.site.hardware,
            registry=registry or self.case.stage.registry,
            settings=Settings(runner=self.lane.runner.name, dispatcher=self.dispatcher, path=self.lane.kind),
            **{"max_tokens": MAX_TOKENS, **self.request},
        )

    def expected(
        self, layer: Layer, hidden: Tensor | None = None, topk: TopKOutput | None = None, **more: Any
    ) -> Tensor:
        """The float64 formula for `layer` (with other tokens or routing where they are given)."""
        from moe_core.testing.oracle import dense

        if not self.can_be_expected:
            raise CheckSkipped(f"the formula does not know the activation {self.config.activation.name!r}")
        x = layer.hidden if hidden is None else hidden
        return dense(self.config, layer.weights, x, topk or layer.topk, scheme=self.scheme, **more)

    def close(self, actual: Tensor, expected: Tensor, what: str = "the result") -> None:
        """Compare within the tolerance in force. Raises AssertionError."""
        tightened = self.case.stage.profile.tolerances
        name = f"{what} of lane {self.lane.label} ({self.config.dtype}, {self.config.scheme})"
        config, arch = self.config, self.case.site.hardware.arch
        assert_close(actual, expected, config.dtype, config.scheme, what=name, tightened=tightened, arch=arch)
