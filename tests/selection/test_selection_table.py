"""What runs where: every hardware profile, every scheme, one rank and eight, with the six plugins of this repository.

The expectations follow from what the backends are for: on NVIDIA, FlashInfer's TensorRT-LLM kernels lead on Blackwell
and Triton everywhere else; on AMD, AITER leads; a CPU has its own runner for unquantized layers; whatever nobody
runs falls to the reference, which is correct and slow. Ranks that bring their own tokens take the machine's all-to-all,
with the best runner that understands what it sends; ranks that all bring the same tokens need none.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moe_core.api import resolve
from moe_core.config import Activation, MoeConfig, ParallelConfig
from moe_core.hardware import PROFILES
from moe_core.quant import BUILTIN_SCHEMES
from moe_core.registry import Registry
from moe_core.resolution import Resolution
from moe_core.settings import Settings
from moe_core.vocabulary import Phase

ROOT = Path(__file__).resolve().parents[2]
PLUGINS = ("aiter", "cutedsl", "deepep", "flashinfer_trtllm", "mori", "triton")
SCHEMES = tuple(scheme.id for scheme in BUILTIN_SCHEMES)
LAYER = MoeConfig(num_experts=64, top_k=8, hidden_size=2048, intermediate_size=1024)


@pytest.fixture(scope="module", autouse=True)
def _sources_on_the_path() -> Iterator[None]:
    """The plugins' packages are importable in this module only, installed or not."""

    def forget() -> dict[str, Any]:
        ours = [m for m in sys.modules if m.partition(".")[0] in {f"moe_core_{name}" for name in PLUGINS}]
        return {m: sys.modules.pop(m) for m in ours}

    path, before = list(sys.path), forget()
    sys.path[:0] = [str(ROOT / "plugins" / name / "src") for name in PLUGINS]
    importlib.invalidate_caches()
    yield
    installed.cache_clear()
    sys.path[:] = path
    forget()
    sys.modules.update(before)


@cache
def installed(names: tuple[str, ...]) -> Registry:
    plugins = [importlib.import_module(f"moe_core_{name}.plugin").plugin for name in names]
    registry = Registry(plugins=plugins, autoload=False, settings=Settings())
    assert len(registry.records) == 1 + len(names)
    assert all(record.plugin is not None for record in registry.records), registry.records
    return registry


def ask(
    hardware: str,
    scheme: str = "bf16",
    ep: int = 1,
    plugins: tuple[str, ...] = PLUGINS,
    tokens: str = "replicated",
    **changes: Any,
) -> Resolution:
    layer = {name: changes.pop(name) for name in list(changes) if name in MoeConfig.__dataclass_fields__}
    return resolve(
        LAYER.replace(scheme=scheme, **layer),
        ParallelConfig(ep_size=ep, tokens=tokens),
        hardware,
        registry=installed(plugins),
        **{"max_tokens": 128, "settings": Settings(), "assume": ("dependencies", "targets"), **changes},
    )


def chosen(*args: Any, **changes: Any) -> str:
    return ask(*args, **changes).require().id


FP8 = ("fp8_tensor", "fp8_channel", "fp8_block128")
WEIGHT_ONLY = ("int8_w8a16", "int4_w4a16", "mxfp4_w4a16")

#: profile -> runner -> the schemes that it is chosen for. What is not listed falls to the reference.
BEST: dict[str, dict[str, tuple[str, ...]]] = {
    "cpu": {"cpu": ("bf16",)},
    # No fp8 in this hardware.
    "a100": {"triton": ("bf16", "int8_channel", *WEIGHT_ONLY)},
    "h100": {"triton": ("bf16", *FP8, "int8_channel", *WEIGHT_ONLY)},
    "h200": {"triton": ("bf16", *FP8, "int8_channel", *WEIGHT_ONLY)},
    "b200": {
        "flashinfer_trtllm": ("bf16", "fp8_tensor", "fp8_block128", "mxfp4_w4a16", "mxfp8", "nvfp4"),
        "triton": ("fp8_channel", "int8_channel", "int8_w8a16", "int4_w4a16"),
    },
    "gb200": {
        "flashinfer_trtllm": ("bf16", "fp8_tensor", "fp8_block128", "mxfp4_w4a16", "mxfp8", "nvfp4"),
        "triton": ("fp8_channel", "int8_channel", "int8_w8a16", "int4_w4a16"),
    },
    # int4 in groups of 128 is not AITER's, nor is mxfp4_w4a16 with silu; fp4 and mxfp8 are new in gfx950.
    "mi300x": {
        "aiter": ("bf16", *FP8, "int8_channel"),
        "triton": WEIGHT_ONLY,
    },
    "mi355x": {
        "aiter": ("bf16", *FP8, "int8_channel", "mxfp4", "mxfp8"),
        "triton": WEIGHT_ONLY,
    },
}
FUSED_FUNC = ("cpu", "triton", "flashinfer_trtllm")


