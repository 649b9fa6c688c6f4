"""The kit catches runners that break the contract: each breaks one thing, and the check for it fails."""

from __future__ import annotations

import itertools
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

import moe_core
from moe_core.capability import Reason, Support
from moe_core.config import MoeConfig
from moe_core.formats import StandardCombineInput
from moe_core.protocols import RunnerHooks
from moe_core.registry import Registry
from moe_core.runners import reference
from moe_core.runners.cpu import runner as cpu
from moe_core.settings import Settings
from moe_core.testing import fake_plugin, make_layer, run_checks, runner_like
from moe_core.testing.checks.overhead import python_frames
from moe_core.testing.dispatchers import plugin as testing_plugin
from moe_core.testing.profile import ConformanceProfile
from moe_core.vocabulary import Maturity

STANDARD = ("standard",)


def failed(check: str, *, base: str = "reference", formats: tuple[str, ...] = STANDARD, **changes: Any) -> str:
    """Why `check` fails for a runner that is `base` but for `changes`; and that it passes for `base` itself."""
    for name, given in (("acme", changes), ("sound", {})):
        plugin = fake_plugin(name, **runner_like(base, name, formats=formats, **given))
        results = run_checks(name, registry=Registry(plugins=[plugin], autoload=False), select=check)
        outcomes = {result.outcome for result in results}
        if name == "acme":
            assert "failed" in outcomes, results
            detail = next(result.detail for result in results if result.outcome == "failed")
        else:
            assert not outcomes & {"failed", "xpassed"}, results
    assert check in detail
    assert "checked: " in detail
    return detail


def before(change: Callable[[Any], Any], pre: Callable[..., Any] = reference.pre_standard) -> Callable[..., Any]:
    """A pre-permute that first changes the dispatch output."""

    def factory(binding: Any) -> Callable[..., Any]:
        inner = pre(binding)
        return lambda d, q, c, s: inner(change(d), q, c, s)

    return factory


