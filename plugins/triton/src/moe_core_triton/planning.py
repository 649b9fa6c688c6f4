"""From a number of tokens to the configuration of a call; a dictionary look-up in a forward."""

from __future__ import annotations

from moe_core.protocols import Binding
from moe_core_triton.configs.config import LayerConfig
from moe_core_triton.configs.store import bound


class Planner:
    """Configurations of one layer on one device."""

    def __init__(self, binding: Binding) -> None:
        self._configs = bound(binding)
        self._fixed: LayerConfig | None = None
        #: Whether the layer may run the warp-specialized kernels.
        self.specialized = self._configs.problem.specialized

    def __call__(self, tokens: int) -> LayerConfig:
        """The configuration for a call of `tokens` tokens."""
        return self._configs(tokens) if self._fixed is None else self._fixed

    def tiles(self, tokens: int) -> LayerConfig:
        """The same for a call that the decode path cannot take."""
        return self._configs.tiles(tokens)

    def fix(self, config: LayerConfig | None) -> None:
        """Use this configuration whatever the tokens: for tuning and tests. None: as before."""
        self._fixed = config
