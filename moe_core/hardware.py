"""What a machine is: facts as plain data, named profiles, and detection.

Detection imports torch; profiles do not, so a plan can be explained for hardware that is not present. A plugin may add
a device with the hook `moe_core_detect_hardware`.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass, field
from typing import Any, Final

from moe_core.errors import ConfigError, did_you_mean
from moe_core.vocabulary import DeviceType

GIB: Final = 1024**3


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareInfo:
    """One kind of device, as selection sees it.

    device_type: "cuda", "rocm", "cpu" or a plugin's own; arch: "sm_90", "gfx942", "x86_64", ...
    memory_bytes and compute_units (SMs, CUs or cores) are per device. features: "peer_access" (the GPUs of the host
    reach each other's memory), "nvlink", "xgmi", a CPU's flags. `present` is False for named profiles.
    """

    device_type: DeviceType
    arch: str
    product: str
    device_count: int = 1
    memory_bytes: int = 0
    compute_units: int = 0
    runtime: str | None = None
    features: frozenset[str] = field(default=frozenset())
    present: bool = False

    @property
    def torch_device_type(self) -> str:
        """The device type that torch uses for it: ROCm builds call theirs "cuda"."""
        return "cuda" if self.device_type == "rocm" else self.device_type

    def __str__(self) -> str:
        parts = [self.product, self.arch]
        if self.memory_bytes:
            parts.append(f"{self.memory_bytes / GIB:.0f} GiB")
        if self.runtime:
            parts.append(self.runtime)
        return " ".join(parts) + ("" if self.present else " (profile, not this machine)")


def _gpu(kind: DeviceType, arch: str, product: str, gib: int, units: int, *features: str) -> HardwareInfo:
    return HardwareInfo(
        device_type=kind,
        arch=arch,
        product=product,
        device_count=8,
        memory_bytes=gib * GIB,
        compute_units=units,
        features=frozenset(features),
    )


#: Vendors' published figures. `device_count` is that of the usual server.
PROFILES: Final[dict[str, HardwareInfo]] = {
    "cpu": HardwareInfo(device_type="cpu", arch="x86_64", product="generic CPU"),
    "a100": _gpu("cuda", "sm_80", "NVIDIA A100", 80, 108, "nvlink", "peer_access"),
    "h100": _gpu("cuda", "sm_90", "NVIDIA H100", 80, 132, "nvlink", "peer_access"),
    "h200": _gpu("cuda", "sm_90", "NVIDIA H200", 141, 132, "nvlink", "peer_access"),
    "b200": _gpu("cuda", "sm_100", "NVIDIA B200", 180, 148, "nvlink", "peer_access"),
    "gb200": _gpu("cuda", "sm_100", "NVIDIA GB200", 186, 148, "nvlink", "peer_access"),
    "mi300x": _gpu("rocm", "gfx942", "AMD Instinct MI300X", 192, 304, "xgmi", "peer_access"),
    "mi355x": _gpu("rocm", "gfx950", "AMD Instinct MI355X", 288, 256, "xgmi", "peer_access"),
}


def profile(name: str) -> HardwareInfo:
    """The named profile. Raises ConfigError with the known names."""
    try:
        return PROFILES[name.lower()]
    except KeyError:
        raise ConfigError(
            f"unknown hardware profile {name!r}",
            hint=did_you_mean(name.lower(), PROFILES) + f" (all: {', '.join(PROFILES)}, or 'detect')",
        ) from None


def detect(device: Any = None) -> HardwareInfo:
    """A GPU (`device`, or torch's current one) where there is one, else this CPU. Imports torch."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(device if device is not None else torch.cuda.current_device())
        hip = torch.version.hip
        if hip is not None:
            arch, kind, runtime = properties.gcnArchName.split(":")[0], "rocm", f"ROCm {hip}"
        else:
            arch, kind = f"sm_{properties.major}{properties.minor}", "cuda"
            runtime = f"CUDA {torch.version.cuda}"
        count = torch.cuda.device_count()
        reach = count > 1 and all(torch.cuda.can_device_access_peer(0, other) for other in range(1, count))
        return HardwareInfo(
            device_type=kind,
            arch=arch,
            product=properties.name,
            device_count=count,
            memory_bytes=properties.total_memory,
            compute_units=properties.multi_processor_count,
            runtime=runtime,
            features=frozenset({"peer_access"} if reach else ()),
            present=True,
        )
    return detect_cpu()


def detect_cpu() -> HardwareInfo:
    """This machine's CPU, without torch."""
    import os

    model, flags = _read_cpuinfo()
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    known = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8", "asimd", "bf16", "sve")
    return HardwareInfo(
        device_type="cpu",
        arch=platform.machine() or "unknown",
        product=model or platform.processor() or "CPU",
        memory_bytes=memory,
        compute_units=cores,
        features=frozenset(flag for flag in known if flag in flags),
        present=True,
    )


def _read_cpuinfo() -> tuple[str, frozenset[str]]:
    model, flags = "", frozenset[str]()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "model name" and not model:
                    model = value.strip()
                elif key.strip() in ("flags", "Features") and not flags:
                    flags = frozenset(value.split())
    except OSError:
        pass  # not Linux: the arch alone must do
    return model, flags
