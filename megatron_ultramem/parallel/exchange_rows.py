"""The exchange by rows: every rank holds all columns of its share of a pool's rows.

Forward: a token's pre-input goes once to every rank that owns a row it wants, with those rows' numbers and scores; each
owner pools what it has and sends one partial sum back; the partial sums are added in fp32. Backward: the same way, with
the gradient of the pooled value going out and the gradients of pre-input and scores coming back. Gradients of the rows
stay with their owner. (Reference: section "rows" of the memory-parallel traffic; bytes in `traffic.rows_bytes`.)

A negative row number means no row.

Split sizes depend on the indices: either they are exchanged first (one wait for the device), or `capacity` fixes them,
and what does not fit goes through a second round, which is skipped where it all fits everywhere (one wait). With room
for everything there is no second round and no wait, so that a CUDA graph can record it; but then `exchange_rows_to_all`
does the same with less work, where a token has one lookup.

Legend: T tokens, M rows a token, C cores, Q query slots, E entry slots (outgoing), Dv and D widths.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from megatron_ultramem.memory.fp8_table import Table
from megatron_ultramem.memory.lookup import LookupPath, Saved
from megatron_ultramem.memory.numerics import accumulation_dtype
from megatron_ultramem.parallel.channel import Channel, check_room
from megatron_ultramem.parallel.routing import Demand, Route, RowOwners, Sizes, spread
from megatron_ultramem.parallel.traffic import Capacity


class _Round(NamedTuple):
    """What one round's backward needs besides tensors."""

    sizes: Sizes
    num_tensors: int  # of all saved ones, how many belong to this round
    inner_plan: object


class _Shape(NamedTuple):
    tokens: int
    top_m: int
    num_cores: int
    pre_width: int


