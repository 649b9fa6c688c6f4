"""Which row goes to which rank, and where it comes back: all on the device but for the sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_core.dispatchers.torch_distributed.groups import Groups
from moe_core.dispatchers.torch_distributed.payload import as_bytes
from moe_core.protocols import Binding


@dataclass(slots=True)
class Route:
    """One call's way. Ranks are those of the group, rows sent are sorted by rank, then token.

    token: int64 [sent], the token of a row sent. place: int64 [T, most], the rows in which a token was sent, `sent`
    behind them. sent_rows, received_rows: rows for and from each rank; received_slots: their slots that live here.
    """

    token: Tensor
    place: Tensor
    sent_rows: list[int]
    received_rows: list[int]
    received_slots: int


class Router:
    """Finds the routes of calls. An expert belongs to one rank; a token is sent once to each rank that it needs."""

    def __init__(self, binding: Binding, groups: Groups) -> None:
        experts, parallel = binding.config.num_experts, binding.parallel
        self._group, self._ranks = groups.ep, parallel.ep_size
        owners = [groups.members[rank] for rank in parallel.owners(experts)]
        local = [0] * experts
        for rank in range(parallel.ep_size):
            for place, expert in enumerate(parallel.local_experts(experts, rank)):
                local[expert] = place
        # The last entry is that of a dropped slot, which -1 finds too.
        self._owner = torch.tensor([*owners, -1], device=binding.device)
        self._local = torch.tensor([*local, -1], dtype=torch.int32, device=binding.device)
        self._most = min(binding.config.top_k, parallel.ep_size)

    def find(self, ids: Tensor) -> tuple[Route, Tensor]:
        """ids [T, K], global -> (the route, int32 [sent, K]: local ids where a row goes, -1 for slots elsewhere).

        Waits for the device once: for how many rows go to and come from each rank.
        """
        tokens = ids.shape[0]
        owner = self._owner[ids.long()]
        wanted = torch.stack([(owner == rank).sum(dim=1) for rank in range(self._ranks)])  # slots [ranks, T]
        goes = wanted > 0
        mine = torch.stack([goes.sum(dim=1), wanted.sum(dim=1)], dim=1)
        theirs = torch.empty_like(mine)
        dist.all_to_all_single(theirs, mine, group=self._group)
        sizes = torch.cat([mine[:, 0], theirs[:, 0], theirs[:, 1]]).tolist()
        sent_rows, received_rows = sizes[: self._ranks], sizes[self._ranks : 2 * self._ranks]
        sent = sum(sent_rows)
        # Row of (rank, token), `sent` where it does not go. A scatter, since boolean indexing would wait again.
        flat = goes.flatten()
        row = torch.where(flat, flat.cumsum(0) - 1, sent)
        pair = torch.arange(flat.shape[0], device=ids.device)
        of_row = pair.new_zeros(sent + 1).scatter_(0, row, pair)[:sent]
        token, rank = of_row % max(tokens, 1), of_row // max(tokens, 1)
        place = row.view(self._ranks, tokens).t().sort(dim=1).values[:, : self._most]
        there = torch.where(owner[token] == rank[:, None], self._local[ids.long()][token], -1)
        return Route(token, place, sent_rows, received_rows, sum(sizes[2 * self._ranks :])), there

    def send(self, rows: Tensor, route: Route, *, back: bool = False) -> tuple[Tensor, Any]:
        """Start sending [sent, ..] (back: [received, ..]); returns what will be received, and the work."""
        out_rows, in_rows = route.sent_rows, route.received_rows
        if back:
            out_rows, in_rows = in_rows, out_rows
        received = rows.new_empty(sum(in_rows), *rows.shape[1:])
        work = dist.all_to_all_single(
            as_bytes(received), as_bytes(rows), in_rows, out_rows, group=self._group, async_op=True
        )
        return received, work


def gathered(rows: Tensor, place: Tensor) -> Tensor:
    """[T, ..]: the sum of rows[place[t, i]] over i, in float32 and in that order; places behind `rows` add nothing."""
    beyond = rows.shape[0]
    padded = torch.cat([rows, rows.new_zeros(1, *rows.shape[1:])])
    total = padded[place[:, 0].clamp(max=beyond)].float()
    for i in range(1, place.shape[1]):
        total += padded[place[:, i].clamp(max=beyond)]
    return total.to(rows.dtype)
