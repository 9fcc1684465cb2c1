"""The tables' gradients from per-entry factors, by sorted segments of any implementation or by the reference."""

from __future__ import annotations

from typing import Any

import torch

from ultramem_kernels.lookup import cuda_gradients, reference


def sort_entries(
    indices_TM: torch.Tensor, rows: int, row_start: int = 0, padding_index: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the entries in ascending order, their flat entry numbers int64), both [T*M]; stable.

    Entries without a row in this shard come last, with row number `rows`.
    """
    flat = indices_TM.reshape(-1)
    if row_start == 0 and padding_index is None:
        return torch.sort(flat, stable=True)
    local = flat - row_start
    missing = (local < 0) | (local >= rows)
    if padding_index is not None:
        missing |= flat == padding_index
    return torch.sort(torch.where(missing, rows, local), stable=True)


def sorted_entries(
    backend: str, indices_TM: torch.Tensor, rows: int, row_start: int, padding_index: int | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sort_entries` by the backend: 'cuda' gives int32."""
    if backend != "cuda":
        return sort_entries(indices_TM, rows, row_start, padding_index)
    if indices_TM.numel() <= cuda_gradients.SORT_LIMIT:
        return cuda_gradients.sort_entries(indices_TM, rows, row_start, padding_index)
    sorted_rows, order = sort_entries(indices_TM.long(), rows, row_start, padding_index)
    return sorted_rows.clamp(-1, rows).int(), order.int()


def add_sorted(
    entries: tuple[torch.Tensor, torch.Tensor],
    backend: str,
    M: int,
    pre_values: tuple[Any, Any, Any],
    values: tuple[Any, Any, Any],
    core_width: int,
    column_start: int,
    way: str = "segments",
) -> None:
    """Adds (gradient, input, d_dot) of the pre-values and (gradient, grad_out, weights) of the values; None: absent.

    `entries` from `sorted_entries`; `way`: one of `cuda_gradients.WAYS`, for the CUDA kernels.
    """
    sorted_rows, order = entries
    if backend == "cuda":
        cuda_gradients.add_segments_(
            sorted_rows, order, M, None if pre_values[0] is None else pre_values, None if values[0] is None else values,
            core_width, column_start, spans=cuda_gradients.WAYS[way],
        )  # fmt: skip
        return
    from ultramem_kernels.lookup.segments_triton import add_segments_

    if pre_values[0] is not None:
        grad, x, d_dots = pre_values
        add_segments_(grad, sorted_rows, order, d_dots.unsqueeze(-1), x, grad.shape[1])
    if values[0] is not None:
        grad, grad_out, weights = values
        add_segments_(grad, sorted_rows, order, weights, grad_out, core_width, column_start)


def add_by_reference(
    indices_TM: torch.Tensor,
    pre_values: tuple[Any, Any, Any],
    values: tuple[Any, Any, Any],
    core_width: int,
    column_start: int,
    row_start: int,
    padding_index: int | None,
) -> None:
    """As `add_sorted`, by `reference.add_rows_`."""
    for (grad, x, weights), width, start in ((pre_values, None, 0), (values, core_width, column_start)):
        if grad is None:
            continue
        local_TM, exists_TM = reference.local_rows(indices_TM, grad.shape[0], row_start, padding_index)
        weights_TMC = weights if weights.dim() == 3 else weights.unsqueeze(-1)
        reference.add_rows_(grad, local_TM, exists_TM, weights_TMC, x, width or grad.shape[1], start)