class RowsExchange:
    """`LookupPath` over tables sharded by rows.

    Args:
        channel: to the ranks that share the rows.
        owners: who holds which row.
        inner: looks up in the rows at hand; must take padded indices.
        capacity: None for dynamic sizes.
        trim: where sizes are dynamic, give `inner` no more places for rows than the fullest query needs. Not where
            `inner` wants the same number on several ranks.
    """

    def __init__(
        self,
        channel: Channel,
        owners: RowOwners,
        inner: LookupPath,
        capacity: Capacity | None = None,
        *,
        trim: bool = False,
    ) -> None:
        self.channel, self.owners, self.inner = channel, owners, inner
        self.capacity, self.trim = capacity, trim

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, Saved]:
        T, M, C = scores_TMC.shape
        shape = _Shape(T, M, C, pre_input_TD.shape[1])
        owner_TM, local_TM = self.owners.locate(indices_TM)
        demand = Demand(owner_TM.masked_fill(indices_TM < 0, self.channel.ranks), self.channel.ranks)
        left_TM = None
        if self.capacity is None:
            route = demand.dynamic(self.channel)
        else:
            route, left_TM = demand.static(*self.capacity.slots(shape.top_m, self.channel.ranks))
            if self.capacity.holds_all(self.channel.ranks):
                check_room(T, self.capacity.lookups)
                left_TM = None
        payload = local_TM, scores_TMC.to(values.dtype), pre_input_TD.to(values.dtype)
        pooled_TV, tensors, plan = self._forward_round(route, shape, payload, values, pre_values)
        rounds = [plan]
        if left_TM is not None and self.channel.largest((left_TM < self.channel.ranks).any().int(), "forward"):
            route = Demand(left_TM, self.channel.ranks).dynamic(self.channel)
            rest_TV, more, plan = self._forward_round(route, shape, payload, values, pre_values)
            pooled_TV, tensors, rounds = pooled_TV + rest_TV, tensors + more, [*rounds, plan]
        return pooled_TV.to(pre_input_TD.dtype), Saved(tensors, (shape, scores_TMC.dtype, pre_input_TD.dtype, rounds))

    def backward(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        values: Table,
        pre_values: Table,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        shape, scores_dtype, pre_input_dtype, rounds = saved.plan
        dtype = accumulation_dtype(values.dtype)
        device = values.device
        # With one row and one token more, for empty slots.
        grad_scores_EC = torch.zeros(shape.tokens * shape.top_m + 1, shape.num_cores, dtype=dtype, device=device)
        grad_pre_input_TD = torch.zeros(shape.tokens + 1, shape.pre_width, dtype=dtype, device=device)
        tensors = saved.tensors
        for plan in rounds:
            own, tensors = tensors[: plan.num_tensors], tensors[plan.num_tensors :]
            self._backward_round(
                Saved(own, plan),
                grad_pooled_TV.to(values.dtype),
                (values, pre_values, values_grad, pre_values_grad),
                (grad_scores_EC, grad_pre_input_TD),
            )
        grad_scores_TMC = grad_scores_EC[:-1].view(shape.tokens, shape.top_m, shape.num_cores)
        return grad_scores_TMC.to(scores_dtype), grad_pre_input_TD[:-1].to(pre_input_dtype)

    def _forward_round(
        self,
        route: Route,
        shape: _Shape,
        payload: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...], _Round]:
        """This round's part of the pooled values in fp32, and what it saves."""
        local_TM, scores_TMC, pre_input_TD = payload
        sizes = route.sizes
        count_Q, row_E, query_QD, score_EC = self.channel.all_to_all(
            "forward",
            [
                route.count_Q,
                _pick(local_TM.reshape(-1).to(torch.int32), route.entry_E, sizes.gaps),
                _pick(pre_input_TD, route.token_Q, sizes.gaps),
                _pick(scores_TMC.flatten(0, 1), route.entry_E, sizes.gaps),
            ],
            [sizes.queries_out, sizes.entries_out, sizes.queries_out, sizes.entries_out],
            [sizes.queries_in, sizes.entries_in, sizes.queries_in, sizes.entries_in],
        )
        # Without gaps between the entries of the sources they are as good as one.
        sources = self.channel.ranks if sizes.gaps else 1
        width = sizes.width if self.trim else shape.top_m
        from_QM, to_E = spread(count_Q.view(sources, len(count_Q) // sources), len(row_E) // sources, width)
        row_QM = _pick(row_E, from_QM, True, empty=-1)
        partial_QV, inner = self.inner.forward(row_QM, _pick(score_EC, from_QM, True), query_QD, values, pre_values)
        (back_QV,) = self.channel.all_to_all("forward", [partial_QV], [sizes.queries_in], [sizes.queries_out])
        pooled_TV = torch.zeros(
            shape.tokens + 1, back_QV.shape[1], dtype=accumulation_dtype(values.dtype), device=values.device
        )
        _add_by_rank(pooled_TV, route.token_Q, back_QV, sizes.queries_out)
        own = (route.token_Q, route.entry_E, to_E, *inner.tensors)
        return pooled_TV[:-1], own, _Round(sizes, len(own), inner.plan)

    def _backward_round(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        tables: tuple[Table, Table, torch.Tensor | None, torch.Tensor | None],
        totals: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Adds this round's gradients of scores and pre-inputs to `totals`, which have one place more than needed."""
        (token_Q, entry_E, to_E, *inner_tensors), plan = saved
        grad_scores_EC, grad_pre_input_TD = totals
        sizes = plan.sizes
        (grad_QV,) = self.channel.all_to_all(
            "backward", [_pick(grad_pooled_TV, token_Q, sizes.gaps)], [sizes.queries_out], [sizes.queries_in]
        )
        scores_QMC, query_QD = self.inner.backward(Saved(tuple(inner_tensors), plan.inner_plan), grad_QV, *tables)
        back_QD, back_EC = self.channel.all_to_all(
            "backward",
            [query_QD, _pick(scores_QMC.flatten(0, 1), to_E, sizes.gaps)],
            [sizes.queries_in, sizes.entries_in],
            [sizes.queries_out, sizes.entries_out],
        )
        _add_by_rank(grad_pre_input_TD, token_Q, back_QD, sizes.queries_out)
        # Every entry went to one owner, in one round; only the surplus place meets several.
        grad_scores_EC[entry_E] = back_EC.to(grad_scores_EC.dtype)


def _pick(source: torch.Tensor, at: torch.Tensor, gaps: bool, empty: int = 0) -> torch.Tensor:
    """source[at]; with `gaps` there is `empty` where `at` is one past the end."""
    if gaps:
        source = torch.cat((source, source.new_full((1, *source.shape[1:]), empty)))
    return source[at]


def _add_by_rank(total_TX: torch.Tensor, token_Q: torch.Tensor, part_QX: torch.Tensor, sizes: list[int]) -> None:
    """total[token] += part, rank after rank: a token has at most one query to a rank, so the order of sums is fixed."""
    for tokens, part in zip(token_Q.split(sizes), part_QX.split(sizes), strict=True):
        total_TX.index_add_(0, tokens, part.to(total_TX.dtype))
