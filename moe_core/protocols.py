"""The protocols between the core, dispatchers and runners, and the values that travel between them.

Static typing only: nothing here is checked with `isinstance`, which would be slow and break `torch.compile`.
The conformance kit checks behavior. Never imports torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from moe_core.vocabulary import DroppedSlot, FormatId, PayloadId, Phase

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from moe_core.config import MoeConfig, ParallelConfig
    from moe_core.hardware import HardwareInfo
    from moe_core.moe_plan import MoePlan
    from moe_core.quant import QuantScheme
    from moe_core.request import PlanRequest
    from moe_core.specs import Terms
    from moe_core.topk import AnyTopK, TopKOutput
    from moe_core.weights import CanonicalWeights


@dataclass(slots=True)
class HookRows:
    """Which tokens and experts the rows of an intermediate result belong to.

    hidden_states: [T, H], the tokens as the runner got them. token_ids, slot_ids, expert_ids: int64 [rows]; the row's
    token, its top-k slot and its *local* expert. Rows of dropped slots are not present.
    """

    hidden_states: Tensor
    token_ids: Tensor
    slot_ids: Tensor
    expert_ids: Tensor


@dataclass(slots=True)
class RunnerHooks:
    """Callbacks inside a runner, for LoRA. Each gets the tensor, to change in place, and its rows.

    after_gate_up: [rows, 2I] (gate, then up) or [rows, I], before the activation.
    after_down: [rows, H], before the router weight unless that was applied to the input.
    """

    after_gate_up: Callable[[Tensor, HookRows], None] | None = None
    after_down: Callable[[Tensor, HookRows], None] | None = None


@dataclass(slots=True)
class RunningState:
    """One call's own state, passed through every step. Nothing outlives the call in a component.

    phase: completed by the plan where it is None. output: write the result here (a runner with the feature `inplace`
    accepts the input itself). tokens_per_rank: how many tokens every EP rank brings to this call, in the order of
    ep_rank, where the caller knows; it spares dispatchers of sharded tokens padding or asking. overlap: arguments for
    kernels that overlap with communication, understood by the pair that exchanges them. private: the backend's.
    """

    phase: Phase | None = None
    hooks: RunnerHooks | None = None
    output: Tensor | None = None
    tokens_per_rank: Sequence[int] | None = None
    overlap: Any = None
    workspace: Any = None
    private: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """All that a factory gets when a plan is bound.

    request: what the plan was made for (phases, graph capture, ...); its most used parts stand beside it.
    format and terms: of the path being bound (for a runner's own factory and its `prepare`: of the first path; a fused
    path has none). all_terms: the terms of every path of the plan. incoming: how the caller writes dropped slots.
    group: what the caller passed for communication (a torch.distributed ProcessGroup for the core's dispatchers).
    layouts: weight layouts that serve every path of the plan; `prepare` returns one of them. runner: the runner core,
    for adapters and fused funcs. For dispatchers: quant_info, the prepared weights, to quantize with them; quantizer,
    the runner's, where it brings one, for rows that travel as the terms' payload says. options: the settings for this
    component by name. max_tokens: the most tokens one call of this rank brings, or None.
    num_local_experts and local_intermediate_size are the rank's own, without padding.
    """

    request: PlanRequest
    config: MoeConfig
    parallel: ParallelConfig
    hardware: HardwareInfo
    scheme: QuantScheme
    device: torch.device
    dtype: torch.dtype
    num_local_experts: int
    local_intermediate_size: int
    format: FormatId
    terms: Terms | None
    all_terms: Mapping[FormatId, Terms]
    incoming: DroppedSlot = DroppedSlot.NEGATIVE
    max_tokens: int | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    group: Any = None
    layouts: frozenset[str] = frozenset()
    runner: Any = None
    quant_info: Any = None
    quantizer: BoundQuantizer | None = None


class QuantInfo(Protocol):
    """The weights of one layer in one runner's layout."""

    @property
    def scheme(self) -> str:
        """The quant scheme id."""

    @property
    def layout(self) -> str:
        """The runner's name for the layout; binding refuses one that the runner's spec does not declare."""


class DispatchOutput(Protocol):
    """What `dispatch` returns. `format` identifies the layout."""

    @property
    def format(self) -> FormatId:
        """The format id."""

    @property
    def hidden_states(self) -> Tensor:
        """The tokens, as laid out by the format."""


class CombineInput(Protocol):
    """What `combine` takes."""

    @property
    def format(self) -> FormatId:
        """The format id."""

    @property
    def hidden_states(self) -> Tensor:
        """The experts' results, as laid out by the format."""


class Dispatcher(Protocol):
    """Moves tokens to the ranks that own their experts, and back.

    It keeps nothing between the two calls: what `combine` needs travels in the data (`handle`), so that two
    micro-batches can be in flight. One that holds more than tensors (communication buffers) has a method `close()` too,
    which `MoePlan.close` calls.
    """

    def dispatch(self, hidden_states: Tensor, topk_output: AnyTopK, state: RunningState) -> Any:
        """hidden_states [T, H] of this rank -> the dispatch output of the agreed format."""

    def combine(self, combine_input: Any, state: RunningState) -> Tensor:
        """The matching combine input -> [T, H] (or [T, K, H] with no_combine)."""


class AsyncDispatcher(Dispatcher, Protocol):
    """A dispatcher whose communication can overlap with other work. The one-shot calls are built on these."""

    def dispatch_begin(self, hidden_states: Tensor, topk_output: AnyTopK, state: RunningState) -> Any:
        """Start; returns a handle."""

    def dispatch_finish(self, handle: Any, state: RunningState) -> Any:
        """Wait; returns the dispatch output."""

    def combine_begin(self, combine_input: Any, state: RunningState) -> Any:
        """Start; returns a handle."""

    def combine_finish(self, handle: Any, state: RunningState) -> Tensor:
        """Wait; returns [T, H]."""


class RunnerCore(Protocol):
    """GEMM1, activation, GEMM2 of one backend, between its own input and output types."""

    def run(self, runner_input: Any, quant_info: Any, state: RunningState) -> Any:
        """Compute the experts."""


class FusedPath(Protocol):
    """A whole layer in one callable."""

    def __call__(
        self,
        hidden_states: Tensor,
        topk_output: AnyTopK,
        quant_info: Any,
        config: MoeConfig,
        state: RunningState,
    ) -> Tensor:
        """[T, H] -> [T, H]."""


class BoundRouter(Protocol):
    """A layer's routing function: what `moe_core.routing.route` computes for its `RoutingConfig` and top_k."""

    def __call__(
        self, router_logits: Tensor, correction_bias: Tensor | None = None, scaling_factor: float = 1.0
    ) -> TopKOutput:
        """router_logits [T, E] -> the choice, as `moe_core.routing.route` gives it."""


class BoundQuantizer(Protocol):
    """What `moe_core.quant.quantize_activation` computes for a payload with scales a row, to the bit."""

    def __call__(self, rows: Tensor, payload: PayloadId) -> tuple[Tensor, Tensor]:
        """rows [T, H], floating point, any T -> (data, scale), whose first dimension is T."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningJob:
    """What a runner's `tune` gets: a bound layer with random weights, and the file where its results belong.

    plan: the bound plan, whose `dispatch` gives the runner's input and whose `run` is what will be called; binding and
    quant_info are its own. tokens: token counts of a call, ascending. budget_s: seconds for all of them together; what
    was found when they end counts. inputs(tokens, seed) -> hidden states [T, H] and a uniformly random routing on the
    layer's device. store: a file in the runner's own format, to be merged into (it may not exist, nor its folder) and
    to be written after every token count, so that an interruption loses nothing. progress: says what goes on.
    """

    plan: MoePlan
    binding: Binding
    quant_info: Any
    tokens: tuple[int, ...]
    budget_s: float
    inputs: Callable[[int, int], tuple[Tensor, TopKOutput]]
    store: Path
    progress: Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRow:
    """The outcome for one token count: what would run without tuning, and what was found. Microseconds of a call.

    source: where the default came from, in the runner's words. tried: how many variants were timed.
    """

    tokens: int
    default: str
    default_us: float
    tuned: str
    tuned_us: float
    source: str = ""
    tried: int = 0


PrePermute: TypeAlias = "Callable[[Any, Any, MoeConfig, RunningState], Any]"
"""(dispatch_output, quant_info, config, state) -> runner_input"""

PostPermute: TypeAlias = "Callable[[Any, Any, MoeConfig, RunningState], Any]"
"""(runner_output, quant_info, config, state) -> combine_input"""

FusedFunc: TypeAlias = "Callable[[Any, Any, MoeConfig, RunningState], Any]"
"""(dispatch_output, quant_info, config, state) -> combine_input"""

DispatcherFactory: TypeAlias = Callable[[Binding], Dispatcher]
RunnerFactory: TypeAlias = Callable[[Binding], RunnerCore]
PrepareWeights: TypeAlias = "Callable[[CanonicalWeights, Binding], QuantInfo]"
UpdateWeights: TypeAlias = "Callable[[Any, CanonicalWeights, Binding], None]"
TuneRunner: TypeAlias = Callable[[TuningJob], Sequence[TuningRow]]
