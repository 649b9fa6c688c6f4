"""What the performance model knows of a device: a table for known products, else what the driver says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final

KIB: Final = 1024


@dataclass(frozen=True, slots=True)
class Device:
    """processors: SMs or compute units. shared_bytes: shared memory (LDS) that one program may use, which is all but a
    KiB of a processor's. l2_bytes: the last cache that all processors share. bandwidth: bytes/s that a large copy
    reaches. peak: operations/s that a large dense GEMM reaches, by "bfloat16", "float16", "float32", "fp8", "int8".
    """

    name: str
    arch: str
    processors: int
    shared_bytes: int
    l2_bytes: int
    bandwidth: float
    peak: Mapping[str, float] = field(hash=False)

    @property
    def amd(self) -> bool:
        """Compute units with 64-wide wavefronts, instead of SMs with 32-wide warps."""
        return self.arch.startswith("gfx")

    @property
    def wide(self) -> bool:
        """Whether the tensor-core instruction has 64 rows or more (wgmma, tcgen05)."""
        return self.arch.startswith(("sm_90", "sm_100", "sm_103"))

    @property
    def descriptors(self) -> bool:
        """Whether tensor descriptors are in hardware."""
        return self.arch.startswith(("sm_9", "sm_10", "sm_11", "sm_12"))

    def rate(self, math: str) -> float:
        """Operations/s for operands of this kind. A kind that the table does not name is converted to bfloat16."""
        return self.peak.get(math) or self.peak["bfloat16"]


def _peaks(bf16: float, fp8: float = 0.0, int8: float = 0.0, tf32: float = 0.0) -> dict[str, float]:
    given = {"bfloat16": bf16, "float16": bf16, "float32": tf32 or bf16 / 2, "fp8": fp8, "int8": int8}
    return {name: 1e12 * value for name, value in given.items() if value}


# H200: measured (copy 4.26 TB/s, bf16 805-791, fp8 1339-1507, int8 817 Top/s).
# The others: dense figures of the vendors' datasheets, times what the H200 was seen to reach of its own datasheet
# (4.8 TB/s, 989 and 1979 Tflop/s): 0.90 of the bandwidth, 0.80 of bf16, 0.70 of 8 bits.
#   NVIDIA H100 Tensor Core GPU Datasheet (SXM5): 3.35 TB/s, 989 / 1979; L2 50 MB, 227 KiB a block
#   NVIDIA A100 80GB PCIe and SXM datasheet: 2.039 TB/s, 312 / int8 624; L2 40 MB, 163 KiB a block
#   NVIDIA Blackwell Architecture Technical Brief, HGX B200: 8 TB/s, 2250 / 4500; L2 126 MB
#   AMD Instinct MI300X Datasheet: 5.3 TB/s, 1307 / 2615; Infinity Cache 256 MB, LDS 64 KiB
#   AMD Instinct MI355X Datasheet: 8 TB/s, 2516 / 5033; Infinity Cache 256 MB, LDS 160 KiB
_B, _F, _Q = 0.90, 0.80, 0.70
_MB: Final = 1_000_000
KNOWN: Final[tuple[tuple[str, Device], ...]] = (
    ("H200", Device("NVIDIA H200", "sm_90", 132, 227 * KIB, 60 * _MB, 4.3e12, _peaks(790, 1388, 817, 400))),
    (
        "H100",
        Device("NVIDIA H100", "sm_90", 132, 227 * KIB, 50 * _MB, _B * 3.35e12, _peaks(_F * 989, _Q * 1979, _Q * 1979)),
    ),
    ("A100", Device("NVIDIA A100", "sm_80", 108, 163 * KIB, 40 * _MB, _B * 2.039e12, _peaks(_F * 312, 0, _Q * 624))),
    (
        "B200",
        Device("NVIDIA B200", "sm_100", 148, 227 * KIB, 126 * _MB, _B * 8e12, _peaks(_F * 2250, _Q * 4500, _Q * 4500)),
    ),
    (
        "MI300X",
        Device(
            "AMD Instinct MI300X",
            "gfx942",
            304,
            64 * KIB,
            256 * _MB,
            _B * 5.3e12,
            _peaks(_F * 1307, _Q * 2615, _Q * 2615),
        ),
    ),
    (
        "MI355X",
        Device(
            "AMD Instinct MI355X",
            "gfx950",
            256,
            160 * KIB,
            256 * _MB,
            _B * 8e12,
            _peaks(_F * 2516, _Q * 5033, _Q * 5033),
        ),
    ),
)

#: The interpreter, and whatever nobody knows.
GENERIC: Final = Device("generic", "generic", 4, 227 * KIB, 32 * _MB, 1e12, _peaks(200, 400, 400))
#: Dense bf16 operations of one processor in a clock (8 bits: twice that), by the start of the architecture's name.
_PER_CLOCK: Final = {"sm_80": 2048, "sm_90": 4096, "sm_10": 8192, "gfx90a": 2048, "gfx942": 2048, "gfx950": 4096}


def known(name: str) -> Device | None:
    """The table's entry for a product, under the full name that the driver gives."""
    words = name.upper().replace("-", " ").split()
    return next((replace(device, name=name) for short, device in KNOWN if short in words or f"G{short}" in words), None)


@lru_cache(maxsize=64)
def this_device(device: Any) -> Device:
    """The `Device` of a torch.device; `GENERIC` for a CPU (the interpreter)."""
    if device.type != "cuda":
        return GENERIC
    import torch

    properties = torch.cuda.get_device_properties(device)
    hip = torch.version.hip is not None
    arch = properties.gcnArchName.split(":")[0] if hip else f"sm_{properties.major}{properties.minor}"
    return described(properties, arch)


def described(properties: Any, arch: str) -> Device:
    """From torch's device properties: the table's figures with this device's own counts, or estimates."""
    processors = properties.multi_processor_count
    found = known(properties.name)
    if found is not None and found.arch == arch:
        return replace(found, processors=processors)
    shared = getattr(properties, "shared_memory_per_block_optin", 0) or 64 * KIB
    cache = getattr(properties, "L2_cache_size", 0) or 8 * _MB
    clock = 1e3 * (getattr(properties, "clock_rate", 0) or 1_500_000)
    # Double data rate; kHz and bits.
    memory = 2e3 * getattr(properties, "memory_clock_rate", 0) * getattr(properties, "memory_bus_width", 0) / 8
    per_clock = next((ops for start, ops in _PER_CLOCK.items() if arch.startswith(start)), 1024)
    bf16 = _F * per_clock * processors * clock / 1e12
    narrow = 0.0 if arch in ("sm_80", "sm_86", "gfx90a") else 2 * bf16
    bandwidth = _B * (memory or 1e9 * 6 * processors)
    return Device(properties.name, arch, processors, shared, cache, bandwidth, _peaks(bf16, narrow, 2 * bf16))
