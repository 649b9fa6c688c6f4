"""The doubles have the signatures, enums and layouts of the FlashInfer that is installed; skipped where none is."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
import warnings
from typing import Any

import pytest
import torch
import trtllm_double
import trtllm_double_enums
import trtllm_double_formats

import moe_core


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The real FlashInfer, whose import writes a log into its workspace."""
    before = os.environ.get("FLASHINFER_WORKSPACE_BASE")
    if importlib.util.find_spec("flashinfer") is None:
        pytest.skip("FlashInfer is not installed")
    os.environ["FLASHINFER_WORKSPACE_BASE"] = str(tmp_path_factory.mktemp("flashinfer"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module("flashinfer.fused_moe")
    finally:
        if before is None:
            os.environ.pop("FLASHINFER_WORKSPACE_BASE")
        else:
            os.environ["FLASHINFER_WORKSPACE_BASE"] = before
    return sys.modules["flashinfer"]


def _shape(function: Any) -> list[tuple[str, str, bool]]:
    """(name, kind, has a default) of each parameter."""
    parameters = inspect.signature(function).parameters.values()
    return [(p.name, str(p.kind), p.default is not p.empty) for p in parameters]


FUNCTIONS = [
    (place, name)
    for place, functions in trtllm_double.PLACES.items()
    for name, value in functions.items()
    if not isinstance(value, type)
]
#: Defaults that the plugin relies on where it leaves an argument out.
DEFAULTS = {"do_finalize": True, "tp_size": 1, "swizzled_input_sf": True, "is_sf_8x4_layout": False, "backend": None}


@pytest.mark.parametrize(("place", "name"), FUNCTIONS)
def test_every_double_has_the_signature_of_what_it_stands_for(installed: Any, place: str, name: str) -> None:
    ours = trtllm_double.PLACES[place][name]
    theirs = getattr(importlib.import_module(place), name)
    assert _shape(ours) == _shape(theirs)
    for name, default in DEFAULTS.items():
        found = inspect.signature(theirs).parameters.get(name)
        assert found is None or default is None or found.default == default


@pytest.mark.parametrize("name", sorted(trtllm_double.PLACES["flashinfer.tllm_enums"]))
def test_enums_have_these_numbers(installed: Any, name: str) -> None:
    theirs = getattr(importlib.import_module("flashinfer.tllm_enums"), name)
    for member in getattr(trtllm_double_enums, name):
        assert int(getattr(theirs, member.name)) == int(member), member


def test_every_routing_method_is_accounted_for(installed: Any) -> None:
    """A new one in FlashInfer may serve a routing of the core: look at `rules.routing_method`."""
    from test_trtllm_routing import METHODS, UNUSED

    theirs = importlib.import_module("flashinfer.tllm_enums").RoutingMethodType
    assert {member.name for member in theirs} == {*METHODS, *UNUSED}


def test_scales_of_hopper_are_folded_as_flashinfer_folds_them(installed: Any) -> None:
    scale = torch.randint(0, 256, (2, 192, 12), dtype=torch.uint8)
    folded = installed.fused_moe.interleave_moe_scales_for_sm90_mixed_gemm(scale)
    assert torch.equal(trtllm_double_formats.fold_scales(scale), folded)
    assert torch.equal(trtllm_double_formats.fold_scales(folded, back=(192, 12)), scale)


@pytest.mark.parametrize("gated", [True, False])
def test_rows_are_shuffled_as_flashinfer_shuffles_them(installed: Any, gated: bool) -> None:
    rows = torch.arange(384).unsqueeze(1)
    paired = installed.fused_moe.reorder_rows_for_gated_act_gemm(rows) if gated else rows
    shuffled = installed.shuffle_matrix_a(paired, 128).squeeze(1)
    assert torch.equal(trtllm_double_formats.shuffled_rows(384, gated=gated), shuffled)


def test_blocks_along_k_are_flashinfers(installed: Any) -> None:
    matrix = torch.randint(0, 256, (1, 64, 512), dtype=torch.uint8)
    blocks = installed.fused_moe.convert_to_block_layout(matrix[0], 128).unsqueeze(0)
    assert torch.equal(trtllm_double_formats.unblock(blocks), matrix)


def test_the_interleave_of_codes_is_undone_exactly() -> None:
    """Compared with FlashInfer's CUDA source, compiled for a CPU, on 2026-11-22: equal bit for bit."""
    codes = torch.randint(0, 256, (2, 48, 96), dtype=torch.uint8)
    there = trtllm_double_formats.interleave_e2m1(codes)
    assert not torch.equal(there, codes)
    assert torch.equal(trtllm_double_formats.interleave_e2m1(there, back=True), codes)
    # One known word: bytes 0, 4 of a row and of the row 8 below it, which hold codes 1 .. 8.
    one = torch.zeros(1, 16, 32, dtype=torch.uint8)
    one[0, 0, 0], one[0, 8, 0], one[0, 0, 4], one[0, 8, 4] = 0x21, 0x43, 0x65, 0x87
    word = trtllm_double_formats.interleave_e2m1(one)[0, 0, :4].int() @ torch.tensor([1, 256, 65536, 16777216]).int()
    assert int(word) & 0xFFFFFFFF == _word(0x87654321)


def _word(raw: int) -> int:
    """As FlashInfer's kernel moves the bits: a table of its shifts, mask by mask."""
    moves = [
        (0x80, 24), (0x70, 18), (0x8, 12), (0x7, 6), (0x8000, 13), (0x7000, 7), (0x800, 1), (0x700, -5),
        (0x800000, 2), (0x700000, -4), (0x80000, -10), (0x70000, -16), (0x80000000, -1), (0x10000000, 1),
        (0x60000000, -3), (0x8000000, -13), (0x1000000, -11), (0x6000000, -15),
    ]  # fmt: skip
    return sum((raw & mask) << shift if shift > 0 else (raw & mask) >> -shift for mask, shift in moves)


@pytest.mark.parametrize("runner", ["flashinfer_trtllm", "flashinfer_cutlass"])
@pytest.mark.parametrize("bypassed", [False, True])
def test_plans_bind_to_the_real_signatures(
    installed: Any, runner: str, bypassed: bool, double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole plans over the double, with every call checked against the signature of the installed function."""
    from moe_core_flashinfer_trtllm import cutlass, cutlass_weights, library, trtllm, trtllm_layouts, trtllm_tokens
    from moe_core_flashinfer_trtllm.plugin import CUTLASS, TRTLLM

    from moe_core.vocabulary import TOPK_BYPASSED, TOPK_STANDARD

    if bypassed and runner == "flashinfer_cutlass":
        pytest.skip("it does not route")
    checked = set()

    def bind(name: str, fixed: Any, given: Any, place: str = "flashinfer.fused_moe") -> Any:
        source = installed if place == "flashinfer" else getattr(installed, place.partition(".")[2])
        library.check_call(getattr(source, name), {*fixed, *given}, name)
        checked.add(name)
        return library.bind_call(name, fixed, given, place)

    for module in (cutlass, cutlass_weights, trtllm, trtllm_layouts, trtllm_tokens):
        monkeypatch.setattr(module, "bind_call", bind)
    spec = TRTLLM if runner == "flashinfer_trtllm" else CUTLASS
    for scheme in sorted(spec.support.schemes):
        sizes = {"group_size": 32, "intermediate_size": 256} if scheme == "int4_w4a16" else {}
        for activation in (moe_core.Activation(), moe_core.Activation.swiglu_oai()):
            if scheme == "fp8_tensor" and activation.name != "silu":
                continue
            layer = trtllm_double.config(scheme, **({"num_experts": 8, "activation": activation} | sizes))
            format_ = TOPK_BYPASSED if bypassed else TOPK_STANDARD
            trtllm_double.plan(runner, layer, trtllm_double.layer_of(layer).weights, topk_format=format_)
    assert len(checked) == (5 if runner == "flashinfer_cutlass" else 11)
