"""Weights of the CPU runner: one matrix an expert, packed for oneDNN or left as the model stores it.

Two layouts:

* `onednn_blocked`: a copy of every expert's `w13` and `w2` in oneDNN's blocked layout. A product reads such
  a matrix as one sequential stream; plain rows of bfloat16 reach about two thirds of that rate while
  decoding. The copy does not keep the canonical tensors alive: once the model drops them, memory is back to
  one copy.
* `rows`: views of the canonical tensors, nothing is copied. As fast or faster where the plain products are good.

Gate and up stay one [2I, H] matrix. Two packed halves with oneDNN's fused swish and multiply were measured
too: slower at every size, since the extra call an expert costs more than the activation that it saves.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import os
import weakref
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from moe_core.errors import WeightError
from moe_core.runners.cpu.products import can_group
from moe_core.runners.cpu.table import Products

BLOCKED = "onednn_blocked"
ROWS = "rows"

LIVE: weakref.WeakValueDictionary[int, CpuWeights] = weakref.WeakValueDictionary()
"""handle -> weights. A compiled graph can hold neither an opaque oneDNN tensor nor a Python object, but it
can hold an int. The references are weak: the plan owns the weights. This is the one module global of the
runner."""
_next_handle = itertools.count(1)


logger = logging.getLogger(__name__)


class Stacks(NamedTuple):
    """The experts of layout `rows` as one tensor each: what `grouped_mm` takes."""

    w13: Tensor
    w2: Tensor
    bias13: Tensor | None
    bias2: Tensor | None


@dataclass(eq=False, kw_only=True)
class CpuWeights:
    """The quant info of the CPU runner; made by `prepare`.

    w13: an expert's [2I, H] rows gate; up ([I, H] without gate), w2: an expert's [H, I]; each packed or a
    view, see `layout`. bias13 [2I] or [I], bias2 [H]: in the dtype of the weights, or None. products: which
    product runs when. stacks: the same rows and biases for `grouped_mm`, or None if it cannot take them.
    """

    layout: str
    dtype: torch.dtype
    gated: bool
    num_experts: int
    hidden_size: int
    intermediate_size: int
    products: Products
    w13: tuple[Tensor, ...] = ()
    w2: tuple[Tensor, ...] = ()
    bias13: tuple[Tensor | None, ...] = ()
    bias2: tuple[Tensor | None, ...] = ()
    stacks: Stacks | None = None
    scheme: str = "bf16"
    handle: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self.handle = next(_next_handle)
        LIVE[self.handle] = self

    def __getstate__(self) -> dict[str, Any]:
        # Opaque oneDNN tensors have no storage to pickle, and their layout depends on the machine: rows
        # travel. Stacked, since each view of a shared tensor would be pickled with all of its storage.
        state = dict(self.__dict__)
        del state["handle"], state["stacks"]
        for name in ("w13", "w2"):
            state[name] = torch.stack([w.to_dense() if w.is_mkldnn else w for w in state[name]])
        for name in ("bias13", "bias2"):
            rows = [b for b in state[name] if b is not None]
            state[name] = torch.stack(rows) if rows else None
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        # The table stays, wherever it was measured: copies of a plan give the same bits.
        self.__dict__.update(state)
        if self.layout == BLOCKED and not can_pack(self.dtype):
            self.layout = ROWS
        if not can_use_onednn(self.dtype):
            self.products = replace(self.products, onednn=(False,) * len(self.products.onednn))
        self._hold(state["w13"], state["w2"], state["bias13"], state["bias2"])
        self.__post_init__()

    def _hold(self, w13: Tensor, w2: Tensor, bias13: Tensor | None, bias2: Tensor | None) -> None:
        convert = _pack if self.layout == BLOCKED else _same
        self.w13, self.w2 = tuple(convert(w) for w in w13), tuple(convert(w) for w in w2)
        none = (None,) * self.num_experts
        self.bias13 = none if bias13 is None else tuple(bias13)
        self.bias2 = none if bias2 is None else tuple(bias2)
        groups = self.layout == ROWS and any(self.products.grouped) and can_group_rows(w13, w2)
        self.stacks = Stacks(w13, w2, bias13, bias2) if groups else None


def prepare(
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
    *,
    gated: bool,
    pack: bool | Literal["auto"] = True,
) -> CpuWeights:
    """Canonical weights -> CpuWeights.

    w13 [E, 2I, H] rows gate; up ([E, I, H] if not gated), w2 [E, H, I], biases [E, 2I] (or [E, I]) and [E,
    H]; float32, bfloat16 or float16, on the CPU. pack: copy the weights into oneDNN's layout, or "auto": where a
    measurement says that it pays (see calibration.py) and the copy fits in memory. The layout is `rows` too where
    oneDNN has no packed product for the dtype (float16 on most CPUs, see `can_pack`); the result's `layout` says.
    """
    _check(w13, w2, w13_bias, w2_bias, gated)
    w13, w2 = w13.detach(), w2.detach()
    dtype, experts = w13.dtype, w13.size(0)
    packed = bool(pack) and can_pack(dtype)
    strided = w13.stride(2) != 1 or w2.stride(2) != 1
    from moe_core.runners.cpu.calibration import calibrate  # it needs this module

    size = w13.nbytes + w2.nbytes
    found = calibrate(dtype, gated, w13.size(2), w2.size(2), 0 if packed and pack != "auto" else size)
    if packed and pack == "auto" and not strided:
        packed = found.pack
    if packed:
        try:
            _check_memory(size)
        except WeightError as error:
            if pack != "auto" or strided:
                raise
            packed = False
            logger.warning("the CPU runner uses layout 'rows', not the faster 'onednn_blocked': %s", error)
    elif strided:
        raise WeightError(
            f"layout 'rows' cannot take strides {w13.stride()}, {w2.stride()}",
            hint="pass contiguous weights, or pack them (option pack_weights=True)",
        )
    # Biases are copied: they are small, and an update in place must not write into the caller's tensor.
    biases = (None if b is None else b.detach().to(dtype, copy=True) for b in (w13_bias, w2_bias))
    result = CpuWeights(
        layout=BLOCKED if packed else ROWS,
        dtype=dtype,
        gated=gated,
        num_experts=experts,
        hidden_size=w13.size(2),
        intermediate_size=w2.size(2),
        products=found.packed if packed else found.rows,
    )
    result._hold(w13, w2, *biases)
    return result


def update_in_place(
    weights: CpuWeights,
    w13: Tensor,
    w2: Tensor,
    w13_bias: Tensor | None = None,
    w2_bias: Tensor | None = None,
) -> None:
    """New values of the same shapes and dtype; every tensor keeps its address. Extra memory: one matrix."""
    _check(w13, w2, w13_bias, w2_bias, weights.gated)
    found = (w13.size(0), w13.size(2), w2.size(2), w13.dtype)
    wanted = (weights.num_experts, weights.hidden_size, weights.intermediate_size, weights.dtype)
    if found != wanted:
        raise WeightError(f"update with (E, H, I, dtype) = {found}, but the prepared weights are {wanted}")
    for old_biases, bias, name in ((weights.bias13, w13_bias, "w13_bias"), (weights.bias2, w2_bias, "w2_bias")):
        if (bias is not None) != any(b is not None for b in old_biases):
            verb = "adds" if bias is not None else "leaves out"
            raise WeightError(f"update {verb} {name}: prepare anew instead")
    with torch.no_grad():
        for old, new in ((weights.w13, w13), (weights.w2, w2)):
            for target, source in zip(old, new.detach(), strict=True):
                if target.is_mkldnn:
                    target.copy_(_pack(source))
                elif target.data_ptr() != source.data_ptr():  # else the caller wrote into the view
                    target.copy_(source)
        for old_biases, bias in ((weights.bias13, w13_bias), (weights.bias2, w2_bias)):
            if bias is not None:
                for old_bias, row in zip(old_biases, bias.detach(), strict=True):
                    if old_bias is not None:
                        old_bias.copy_(row)


def can_pack(dtype: torch.dtype) -> bool:
    """True if oneDNN has a correct product with packed weights of `dtype` on this CPU (tried once)."""
    return _try_onednn(dtype, True)


def can_use_onednn(dtype: torch.dtype) -> bool:
    """True if oneDNN's linear takes plain rows of `dtype` on this CPU (tried once)."""
    return _try_onednn(dtype, False)