def best_runner(hardware: str, scheme: str) -> str:
    return next((runner for runner, schemes in BEST[hardware].items() if scheme in schemes), "reference")


def kind(runner: str) -> str:
    return "fused" if runner in FUSED_FUNC else "split"


def expected_all_to_all(hardware: str, scheme: str) -> str:
    runner = best_runner(hardware, scheme)
    if hardware in ("mi300x", "mi355x"):
        return f"mori+{runner}/{kind(runner)}"
    if hardware in ("cpu", "a100"):
        return f"allgather+{runner}/{kind(runner)}"  # no vendor's all-to-all there
    if runner == "flashinfer_trtllm":
        # Token-major rows alone: DeepEP's normal kernels in both phases.
        return f"deepep_normal+{runner}/{kind(runner)}"
    # DeepEP by phase: token-major rows in prefill, where Triton has a fused func, expert-major ones in decode.
    return f"deepep+{runner}/{'mixed' if runner == 'triton' else 'split'}"


def test_every_profile_and_scheme_is_in_the_table() -> None:
    assert set(BEST) == set(PROFILES)
    named = [scheme for runners in BEST.values() for schemes in runners.values() for scheme in schemes]
    assert set(named) == set(SCHEMES)
    for hardware, runners in BEST.items():
        listed = [scheme for schemes in runners.values() for scheme in schemes]
        assert len(listed) == len(set(listed)), hardware


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("hardware", PROFILES)
def test_one_rank_takes_the_best_runner_of_its_hardware(hardware: str, scheme: str) -> None:
    runner = best_runner(hardware, scheme)
    assert chosen(hardware, scheme) == f"standard+{runner}/{kind(runner)}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("hardware", PROFILES)
def test_eight_ranks_with_replicated_tokens_need_no_all_to_all(hardware: str, scheme: str) -> None:
    runner = best_runner(hardware, scheme)
    assert chosen(hardware, scheme, 8) == f"standard+{runner}/{kind(runner)}"


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("hardware", PROFILES)
def test_eight_ranks_with_their_own_tokens_take_the_machines_all_to_all(hardware: str, scheme: str) -> None:
    found = ask(hardware, scheme, 8, tokens="sharded")
    assert (found.chosen.id if found.chosen else None) == expected_all_to_all(hardware, scheme)
    (standard,) = [v for v in found.verdicts if v.spec.subject == "dispatcher:standard"]
    assert [r.code for r in standard.reasons] == ["parallel.tokens"]


@pytest.mark.parametrize("hardware", ["h200", "mi300x"])
def test_an_all_to_all_refuses_replicated_tokens_and_one_rank_has_none_to_tell_apart(hardware: str) -> None:
    codes = {v.spec.name: {r.code for r in v.reasons} for v in ask(hardware, "bf16", 8).verdicts}
    carriers = {name for name in codes if name.startswith(("deepep", "mori"))}
    assert carriers
    assert all("parallel.tokens" in codes[name] for name in carriers)
    assert chosen(hardware, tokens="sharded") == chosen(hardware)


@pytest.mark.parametrize("hardware", [name for name in PROFILES if name != "cpu"])
def test_what_is_only_announced_is_not_chosen(hardware: str) -> None:
    """Without `assume="targets"`, what is not written is refused."""
    found = ask(hardware, assume=("dependencies",))
    best = "aiter/split" if hardware.startswith("mi") else "triton/fused"
    assert found.require().id == f"standard+{'flashinfer_trtllm/fused' if 'b200' in hardware else best}"
    codes = {v.spec.name: {r.code for r in v.reasons} for v in found.verdicts}
    unwritten = {name for name, verdict in codes.items() if "target.missing" in verdict}
    assert unwritten == {"cutedsl_hopper"}


