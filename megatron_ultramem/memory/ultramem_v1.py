"""The UltraMem layer (arXiv 2411.12364): TDQKR retrieval over E virtual blocks of one table (implicit value expansion).

    o = sum_b W_b^T ( sum over selected rows v of block b of s_v * V[v mod n^2] ),   block of v = v // n^2

so that a table of n^2 rows is addressed through about E*n^2 virtual ones. A score of core c weights slice c of a row.

Shapes: T tokens, H hidden size, M values per token, C cores, E blocks, V value width Dv.
"""

from __future__ import annotations

from typing import Any

import torch

from megatron_ultramem.memory.kinds import blocks
from megatron_ultramem.memory.tucker_layer import TuckerLayer


class UltraMem(TuckerLayer):
    """One memory layer; see `MemoryLayer` for the arguments. Its rows are virtual ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.row_span = self.pool.virtual_rows
        self.blocks = blocks(self.config)
        self.query_proj = self._projection(self.hidden_size, self.retrieval.query_width)
        # The blocks' projections side by side: their sum is one product.
        self.value_proj = self._projection(self.blocks * self.config.value_dim, self.hidden_size)

    def output(self, x_TH: torch.Tensor, rows_TM: torch.Tensor, scores_TMC: torch.Tensor) -> torch.Tensor:
        rows_TEM, scores_TEMC = by_block(rows_TM, scores_TMC, self.pool.rows, self.blocks)
        pooled_TEV = self.table.lookup(rows_TEM.flatten(0, 1), scores_TEMC.flatten(0, 1))
        return self.value_proj(pooled_TEV.view(len(x_TH), -1))

    def physical(self, rows_TM: torch.Tensor) -> torch.Tensor:
        return rows_TM % self.pool.rows


def by_block(
    rows_TM: torch.Tensor, scores_TMC: torch.Tensor, table_rows: int, num_blocks: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Virtual rows and their scores, block by block: rows of the table [T, E, M] and scores [T, E, M, C].

    Each block's rows come first; then follow negative rows, which mean none, with scores that have no meaning.
    """
    T, M, _ = scores_TMC.shape
    block_TM = rows_TM // table_rows
    order_TM = block_TM.argsort(dim=1, stable=True)
    every_E = torch.arange(num_blocks, device=rows_TM.device)
    count_TE = (block_TM.unsqueeze(1) == every_E.unsqueeze(-1)).sum(-1)
    start_TE = count_TE.cumsum(1) - count_TE
    place_M = torch.arange(M, device=rows_TM.device)
    wanted_TEM = place_M < count_TE.unsqueeze(-1)
    from_TX = order_TM.gather(1, (start_TE.unsqueeze(-1) + place_M).clamp_max(M - 1).flatten(1))
    to_TM = block_TM * M + order_TM.argsort(dim=1) - start_TE.gather(1, block_TM)
    rows_TEM = (rows_TM % table_rows).gather(1, from_TX).view(T, num_blocks, M)
    scores_TXC: torch.Tensor = _Moved.apply(scores_TMC, from_TX, to_TM)
    return rows_TEM.masked_fill(~wanted_TEM, -1), scores_TXC.view(T, num_blocks, M, -1)


class _Moved(torch.autograd.Function):
    """Scores in other places: those of `from_TX`, and of the gradient those of `to_TM`, where each score went. Autograd
    would scatter the gradients of all places, those without a meaning too."""

    @staticmethod
    def forward(ctx: Any, scores_TMC: torch.Tensor, from_TX: torch.Tensor, to_TM: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(to_TM)
        return _gathered(scores_TMC, from_TX)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_TXC: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (to_TM,) = ctx.saved_tensors
        return _gathered(grad_TXC, to_TM), None, None


def _gathered(x_TMC: torch.Tensor, places_TX: torch.Tensor) -> torch.Tensor:
    return x_TMC.gather(1, places_TX.unsqueeze(-1).expand(-1, -1, x_TMC.shape[-1]))
