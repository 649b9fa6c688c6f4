"""Canonical weights: the one layout that the core hands to every plugin. Never imports torch at import time."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from moe_core.config import MoeConfig, ParallelConfig
from moe_core.errors import WeightError
from moe_core.quant import QuantScheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightRequirements:
    """Sizes that a runner wants allocated on a rank, at least as large as the layer's own.

    A runner that pads the hidden size pads the tokens itself, in its pre-permute.
    """

    hidden_size: int
    intermediate_size: int


@dataclass(slots=True, kw_only=True)
class CanonicalWeights:
    """The experts of one rank. `I` is the intermediate size a TP rank, `F` is 2 for gated layers and 1 otherwise.

    w13: [E_local, F * I, H], rows [gate; up]. w2: [E_local, H, I]. Both K-major and contiguous, in the storage dtype
    and packing of the scheme (docs/quant-schemes.md). *_scale: logical scales of the scheme. *_zero: zero points.
    *_global_scale: float32 a projection, for schemes with two levels. *_bias: float [E_local, F * I] and
    [E_local, H]; with TP only rank 0 may carry w2_bias, since partial results are summed. *_input_scale: static
    activation scales of GEMM1 and GEMM2, float32 [E_local].
    """

    w13: Tensor
    w2: Tensor
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_zero: Tensor | None = None
    w2_zero: Tensor | None = None
    w13_global_scale: Tensor | None = None
    w2_global_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None

    def __getstate__(self) -> dict[str, tuple[Tensor, str]]:
        import torch

        # torch cannot load a pickled float8 tensor; its bytes it can.
        def plain(tensor: Tensor) -> Tensor:
            return tensor.view(torch.uint8) if "float8" in str(tensor.dtype) else tensor

        return {name: (plain(t), str(t.dtype).removeprefix("torch.")) for name, t in self.tensors().items()}

    def __setstate__(self, state: dict[str, tuple[Tensor, str]]) -> None:
        for f in fields(self):
            tensor, dtype = state.get(f.name, (None, ""))
            setattr(self, f.name, None if tensor is None else tensor.view(torch_dtype(dtype)))

    def detach(self) -> CanonicalWeights:
        """The same tensors without gradients."""
        return CanonicalWeights(**{name: tensor.detach() for name, tensor in self.tensors().items()})

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.w13.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to(self, device: torch.device | str) -> CanonicalWeights:
        """A copy on `device`."""
        return CanonicalWeights(**{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def validate(
        self,
        config: MoeConfig,
        parallel: ParallelConfig,
        scheme: QuantScheme,
        sizes: WeightRequirements | None = None,
    ) -> None:
        """Raise WeightError, naming every problem, unless these are the weights of this rank of this layer.

        sizes: what a runner asked to pad to, where they were allocated so.
        """
        import torch

        experts = len(parallel.local_experts(config.num_experts))
        inner, hidden = config.intermediate_size // parallel.tp_size, config.hidden_size
        if sizes is not None:
            inner, hidden = sizes.intermediate_size, sizes.hidden_size
        rows = config.gate_up_factor * inner
        storage = config.dtype if scheme.scale is None else scheme.storage_dtype
        problems: list[str] = []

        def check(name: str, shape: tuple[int, ...], dtypes: tuple[str, ...], why: str = "") -> None:
            tensor = getattr(self, name)
            if tensor is None:
                problems.append(f"{name} is missing: expected shape {shape} of {' or '.join(dtypes)}{why}")
                return
            if tuple(tensor.shape) != shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}{why}")
            if dtypes and str(tensor.dtype).removeprefix("torch.") not in dtypes:
                problems.append(f"{name} is {tensor.dtype}, expected {' or '.join(dtypes)}")

        matrices = {"w13": (rows, hidden), "w2": (hidden, inner)}
        for name, (n, k) in matrices.items():
            check(name, (experts, *scheme.storage_shape(n, k)), (storage,))
            if scheme.scale is not None:
                self._check_scales(name, scheme, n, k, config, experts, problems)
        if config.bias:
            floats = ("bfloat16", "float16", "float32", "float64")
            check("w13_bias", (experts, rows), floats, " (MoeConfig.bias is set)")
            if parallel.tp_rank == 0:
                check("w2_bias", (experts, hidden), floats, " (MoeConfig.bias is set)")
            if parallel.tp_rank > 0 and self.w2_bias is not None:
                problems.append(
                    "w2_bias was given on a TP rank above 0: partial results are summed, it would count twice"
                )
        elif self.w13_bias is not None or self.w2_bias is not None:
            problems.append("biases were given, but MoeConfig.bias is False")
        for name in ("w13_input_scale", "w2_input_scale"):
            tensor = getattr(self, name)
            if tensor is not None and not scheme.static_activation:
                problems.append(f"{name} was given, but scheme {scheme.id!r} has no static activation scales")
            elif tensor is not None and tuple(tensor.shape) not in ((experts,), (experts, 1)):
                problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {(experts,)}")
        for name, tensor in self.tensors().items():
            if tensor.device != self.device:
                problems.append(f"{name} is on {tensor.device}, but w13 is on {self.device}")
            if tensor.layout is torch.strided and not tensor.is_contiguous() and not any(name in p for p in problems):
                problems.append(f"{name} is not contiguous (strides {tensor.stride()}); call .contiguous()")
        if problems:
            raise WeightError(
                f"these are not the weights of rank ep {parallel.ep_rank}/{parallel.ep_size}, "
                f"tp {parallel.tp_rank}/{parallel.tp_size} in scheme {config.scheme!r}:\n    "
                + "\n    ".join(problems),
                hint="w13 is [experts, gate rows then up rows, hidden], w2 is [experts, hidden, intermediate]; "
                "CanonicalWeights.shard() takes a rank's part of a whole model's weights",
            )

    def _check_scales(
        self,
        name: str,
        scheme: QuantScheme,
        n: int,
        k: int,
        config: MoeConfig,
        experts: int,
        problems: list[str],
    ) -> None:
        scale = getattr(self, f"{name}_scale")
        parts = 2 if name == "w13" and config.activation.gated else 1
        shapes = [scheme.scale_shape(n, k, config.group_size, parts=p) for p in {1, parts}]
        expected = {(experts, *shape) for shape in shapes if shape is not None}
        if any(shape[-1:] == (1,) and len(shape) == 2 for shape in expected):
            expected.add((experts,))  # one scale an expert may be written without the trailing 1
        if scale is None:
            problems.append(f"{name}_scale is missing: scheme {scheme.id!r} needs {sorted(expected)}")
        elif tuple(scale.shape) not in expected:
            problems.append(f"{name}_scale has shape {tuple(scale.shape)}, expected {sorted(expected)}")
        if scale is not None and scheme.scale is not None:
            dtype = str(scale.dtype).removeprefix("torch.")
            if not dtype.startswith((scheme.scale.storage_dtype, scheme.scale.dtype)):
                problems.append(f"{name}_scale is {scale.dtype}, expected {scheme.scale.storage_dtype}")
        two_level = getattr(self, f"{name}_global_scale")
        if scheme.global_scale and two_level is None:
            problems.append(f"{name}_global_scale is missing: scheme {scheme.id!r} has two levels of scales")
        elif two_level is not None and tuple(two_level.shape) not in ((experts,), (experts, 1), (experts, parts)):
            problems.append(f"{name}_global_scale has shape {tuple(two_level.shape)}, expected {(experts, parts)}")
        zero = getattr(self, f"{name}_zero")
        if zero is not None and not scheme.zero_points:
            problems.append(f"{name}_zero was given, but scheme {scheme.id!r} has no zero points")
        elif zero is not None and scale is not None and tuple(zero.shape) != tuple(scale.shape):
            problems.append(f"{name}_zero has shape {tuple(zero.shape)}, expected {tuple(scale.shape)}")

    def shard(self, config: MoeConfig, parallel: ParallelConfig, scheme: QuantScheme | None = None) -> CanonicalWeights:
        """This rank's part of a whole model's weights: its experts, and its slice of the intermediate size.

        Raises WeightError where a TP slice would cut through a scale block or a packed item.
        """
        from moe_core._shard import shard

        return shard(self, config, parallel, scheme)

    @classmethod
    def quantize(
        cls,
        w13: Tensor,
        w2: Tensor,
        config: MoeConfig,
        *,
        w13_bias: Tensor | None = None,
        w2_bias: Tensor | None = None,
        zero_points: bool = False,
    ) -> CanonicalWeights:
        """Float weights w13 [E, F * I, H] and w2 [E, H, I] in `config.scheme`, by the reference codec."""
        from moe_core.quant import builtin_scheme, quantize

        scheme = builtin_scheme(config.scheme)
        if scheme.scale is None:
            dtype = torch_dtype(config.dtype)
            return cls(w13=w13.to(dtype), w2=w2.to(dtype), w13_bias=w13_bias, w2_bias=w2_bias)
        q13 = quantize(w13, scheme, group_size=config.group_size, zero_points=zero_points)
        q2 = quantize(w2, scheme, group_size=config.group_size, zero_points=zero_points)
        return cls(
            w13=q13.data,
            w13_scale=q13.scale,
            w13_zero=q13.zero,
            w13_global_scale=q13.global_scale,
            w2=q2.data,
            w2_scale=q2.scale,
            w2_zero=q2.zero,
            w2_global_scale=q2.global_scale,
            w13_bias=w13_bias,
            w2_bias=w2_bias,
        )


def canonical_gate_up(weight: Tensor, *, interleaved: bool = False, transposed: bool = False) -> Tensor:
    """A checkpoint's gate/up projection (or its bias) as canonical rows [gate; up].

    weight: [E, 2I, H] ([E, H, 2I] if `transposed`; a bias is [E, 2I]). interleaved: rows are gate0, up0, gate1, ...
    Returns a contiguous tensor; the input itself where nothing has to move.
    """
    import torch

    result = weight.transpose(-1, -2) if transposed else weight
    if interleaved:
        axis = 1
        if result.shape[axis] % 2:
            raise WeightError(f"interleaved gate/up rows must be even in number, got shape {tuple(weight.shape)}")
        even = torch.arange(0, result.shape[axis], 2, device=weight.device)
        result = result.index_select(axis, torch.cat([even, even + 1]))
    return result.contiguous()


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name such as "bfloat16"."""
    import torch

    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise WeightError(f"{name!r} is not a torch dtype")
    return dtype
