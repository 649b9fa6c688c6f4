"""Strict doubles of vendors' libraries, as the plugins offer them: for tests on machines without the vendor's hardware.

    from moe_core.testing import double

    with double("acme", arch="x1") as acme:                    # `import acme` finds the double inside the block
        plan = moe_core.plan(config, weights, registry=Registry([acme.plugin]), runner="acme")

The core knows no backend by name, so a plugin names its doubles in the hook `moe_core_doubles`, each with a target: a
callable whose result is a context manager. Its arguments are the double's own. What it yields has the attribute
`plugin`: the same components, declared for CPUs and without the requirement of an installed library.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from moe_core import _lazy
from moe_core.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from moe_core.registry import Registry


def double(name: str, *, registry: Registry | None = None, **options: Any) -> AbstractContextManager[Any]:
    """The double `name`, installed inside a `with` block. registry: where plugins are looked for, else all installed.

    Raises ConfigError where no plugin offers it, or two do, and DependencyError where it does not load.
    """
    from moe_core.registry import default_registry

    answers = (default_registry() if registry is None else registry).call("moe_core_doubles")
    offered = [(record.name, target) for record, doubles in answers for key, target in doubles.items() if key == name]
    if len(offered) != 1:
        known = {key for _, doubles in answers for key in doubles}
        if offered:
            who = ", ".join(plugin for plugin, _ in offered)
            raise ConfigError(
                f"several plugins offer a double {name!r}: {who}", hint="name one in a registry of your own"
            )
        raise ConfigError(f"no plugin here offers a double {name!r}", hint=did_you_mean(name, known))
    plugin, target = offered[0]
    made: AbstractContextManager[Any] = _lazy.load(target, wanted_by=f"plugin {plugin!r}")(**options)
    return made
