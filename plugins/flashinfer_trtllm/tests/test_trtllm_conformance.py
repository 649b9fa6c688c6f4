"""The core's conformance kit on both runners, over the doubles: what is declared works, what is not is refused."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
from trtllm_double import registry

from moe_core.registry import Registry
from moe_core.settings import Settings
from moe_core.testing import list_checks
from moe_core.testing.registration import CheckSkipped

NAME = "flashinfer_trtllm"
#: Those of the plugin itself are for the real one: importing the double imports torch.
CHECKS = [check for check in list_checks(NAME, registry=registry(), device="cpu") if check.component[:6] == "runner"]


@pytest.mark.usefixtures("double")
@pytest.mark.parametrize("check", CHECKS, ids=[check.name for check in CHECKS])
def test_runner(check: Any) -> None:
    try:
        check()
    except CheckSkipped as why:
        pytest.skip(str(why))


def test_the_plugin_itself() -> None:
    from moe_core_flashinfer_trtllm.plugin import plugin

    real = Registry(plugins=[plugin], autoload=False, settings=Settings())
    own = [check for check in list_checks(NAME, registry=real, device="cpu") if check.component[:6] == "plugin"]
    assert len(own) >= 5
    for check in own:
        with contextlib.suppress(CheckSkipped):
            check()
