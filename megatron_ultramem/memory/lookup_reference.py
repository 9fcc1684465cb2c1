"""The lookup in plain PyTorch: the documentation of what a kernel computes, and the fallback everywhere.

Works on chunks of tokens, so that gathered rows never take more than a bounded space. Shapes as in `lookup.py`, with
`t` tokens of a chunk and W = Dv / C, the width of a core's slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from megatron_ultramem.memory.numerics import accumulation_dtype, tokens_per_chunk


class ReferenceLookup:
    """`LookupBackend` in plain PyTorch, for every device."""

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: torch.Tensor,
        pre_values: torch.Tensor,
        activation: str,
    ) -> torch.Tensor:
        T, M, C = scores_TMC.shape
        dtype = accumulation_dtype(values.dtype)
        pooled_TV = torch.empty(T, values.shape[1], dtype=pre_input_TD.dtype, device=values.device)
        for part in _chunks(indices_TM, values, pre_values):
            dots_tM, _ = _pre_value_dots(indices_TM[part], pre_input_TD[part], pre_values)
            weights_tMC = _activate(dots_tM, activation).unsqueeze(-1) * scores_TMC[part].to(dtype)
            rows_tMCW = _rows(values, indices_TM[part]).unflatten(-1, (C, -1))
            pooled_TV[part] = torch.einsum("tmc,tmcw->tcw", weights_tMC, rows_tMCW).flatten(1)
        return pooled_TV

    def backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: torch.Tensor,
        pre_values: torch.Tensor,
        activation: str,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        C = scores_TMC.shape[2]
        dtype = accumulation_dtype(values.dtype)
        grad_scores_TMC = torch.empty_like(scores_TMC)
        grad_pre_input_TD = torch.empty_like(pre_input_TD)
        for part in _chunks(indices_TM, values, pre_values):
            indices_tM, scores_tMC = indices_TM[part], scores_TMC[part].to(dtype)
            grad_tCW = grad_pooled_TV[part].to(dtype).unflatten(-1, (C, -1))
            dots_tM, pre_rows_tMD = _pre_value_dots(indices_tM, pre_input_TD[part], pre_values)
            active_tM = _activate(dots_tM, activation)
            rows_tMCW = _rows(values, indices_tM).unflatten(-1, (C, -1))
            along_tMC = torch.einsum("tcw,tmcw->tmc", grad_tCW, rows_tMCW)
            grad_scores_TMC[part] = active_tM.unsqueeze(-1) * along_tMC
            grad_dots_tM = (scores_tMC * along_tMC).sum(-1) * _activation_slope(dots_tM, activation)
            grad_pre_input_TD[part] = torch.einsum("tm,tmd->td", grad_dots_tM, pre_rows_tMD)
            if values_grad is not None:
                weights_tMC = active_tM.unsqueeze(-1) * scores_tMC
                _add_rows(values_grad, indices_tM, (weights_tMC.unsqueeze(-1) * grad_tCW.unsqueeze(1)).flatten(2))
            if pre_values_grad is not None:
                pre_input_tD = pre_input_TD[part].to(dtype)
                _add_rows(pre_values_grad, indices_tM, grad_dots_tM.unsqueeze(-1) * pre_input_tD.unsqueeze(1))
        return grad_scores_TMC, grad_pre_input_TD


def _pre_value_dots(
    indices_tM: torch.Tensor, pre_input_tD: torch.Tensor, pre_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """<x', P[row]> as [t, M], and the rows [t, M, D]."""
    rows_tMD = _rows(pre_values, indices_tM)
    return torch.einsum("tmd,td->tm", rows_tMD, pre_input_tD.to(rows_tMD.dtype)), rows_tMD


def _rows(table: torch.Tensor, indices_tM: torch.Tensor) -> torch.Tensor:
    """Rows [t, M, width] in the accumulation dtype."""
    rows = table.index_select(0, indices_tM.reshape(-1)).to(accumulation_dtype(table.dtype))
    return rows.view(*indices_tM.shape, table.shape[1])


def _add_rows(buffer: torch.Tensor, indices_tM: torch.Tensor, rows_tMV: torch.Tensor) -> None:
    """Adds rows to `buffer` in place, in a fixed order where deterministic algorithms are asked for."""
    indices, rows = indices_tM.reshape(-1), rows_tMV.flatten(0, 1).to(buffer.dtype)
    if buffer.is_cuda and torch.are_deterministic_algorithms_enabled():
        buffer.index_put_((indices,), rows, accumulate=True)  # sorts the indices; index_add_ would use atomics
    else:
        buffer.index_add_(0, indices, rows)


def _activate(dots_tM: torch.Tensor, activation: str) -> torch.Tensor:
    return F.gelu(dots_tM) if activation == "gelu" else dots_tM


def _activation_slope(dots_tM: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "none":
        return torch.ones_like(dots_tM)
    cumulative = 0.5 * (1 + torch.erf(dots_tM / math.sqrt(2)))
    return cumulative + dots_tM * torch.exp(-0.5 * dots_tM.square()) / math.sqrt(2 * math.pi)


def _chunks(indices_TM: torch.Tensor, values: torch.Tensor, pre_values: torch.Tensor) -> Iterator[slice]:
    T, M = indices_TM.shape
    step = tokens_per_chunk(2 * M * (values.shape[1] + pre_values.shape[1]), values.is_cuda)
    for low in range(0, T, step):
        yield slice(low, low + step)
