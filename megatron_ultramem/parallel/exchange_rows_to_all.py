"""The exchange by rows with room for everything: every token's query goes to every rank.

Where the sizes must not depend on the rows (CUDA graphs), each rank must have room for all rows of all tokens, as if it
owned them all; and a token with many more rows than there are ranks has some on nearly every rank anyway. So nothing is
ordered by owner: a rank sends its row numbers to everyone, with the rows of others marked as none, in the places they
have. The lookup passes over those, and gradients of scores come back to where their entries lie. (Bytes:
`traffic.rows_to_all_bytes`.)

A negative row number means no row. No method waits for the device.

Legend: P ranks, T tokens a rank (after padding), M rows a token, C cores, Q = P*T queries, Dv and D widths.
"""

from __future__ import annotations

import torch

from megatron_ultramem.memory.fp8_table import Table
from megatron_ultramem.memory.lookup import LookupPath, Saved
from megatron_ultramem.memory.numerics import accumulation_dtype
from megatron_ultramem.parallel.channel import Channel, pad
from megatron_ultramem.parallel.routing import RowOwners


class RowsToAllExchange:
    """`LookupPath` over tables sharded by rows.

    Args:
        channel: to the ranks that share the rows.
        owners: who holds which row.
        inner: looks up in the rows at hand; must take padded indices.
        tokens: the largest number that a rank has.
    """

    def __init__(self, channel: Channel, owners: RowOwners, inner: LookupPath, tokens: int) -> None:
        self.channel, self.owners, self.inner, self.tokens = channel, owners, inner, tokens

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
    ) -> tuple[torch.Tensor, Saved]:
        P, tokens = self.channel.ranks, len(indices_TM)
        owner_TM, local_TM = self.owners.locate(indices_TM)
        owner_TM = pad(owner_TM.masked_fill(indices_TM < 0, P).to(torch.int32), self.tokens, P)
        every_P11 = torch.arange(P, dtype=torch.int32, device=owner_TM.device).view(P, 1, 1)
        row_PTM = pad(local_TM.to(torch.int32), self.tokens).expand(P, -1, -1).masked_fill(owner_TM != every_P11, -1)
        row_QM, query_QD, score_QMC = self.channel.even_all_to_all(
            "forward",
            [
                row_PTM.flatten(0, 1),
                self._for_all(pre_input_TD.to(values.dtype)),
                self._for_all(scores_TMC.to(values.dtype)),
            ],
        )
        partial_QV, inner = self.inner.forward(row_QM, score_QMC, query_QD, values, pre_values)
        (back_QV,) = self.channel.even_all_to_all("forward", [partial_QV])
        pooled_TV = self._summed(back_QV, tokens)
        plan = tokens, scores_TMC.dtype, pre_input_TD.dtype, inner.plan
        return pooled_TV.to(pre_input_TD.dtype), Saved((owner_TM, *inner.tensors), plan)

    def backward(
        self,
        saved: Saved,
        grad_pooled_TV: torch.Tensor,
        values: Table,
        pre_values: Table,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        (owner_TM, *inner_tensors), (tokens, scores_dtype, pre_input_dtype, inner_plan) = saved
        (grad_QV,) = self.channel.even_all_to_all("backward", [self._for_all(grad_pooled_TV.to(values.dtype))])
        score_QMC, query_QD = self.inner.backward(
            Saved(tuple(inner_tensors), inner_plan), grad_QV, values, pre_values, values_grad, pre_values_grad
        )
        query_QD, score_QMC = self.channel.even_all_to_all("backward", [query_QD, score_QMC.to(values.dtype)])
        # Every entry has its gradient from its owner; without one it gets none.
        P, C = self.channel.ranks, score_QMC.shape[2]
        score_PTMC = score_QMC.view(P, self.tokens, -1, C)
        from_1TMC = owner_TM.long().clamp_max(P - 1)[None, :, :, None].expand(1, -1, -1, C)
        score_TMC = score_PTMC.gather(0, from_1TMC)[0].masked_fill((owner_TM == P).unsqueeze(-1), 0)
        return score_TMC[:tokens].to(scores_dtype), self._summed(query_QD, tokens).to(pre_input_dtype)

    def _for_all(self, x_TX: torch.Tensor) -> torch.Tensor:
        """The same for every rank: [P*T, ...]."""
        return pad(x_TX, self.tokens).expand(self.channel.ranks, *(-1,) * x_TX.dim()).flatten(0, 1)

    def _summed(self, part_QX: torch.Tensor, tokens: int) -> torch.Tensor:
        """What came back to each token, added up over the ranks in fp32 (fp64)."""
        part_PTX = part_QX.view(self.channel.ranks, self.tokens, part_QX.shape[1])
        return part_PTX[:, :tokens].sum(0, dtype=accumulation_dtype(part_QX.dtype))
