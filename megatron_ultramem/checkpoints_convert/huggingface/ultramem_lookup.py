"""Value tables and the lookup in them.

    pooled (block b, slice c) = sum_m act(<x', P[row_m]>) * s_{m,b,c} * V[row_m, slice c]

UltraMemV2 (arXiv 2508.18756, equation 15) has one block; UltraMem v1 gives a row's score to the virtual block that it
was found in. Kinds without pre-values P have 1 in the place of act().

Shapes: T tokens, M rows per token, B blocks, C cores, V width of a value, D of a pre-value, W = V / C; t tokens of a
chunk.
"""

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .ultramem_common import accumulation_dtype, chunks, fused_kernels


class UltraMemValuePool(nn.Module):
    """Tables that layers share: parameters `values` [rows, V] and, for some kinds, `pre_values` [rows, D].

    It is always called, never read from outside, so that hooks which place or fetch its parameters work.
    """

    def __init__(self, rows: int, value_dim: int, pre_value_dim: int, activation: str, kernels: str) -> None:
        """`pre_value_dim` 0: no pre-values. `activation`: none or gelu, of their dot products."""
        super().__init__()
        self.activation, self.kernels = activation, kernels
        self.values = nn.Parameter(torch.empty(rows, value_dim))
        self.pre_values = nn.Parameter(torch.empty(rows, pre_value_dim)) if pre_value_dim else None

    def forward(
        self, rows_TM: torch.Tensor, scores_TMBC: torch.Tensor, pre_input_TD: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Pooled values [T, B*V] in the dtype of the tables."""
        with torch.autocast(self.values.device.type, enabled=False):
            if kernels := fused_kernels(self.kernels, self.values):
                return self._fused(kernels, rows_TM, scores_TMBC, pre_input_TD)
            return _Lookup.apply(rows_TM, scores_TMBC, pre_input_TD, self.values, self.pre_values, self.activation)

    def _fused(
        self,
        kernels: ModuleType,
        rows_TM: torch.Tensor,
        scores_TMBC: torch.Tensor,
        pre_input_TD: torch.Tensor | None,
    ) -> torch.Tensor:
        deterministic = torch.are_deterministic_algorithms_enabled()
        if pre_input_TD is not None:
            return kernels.lookup(
                rows_TM,
                scores_TMBC.squeeze(2),
                pre_input_TD.to(self.values.dtype),
                self.values,
                self.pre_values,
                activation=self.activation,
                deterministic=deterministic,
            )
        blocks = [
            kernels.weighted_sum(rows_TM, scores_TMC, self.values, deterministic=deterministic)
            for scores_TMC in scores_TMBC.unbind(2)
        ]
        return torch.cat(blocks, dim=1)


class _Lookup(torch.autograd.Function):
    """In chunks of tokens; the backward allocates one dense gradient per table, not one per chunk."""

    @staticmethod
    def forward(
        ctx: Any,
        rows_TM: torch.Tensor,
        scores_TMBC: torch.Tensor,
        pre_input_TD: torch.Tensor | None,
        values: torch.Tensor,
        pre_values: torch.Tensor | None,
        activation: str,
    ) -> torch.Tensor:
        ctx.save_for_backward(rows_TM, scores_TMBC, pre_input_TD, values, pre_values)
        ctx.activation = activation
        T, _, B, C = scores_TMBC.shape
        pooled_TV = torch.empty(T, B * values.shape[1], dtype=values.dtype, device=values.device)
        for part in _parts(rows_TM, values, pre_values):
            weights_tMBC = scores_TMBC[part].to(accumulation_dtype(values.dtype))
            if pre_values is not None and pre_input_TD is not None:
                dots_tM = _dots(_rows(pre_values, rows_TM[part]), pre_input_TD[part])
                weights_tMBC = _activate(dots_tM, activation)[..., None, None] * weights_tMBC
            rows_tMCW = _rows(values, rows_TM[part]).unflatten(-1, (C, -1))
            pooled_TV[part] = torch.einsum("tmbc,tmcw->tbcw", weights_tMBC, rows_tMCW).flatten(1)
        return pooled_TV

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_pooled_TV: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows_TM, scores_TMBC, pre_input_TD, values, pre_values = ctx.saved_tensors
        dtype = accumulation_dtype(values.dtype)
        _, _, B, C = scores_TMBC.shape
        grad_scores_TMBC = torch.empty_like(scores_TMBC)
        grad_pre_input_TD = None if pre_input_TD is None else torch.empty_like(pre_input_TD)
        grad_values, grad_pre_values = (
            torch.zeros_like(table, dtype=dtype) if wanted else None
            for table, wanted in zip((values, pre_values), ctx.needs_input_grad[3:5], strict=True)
        )
        for part in _parts(rows_TM, values, pre_values):
            weights_tMBC = scores_tMBC = scores_TMBC[part].to(dtype)
            grad_tBCW = grad_pooled_TV[part].to(dtype).unflatten(-1, (B, C, -1))
            rows_tMCW = _rows(values, rows_TM[part]).unflatten(-1, (C, -1))
            along_tMBC = torch.einsum("tbcw,tmcw->tmbc", grad_tBCW, rows_tMCW)
            if pre_values is not None and grad_pre_input_TD is not None:
                pre_input_tD, pre_rows_tMD = pre_input_TD[part].to(dtype), _rows(pre_values, rows_TM[part])
                dots_tM = _dots(pre_rows_tMD, pre_input_tD)
                grad_dots_tM = (scores_tMBC * along_tMBC).sum((-2, -1)) * _slope(dots_tM, ctx.activation)
                grad_pre_input_TD[part] = torch.einsum("tm,tmd->td", grad_dots_tM, pre_rows_tMD)
                if grad_pre_values is not None:
                    _add_rows(grad_pre_values, rows_TM[part], grad_dots_tM.unsqueeze(-1) * pre_input_tD.unsqueeze(1))
                active_tM11 = _activate(dots_tM, ctx.activation)[..., None, None]
                weights_tMBC, along_tMBC = active_tM11 * scores_tMBC, active_tM11 * along_tMBC
            grad_scores_TMBC[part] = along_tMBC
            if grad_values is not None:
                grad_rows_tMCW = torch.einsum("tmbc,tbcw->tmcw", weights_tMBC, grad_tBCW)
                _add_rows(grad_values, rows_TM[part], grad_rows_tMCW.flatten(2))
        tables = (None if grad is None else grad.to(values.dtype) for grad in (grad_values, grad_pre_values))
        return None, grad_scores_TMBC, grad_pre_input_TD, *tables, None


def _parts(rows_TM: torch.Tensor, values: torch.Tensor, pre_values: torch.Tensor | None) -> Iterator[slice]:
    T, M = rows_TM.shape
    widths = values.shape[1] + (0 if pre_values is None else pre_values.shape[1])
    return chunks(T, 2 * M * widths, values.device)


def _rows(table: torch.Tensor, rows_tM: torch.Tensor) -> torch.Tensor:
    """Rows [t, M, width] in the accumulation dtype."""
    rows = table.index_select(0, rows_tM.reshape(-1)).to(accumulation_dtype(table.dtype))
    return rows.view(*rows_tM.shape, table.shape[1])


def _add_rows(table: torch.Tensor, rows_tM: torch.Tensor, rows_tMW: torch.Tensor) -> None:
    indices, rows = rows_tM.reshape(-1), rows_tMW.flatten(0, 1)
    if table.is_cuda and torch.are_deterministic_algorithms_enabled():
        table.index_put_((indices,), rows, accumulate=True)  # sorts the indices; index_add_ would use atomics
    else:
        table.index_add_(0, indices, rows)


def _dots(rows_tMD: torch.Tensor, pre_input_tD: torch.Tensor) -> torch.Tensor:
    return torch.einsum("tmd,td->tm", rows_tMD, pre_input_tD.to(rows_tMD.dtype))


def _activate(dots_tM: torch.Tensor, activation: str) -> torch.Tensor:
    return F.gelu(dots_tM) if activation == "gelu" else dots_tM


def _slope(dots_tM: torch.Tensor, activation: str) -> torch.Tensor:
    """Derivative of `_activate`."""
    if activation == "none":
        return torch.ones_like(dots_tM)
    cumulative = 0.5 * (1 + torch.erf(dots_tM / math.sqrt(2)))
    return cumulative + dots_tM * torch.exp(-0.5 * dots_tM.square()) / math.sqrt(2 * math.pi)
