"""What detection says of GPUs, without one."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from moe_core.hardware import PROFILES, detect


@pytest.mark.parametrize(
    ("count", "reached", "features"),
    [(1, True, set()), (4, True, {"peer_access"}), (4, False, set())],
)
def test_gpus_that_reach_each_others_memory(
    count: int, reached: bool, features: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    properties = SimpleNamespace(name="a GPU", major=9, minor=0, total_memory=1 << 30, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda one, other: reached or other != count - 1)
    found = detect(0)
    assert (found.arch, found.device_count, found.features) == ("sm_90", count, frozenset(features))


def test_the_named_servers_have_it() -> None:
    assert all(("peer_access" in one.features) == (one.device_type != "cpu") for one in PROFILES.values())
