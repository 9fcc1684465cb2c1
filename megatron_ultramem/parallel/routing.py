"""Which token's query goes to which rank: the bookkeeping of the exchange by rows.

A *query* is a (token, owner) pair: the token's pre-input, sent once to a rank that holds at least one of its rows. An
*entry* is one of those rows with its scores. Outgoing queries and entries lie in *slots*, ordered by owner and then by
token; a slot may be empty where sizes are static.

Legend: T tokens, M rows a token, P ranks, Q query slots, E entry slots, C cores. No method waits for the device unless
it says so, and the static ones pass no number of the host's to the device but as a kernel's argument (as `where` would
not): CUDA graphs record them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional as F

from megatron_ultramem.parallel.channel import Channel


@dataclass(frozen=True)
class RowOwners:
    """Blocks of `block_rows` rows are dealt to the ranks in turn, so that every layer's window is spread over them."""

    ranks: int
    block_rows: int

    def locate(self, rows_TM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(owner, row within the owner's shard) of rows of the pool."""
        block_TM = rows_TM // self.block_rows
        return block_TM % self.ranks, block_TM // self.ranks * self.block_rows + rows_TM % self.block_rows


@dataclass(frozen=True)
class Sizes:
    """Slots per rank: of queries and entries that go out and come in. `gaps`: some may be empty. No query that comes in
    has more than `width` entries."""

    queries_out: list[int]
    entries_out: list[int]
    queries_in: list[int]
    entries_in: list[int]
    gaps: bool
    width: int


@dataclass(frozen=True)
class Route:
    """Where the outgoing slots of one round take their contents from."""

    token_Q: torch.Tensor  # int64; T where the slot is empty
    count_Q: torch.Tensor  # int32, entries of the query; 0 where the slot is empty
    entry_E: torch.Tensor  # int64, t * M + m; T * M where the slot is empty
    sizes: Sizes


class Demand:
    """What the tokens of this rank want from every rank."""

    def __init__(self, owner_TM: torch.Tensor, ranks: int) -> None:
        """An owner equal to `ranks` stands for an entry that is not wanted."""
        self.owner_TM, self.ranks = owner_TM, ranks
        every_P = torch.arange(ranks, device=owner_TM.device)
        self.count_PT = (every_P[:, None, None] == owner_TM.T).sum(1, dtype=torch.int32)
        self.entries_P = self.count_PT.sum(1)
        # Stable: by owner, then by token. Narrow keys are sorted in fewer passes.
        keys = owner_TM.reshape(-1).to(torch.uint8 if ranks < 256 else torch.int32)
        self.order_E = keys.sort(stable=True).indices

    def dynamic(self, channel: Channel) -> Route:
        """The slots that are needed and no more; one message of sizes, and one wait for the device."""
        wanted_PT = self.count_PT > 0
        most_P = F.pad(self.count_PT, (1, 0)).amax(1)  # padded, for ranks without tokens
        out_P3 = torch.stack((wanted_PT.sum(1), self.entries_P, most_P), dim=1).to(torch.int32)
        ones = [1] * self.ranks
        (in_P3,) = channel.all_to_all("forward", [out_P3], [ones], [ones])
        queries_out, entries_out, _, queries_in, entries_in, most_in = torch.cat((out_P3, in_P3), dim=1).T.tolist()
        # Stable again: those that are wanted come first, by owner, then by token.
        pair_Q = (~wanted_PT).view(-1).to(torch.uint8).sort(stable=True).indices[: sum(queries_out)]
        return Route(
            token_Q=pair_Q % max(1, self.owner_TM.shape[0]),
            count_Q=self.count_PT.view(-1)[pair_Q],
            entry_E=self.order_E[: sum(entries_out)],
            sizes=Sizes(queries_out, entries_out, queries_in, entries_in, gaps=False, width=max(most_in)),
        )

    def static(self, query_slots: int, entry_slots: int) -> tuple[Route, torch.Tensor]:
        """The same number of slots for every rank, and what did not fit: the owners [T, M] with `ranks` for all that
        did. Queries fit in the order of tokens, each with all of its entries or not at all."""
        T, M = self.owner_TM.shape
        device = self.owner_TM.device
        wanted_PT = self.count_PT > 0
        query_number_PT = wanted_PT.cumsum(1)
        fits_PT = (query_number_PT <= query_slots) & (self.count_PT.cumsum(1) <= entry_slots)
        queries_P1 = (wanted_PT & fits_PT).sum(1, keepdim=True)
        entries_P1 = (self.count_PT * fits_PT).sum(1, keepdim=True)

        slot_PQ = torch.arange(query_slots, device=device).expand(self.ranks, -1)
        token_PQ = torch.searchsorted(query_number_PT, (slot_PQ + 1).contiguous())
        token_PQ = token_PQ.masked_fill(slot_PQ >= queries_P1, T)
        count_PT1 = torch.cat((self.count_PT, self.count_PT.new_zeros(self.ranks, 1)), dim=1)
        slot_PE = torch.arange(entry_slots, device=device).expand(self.ranks, -1)
        start_P1 = (self.entries_P.cumsum(0) - self.entries_P).unsqueeze(1)
        order_E1 = torch.cat((self.order_E, self.order_E.new_full((1,), T * M)))
        entry_PE = order_E1[(start_P1 + slot_PE).masked_fill(slot_PE >= entries_P1, T * M)]
        slots = [query_slots] * self.ranks, [entry_slots] * self.ranks
        count_PQ = count_PT1.gather(1, token_PQ)
        route = Route(
            token_PQ.view(-1), count_PQ.view(-1), entry_PE.view(-1), Sizes(*slots, *slots, gaps=True, width=M)
        )

        fits_TP1 = torch.cat((fits_PT, fits_PT.new_ones(1, T))).T  # entries that are not wanted fit
        left_TM = self.owner_TM.masked_fill(fits_TP1.gather(1, self.owner_TM), self.ranks)
        return route, left_TM


def spread(count_SQ: torch.Tensor, entry_slots: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Where entries that came in belong.

    Args:
        count_SQ: entries of the queries of S sources; each source's entries lie in a row of `entry_slots` slots, query
            after query, from its start on.
        width: M, entries that a query has at most.

    Returns:
        from_QM [S*Q, M]: the slot of the query's m-th entry, S*entry_slots where it has none;
        to_E [S*entry_slots]: place (query * M + m) of a slot's entry, S*Q*M where the slot is empty.
    """
    S, Q = count_SQ.shape
    device = count_SQ.device
    source_S1 = torch.arange(S, device=device).unsqueeze(1)
    end_SQ = count_SQ.cumsum(1)
    start_SQ = end_SQ - count_SQ
    m_M = torch.arange(width, device=device)
    from_SQM = (source_S1 * entry_slots + start_SQ).unsqueeze(-1) + m_M
    from_QM = from_SQM.masked_fill(m_M >= count_SQ.unsqueeze(-1), S * entry_slots).view(S * Q, width)

    slot_SE = torch.arange(entry_slots, device=device).expand(S, -1).contiguous()
    query_SE = torch.searchsorted(end_SQ, slot_SE, right=True)
    start_SQ1 = torch.cat((start_SQ, start_SQ.new_zeros(S, 1)), dim=1)
    place_SE = (source_S1 * Q + query_SE) * width + slot_SE - start_SQ1.gather(1, query_SE)
    return from_QM, place_SE.masked_fill(query_SE >= Q, S * Q * width).view(-1)
