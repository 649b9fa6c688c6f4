"""What uniform routing does to experts and tiles: exact expectations of the binomial distribution."""

from __future__ import annotations

import math
from functools import lru_cache


@lru_cache(maxsize=512)
def _counts(experts: int, top_k: int, tokens: int) -> tuple[tuple[int, float], ...]:
    """(tokens of one expert, probability), for all that matter (each token takes it with top_k / experts)."""
    p = min(1.0, top_k / experts)
    if p >= 1.0:
        return ((tokens, 1.0),)
    spread = 10 * math.sqrt(tokens * p * (1 - p)) + 10
    low, high = max(0, int(tokens * p - spread)), min(tokens, int(tokens * p + spread) + 1)
    log = math.lgamma(tokens + 1) - math.lgamma(low + 1) - math.lgamma(tokens - low + 1)
    probability = math.exp(log + low * math.log(p) + (tokens - low) * math.log1p(-p))
    found = []
    for n in range(low, high + 1):
        found.append((n, probability))
        probability *= (tokens - n) / (n + 1) * p / (1 - p)
    return tuple(found)


def active_experts(experts: int, top_k: int, tokens: int) -> float:
    """Expected number of experts with a token."""
    return experts * (1 - (1 - min(1.0, top_k / experts)) ** tokens)


@lru_cache(maxsize=4096)
def expected_tiles(experts: int, top_k: int, tokens: int, block_m: int) -> float:
    """Expected number of tiles of `block_m` tokens, over all experts."""
    return experts * sum(chance * -(-n // block_m) for n, chance in _counts(experts, top_k, tokens))


def padding(experts: int, top_k: int, tokens: int, block_m: int) -> float:
    """Expected rows of all tiles over real rows, less one: 0.43 means 43 % of the work for nothing."""
    rows = experts * sum(chance * n for n, chance in _counts(experts, top_k, tokens))
    return expected_tiles(experts, top_k, tokens, block_m) * block_m / rows - 1
