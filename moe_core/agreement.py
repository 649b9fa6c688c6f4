"""Ranks compare what they resolved to before the first collective, instead of hanging in it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from moe_core.errors import RankDisagreement
from moe_core.explanation import describe_layer
from moe_core.resolution import Resolution


def summary(resolution: Resolution) -> tuple[str, str]:
    """(fingerprint, one line) of a rank. The line tells what differs when fingerprints do."""
    chosen = resolution.chosen
    versions = ", ".join(f"{name} {version}" for name, version in sorted(resolution.versions.items()))
    what = chosen.id if chosen else "nothing usable"
    return resolution.fingerprint, (
        f"{what} ({versions}) for {describe_layer(resolution.request)} on {resolution.request.hardware.product}"
    )


def verify_agreement(resolution: Resolution, group: Any) -> None:
    """Raise RankDisagreement on every rank of `group` unless all resolved alike.

    A rank for which nothing is usable takes part too, so that the others learn of it instead of waiting.
    """
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        return  # some other library's group: its dispatcher must compare (see `compare`)
    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, summary(resolution), group=group)
    compare(gathered)


def compare(summaries: list[tuple[str, str]]) -> None:
    """Raise RankDisagreement, naming the ranks in the minority and both sides, unless all fingerprints are equal."""
    counts = Counter(fingerprint for fingerprint, _ in summaries)
    if len(counts) <= 1:
        return
    # The first of the most common, so that every rank names the same ones.
    usual = max(counts, key=lambda fingerprint: (counts[fingerprint], fingerprint))
    odd = [rank for rank, (fingerprint, _) in enumerate(summaries) if fingerprint != usual]
    example = next(line for fingerprint, line in summaries if fingerprint == usual)
    lines = [f"the other ranks: {example} [{usual}]"]
    lines += [f"rank {rank}: {summaries[rank][1]} [{summaries[rank][0]}]" for rank in odd]
    raise RankDisagreement(
        f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} resolved to another plan:\n    "
        + "\n    ".join(lines),
        hint="install the same plugins and set the same settings on every rank; compare `moe-core explain` there",
    )