@functools.cache
def _try_onednn(dtype: torch.dtype, packed: bool) -> bool:
    # The predicates alone would not notice a build without oneDNN, or an operator that changed its schema.
    try:
        mkldnn = torch.ops.mkldnn
        if dtype == torch.bfloat16 and not mkldnn._is_mkldnn_bf16_supported():
            return False
        if dtype == torch.float16 and not mkldnn._is_mkldnn_fp16_supported():
            return False
        if dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return False
        x = (torch.arange(3 * 32).reshape(3, 32) % 7 - 3).to(dtype)
        w = (torch.arange(16 * 32).reshape(16, 32) % 5 - 2).to(dtype)
        found = mkldnn._linear_pointwise.default(x, _pack(w) if packed else w, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return False
    return bool(torch.equal(found.float(), x.float() @ w.float().t()))


def _pack(weight: Tensor) -> Tensor:
    # No batch size hint: hints of 8 and more give the same layout, a hint of 1 a slower one in float32.
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.detach().contiguous())
    return packed


def _same(weight: Tensor) -> Tensor:
    return weight


def can_group_rows(w13: Tensor, w2: Tensor) -> bool:
    """True if `grouped_mm` takes these stacks: before torch 2.11 it wants pointers and rows aligned to 16 bytes."""
    aligned = all(
        w.data_ptr() % 16 == 0 and all(s * w.itemsize % 16 == 0 for s in w.stride()[:2]) and w.stride(2) == 1
        for w in (w13, w2)
    )
    return aligned and can_group(w13.dtype)


