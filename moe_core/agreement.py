"""Ranks compare what they resolved to before the first collective, instead of hanging in it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar, cast

from moe_core.errors import MoeCoreError, RankDisagreement
from moe_core.explanation import describe_layer
from moe_core.resolution import Resolution

T = TypeVar("T")


def summary(resolution: Resolution) -> tuple[str, str, tuple[int, int]]:
    """(fingerprint, one line, (ep_rank, tp_rank)) of a rank. The line tells what differs when fingerprints do."""
    chosen = resolution.chosen
    versions = ", ".join(f"{name} {version}" for name, version in sorted(resolution.versions.items()))
    what = chosen.id if chosen else "nothing usable"
    return (
        resolution.fingerprint,
        (f"{what} ({versions}) for {describe_layer(resolution.request)} on {resolution.request.hardware.product}"),
        (resolution.request.parallel.ep_rank, resolution.request.parallel.tp_rank),
    )


def verify_agreement(resolution: Resolution, group: Any) -> None:
    """Raise RankDisagreement on every rank of `group` unless all resolved alike.

    A rank for which nothing is usable takes part too, so that the others learn of it instead of waiting.
    """
    import torch.distributed as dist

    if not isinstance(group, dist.ProcessGroup):
        return  # some other library's group: its dispatcher must compare (see `compare`)
    compare([row for row in _gather(summary(resolution), group) if row is not None])


def everywhere(group: Any, work: Callable[[], T]) -> T:
    """`work()`, whose failure on one rank of `group` is an error on every rank, not a hang in the next collective."""
    import torch.distributed as dist

    if not dist.is_available() or not isinstance(group, dist.ProcessGroup):
        return work()
    result: T | None = None
    failure: Exception | None = None
    try:
        result = work()
    except Exception as error:  # whatever it is: the others would wait for this rank
        failure = error
    text = None if failure is None else str(failure)
    if failure is not None and not isinstance(failure, MoeCoreError):
        text = f"{type(failure).__name__}: {failure}"
    texts = _gather(text, group)
    if failure is not None:
        raise failure
    failed = [(rank, text) for rank, text in enumerate(texts) if text is not None]
    if failed:
        rank, text = failed[0]
        raise RankDisagreement(
            f"rank{'s' if len(failed) > 1 else ''} {', '.join(str(r) for r, _ in failed)} could not make this plan; "
            f"rank {rank} says:\n    " + text.replace("\n", "\n    ")
        )
    return cast(T, result)


def _gather(value: Any, group: Any) -> list[Any]:
    import torch.distributed as dist

    gathered: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(gathered, value, group=group)
    return gathered


def compare(summaries: list[tuple[str, str, tuple[int, int]]]) -> None:
    """Raise RankDisagreement, naming the ranks in the minority and both sides, unless all fingerprints are equal.

    Two ranks of a group with the same place in the layer disagree as well: experts would count twice.
    """
    counts = Counter(fingerprint for fingerprint, _, _ in summaries)
    if len(counts) <= 1:
        for place, number in Counter(place for _, _, place in summaries).items():
            if number > 1:
                same = [str(rank) for rank, row in enumerate(summaries) if row[2] == place]
                raise RankDisagreement(
                    f"ranks {', '.join(same)} all say that they are ep_rank {place[0]}, tp_rank {place[1]}",
                    hint="give each rank of the group its own ParallelConfig(ep_rank=..., tp_rank=...)",
                )
        return
    # The first of the most common, so that every rank names the same ones.
    usual = max(counts, key=lambda fingerprint: (counts[fingerprint], fingerprint))
    odd = [rank for rank, (fingerprint, _, _) in enumerate(summaries) if fingerprint != usual]
    example = next(line for fingerprint, line, _ in summaries if fingerprint == usual)
    lines = [f"the other ranks: {example} [{usual}]"]
    lines += [f"rank {rank}: {summaries[rank][1]} [{summaries[rank][0]}]" for rank in odd]
    raise RankDisagreement(
        f"rank{'s' if len(odd) > 1 else ''} {', '.join(map(str, odd))} resolved to another plan:\n    "
        + "\n    ".join(lines),
        hint="install the same plugins and set the same settings on every rank; compare `moe-core explain` there",
    )
