"""The CPU runner's weights, kernel and operator against a loop over slots in float64."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_core.config import Activation
from moe_core.errors import BindError, ContractViolation, WeightError
from moe_core.protocols import HookRows, RunnerHooks
from moe_core.runners.cpu import op, weights
from moe_core.runners.cpu.kernel import experts_forward
from moe_core.runners.cpu.weights import BLOCKED, LIVE, ROWS, CpuWeights, can_pack, prepare, update_in_place

E, H, I = 6, 48, 40  # noqa: E741
SILU = Activation()
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
DTYPES = list(TOLERANCE)
GATED = [
    *(Activation(name=n) for n in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")),
    Activation(limit=0.5),
    Activation(name="gelu", limit=0.5),
    Activation.swiglu_oai(limit=0.5),
    Activation.swiglu_oai(limit=None),
]
UNGATED = [
    *(Activation(name=n, gated=False) for n in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "identity")),
    Activation(name="relu2", gated=False, limit=0.3),
]


def scalar(name: str, x: Tensor, alpha: float) -> Tensor:
    return {
        "silu": lambda: x / (1 + (-x).exp()),
        "gelu": lambda: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
        "gelu_tanh": lambda: 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
        "relu": lambda: x.clamp(min=0),
        "relu2": lambda: x.clamp(min=0) ** 2,
        "identity": lambda: x,
        "swiglu_oai": lambda: x / (1 + (-alpha * x).exp()),
    }[name]()


class Layer:
    """Random canonical weights, and the layer as a loop over slots."""

    def __init__(self, dtype: torch.dtype, gated: bool = True, bias: bool = False, seed: int = 0) -> None:
        random = torch.Generator().manual_seed(seed)

        def make(*shape: int, fan_in: int) -> Tensor:
            return (torch.randn(shape, generator=random) / fan_in**0.5).to(dtype)

        self.dtype, self.gated = dtype, gated
        rows = 2 * I if gated else I
        self.w13, self.w2 = make(E, rows, H, fan_in=H), make(E, H, I, fan_in=I)
        self.bias13 = make(E, rows, fan_in=4) if bias else None
        self.bias2 = make(E, H, fan_in=4) if bias else None

    def prepare(self, pack: bool = True) -> CpuWeights:
        return prepare(self.w13, self.w2, self.bias13, self.bias2, gated=self.gated, pack=pack)

    def slots(self, x: Tensor, ids: Tensor, act: Activation, scales: Tensor | None = None) -> Tensor:
        """[T, K, H] float64, not weighted (scales: on the input)."""
        out = torch.zeros(*ids.shape, H, dtype=torch.float64)
        for t, k in itertools.product(*map(range, ids.shape)):
            e = int(ids[t, k])
            if not 0 <= e < E:
                continue
            row = x[t].double()
            if scales is not None:
                row = (x[t].float() * scales[t, k].float()).to(self.dtype).double()
            h = self.w13[e].double() @ row
            if self.bias13 is not None:
                h = h + self.bias13[e].double()
            limit = act.limit if act.limit is not None else math.inf
            if act.gated:
                gate, up = h[:I].clamp(max=limit), h[I:].clamp(-limit, limit)
                h = scalar(act.name, gate, act.alpha) * (up + (act.beta if act.name == "swiglu_oai" else 0))
            else:
                h = scalar(act.name, h.clamp(max=limit), act.alpha)
            out[t, k] = self.w2[e].double() @ h
            if self.bias2 is not None:
                out[t, k] += self.bias2[e].double()
        return out

    def forward(self, x: Tensor, ids: Tensor, scales: Tensor | None, act: Activation = SILU) -> Tensor:
        out = self.slots(x, ids, act)
        if scales is not None:
            inside = (ids >= 0) & (ids < E)
            out = out * scales.double().where(inside, 0.0)[..., None]
        return out.sum(1)


def inputs(tokens: int, top_k: int = 2, dtype: torch.dtype = torch.float32, seed: int = 1) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, H, generator=random).to(dtype)
    ids = torch.randint(0, E, (tokens, top_k), generator=random)
    scales = torch.rand(tokens, top_k, generator=random)
    return x, ids, scales


def check(found: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == wanted.shape
    assert found.isfinite().all()
    if wanted.numel():
        error = (found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-3)
        assert error < TOLERANCE[dtype], float(error)


@pytest.mark.parametrize("pack", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_layouts_dtypes_and_sizes(tokens: int, dtype: torch.dtype, pack: bool) -> None:
    layer = Layer(dtype)
    prepared = layer.prepare(pack)
    assert prepared.layout == (BLOCKED if pack and can_pack(dtype) else ROWS)
    x, ids, scales = inputs(tokens, 3, dtype)
    check(experts_forward(x, ids, scales, prepared, SILU), layer.forward(x, ids, scales), dtype)


@pytest.mark.parametrize("act", [*GATED, *UNGATED], ids=lambda a: f"{a.name}-{a.gated}-{a.limit}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 180])
def test_activations_with_bias(act: Activation, dtype: torch.dtype, tokens: int) -> None:
    layer = Layer(dtype, act.gated, bias=True)
    x, ids, scales = inputs(tokens, 2, dtype)
    for pack in (True, False):
        found = experts_forward(x, ids, scales, layer.prepare(pack), act)
        check(found, layer.forward(x, ids, scales, act), dtype)


@pytest.mark.parametrize("tokens", [1, 6, 100])
@pytest.mark.parametrize("combine", [True, False])
def test_dropped_slots_are_exactly_zero(tokens: int, combine: bool) -> None:
    layer = Layer(torch.float32)
    x, ids, scales = inputs(tokens, 4)
    ids[:, 0] = torch.tensor([-1, E, E + 100, -7]).repeat(tokens)[:tokens]
    scales[:, 0] = math.nan
    x_nan = x
    if tokens > 1:
        ids[1], scales[1] = -1, math.nan
        x_nan = x.clone()
        x_nan[1] = math.nan  # a token without experts is not read either
    found = experts_forward(x_nan, ids, scales, layer.prepare(), SILU, combine=combine)
    assert found.isfinite().all()
    if combine:
        check(found, layer.forward(x, ids, scales), torch.float32)
    else:
        assert (found[:, 0] == 0).all()
    if tokens > 1:
        assert (found[1] == 0).all()


def test_poisoned_weights_of_unused_experts_are_not_read() -> None:
    layer = Layer(torch.float32)
    layer.w13[3], layer.w2[3] = math.nan, math.inf
    x, ids, scales = inputs(300)
    ids[ids == 3] = -1
    assert experts_forward(x, ids, scales, layer.prepare(), SILU).isfinite().all()


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_nothing_to_do(tokens: int, combine: bool) -> None:
    prepared = Layer(torch.bfloat16).prepare()
    x, ids, _ = inputs(tokens, 2, torch.bfloat16)
    found = experts_forward(x, ids.fill_(-1), None, prepared, SILU, combine=combine)
    assert found.shape == ((tokens, H) if combine else (tokens, 2, H))
    assert found.dtype == torch.bfloat16
    assert not found.any()


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("top_k", [1, 3])
@pytest.mark.parametrize("tokens", [1, 9, 300])
def test_one_expert_and_duplicates(tokens: int, top_k: int, ids_dtype: torch.dtype) -> None:
    layer = Layer(torch.float32)
    x, ids, scales = inputs(tokens, top_k)
    ids = torch.full_like(ids, 4).to(ids_dtype)
    check(experts_forward(x, ids, scales, layer.prepare(), SILU), layer.forward(x, ids, scales), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 8, 100])
def test_weights_forms_and_output_scale(tokens: int, dtype: torch.dtype) -> None:
    layer = Layer(dtype)
    prepared = layer.prepare()
    x, ids, scales = inputs(tokens, 3, dtype)
    ids[:, 1] = -1
    for form in (None, scales, scales.to(dtype)):
        plain = layer.forward(x, ids, form)
        check(experts_forward(x, ids, form, prepared, SILU), plain, dtype)
        check(experts_forward(x, ids, form, prepared, SILU, output_scale=2.5), 2.5 * plain, dtype)
        slots = layer.slots(x, ids, SILU) * (1 if form is None else form.double()[..., None]) * 2.5
        check(experts_forward(x, ids, form, prepared, SILU, output_scale=2.5, combine=False), slots, dtype)


@pytest.mark.parametrize("tokens", [1, 8, 200])
def test_router_weight_on_input(tokens: int) -> None:
    layer = Layer(torch.float32)
    x, ids, scales = inputs(tokens)
    ids[0, 0], scales[0, 0] = -1, math.nan
    found = experts_forward(x, ids, scales, layer.prepare(), SILU, router_weight_on_input=True)
    check(found, layer.slots(x, ids, SILU, scales).sum(1), torch.float32)


@pytest.mark.parametrize("tokens", [1, 64, 100])
def test_top_k_sum_is_accumulated_in_float32(tokens: int) -> None:
    """Large slots that cancel: a bfloat16 sum would lose the small one, a bfloat16 weight its last bits."""
    w13, w2 = torch.zeros(3, 2, 2), torch.zeros(3, 2, 1)
    w13[:, 0, 0] = w13[:, 1, 1] = 1.0
    w2[0], w2[1], w2[2] = 256.0, -256.0, 0.5
    prepared = prepare(w13.bfloat16(), w2.bfloat16(), gated=True)
    x = torch.ones(tokens, 2, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 2, 1]]).repeat(tokens, 1)
    scales = torch.tensor([[1.001, 1.0, 1.0]]).repeat(tokens, 1)
    found = experts_forward(x, ids, scales, prepared, Activation(name="identity"))
    assert torch.allclose(found.float(), torch.tensor(0.756), rtol=1e-2)


@pytest.mark.parametrize("tokens", [1, 5, 150])
def test_hooks_like_lora(tokens: int) -> None:
    layer = Layer(torch.float32)
    x, ids, scales = inputs(tokens, 2)
    ids[0, 1] = -1
    up, down = torch.randn(E, 2 * I, H) / 20, torch.randn(E, H)

    def after_gate_up(y: Tensor, rows: HookRows) -> None:
        assert y.shape == (rows.token_ids.numel(), 2 * I)
        assert (ids[rows.token_ids, rows.slot_ids] == rows.expert_ids).all()
        y += torch.einsum("roh,rh->ro", up[rows.expert_ids], rows.hidden_states[rows.token_ids])

    def after_down(y: Tensor, rows: HookRows) -> None:
        y += down[rows.expert_ids]

    hooks = RunnerHooks(after_gate_up, after_down)
    found = op.cpu_experts(x, ids, scales, layer.prepare(), SILU, hooks=hooks)
    layer.w13, layer.bias2 = layer.w13 + up, down
    check(found, layer.forward(x, ids, scales), torch.float32)
    empty = experts_forward(x, ids, scales, layer.prepare(), SILU, hooks=RunnerHooks())
    check(empty, layer.forward(x, ids, scales), torch.float32)


@pytest.mark.parametrize("tokens", [1, 8, 256])
def test_same_bits_every_time_and_strided_input(tokens: int) -> None:
    layer = Layer(torch.bfloat16)
    prepared = layer.prepare()
    x, ids, scales = inputs(tokens, 4, torch.bfloat16)
    first = experts_forward(x, ids, scales, prepared, SILU)
    wide = torch.cat([x, x], 1)[:, :H]
    back = ids.flip(1).contiguous().flip(1)
    for _ in range(3):
        assert torch.equal(first, experts_forward(wide, back, scales, prepared, SILU))


def test_inputs_are_not_changed_and_gradients_do_not_flow() -> None:
    layer = Layer(torch.float32)
    x, ids, scales = inputs(20)
    copies = [t.clone() for t in (x, ids, scales)]
    found = experts_forward(x.requires_grad_(), ids, scales, layer.prepare(False), Activation(limit=0.1))
    assert not found.requires_grad
    assert all(torch.equal(a, b) for a, b in zip(copies, (x, ids, scales), strict=True))


def test_wrong_input_dtype() -> None:
    x, ids, scales = inputs(2)
    with pytest.raises(ContractViolation, match=r"float32.*bfloat16"):
        experts_forward(x, ids, scales, Layer(torch.bfloat16).prepare(), SILU)


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pickle_and_copy(dtype: torch.dtype, pack: bool) -> None:
    prepared = Layer(dtype, bias=True).prepare(pack)
    x, ids, scales = inputs(30, 2, dtype)
    first = experts_forward(x, ids, scales, prepared, SILU)
    data = pickle.dumps(prepared)
    # Each value once, although views share a storage.
    assert len(data) < E * (3 * I * H + 2 * I + H) * dtype.itemsize + 8_000
    for other in (pickle.loads(data), copy.deepcopy(prepared)):
        assert other.layout == prepared.layout
        assert other.handle != prepared.handle
        assert LIVE[other.handle] is other
        assert torch.equal(first, experts_forward(x, ids, scales, other, SILU))


def test_unpickling_where_packing_is_not_possible(monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps(Layer(torch.float32).prepare())
    monkeypatch.setattr(weights, "_try_onednn", lambda dtype, packed: False)
    other = pickle.loads(data)
    assert other.layout == ROWS
    x, ids, scales = inputs(5)
    check(
        experts_forward(x, ids, scales, other, SILU),
        Layer(torch.float32).forward(x, ids, scales),
        torch.float32,
    )


@pytest.mark.parametrize("pack", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_update_in_place(dtype: torch.dtype, pack: bool) -> None:
    layer, new = Layer(dtype, bias=True), Layer(dtype, bias=True, seed=5)
    prepared = layer.prepare(pack)
    handle, tensors = prepared.handle, [*prepared.w13, *prepared.w2]
    update_in_place(prepared, new.w13, new.w2, new.bias13, new.bias2)
    assert prepared.handle == handle
    assert all(a is b for a, b in zip(tensors, [*prepared.w13, *prepared.w2], strict=True))
    x, ids, scales = inputs(10, 2, dtype)
    check(experts_forward(x, ids, scales, prepared, SILU), new.forward(x, ids, scales), dtype)
    if prepared.layout == ROWS:
        assert torch.equal(layer.w13, new.w13)  # views: the caller's own tensors
        update_in_place(prepared, layer.w13, layer.w2, new.bias13, new.bias2)
        assert torch.equal(layer.w2, new.w2)
    with pytest.raises(WeightError, match="leaves out w13_bias"):
        update_in_place(prepared, new.w13, new.w2)
    with pytest.raises(WeightError, match="prepared weights"):
        update_in_place(prepared, new.w13[1:], new.w2[1:], new.bias13[1:], new.bias2[1:])


def test_rows_share_memory_and_packed_do_not_keep_the_model_alive() -> None:
    layer = Layer(torch.float32)
    rows = layer.prepare(False)
    assert [w.data_ptr() for w in rows.w2] == [w.data_ptr() for w in layer.w2]
    packed = layer.prepare(True)
    if packed.layout == BLOCKED:
        assert all(w.is_mkldnn for w in packed.w13 + packed.w2)


def test_wrong_weights() -> None:
    w13, w2 = torch.zeros(E, 2 * I, H), torch.zeros(E, H, I)
    for args, match in (
        ((w13, w2.transpose(1, 2)), "do not fit"),
        ((w13[0], w2), "3-dimensional"),
        ((w13, w2.half()), "one dtype"),
        ((w13.double(), w2.double()), "one dtype"),
        ((w13, w2, torch.zeros(E, I)), "w13_bias"),
        ((w13, w2, None, torch.zeros(E, I)), "w2_bias"),
        ((w13.to("meta"), w2), "on the CPU"),
    ):
        with pytest.raises(WeightError, match=match):
            prepare(*args, gated=True)
    with pytest.raises(WeightError, match="do not fit"):
        prepare(w13, w2, gated=False)
    strided = torch.zeros(E, H, 2 * I).transpose(1, 2)
    with pytest.raises(WeightError, match="strides"):
        prepare(strided, w2, gated=True, pack=False)
    assert prepare(strided, w2, gated=True).num_experts == E


@pytest.mark.skipif(not can_pack(torch.float32), reason="this torch has no oneDNN")
def test_packing_that_does_not_fit_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert weights.available_bytes()
    monkeypatch.setattr(weights, "available_bytes", lambda: 2**10)
    with pytest.raises(WeightError, match=r"packing needs .* GiB(.|\n)*pack_weights=False"):
        Layer(torch.float32).prepare()
    assert Layer(torch.float32).prepare(False).layout == ROWS


def test_available_memory_without_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str | Path) -> None:
        raise OSError(path)

    monkeypatch.setattr("builtins.open", refuse)
    found = weights.available_bytes()
    assert found is None or found > 0


@pytest.mark.parametrize("combine", [True, False])
@pytest.mark.parametrize("dynamic", [True, False])
def test_compile_fullgraph(combine: bool, dynamic: bool) -> None:
    torch._dynamo.reset()
    layers = [Layer(torch.float32), Layer(torch.float32, seed=3)]
    first, second = (layer.prepare() for layer in layers)

    def model(x: Tensor, ids: Tensor, scales: Tensor) -> Tensor:
        y = op.cpu_experts(x + 1, ids, scales, first, SILU)
        return op.cpu_experts(y, ids, scales, second, Activation(limit=1.0), combine=combine) * 2

    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (4, 9):
        args = inputs(tokens)
        assert torch.equal(compiled(*args), model(*args))


@pytest.mark.parametrize("combine", [True, False])
def test_opcheck(combine: bool) -> None:
    prepared = Layer(torch.float32).prepare()
    x, ids, scales = inputs(5)
    for given in (scales, None):
        torch.library.opcheck(
            torch.ops.moe_core.cpu_experts.default,
            (x, ids, given, prepared.handle, "silu", True, 1.0, 0.0, None, False, combine, 1.0),
        )


def test_operator_after_the_weights_are_gone_and_registered_twice() -> None:
    x, ids, scales = inputs(2)
    handle = Layer(torch.float32).prepare().handle
    assert handle not in LIVE
    with pytest.raises(BindError, match="weights are gone"):
        torch.ops.moe_core.cpu_experts(x, ids, scales, handle, "silu", True, 1.0, 0.0, None, False, True, 1.0)
    op._register()