@pytest.mark.parametrize(
    ("hardware", "scheme", "ep", "plugins", "expected"),
    [
        ("h200", "bf16", 1, (), "standard+reference/split"),
        ("h200", "bf16", 1, ("flashinfer_trtllm",), "standard+flashinfer_cutlass/fused"),
        ("h200", "bf16", 1, ("aiter", "mori"), "standard+reference/split"),
        ("h200", "mxfp4_w4a16", 1, ("flashinfer_trtllm", "cutedsl"), "standard+flashinfer_cutlass/fused"),
        ("h200", "fp8_block128", 1, ("cutedsl",), "standard+cutedsl_hopper/fused"),
        ("h200", "bf16", 8, ("triton",), "standard+triton/fused"),
        ("h200", "bf16", 8, ("deepep",), "deepep+reference/split"),
        ("h200", "bf16", 8, ("deepep", "flashinfer_trtllm"), "standard+flashinfer_cutlass/fused"),
        ("h200", "bf16", 8, ("triton",), "allgather+triton/fused"),
        ("h200", "bf16", 16, ("triton",), "allgather+triton/fused"),
        # Rows alone, and local ids: DeepEP's normal kernels.
        ("h200", "bf16", 8, ("deepep", "flashinfer_trtllm"), "deepep_normal+flashinfer_cutlass/fused"),
        ("b200", "bf16", 1, ("triton",), "standard+triton/fused"),
        ("b200", "nvfp4", 1, ("triton",), "standard+reference/split"),
        ("b200", "nvfp4", 1, ("triton", "cutedsl"), "standard+cutedsl/fused"),
        ("b200", "nvfp4", 8, ("deepep", "cutedsl"), "deepep_ll+cutedsl/fused"),
        ("b200", "mxfp8", 1, ("cutedsl", "triton"), "standard+reference/split"),
        ("mi300x", "bf16", 1, ("triton",), "standard+triton/fused"),
        ("mi300x", "bf16", 8, ("triton", "mori"), "mori+triton/fused"),
        ("mi300x", "bf16", 8, ("aiter",), "standard+aiter/split"),
        ("mi355x", "nvfp4", 1, PLUGINS, "standard+reference/split"),
        ("cpu", "bf16", 1, (), "standard+cpu/fused"),
        ("cpu", "bf16", 8, (), "standard+cpu/fused"),
        ("cpu", "bf16", 8, (), "allgather+cpu/fused"),
        ("cpu", "nvfp4", 8, (), "standard+reference/split"),
    ],
)
def test_what_is_installed_decides_among_what_fits(
    hardware: str, scheme: str, ep: int, plugins: tuple[str, ...], expected: str
) -> None:
    # Ranks bring their own tokens where an all-to-all is expected.
    tokens = "replicated" if expected.startswith("standard+") else "sharded"
    assert chosen(hardware, scheme, ep, plugins, tokens) == expected


