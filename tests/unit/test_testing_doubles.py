"""Doubles of vendors' libraries, found through the plugins that offer them."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from moe_core.errors import ConfigError, DependencyError
from moe_core.registry import Registry
from moe_core.testing import double, fake_plugin


@contextmanager
def acme(**options: Any) -> Any:
    yield SimpleNamespace(options=options)


def registry(*offers: dict[str, str]) -> Registry:
    plugins = [fake_plugin(f"p{i}", hooks={"moe_core_doubles": lambda o=offer: o}) for i, offer in enumerate(offers)]
    return Registry(plugins, autoload=False)


def test_a_plugins_double_is_found_by_name_and_takes_its_own_arguments() -> None:
    with double("acme", registry=registry({"acme": f"{__name__}:acme"}, {}), arch="x1") as made:
        assert made.options == {"arch": "x1"}


def test_what_nobody_offers_or_two_do_is_refused() -> None:
    with pytest.raises(ConfigError, match="no plugin here offers a double 'acmee'") as refused:
        double("acmee", registry=registry({"acme": "a:b"}))
    assert "did you mean 'acme'" in str(refused.value.hint)
    with pytest.raises(ConfigError, match="several plugins offer a double 'acme': p0, p1"):
        double("acme", registry=registry({"acme": "a:b"}, {"acme": "c:d"}))


def test_a_double_that_does_not_load_names_its_plugin() -> None:
    with pytest.raises(DependencyError, match="plugin 'p0' needs 'moe_core_no_such:double'"):
        double("acme", registry=registry({"acme": "moe_core_no_such:double"}))
