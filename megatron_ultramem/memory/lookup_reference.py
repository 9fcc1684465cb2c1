"""The lookup in plain PyTorch: the documentation of what a kernel computes, and the fallback everywhere.

Works on chunks of tokens, so that gathered rows never take more than a bounded space. Shapes as in `lookup.py`, with
`t` tokens of a chunk and W = Dv / C, the width of a core's slice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch.nn import functional as F

from megatron_ultramem.memory.fp8_table import Fp8Table, Table, quantize_
from megatron_ultramem.memory.numerics import accumulation_dtype, tokens_per_chunk

SortedRows = tuple[torch.Tensor, torch.Tensor]  # rows in ascending order, and their places before; as a backend likes


class ReferenceLookup:
    """`LookupBackend` in plain PyTorch, for every device."""

    def quantize_(self, copy: Fp8Table, table: torch.Tensor, amax_N: torch.Tensor) -> None:
        quantize_(copy, table, amax_N)

    def forward(
        self,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        padded: bool = False,
    ) -> torch.Tensor:
        T, M, C = scores_TMC.shape
        dtype = accumulation_dtype(values.dtype)
        pooled_TV = torch.empty(T, values.shape[1], dtype=pre_input_TD.dtype, device=values.device)
        for part in _chunks(indices_TM, values.shape[1] + pre_values.shape[1], values.is_cuda):
            rows_tMD = _rows(pre_values, indices_TM[part], padded)
            dots_tM = _dots(rows_tMD, pre_input_TD[part])
            weights_tMC = activate(dots_tM, activation).unsqueeze(-1) * scores_TMC[part].to(dtype)
            rows_tMCW = _rows(values, indices_TM[part], padded).unflatten(-1, (C, -1))
            pooled_TV[part] = torch.einsum("tmc,tmcw->tcw", weights_tMC, rows_tMCW).flatten(1)
        return pooled_TV

    def backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        scores_TMC: torch.Tensor,
        pre_input_TD: torch.Tensor,
        values: Table,
        pre_values: Table,
        activation: str,
        values_grad: torch.Tensor | None,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        C = scores_TMC.shape[2]
        dtype = accumulation_dtype(values.dtype)
        grad_scores_TMC = torch.empty_like(scores_TMC)
        grad_pre_input_TD = torch.empty_like(pre_input_TD)
        for part in _chunks(indices_TM, values.shape[1] + pre_values.shape[1], values.is_cuda):
            indices_tM, scores_tMC = indices_TM[part], scores_TMC[part].to(dtype)
            grad_tCW = grad_pooled_TV[part].to(dtype).unflatten(-1, (C, -1))
            pre_rows_tMD = _rows(pre_values, indices_tM, padded)
            dots_tM = _dots(pre_rows_tMD, pre_input_TD[part])
            active_tM = activate(dots_tM, activation)
            rows_tMCW = _rows(values, indices_tM, padded).unflatten(-1, (C, -1))
            along_tMC = torch.einsum("tcw,tmcw->tmc", grad_tCW, rows_tMCW)
            grad_scores_TMC[part] = active_tM.unsqueeze(-1) * along_tMC
            grad_dots_tM = (scores_tMC * along_tMC).sum(-1) * activation_slope(dots_tM, activation)
            grad_pre_input_TD[part] = torch.einsum("tm,tmd->td", grad_dots_tM, pre_rows_tMD)
            if values_grad is not None:
                weights_tMC = active_tM.unsqueeze(-1) * scores_tMC
                _add_rows(values_grad, indices_tM, (weights_tMC.unsqueeze(-1) * grad_tCW.unsqueeze(1)).flatten(2))
            if pre_values_grad is not None:
                pre_input_tD = pre_input_TD[part].to(dtype)
                _add_rows(pre_values_grad, indices_tM, grad_dots_tM.unsqueeze(-1) * pre_input_tD.unsqueeze(1))
        return grad_scores_TMC, grad_pre_input_TD

    def dots(
        self, indices_TM: torch.Tensor, pre_input_TD: torch.Tensor, pre_values: Table, padded: bool = False
    ) -> torch.Tensor:
        dtype = accumulation_dtype(pre_values.dtype)
        dots_TM = torch.empty(indices_TM.shape, dtype=dtype, device=pre_values.device)
        for part in _chunks(indices_TM, pre_values.shape[1], pre_values.is_cuda):
            dots_TM[part] = _dots(_rows(pre_values, indices_TM[part], padded), pre_input_TD[part])
        return dots_TM

    def sort_rows(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> None:
        return None

    def dots_backward(
        self,
        grad_dots_TM: torch.Tensor,
        indices_TM: torch.Tensor,
        pre_input_TD: torch.Tensor,
        pre_values: Table,
        pre_values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        dtype = accumulation_dtype(pre_values.dtype)
        grad_pre_input_TD = torch.empty_like(pre_input_TD)
        for part in _chunks(indices_TM, pre_values.shape[1], pre_values.is_cuda):
            grad_tM, rows_tMD = grad_dots_TM[part].to(dtype), _rows(pre_values, indices_TM[part], padded)
            grad_pre_input_TD[part] = torch.einsum("tm,tmd->td", grad_tM, rows_tMD)
            if pre_values_grad is not None:
                if padded:
                    grad_tM = grad_tM.masked_fill(indices_TM[part] < 0, 0.0)
                along_tMD = grad_tM.unsqueeze(-1) * pre_input_TD[part].to(dtype).unsqueeze(1)
                _add_rows(pre_values_grad, indices_TM[part], along_tMD)
        return grad_pre_input_TD

    def weighted_sum(
        self,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        padded: bool = False,
    ) -> torch.Tensor:
        dtype = accumulation_dtype(values.dtype)
        pooled_TV = torch.empty(indices_TM.shape[0], values.shape[1], dtype=values.dtype, device=values.device)
        for part in _chunks(indices_TM, values.shape[1], values.is_cuda):
            rows_tMV, weights_tMC = _rows(values, indices_TM[part], padded), weights_TMC[part].to(dtype)
            for core, columns in core_columns(values.shape[1], column_start, core_width):
                pooled_TV[part, columns] = torch.einsum(
                    "tm,tmw->tw", weights_tMC[:, :, core], rows_tMV[:, :, columns]
                ).to(values.dtype)
        return pooled_TV

    def weighted_sum_backward(
        self,
        grad_pooled_TV: torch.Tensor,
        indices_TM: torch.Tensor,
        weights_TMC: torch.Tensor,
        values: Table,
        column_start: int,
        core_width: int,
        values_grad: torch.Tensor | None,
        padded: bool = False,
        sorted_rows: SortedRows | None = None,
    ) -> torch.Tensor:
        dtype = accumulation_dtype(values.dtype)
        grad_weights_TMC = torch.zeros(weights_TMC.shape, dtype=dtype, device=values.device)
        for part in _chunks(indices_TM, values.shape[1], values.is_cuda):
            rows_tMV, grad_tV = _rows(values, indices_TM[part], padded), grad_pooled_TV[part].to(dtype)
            weights_tMC, grad_rows_tMV = weights_TMC[part].to(dtype), torch.empty_like(rows_tMV)
            if padded:
                weights_tMC = weights_tMC.masked_fill((indices_TM[part] < 0).unsqueeze(-1), 0.0)
            for core, columns in core_columns(values.shape[1], column_start, core_width):
                grad_tW = grad_tV[:, columns]
                grad_weights_TMC[part, :, core] = torch.einsum("tw,tmw->tm", grad_tW, rows_tMV[:, :, columns])
                grad_rows_tMV[:, :, columns] = weights_tMC[:, :, core].unsqueeze(-1) * grad_tW.unsqueeze(1)
            if values_grad is not None:
                _add_rows(values_grad, indices_TM[part], grad_rows_tMV)
        return grad_weights_TMC


def activate(dots_TM: torch.Tensor, activation: str) -> torch.Tensor:
    """'none' or 'gelu' (exact)."""
    return F.gelu(dots_TM) if activation == "gelu" else dots_TM


def activation_slope(dots_TM: torch.Tensor, activation: str) -> torch.Tensor:
    """Derivative of `activate`."""
    if activation == "none":
        return torch.ones_like(dots_TM)
    cumulative = 0.5 * (1 + torch.erf(dots_TM / math.sqrt(2)))
    return cumulative + dots_TM * torch.exp(-0.5 * dots_TM.square()) / math.sqrt(2 * math.pi)


def core_columns(columns: int, column_start: int, core_width: int) -> Iterator[tuple[int, slice]]:
    """Cores whose slices of the pooled value meet the columns [column_start, column_start + columns), and where."""
    for core in range(column_start // core_width, -(-(column_start + columns) // core_width)):
        low, high = core * core_width - column_start, (core + 1) * core_width - column_start
        yield core, slice(max(low, 0), min(high, columns))


def _dots(rows_tMD: torch.Tensor, pre_input_tD: torch.Tensor) -> torch.Tensor:
    """<x', P[row]> as [t, M]."""
    return torch.einsum("tmd,td->tm", rows_tMD, pre_input_tD.to(rows_tMD.dtype))