def _check(w13: Tensor, w2: Tensor, w13_bias: Tensor | None, w2_bias: Tensor | None, gated: bool) -> None:
    if w13.dim() != 3 or w2.dim() != 3:
        raise WeightError(f"w13 and w2 must be 3-dimensional, got {tuple(w13.shape)} and {tuple(w2.shape)}")
    experts, rows, hidden = w13.shape
    inner = w2.size(2)
    if tuple(w2.shape) != (experts, hidden, inner) or rows != inner * (2 if gated else 1):
        raise WeightError(
            f"shapes do not fit: w13 {tuple(w13.shape)}, w2 {tuple(w2.shape)}, gated={gated}",
            hint="canonical: w13 [E, 2I, H] (rows gate; up; [E, I, H] if not gated) and w2 [E, H, I]",
        )
    for name, bias, size in (("w13_bias", w13_bias, rows), ("w2_bias", w2_bias, hidden)):
        if bias is not None and tuple(bias.shape) != (experts, size):
            raise WeightError(f"{name} must be {(experts, size)}, got {tuple(bias.shape)}")
    known = (torch.float32, torch.bfloat16, torch.float16)
    if w13.dtype not in known or w2.dtype != w13.dtype:
        raise WeightError(f"w13 and w2 must share one dtype of {known}, got {w13.dtype} and {w2.dtype}")
    if any(t is not None and t.device.type != "cpu" for t in (w13, w2, w13_bias, w2_bias)):
        raise WeightError(f"the CPU runner needs weights on the CPU, got {w13.device} and {w2.device}")


def _check_memory(needed: int) -> None:
    available = available_bytes()
    if available is not None and needed > available:
        raise WeightError(
            f"packing needs {needed / 2**30:.2f} GiB for a second copy of the weights, "
            f"but {available / 2**30:.2f} GiB are available",
            hint="use the option pack_weights=False (layout 'rows': no copy)",
        )


def available_bytes() -> int | None:
    """Memory that can still be taken, or None if the system does not say."""
    found: list[int] = []
    try:
        # Free pages alone would count the page cache as taken, which a checkpoint just read has filled.
        with open("/proc/meminfo") as file:
            found += [int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:")]
    except OSError:
        with contextlib.suppress(AttributeError, OSError, ValueError):
            found.append(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # a container's limit; "max" is a ValueError: no limit
        with open("/sys/fs/cgroup/memory.max") as file:
            limit = int(file.read())
        with open("/sys/fs/cgroup/memory.stat") as file:
            stat = dict(line.split() for line in file)
        with open("/sys/fs/cgroup/memory.current") as file:
            used = int(file.read()) - int(stat.get("inactive_file", 0))
        found.append(limit - used)
    return min(found, default=None)
