"""Which products go to the warp-specialized kernels, and with what. No GPU: the kernels are recorders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from moe_core_triton import hopper, products
from moe_core_triton.configs.config import GemmConfig
from moe_core_triton.configs.specialized import HEIGHTS
from moe_core_triton.products import Epilogue, Rows
from moe_core_triton.row_table import RowTable
from moe_core_triton.weights import Projection

from moe_core import Activation

TOKENS, TOP_K, EXPERTS, HIDDEN, INNER = 6, 2, 3, 256, 128
FP8 = torch.float8_e4m3fn
CONFIG = GemmConfig(256, 64, 4, 4, False, True, 16, specialized=True)
PACKED_CONFIG = GemmConfig(256, 128, 4, 6, True, True, 16, specialized=True)


@dataclass
class Product:
    """What `hopper.takes` is asked about."""

    rows: Rows
    w: Projection
    table: RowTable
    epilogue: Epilogue
    out: torch.Tensor

    @property
    def taken(self) -> bool:
        return hopper.takes(self.rows, self.w, self.table, self.epilogue, self.out)


@pytest.fixture(autouse=True)
def launched(monkeypatch: Any) -> list[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """A Hopper GPU with kernels that only say what they were given."""
    seen: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []

    def kernel(name: str) -> Callable[..., None]:
        return lambda *given, **named: seen.append((name, given, named))

    modules = [
        SimpleNamespace(**{name + end: kernel(name + end) for name in ("up_gemm", "down_gemm")})
        for end in ("", "_fp8", "_mxfp4")
    ]
    monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: True)
    monkeypatch.setattr(hopper, "_kernels", lambda: modules)
    return seen


def table(*, slots: bool = True, block_m: int = 128) -> RowTable:
    whole = torch.zeros(TOKENS * TOP_K, dtype=torch.int32)
    few = torch.zeros(EXPERTS, dtype=torch.int32)
    by_slot = whole if slots else None
    return RowTable(TOKENS * TOP_K, block_m, few, few, few, few, few, by_slot, by_slot)


def up(
    *, fp8: bool = False, slots: bool = True, k: int = HIDDEN, n: int = INNER, dtype: Any = torch.bfloat16
) -> Product:
    data = torch.zeros(TOKENS if slots else TOKENS * TOP_K, k, dtype=FP8 if fp8 else dtype)
    w = Projection(torch.zeros(EXPERTS, 2 * n, k, dtype=data.dtype), 2, n, k)
    epilogue, out = Epilogue(Activation(limit=7.0)), torch.zeros(TOKENS * TOP_K, n, dtype=data.dtype)
    rows = Rows(data, TOP_K if slots else 0)
    if fp8:
        w.scale, w.weight_scale = torch.zeros(EXPERTS, 2 * n // 128, k // 128), "block"
        rows = replace(rows, scale=torch.zeros(data.shape[0], k // 128), kind="group")
        epilogue = replace(epilogue, quant="group", scale=torch.zeros(TOKENS * TOP_K, n // 128))
    return Product(rows, w, table(slots=slots), epilogue, out)


def down(*, fp8: bool = False, slots: bool = True, k: int = INNER, n: int = HIDDEN, **weighing: Any) -> Product:
    data = torch.zeros(TOKENS * TOP_K, k, dtype=FP8 if fp8 else torch.bfloat16)
    w = Projection(torch.zeros(EXPERTS, n, k, dtype=data.dtype), 1, n, k)
    rows, out = Rows(data), torch.zeros(TOKENS * TOP_K, n, dtype=torch.bfloat16)
    if fp8:
        w.scale, w.weight_scale = torch.zeros(EXPERTS, n // 128, k // 128), "block"
        rows = Rows(data, 0, torch.zeros(data.shape[0], k // 128), "group")
    return Product(rows, w, table(slots=slots), Epilogue(scatter=slots, **weighing), out)


def packed_up(*, slots: bool = True, k: int = HIDDEN, n: int = INNER, dtype: Any = torch.bfloat16) -> Product:
    """Of mxfp4 weights in words, as `weights.prepare` makes them."""
    product = up(slots=slots, k=k, n=n, dtype=dtype)
    product.w = packed(2, n, k)
    product.table = table(slots=slots, block_m=64)
    return product


def packed_down(*, slots: bool = True, k: int = INNER, n: int = HIDDEN, **weighing: Any) -> Product:
    product = down(slots=slots, k=k, n=n, **weighing)
    product.rows, product.w = replace(product.rows, kind="wide"), packed(1, n, k)
    product.table = table(slots=slots, block_m=64)
    return product


def packed(parts: int, n: int, k: int) -> Projection:
    steps = -(-k // 128)
    data = torch.zeros(EXPERTS, parts * n, 64 * steps, dtype=torch.uint8)
    scale = torch.zeros(EXPERTS, parts * n, 4 * steps, dtype=torch.uint8)
    bias = torch.zeros(EXPERTS, parts * n, dtype=torch.bfloat16)
    return Projection(data, parts, n, k, scale, bias=bias, pack="mxfp4_words", group=32, pack_width=128)


BOTH = pytest.mark.parametrize("fp8", [False, True], ids=["bf16", "fp8"])
GATHERED = pytest.mark.parametrize("slots", [False, True], ids=["rows", "slots"])
PARTS = pytest.mark.parametrize("make", [up, down])
PACKED = pytest.mark.parametrize("make", [packed_up, packed_down])


@BOTH
@GATHERED
def test_what_is_taken(fp8: bool, slots: bool) -> None:
    assert up(fp8=fp8, slots=slots).taken
    assert down(fp8=fp8, slots=slots).taken
    assert down(fp8=fp8, slots=slots, weigh="out", weights=torch.ones(12)).taken
    assert down(fp8=fp8, slots=slots, weigh="scale", factor=2.0).taken
    assert up(slots=slots, dtype=torch.float16).taken


@BOTH
@PARTS
def test_another_device_tile_or_triton(monkeypatch: Any, make: Any, fp8: bool) -> None:
    product = make(fp8=fp8)
    theirs = HEIGHTS["fp8_block128" if fp8 else "bf16"]
    for block_m in (16, 32, 64, 128, 192, 256):
        assert replace(product, table=table(block_m=block_m)).taken is (block_m in theirs)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_kernels", lambda: None)
        assert not product.taken
    assert product.taken
    monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: False)
    assert not product.taken


@BOTH
@PARTS
def test_other_weights(make: Any, fp8: bool) -> None:
    def changed(**changes: Any) -> bool:
        product = make(fp8=fp8)
        for name, value in changes.items():
            setattr(product.w, name, value)
        return bool(product.taken)

    assert changed()
    assert changed(bias=torch.zeros(EXPERTS, 2 * INNER)) is not fp8
    assert not changed(pack="mxfp4")
    assert not changed(weight_scale="" if fp8 else "block")
    assert not fp8 or not changed(weight_scale="row")
    assert not changed(data=make(fp8=fp8).w.data.to(torch.int8))


@PARTS
def test_other_dtypes(make: Any) -> None:
    product = make()
    for dtype in (torch.float32, torch.int8):
        product.w.data = product.w.data.to(dtype)
        assert not replace(product, rows=replace(product.rows, data=product.rows.data.to(dtype))).taken
    product = make()
    assert not replace(product, out=product.out.float()).taken


@BOTH
@GATHERED
def test_other_epilogues(fp8: bool, slots: bool) -> None:
    def after_up(**changes: Any) -> bool:
        product = up(fp8=fp8, slots=slots)
        return replace(product, epilogue=replace(product.epilogue, **changes)).taken

    def after_down(**changes: Any) -> bool:
        product = down(fp8=fp8, slots=slots)
        return replace(product, epilogue=replace(product.epilogue, **changes)).taken

    assert not after_up(activation=None)
    assert not after_up(quant="" if fp8 else "group")
    assert not after_up(quant="expert")
    assert not after_up(weigh="in")
    assert not after_up(scatter=True)
    assert not after_down(activation=Activation())
    assert not after_down(quant="group")
    assert not after_down(weigh="in")
    assert not after_down(scatter=not slots)


@GATHERED
def test_rows_that_do_not_go_with_the_table(slots: bool) -> None:
    product = up(slots=slots)
    assert not replace(product, rows=replace(product.rows, divisor=0 if slots else TOP_K)).taken
    product = down(slots=slots)
    assert not replace(product, rows=replace(product.rows, divisor=1)).taken


@BOTH
@PARTS
def test_rows_in_an_order_that_the_weights_have_not(make: Any, fp8: bool) -> None:
    product = make(fp8=fp8)
    assert not replace(product, rows=replace(product.rows, kind="wide")).taken


@GATHERED
def test_packed_weights_are_taken(slots: bool) -> None:
    for make in (packed_up, packed_down):
        product = make(slots=slots)
        assert product.taken
        product.w.bias = None
        assert product.taken
        for block_m in (16, 32, 64, 128, 192, 256):
            theirs = block_m in HEIGHTS["mxfp4_w4a16"]
            assert replace(product, table=table(slots=slots, block_m=block_m)).taken is theirs
    assert packed_down(slots=slots, weigh="out", weights=torch.ones(12)).taken


@GATHERED
def test_packed_weights_ask_for_their_order_of_columns(slots: bool) -> None:
    """GEMM1 makes it itself, of x as it came; GEMM2 gets what GEMM1 wrote."""
    first, second = packed_up(slots=slots), packed_down(slots=slots)
    assert not replace(first, rows=replace(first.rows, kind="wide")).taken
    assert not replace(second, rows=replace(second.rows, kind="")).taken


@PACKED
def test_packed_weights_of_other_kinds(make: Any) -> None:
    for changes in ({"pack": "mxfp4"}, {"pack": "int4"}, {"group": 64}, {"pack_width": 64}):
        product = make()
        for name, value in changes.items():
            setattr(product.w, name, value)
        assert not product.taken, changes
    product = make()
    half = product.rows.data.half()
    assert not replace(product, rows=replace(product.rows, data=half), out=product.out.half()).taken
    assert not replace(product, out=product.out.float()).taken


def test_sizes_of_packed_weights() -> None:
    for make in (packed_up, packed_down):
        assert make(k=272, n=144).taken
        assert not make(k=264).taken
        assert not make(n=136).taken


def test_other_epilogues_of_packed_weights() -> None:
    for make, changes in (
        (packed_up, {"activation": None}),
        (packed_up, {"quant": "group"}),
        (packed_up, {"weigh": "in"}),
        (packed_up, {"scatter": True}),
        (packed_down, {"activation": Activation()}),
        (packed_down, {"weigh": "in"}),
        (packed_down, {"scatter": False}),
    ):
        product = make()
        assert not replace(product, epilogue=replace(product.epilogue, **changes)).taken, changes


def test_sizes() -> None:
    assert up(k=264, n=136).taken
    assert not up(k=260).taken
    assert not up(n=132).taken
    assert not down(k=100).taken
    assert not up(fp8=True, k=192).taken
    assert not up(fp8=True, n=192).taken
    assert not down(fp8=True, n=192).taken


def test_addresses_and_strides() -> None:
    product = up()
    shifted = torch.zeros(TOKENS * HIDDEN + 1, dtype=torch.bfloat16)[1:].view(TOKENS, HIDDEN)
    assert not replace(product, rows=replace(product.rows, data=shifted)).taken
    for more, taken in ((4, False), (8, True)):
        strided = torch.zeros(TOKENS, HIDDEN + more, dtype=torch.bfloat16)[:, :HIDDEN]
        assert replace(product, rows=replace(product.rows, data=strided)).taken is taken


def test_offsets_of_gathered_rows_fit_32_bits() -> None:
    for slots in (True, False):
        product, rows = up(slots=slots, k=2048), torch.empty(1 << 20, 2048, dtype=torch.bfloat16, device="meta")
        assert replace(product, rows=replace(product.rows, data=rows[1:])).taken
        assert replace(product, rows=replace(product.rows, data=rows)).taken is not slots


def test_what_is_launched(launched: Any) -> None:
    weights = torch.ones(12)
    given = [
        up(),
        up(slots=False),
        down(weigh="out", weights=weights, factor=2.0),
        down(weigh="scale", weights=weights, factor=3.0),
        down(factor=4.0),
        up(fp8=True),
        down(fp8=True, weigh="out", weights=weights, factor=2.0),
    ]
    for one in given:
        products.grouped_product(one.rows, one.w, one.table, one.out, one.epilogue, CONFIG, prefetch=False)
    names = ["up_gemm", "up_gemm", *["down_gemm"] * 3, "up_gemm_fp8", "down_gemm_fp8"]
    assert [name for name, _, _ in launched] == names
    assert all(named["group_m"] == 16 for _, _, named in launched)
    assert all(named["bias"] is None for name, _, named in launched if "fp8" not in name)
    assert [named["top_k"] for _, _, named in launched if "top_k" in named] == [TOP_K, 1, TOP_K]
    first = launched[0]
    assert (first[1][0], first[1][1], first[1][2], first[1][3]) == (
        given[0].rows.data,
        given[0].w.data,
        given[0].table,
        given[0].out,
    )
    assert (first[2]["act"], first[2]["limit"]) == ("silu", 7.0)
    # The weights only where they are asked for, and no factor where nothing is weighed.
    weighing = [(named["row_weights"] is weights, named["factor"]) for _, _, named in launched if "factor" in named]
    assert weighing == [(True, 2.0), (False, 3.0), (False, 1.0), (True, 2.0)]
    one = given[5]
    expected = (one.rows.data, one.rows.scale, one.w.data, one.w.scale, one.table, one.out, one.epilogue.scale)
    assert all(a is b for a, b in zip(launched[5][1], expected, strict=True))


def test_biases_are_launched(launched: Any) -> None:
    for make in (up, down):
        one = make()
        one.w.bias = torch.zeros(EXPERTS, one.w.data.shape[1])
        products.grouped_product(one.rows, one.w, one.table, one.out, one.epilogue, CONFIG, prefetch=False)
        assert launched[-1][2]["bias"] is one.w.bias


def test_what_is_launched_for_packed_weights(launched: Any, monkeypatch: Any) -> None:
    # The order of columns is tested below: here its kernel does not run.
    monkeypatch.setattr(hopper, "wide", lambda data: Rows(data + 1, kind="wide"))
    weights = torch.ones(12)
    first, second = packed_up(), packed_down(weigh="out", weights=weights, factor=2.0)
    for one in (first, second):
        products.grouped_product(one.rows, one.w, one.table, one.out, one.epilogue, PACKED_CONFIG, prefetch=False)
    (name, given, named), (other, after, how) = launched
    assert (name, other) == ("up_gemm_mxfp4", "down_gemm_mxfp4")
    assert torch.equal(given[0], first.rows.data + 1)
    assert all(a is b for a, b in zip(given[1:], (first.w.data, first.w.scale, first.table, first.out), strict=True))
    assert named == {
        "bias": first.w.bias,
        "top_k": TOP_K,
        "act": "silu",
        "alpha": 1.0,
        "beta": 0.0,
        "limit": 7.0,
        "group_m": 16,
    }
    expected = (second.rows.data, second.w.data, second.w.scale, second.table, second.out)
    assert all(a is b for a, b in zip(after, expected, strict=True))
    assert how == {"bias": second.w.bias, "row_weights": weights, "factor": 2.0, "group_m": 16}


@pytest.mark.parametrize("make", [down, packed_down])
def test_ordinary_kernels_refuse_another_order_of_columns(make: Any) -> None:
    one = make()
    rows = replace(one.rows, kind="wide")
    for config in (GemmConfig(64, 128, 2, 3, True, True), GemmConfig(64, 128, 4, 5, False, True)):
        with pytest.raises(ValueError, match="natural order"):
            products.grouped_product(rows, one.w, one.table, one.out, one.epilogue, config, prefetch=False)


def test_what_is_not_taken_is_an_error(monkeypatch: Any, launched: Any) -> None:
    """The sequence puts an ordinary configuration there before."""
    monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: False)
    for one in (up(), down(fp8=True), packed_up(), packed_down()):
        with pytest.raises(ValueError, match="specialized"):
            products.grouped_product(one.rows, one.w, one.table, one.out, one.epilogue, CONFIG, prefetch=False)
    assert not launched


@pytest.mark.parametrize(
    ("version", "enough"), [("3.5", False), ("3.6", True), ("3.10", True), ("4.0", True), ("none", False)]
)
def test_the_triton_that_they_are_written_for(monkeypatch: Any, version: str, enough: bool) -> None:
    monkeypatch.setattr(hopper, "triton_version", lambda: version)
    assert hopper._new_enough() is enough


def test_rows_that_overlap_are_not_read_by_a_descriptor() -> None:
    same = torch.zeros(1, HIDDEN, dtype=torch.bfloat16).expand(TOKENS * TOP_K, HIDDEN)
    assert not hopper.reads(same, gathered=False)
    assert hopper.reads(same, gathered=True)


def test_where_they_are_available(monkeypatch: Any) -> None:
    device = torch.device("cpu")
    assert hopper.available(device)
    with monkeypatch.context() as patch:
        patch.setattr(hopper, "_kernels", lambda: None)
        assert not hopper.available(device)
    monkeypatch.setattr(hopper, "is_exactly_hopper", lambda device: False)
    assert not hopper.available(device)