def _rows(table: Table, indices_tM: torch.Tensor, padded: bool) -> torch.Tensor:
    """Rows [t, M, width] in the accumulation dtype; zeros where `padded` and the index is negative."""
    flat = indices_tM.reshape(-1)
    known = flat.clamp_min(0) if padded else flat
    rows = table.rows(known) if isinstance(table, Fp8Table) else table.index_select(0, known)
    rows = rows.to(accumulation_dtype(table.dtype))
    if padded:
        rows = rows.masked_fill((flat < 0).unsqueeze(-1), 0.0)
    return rows.view(*indices_tM.shape, table.shape[1])


def _add_rows(buffer: torch.Tensor, indices_tM: torch.Tensor, rows_tMV: torch.Tensor) -> None:
    """Adds rows to `buffer` in place, in a fixed order where deterministic algorithms are asked for.

    Where an index is negative, the row to add is zero.
    """
    indices, rows = indices_tM.reshape(-1).clamp_min(0), rows_tMV.flatten(0, 1).to(buffer.dtype)
    if buffer.is_cuda and torch.are_deterministic_algorithms_enabled():
        buffer.index_put_((indices,), rows, accumulate=True)  # sorts the indices; index_add_ would use atomics
    else:
        buffer.index_add_(0, indices, rows)


def _chunks(indices_TM: torch.Tensor, row_elements: int, is_cuda: bool) -> Iterator[slice]:
    T, M = indices_TM.shape
    step = tokens_per_chunk(2 * M * row_elements, is_cuda)
    for low in range(0, T, step):
        yield slice(low, low + step)
