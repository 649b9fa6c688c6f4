"""Which kernels `moe-core tune` found best for a layer of `flashinfer_cutlass`: a JSON file, read when a plan is bound.

FlashInfer numbers the kernels of GEMM1 and GEMM2 in a list that belongs to its version, the device and the data types,
so an entry counts for exactly those. Nothing is timed in a forward.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_core.errors import BindError, MoeCoreError
from moe_core.protocols import Binding
from moe_core.tuning import default_store, named_store
from moe_core_flashinfer_trtllm.library import version

logger = logging.getLogger("moe_core.flashinfer_cutlass")

RUNNER, FORMAT = "flashinfer_cutlass", 1


@dataclass(frozen=True, slots=True)
class Tactics:
    """Kernel numbers by token count; a call takes those of the largest count that is not above its own."""

    tokens: tuple[int, ...] = ()
    ids: tuple[list[int], ...] = ()

    def at(self, tokens: int) -> list[int] | None:
        """[GEMM1's, GEMM2's], or None for FlashInfer's own choice."""
        if not self.tokens:
            return None
        return self.ids[max(0, bisect.bisect_right(self.tokens, tokens) - 1)]


def problem(binding: Binding, *, fused_finalize: bool) -> str:
    """All that the numbers depend on, as a key of the file."""
    config, parallel = binding.config, binding.parallel
    device = torch.cuda.get_device_name(binding.device) if binding.device.type == "cuda" else "cpu"
    said: dict[str, Any] = {
        "flashinfer": version(),
        "device": device,
        "scheme": binding.scheme.id,
        "dtype": config.dtype,
        "activation": [config.activation.name, config.activation.gated, config.activation.limit is not None],
        "experts": [config.num_experts, config.top_k, parallel.ep_size],
        "sizes": [config.hidden_size, binding.local_intermediate_size],
        "bias": config.bias,
        "fused_finalize": fused_finalize,
    }
    text = json.dumps(said, sort_keys=True)
    return f"{said['scheme']} {config.hidden_size}x{said['sizes'][1]} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def tactics(binding: Binding, *, fused_finalize: bool) -> Tactics:
    """From the file of the setting `tuning`, else this user's. Raises BindError for a named file that is unusable."""
    named = named_store(binding.request.settings, RUNNER)
    path = named if named is not None else default_store(RUNNER)
    try:
        layers = read(path)
    except MoeCoreError as error:
        if named is not None:
            raise BindError(error.message, hint=error.hint) from error
        logger.warning("%s", error)
        return Tactics()
    found = layers.get(problem(binding, fused_finalize=fused_finalize), {})
    rows = sorted((int(tokens), list(map(int, ids))) for tokens, ids in found.items())
    return Tactics(tuple(t for t, _ in rows), tuple(ids for _, ids in rows))


def read(path: Path) -> dict[str, dict[str, Sequence[int]]]:
    """The layers of a file; none where it does not exist. Raises MoeCoreError for one that is not of this runner."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise MoeCoreError(f"{str(path)!r} cannot be read: {error}", hint="delete it, or name another file") from error
    if not isinstance(content, dict) or content.get("runner") != RUNNER or content.get("format") != FORMAT:
        raise MoeCoreError(
            f"{str(path)!r} holds no tuned kernels of {RUNNER} in format {FORMAT}",
            hint="delete it, or name another file",
        )
    layers: dict[str, dict[str, Sequence[int]]] = content.get("layers", {})
    return layers


def merge(path: Path, key: str, rows: Mapping[int, Sequence[int]]) -> None:
    """Add rows (tokens -> kernel numbers) of one layer; what else the file holds stays. Replaced as a whole."""
    layers = read(path)
    layers.setdefault(key, {}).update({str(tokens): list(ids) for tokens, ids in rows.items()})
    text = json.dumps({"runner": RUNNER, "format": FORMAT, "layers": layers}, indent=1, sort_keys=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(f".{os.getpid()}.tmp")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)
