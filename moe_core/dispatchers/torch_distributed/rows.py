"""How many rows a rank sends: the same number on every rank, known on the host without asking anybody."""

from __future__ import annotations

from moe_core.errors import BindError, ContractViolation
from moe_core.protocols import Binding, RunningState


class RowsOfRanks:
    """Rows a rank in one call.

    `state.tokens_per_rank` says it; else the option `equal_tokens` promises that all ranks bring the same number; else
    it is the plan's max_tokens, which is always right, and moves padding.
    """

    def __init__(self, binding: Binding) -> None:
        if binding.max_tokens is None:
            raise BindError("without max_tokens nobody knows how many tokens another rank may bring")
        self._most, self._equal = binding.max_tokens, bool(binding.options.get("equal_tokens", False))
        self._rank, self._ranks = binding.parallel.ep_rank, binding.parallel.ep_size

    def __call__(self, tokens: int, state: RunningState) -> int:
        """For this rank's `tokens` of the call. Raises ContractViolation where `state.tokens_per_rank` denies them."""
        given = state.tokens_per_rank
        if given is None:
            return tokens if self._equal else self._most
        if len(given) != self._ranks or given[self._rank] != tokens:
            me = f"EP rank {self._rank} of {self._ranks} with {tokens} tokens"
            raise ContractViolation(
                f"tokens_per_rank is {list(given)}, and this is {me}",
                hint="give the number of tokens of every EP rank, in the order of ep_rank, the same on every rank",
            )
        most = max(given)
        if most > self._most:
            raise ContractViolation(
                f"tokens_per_rank is {list(given)}, but the plan was made for at most {self._most} tokens a rank"
            )
        return most