def after(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """A post-permute that changes the result."""

    def factory(binding: Any) -> Callable[..., Any]:
        inner = reference.post_standard(binding)

        def post(out: Any, q: Any, c: Any, s: Any) -> StandardCombineInput:
            result = inner(out, q, c, s)
            return StandardCombineInput(change(result.hidden_states), result.handle)

        return post

    return factory


def test_dropped_slots_computed_as_expert_0() -> None:
    pre = before(lambda d: replace(d, topk_ids=d.topk_ids.clamp(min=0), topk_weights=d.topk_weights.nan_to_num(nan=1)))
    assert "instead of exactly 0" in failed(
        "contract.negative_ids_contribute_zero[standard/split]", adapter={"pre": pre}
    )


def test_nan_weight_of_a_dropped_slot_is_read() -> None:
    def post(binding: Any) -> Callable[..., Any]:
        def call(out: Any, q: Any, c: Any, s: Any) -> StandardCombineInput:
            result = (out * s.private["reference.weights"][..., None]).sum(dim=1).to(binding.dtype)
            return StandardCombineInput(result, s.private["reference.handle"])

        return call

    failed("contract.negative_ids_contribute_zero[standard/split]", adapter={"post": post})


def test_padding_rows_behind_num_valid_are_computed() -> None:
    failed("contract.padding_rows[standard/split]", adapter={"pre": before(lambda d: replace(d, num_valid=None))})


def test_rows_above_masked_m_are_read() -> None:
    # As a kernel does that takes one scale from all rows of the buffer.
    pre = before(lambda d: replace(d, hidden_states=d.hidden_states + 0 * d.hidden_states.sum()), reference.pre_batched)
    assert "not finite" in failed("contract.padding_rows[batched/split]", formats=("batched",), adapter={"pre": pre})


def test_wrong_sum() -> None:
    detail = failed("numerics.scheme[bf16]", adapter={"post": after(lambda y: y * 0.5)})
    assert "relative RMS" in detail
    assert "tolerance" in detail


def test_input_changed() -> None:
    def post(binding: Any) -> Callable[..., Any]:
        inner = reference.post_standard(binding)
        return lambda out, q, c, s: (s.private["x"].zero_(), inner(out, q, c, s))[1]

    def pre(binding: Any) -> Callable[..., Any]:
        inner = reference.pre_standard(binding)

        def call(d: Any, q: Any, c: Any, s: Any) -> Any:
            s.private["x"] = d.hidden_states
            return inner(d, q, c, s)

        return call

    adapter = {"pre": pre, "post": post}
    assert "hidden_states was changed" in failed("contract.input_unchanged[standard/split]", adapter=adapter)


def test_output_buffer_ignored() -> None:
    failed("contract.output_buffer[standard/split]", adapter={"post": after(torch.clone)})


def test_bias_declared_and_left_out() -> None:
    def prepare(weights: Any, binding: Any) -> Any:
        return reference.prepare(replace(weights, w13_bias=None, w2_bias=None), binding)

    failed("numerics.bias", prepare=prepare)


class SiluOnly(reference.ReferenceRunner):
    """Computes silu whatever was asked for."""

    def __init__(self, binding: Any) -> None:
        super().__init__(binding)
        config = binding.config
        self._binding = replace(binding, config=config.replace(activation=replace(config.activation, name="silu")))


def test_activation_declared_and_lacking() -> None:
    failed("numerics.activation[relu2]", factory=SiluOnly)


def test_hooks_get_another_expert() -> None:
    class Wrong(reference.ReferenceRunner):
        def run(self, runner_input: Any, quant_info: Any, state: Any) -> Any:
            if state.hooks is not None and state.hooks.after_down is not None:
                hook = state.hooks.after_down
                wrong = RunnerHooks(after_down=lambda y, rows: hook(y, replace(rows, expert_ids=rows.expert_ids * 0)))
                state = replace(state, hooks=wrong)
            return super().run(runner_input, quant_info, state)

    assert "missing, extra or twice" in failed("numerics.hook[after_down]", factory=Wrong)


def test_state_leaks_between_calls_in_flight() -> None:
    held: dict[str, Any] = {}

    def pre(binding: Any) -> Callable[..., Any]:
        inner = reference.pre_standard(binding)

        def call(d: Any, q: Any, c: Any, s: Any) -> Any:
            made = inner(d, q, c, s)
            held.update(s.private)  # on the plugin, where the next call finds it
            return made

        return call

    def post(binding: Any) -> Callable[..., Any]:
        inner = reference.post_standard(binding)

        def call(out: Any, q: Any, c: Any, s: Any) -> Any:
            s.private.update(held)
            return inner(out, q, c, s)

        return call

    failed("state.steps_in_flight[standard/split]", adapter={"pre": pre, "post": post})


def test_fused_differs_from_split() -> None:
    def fused(binding: Any) -> Callable[..., Any]:
        inner = cpu.fused_standard(binding)

        def call(d: Any, q: Any, c: Any, s: Any) -> StandardCombineInput:
            return StandardCombineInput(inner(d, q, c, s).hidden_states * 1.01, d.handle)

        return call

    failed("numerics.fused_equals_split", base="cpu", fused={"target": fused})


def test_layout_that_the_spec_does_not_name() -> None:
    def prepare(weights: Any, binding: Any) -> Any:
        return replace(reference.prepare(weights, binding), layout="swizzled")

    assert "LayoutMismatch" in failed("weights.prepare[bf16]", prepare=prepare)


def test_weights_of_the_caller_changed() -> None:
    def prepare(weights: Any, binding: Any) -> Any:
        weights.w13.mul_(1.5)
        return reference.prepare(weights, binding)

    assert "changed the caller's w13" in failed("weights.prepare[bf16]", prepare=prepare)


def test_update_that_does_nothing() -> None:
    failed("weights.update[bf16]", update=lambda quant_info, weights, binding: None)


def test_too_many_frames_of_the_plugin() -> None:
    class Deep(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            return self._deeper(40, arguments)

        def _deeper(self, depth: int, arguments: tuple[Any, ...]) -> Any:
            return self._deeper(depth - 1, arguments) if depth else super().run(*arguments)

    assert "42 frames of the plugin, at most 40" in failed("overhead.frames[standard/split]", base="cpu", factory=Deep)


def test_too_many_frames_of_the_framework() -> None:
    class Roundabout(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            for _ in range(12):
                RunnerHooks()
            return super().run(*arguments)

    detail = failed("overhead.frames[standard/split]", base="cpu", factory=Roundabout)
    assert "frames of moe_core, at most 12" in detail
    assert "1 frames of the plugin, at most 40" in detail


def test_what_the_kits_dispatchers_call_is_not_the_frameworks() -> None:
    config = MoeConfig(num_experts=4, top_k=2, hidden_size=64, intermediate_size=32, dtype="float32")
    layer, registry = make_layer(config), Registry(plugins=[testing_plugin], autoload=False)
    counted = {}
    for name in ("standard", "testing_standard"):
        settings = Settings(runner="cpu", dispatcher=name, path="split")
        plan = moe_core.plan(config, layer.weights, registry=registry, settings=settings)
        counted[name] = python_frames(lambda plan=plan: plan(layer.hidden, layer.topk), {"moe_core"}).core
    inner = "moe_core.dispatchers.standard.StandardDispatcher.dispatch"  # the kit's calls the core's
    assert inner in counted["standard"]
    assert inner not in counted["testing_standard"]
    for name, frames in counted.items():
        # What comes before and after the kit's frames counts.
        assert "moe_core.moe_plan.MoePlan.__call__" in frames, name
        assert any(frame.endswith("CpuRunner.run") for frame in frames), name


def test_logging_in_a_forward() -> None:
    class Chatty(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            logging.getLogger("acme").debug("a call")
            return super().run(*arguments)

    assert "logging" in failed("overhead.modules[standard/fused]", base="cpu", factory=Chatty)


@pytest.mark.parametrize(
    "read", [lambda: os.environ.get("ACME"), lambda: os.getenv("ACME"), lambda: os.environ["PATH"]]
)
def test_environment_read_in_a_forward(read: Callable[[], Any]) -> None:
    class Curious(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            read()
            return super().run(*arguments)

    detail = failed("overhead.modules[standard/split]", base="cpu", factory=Curious)
    assert f"os (by {__name__}." in detail


def test_import_in_a_forward() -> None:
    class Late(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            sys.modules.pop("colorsys", None)
            import colorsys  # noqa: F401

            return super().run(*arguments)

    assert "importlib" in failed("overhead.modules[standard/split]", base="cpu", factory=Late)


def test_a_library_that_reads_the_environment_is_not_the_plugins_fault() -> None:
    # As Triton's launcher does.
    library: dict[str, Any] = {"__name__": "somebody.launcher", "os": os}
    exec("def launch():\n    return os.environ.get('SOMEBODY'), os.getenv('SOMEBODY')", library)

    class Launching(cpu.CpuRunner):
        def run(self, *arguments: Any) -> Any:
            library["launch"]()
            return super().run(*arguments)

    plugin = fake_plugin("acme", **runner_like("cpu", "acme", formats=STANDARD, factory=Launching))
    results = run_checks("acme", registry=Registry(plugins=[plugin], autoload=False), select="overhead.modules")
    assert [r.outcome for r in results if r.component == "runner:acme"] == ["passed", "passed"]


def test_deterministic_lie() -> None:
    counter = itertools.count()
    post = after(lambda y: y * (1 + 1e-6 * next(counter)))
    assert "other bits" in failed("numerics.deterministic", adapter={"post": post})


def test_unknown_reason_code() -> None:
    def why_not(request: Any, subject: str) -> list[Reason]:
        return [Reason(subject, "mystery", "no idea")] if request.hardware.arch == "sm_90" else []

    assert "'mystery'" in failed("capability.hardware[h200]", why_not=why_not)


def test_reasons_that_change() -> None:
    counter = itertools.count()

    def why_not(request: Any, subject: str) -> list[Reason]:
        return [Reason(subject, "acme.moody", f"attempt {next(counter)}")]

    failed("capability.pure", why_not=why_not)


def test_refuses_what_it_declares() -> None:
    def why_not(request: Any, subject: str) -> list[Reason]:
        relu = request.config.activation.name == "relu"
        return [Reason(subject, "activation", "has no relu after all")] if relu else []

    assert "refuses every such layer" in failed("numerics.activation[relu]", why_not=why_not)


class Agreeable(Support):
    """Finds nothing against anything."""

    def why_not(self, request: Any, subject: str) -> list[Reason]:
        return []


@pytest.mark.parametrize("check", ["numerics.dtype[float64]", "numerics.scheme[nvfp4]", "capability.refuses[scheme]"])
def test_undeclared_and_not_refused(check: str) -> None:
    given = Registry(autoload=False).runner("cpu").support
    support = Agreeable(**{name: getattr(given, name) for name in given.__dataclass_fields__})
    assert "must refuse it" in failed(check, base="cpu", support=support)


def test_maturity_beyond_support() -> None:
    detail = failed("hygiene.maturity", base="cpu", maturity={"sm_90": Maturity.EXECUTED})
    assert "does not support sm_90" in detail


def test_tolerance_above_the_ceiling() -> None:
    profile = ConformanceProfile(tolerances={("float32", "bf16"): 0.5})
    plugin = fake_plugin("acme", conformance=profile, **runner_like("reference", "acme", formats=STANDARD))
    results = run_checks("acme", registry=Registry(plugins=[plugin], autoload=False), select="hygiene.profile")
    assert [r.outcome for r in results] == ["failed"]
    assert "the kit's ceiling" in results[0].detail