@pytest.mark.parametrize(
    ("hardware", "ep", "changes", "expected"),
    [
        # A layer that the leader cannot run goes to the next one.
        ("b200", 1, {"activation": Activation(name="gelu")}, "standard+triton/fused"),
        ("b200", 1, {"dtype": "float16"}, "standard+triton/fused"),
        ("b200", 1, {"dtype": "float64"}, "standard+reference/split"),
        ("b200", 1, {"bias": True}, "standard+triton/fused"),
        ("mi300x", 1, {"dtype": "float32"}, "standard+triton/fused"),
        ("mi300x", 1, {"activation": Activation(gated=False)}, "standard+triton/fused"),
        ("mi300x", 1, {"no_combine": True}, "standard+triton/fused"),
        ("mi300x", 1, {"scheme": "int4_w4a16", "group_size": 32}, "standard+aiter/split"),
        ("mi355x", 1, {"scheme": "mxfp4_w4a16", "activation": Activation.swiglu_oai()}, "standard+aiter/split"),
        ("cpu", 1, {"dtype": "float64"}, "standard+reference/split"),
        ("cpu", 1, {"no_combine": True, "bias": True}, "standard+cpu/fused"),
        # LoRA hooks are inside the runner, where a fused func cannot call them.
        ("h200", 1, {"hooks": ("after_gate_up",)}, "standard+triton/split"),
        ("h200", 8, {"graph_capture": tuple(Phase)}, "deepep_ll+triton/split"),
        ("h200", 8, {"max_tokens": 4096, "hidden_size": 2304}, "deepep_normal+triton/fused"),
        # Its memory is sized by tokens.
        ("h200", 8, {"max_tokens": None}, "deepep_normal+triton/fused"),
        # Two hosts. DeepEP by phase: token-major in prefill, where Triton has a fused func, expert-major in decode.
        ("h200", 16, {}, "deepep+triton/mixed"),
        # Graphs in every phase exclude kernels whose host waits for counts.
        ("h200", 16, {"graph_capture": tuple(Phase)}, "deepep_ll+triton/split"),
        ("h200", 16, {"graph_capture": (Phase.DECODE,)}, "deepep+triton/mixed"),
        ("h200", 16, {"phases": (Phase.PREFILL,)}, "deepep+triton/fused"),
        ("h200", 16, {"phases": (Phase.DECODE,)}, "deepep+triton/split"),
        # The low-latency kernels are compiled for some hidden sizes and sized by tokens.
        ("h200", 16, {"hidden_size": 2304}, "deepep_normal+triton/fused"),
        ("h200", 16, {"max_tokens": 4096}, "deepep_normal+triton/fused"),
        ("h200", 16, {"max_tokens": 4096, "options": {"deepep": {"decode_max_tokens": 64}}}, "deepep+triton/mixed"),
        ("h200", 8, {"num_experts": 65}, "standard+triton/fused"),  # no all-to-all of ours spreads them unevenly
        ("h200", 40, {"num_experts": 80}, "deepep_ll+triton/split"),
    ],
)
def test_what_the_layer_needs_moves_the_choice(hardware: str, ep: int, changes: dict[str, Any], expected: str) -> None:
    changes = dict(changes)
    if "options" in changes:
        changes["settings"] = Settings(options=changes.pop("options"))
    changes["tokens"] = "replicated" if expected.startswith("standard+") else "sharded"
    assert chosen(hardware, changes.pop("scheme", "bf16"), ep, **changes) == expected


def test_gpus_that_do_not_reach_each_other_use_collectives() -> None:
    apart = replace(PROFILES["h200"], features=frozenset())
    found = resolve(
        LAYER, ParallelConfig(ep_size=8, tokens="sharded"), apart, registry=installed(("triton",)),
        max_tokens=128, settings=Settings(), assume=("dependencies", "targets"),
    )  # fmt: skip
    assert found.require().id == "allgather+triton/fused"
    (verdict,) = [v for v in found.verdicts if v.spec.name == "symm_mem"]
    assert [r.message for r in verdict.reasons] == [
        "the GPUs of this host do not reach each other's memory (peer access)"
    ]


@pytest.mark.parametrize("hardware", PROFILES)
def test_nobody_is_chosen_who_refuses_and_every_refusal_has_a_reason(hardware: str) -> None:
    for scheme in SCHEMES:
        for ep, tokens in ((1, "replicated"), (8, "replicated"), (8, "sharded")):
            found = ask(hardware, scheme, ep, tokens=tokens)
            usable = {v.spec.name for v in found.verdicts if v.usable}
            assert all({c.dispatcher, c.runner} <= usable for c in found.candidates)
            assert all(r.message and r.subject for r in found.reasons)
            assert len({c.id for c in found.candidates}) == len(found.candidates)


def test_what_was_never_executed_is_not_chosen_without_a_note() -> None:
    notes = "\n".join(ask("mi300x", "bf16", 8, tokens="sharded").notes)
    assert "runner 'aiter' is contract on gfx942" in notes
    assert "dispatcher 'mori' is contract on gfx942" in notes
    assert "taken for granted, not checked on this machine: dependencies, targets" in notes
    assert all("taken for granted" in note for note in ask("cpu").notes)
