"""The bound plan: one callable a layer. A forward touches bound callables only."""

from __future__ import annotations

import pickle
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from moe_core import _contract, explanation
from moe_core.errors import ContractViolation
from moe_core.protocols import Binding, BoundRouter, RunningState
from moe_core.resolution import Resolution
from moe_core.vocabulary import TOPK_STANDARD, FormatId, Owner, Phase, Step
from moe_core.weights import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor

    from moe_core.topk import AnyTopK, TopKOutput
    from moe_core.weights import CanonicalWeights


class MoePlan:
    """One layer, ready to run: `y = plan(hidden_states, topk_output)`.

    hidden_states: [T, H] of the layer's dtype on the plan's device; topk_output: a TopKOutput with [T, K] tensors (or
    BypassedTopK where the plan was made for it). Returns [T, H] ([T, K, H] with no_combine). Attributes: `resolution`
    (why this plan), `terms` (by format), `quant_info` (the prepared weights), `fingerprint`, `dispatcher`, `runner`.

    A server that overlaps communication with other work drives the steps itself: `dispatch` (or `dispatch_begin` and
    `dispatch_finish`), `run`, `combine` (or `combine_begin` and `combine_finish`), with one `RunningState` a call.
    `close` ends it where a dispatcher holds more than tensors.
    """

    __slots__ = (
        "_binding",
        "_bound_hooks",
        "_combine",
        "_config",
        "_device",
        "_dispatch",
        "_dispatch_begin",
        "_dtype",
        "_hidden_size",
        "_id_dtypes",
        "_max_tokens",
        "_paths",
        "_phases",
        "_router",
        "_split",
        "_topk_format",
        "_topk_shape",
        "_update",
        "_whole",
        "dispatcher",
        "fingerprint",
        "quant_info",
        "resolution",
        "runner",
        "terms",
    )

    def __init__(
        self,
        resolution: Resolution,
        binding: Binding,
        quant_info: Any,
        *,
        paths: dict[FormatId, tuple[Any, Any, Any]],
        dispatcher: Any,
        whole: Callable[..., Tensor] | None,
        split_phases: bool,
        router: BoundRouter,
        update: Callable[[MoePlan, CanonicalWeights], None],
    ) -> None:
        """Use `moe_core.plan` or `moe_core.binding.bind`."""
        request = resolution.request
        self.resolution, self.quant_info, self._binding = resolution, quant_info, binding
        self.fingerprint, self.terms = resolution.fingerprint, binding.all_terms
        self.runner, self.dispatcher = binding.runner, dispatcher
        self._config, self._hidden_size = binding.config, binding.config.hidden_size
        self._dtype, self._device = binding.dtype, binding.device
        self._topk_format = request.topk_format
        self._topk_shape = binding.config.top_k if self._topk_format == TOPK_STANDARD else None
        self._id_dtypes = (torch_dtype("int32"), torch_dtype("int64"))
        self._max_tokens = request.max_tokens or sys.maxsize
        self._bound_hooks, self._phases = request.hooks, request.phases
        self._paths, self._whole, self._split, self._update = paths, whole, split_phases, update
        self._router = router
        self._dispatch: Any = dispatcher.dispatch if dispatcher is not None else None
        self._dispatch_begin: Any = dispatcher.dispatch_begin if split_phases else None
        self._combine: Any = dispatcher.combine if dispatcher is not None else None
        if request.settings.check:
            if whole is not None:
                self._whole = _contract.checked(whole, request)
            else:
                self._dispatch = _contract.checked(dispatcher.dispatch, request)
                if split_phases:
                    self._dispatch_begin = _contract.checked(dispatcher.dispatch_begin, request)

    def __call__(
        self,
        hidden_states: Tensor,
        topk_output: AnyTopK,
        *,
        phase: Phase | None = None,
        state: RunningState | None = None,
    ) -> Tensor:
        """Run the layer. phase: the plan's first where it is not given. state: this call's hooks, output tensor, ...

        Raises ContractViolation for tensors of a wrong shape, dtype or device, before any kernel runs.
        """
        state = self._begin(hidden_states, topk_output, phase, state)
        if self._whole is not None:
            return self._whole(hidden_states, topk_output, self.quant_info, self._config, state)
        dispatched = self._dispatch(hidden_states, topk_output, state)
        pre, run, post = self._paths[dispatched.format]
        quant_info, config = self.quant_info, self._config
        if post is None:
            result = run(dispatched, quant_info, config, state)
        else:
            result = post(run(pre(dispatched, quant_info, config, state), quant_info, state), quant_info, config, state)
        return self._combine(result, state)  # type: ignore[no-any-return]

    def _begin(
        self, hidden_states: Tensor, topk_output: AnyTopK, phase: Phase | None, state: RunningState | None
    ) -> RunningState:
        """Refuse bad input, and complete the state. Nothing here but comparisons: it runs on every forward."""
        if (
            hidden_states.dim() != 2
            or hidden_states.shape[1] != self._hidden_size
            or hidden_states.shape[0] > self._max_tokens
            or hidden_states.dtype != self._dtype
            or hidden_states.device != self._device
            or hidden_states.requires_grad
            or getattr(topk_output, "format", None) != self._topk_format
        ):
            _contract.check_input(hidden_states, topk_output, self._binding, self._topk_format)
        if self._topk_shape is not None:
            ids, weights = topk_output.topk_ids, topk_output.topk_weights  # type: ignore[union-attr]
            expected = (hidden_states.shape[0], self._topk_shape)
            if (
                ids.shape != expected
                or weights.shape != expected
                or ids.dtype not in self._id_dtypes
                or not weights.is_floating_point()
                or weights.requires_grad
                or ids.device != hidden_states.device
                or weights.device != hidden_states.device
            ):
                _contract.check_topk(hidden_states, topk_output, self._topk_shape)
        elif topk_output.router_logits.shape != (hidden_states.shape[0], self._config.num_experts):  # type: ignore[union-attr]
            _contract.refuse_logits(hidden_states, topk_output, self._config)
        if state is None:
            state = RunningState(self._phases[0] if phase is None else phase)
        else:
            _contract.check_state(state, phase, self._phases[0], hidden_states, self._binding)
            if state.hooks is not None:
                _contract.check_hooks(state.hooks, self._bound_hooks)
        if state.phase not in self._phases:
            _contract.refuse_phase(state.phase, self._phases)
        return state

    def route(
        self, router_logits: Tensor, correction_bias: Tensor | None = None, *, scaling_factor: float = 1.0
    ) -> TopKOutput:
        """The layer's routing function, by the runner's kernels where it has some: see `moe_core.route`."""
        return self._router(router_logits, correction_bias, scaling_factor)

    def dispatch(
        self, hidden_states: Tensor, topk_output: AnyTopK, state: RunningState, *, phase: Phase | None = None
    ) -> Any:
        """First step, for servers that drive the steps themselves. The state goes through all of them."""
        self._need_steps()
        return self._dispatch(hidden_states, topk_output, self._begin(hidden_states, topk_output, phase, state))

    def dispatch_begin(
        self, hidden_states: Tensor, topk_output: AnyTopK, state: RunningState, *, phase: Phase | None = None
    ) -> Any:
        """Start the dispatch; the handle is for `dispatch_finish`. One that is not asynchronous does it all here."""
        self._need_steps()
        state = self._begin(hidden_states, topk_output, phase, state)
        if self._split:
            return self._dispatch_begin(hidden_states, topk_output, state)
        return self._dispatch(hidden_states, topk_output, state)

    def dispatch_finish(self, handle: Any, state: RunningState) -> Any:
        """Wait for the dispatch; returns the dispatch output."""
        return self.dispatcher.dispatch_finish(handle, state) if self._split else handle

    def run(self, dispatched: Any, state: RunningState | None = None) -> Any:
        """The experts: dispatch output -> combine input."""
        self._need_steps()
        if dispatched.format not in self._paths:
            raise ContractViolation(
                f"this plan was bound for the formats {sorted(self._paths)}, got {dispatched.format!r}"
            )
        if state is None:
            state = RunningState(self._phases[0])
        if state.hooks is not None:
            _contract.check_hooks(state.hooks, self._bound_hooks)
        pre, run, post = self._paths[dispatched.format]
        quant_info, config = self.quant_info, self._config
        if post is None:
            return run(dispatched, quant_info, config, state)
        return post(run(pre(dispatched, quant_info, config, state), quant_info, state), quant_info, config, state)

    def combine(self, combine_input: Any, state: RunningState) -> Tensor:
        """Last step: combine input -> [T, H]."""
        self._need_steps()
        return self._combine(combine_input, state)  # type: ignore[no-any-return]

    def combine_begin(self, combine_input: Any, state: RunningState) -> Any:
        """Start the combine; the handle is for `combine_finish`."""
        self._need_steps()
        if self._split:
            return self.dispatcher.combine_begin(combine_input, state)
        return self._combine(combine_input, state)

    def combine_finish(self, handle: Any, state: RunningState) -> Tensor:
        """Wait for the combine; returns [T, H]."""
        return self.dispatcher.combine_finish(handle, state) if self._split else handle  # type: ignore[no-any-return]

    def _need_steps(self) -> None:
        if self._whole is not None:
            raise ContractViolation(
                f"{self!r} does everything in one kernel and has no steps to drive",
                hint="call the plan, or make one with path='fused' or path='split'",
            )

    def update_weights(self, weights: CanonicalWeights) -> None:
        """New values for the same layer, in place: addresses stay, captured graphs see the new weights.

        What the plan holds is overwritten. A runner that keeps your own tensors instead of a copy (`reference`; `cpu`
        with pack_weights=False) writes into those that the plan was made with.
        """
        self._update(self, weights)

    def close(self) -> None:
        """Give back what the dispatcher holds beyond tensors: communication buffers, say. The plan cannot run again.

        Where ranks share the layer, close it on all of them, in the same order. Closing twice does nothing.
        """
        close = getattr(self.dispatcher, "close", None)
        if close is not None:
            close()
        self._dispatch = self._dispatch_begin = _contract.refuse_closed
        if self._whole is not None:
            self._whole = _contract.refuse_closed

    def step_owner(self, step: Step) -> Owner | None:
        """Who performs a step of the layer; None where it has no such step. What the caller does, no phase changes."""
        if not self.terms:  # a fused path does everything
            return Owner.RUNNER if step in self.resolution.request.steps else None
        return next(iter(self.terms.values())).owner(step)

    def explain(self, *, brief: bool = False) -> str:
        """The selection report as text (see `moe_core.explanation.text`), and the layout that the weights got."""
        return f"{explanation.text(self.resolution, brief=brief)}\nweights   layout {self.quant_info.layout}"

    def __repr__(self) -> str:
        return f"<MoePlan {self.resolution.require().id} {self.fingerprint}>"

    def __reduce__(self) -> tuple[Any, ...]:
        from moe_core.binding import rebind

        if self._binding.group is not None:
            raise pickle.PicklingError(
                f"{self!r} holds a process group, which cannot travel between processes; "
                "pickle plan.resolution and bind it again with the other process's group"
            )
        return (rebind, (self.resolution, self.quant_info, self._device))
