"""What the lookup computes, in plain PyTorch. Every kernel of this folder must agree with these functions.

Legend: T tokens, M values per token, C cores, N rows of a table (or of this rank's shard), P pre-value width,
V value width (of this rank's columns), W width of a core's slice of the pooled value.

    dot[t, m]    = <pre_input[t], pre_values[row(t, m)]>
    weight       = act(dot[t, m]) * scores[t, m, c]
    out[t, col]  = sum_m weight[t, m, core(col)] * values[row(t, m), col]        core(col) = (column_start + col) // W

(UltraMemV2, arXiv 2508.18756, eq. 15 with multi-core scoring.) `row(t, m) = indices[t, m] - row_start`; an index
outside the shard's rows, or equal to `padding_index`, contributes nothing and receives zero gradients.

A table may be given as E4M3 codes (uint8) with the scales of its rows (fp8_rows.py): its rows are then scale * code,
and its gradient is that of these numbers.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ultramem_kernels.lookup.fp8_rows import decode


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def local_rows(
    indices_TM: torch.Tensor, rows: int, row_start: int = 0, padding_index: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(row numbers inside the shard with 0 where there is none, mask of the entries that exist), both [T, M]."""
    local_TM = indices_TM.long() - row_start
    exists_TM = (local_TM >= 0) & (local_TM < rows)
    if padding_index is not None:
        exists_TM = exists_TM & (indices_TM != padding_index)
    return local_TM.where(exists_TM, local_TM.new_zeros(())), exists_TM


def column_cores(columns: int, core_width: int, column_start: int, device: torch.device) -> torch.Tensor:
    """Core number of each of a shard's columns, [V] int64."""
    return (torch.arange(columns, device=device) + column_start) // core_width


def gather_rows(table_ND: torch.Tensor, local_TM: torch.Tensor, scales_N: torch.Tensor | None = None) -> torch.Tensor:
    """Rows [T, M, D] in the accumulation dtype; with `scales_N` the table holds codes."""
    rows_TMD = table_ND[local_TM]
    if scales_N is not None:
        return decode(rows_TMD) * scales_N[local_TM].unsqueeze(-1)
    return rows_TMD.to(accumulation_dtype(table_ND.dtype))


def pre_value_dot(
    indices_TM: torch.Tensor,
    pre_input_TP: torch.Tensor,
    pre_values_NP: torch.Tensor,
    row_start: int = 0,
    padding_index: int | None = None,
    scales_N: torch.Tensor | None = None,
) -> torch.Tensor:
    """`dot` [T, M] in the accumulation dtype; 0 where the row does not exist."""
    dtype = accumulation_dtype(pre_values_NP.dtype)
    local_TM, exists_TM = local_rows(indices_TM, pre_values_NP.shape[0], row_start, padding_index)
    dot_TM = torch.einsum("tmp,tp->tm", gather_rows(pre_values_NP, local_TM, scales_N), pre_input_TP.to(dtype))
    return dot_TM.where(exists_TM, dot_TM.new_zeros(()))


def weighted_sum(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor,
    values_NV: torch.Tensor,
    core_width: int | None = None,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    scales_N: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """`out` [T, V] in `out_dtype` (None: the table's), for given weights. `core_width` defaults to V / C (a whole
    table)."""
    dtype = accumulation_dtype(values_NV.dtype)
    columns, cores = values_NV.shape[1], weights_TMC.shape[2]
    core_V = column_cores(columns, core_width or columns // cores, column_start, values_NV.device)
    local_TM, exists_TM = local_rows(indices_TM, values_NV.shape[0], row_start, padding_index)
    weights_TMC = weights_TMC.to(dtype) * exists_TM.unsqueeze(-1)
    out_TV = torch.einsum("tmv,tmv->tv", weights_TMC[:, :, core_V], gather_rows(values_NV, local_TM, scales_N))
    return out_TV.to(out_dtype or values_NV.dtype)


def activate(dot_TM: torch.Tensor, activation: str) -> torch.Tensor:
    """The activation on the pre-value dot product: 'none' or 'gelu' (exact, by erf)."""
    return F.gelu(dot_TM) if activation == "gelu" else dot_TM


def lookup(
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TP: torch.Tensor,
    values_NV: torch.Tensor,
    pre_values_NP: torch.Tensor,
    activation: str = "none",
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The whole lookup, `out` [T, V] in `out_dtype` (None: the table's); differentiable by autograd with dense table
    gradients, unless the tables hold codes."""
    dot_TM = pre_value_dot(indices_TM, pre_input_TP, pre_values_NP, row_start, padding_index, pre_value_scales_N)
    weights_TMC = activate(dot_TM, activation).unsqueeze(-1) * scores_TMC
    return weighted_sum(
        indices_TM, weights_TMC, values_NV, None, 0, row_start, padding_index, value_scales_N, out_dtype
    )


def activation_slope(dot_TM: torch.Tensor, activation: str) -> torch.Tensor:
    """Derivative of `activate`."""
    if activation != "gelu":
        return torch.ones_like(dot_TM)
    cdf = 0.5 * (1 + torch.erf(dot_TM * 0.5**0.5))
    return cdf + dot_TM * torch.exp(-0.5 * dot_TM.square()) / (2 * torch.pi) ** 0.5


def backward_by_token(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor | None,
    pre_input_TP: torch.Tensor | None,
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    grad: torch.Tensor,
    activation: str = "none",
    core_width: int = 1,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """Backward of `lookup`, of `pre_value_dot` (no values) and of `weighted_sum` (no pre-values), but for the tables.

    `grad` is the gradient of the output: [T, V], or [T, M] for the dots. Returns (grad_pre_input, grad_weights, d_dot
    [T, M], final weights [T, M, C]); with the last two `add_rows_` forms the tables' gradients. Formulas in
    backward_triton.py.
    """
    table = values_NV if values_NV is not None else pre_values_NP
    assert table is not None
    dtype = accumulation_dtype(table.dtype)
    local_TM, exists_TM = local_rows(indices_TM, table.shape[0], row_start, padding_index)
    grad_weights_TMC = final_TMC = None
    d_dot_TM = grad
    if values_NV is not None:
        assert weights_TMC is not None
        core_V = column_cores(values_NV.shape[1], core_width, column_start, table.device)
        rows_TMV = gather_rows(values_NV, local_TM, value_scales_N)
        products_TMV = rows_TMV * grad.to(dtype).unsqueeze(1) * exists_TM.unsqueeze(-1)
        q_TMC = products_TMV.new_zeros(weights_TMC.shape).index_add_(2, core_V, products_TMV)
        grad_weights_TMC, final_TMC = q_TMC, weights_TMC.to(dtype)
        if pre_values_NP is not None:
            assert pre_input_TP is not None
            dot_TM = pre_value_dot(
                indices_TM, pre_input_TP, pre_values_NP, row_start, padding_index, pre_value_scales_N
            )
            active_TM1 = activate(dot_TM, activation).unsqueeze(-1)
            d_dot_TM = (final_TMC * q_TMC).sum(-1) * activation_slope(dot_TM, activation)
            grad_weights_TMC, final_TMC = active_TM1 * q_TMC, active_TM1 * final_TMC
        grad_weights_TMC = grad_weights_TMC.to(weights_TMC.dtype)
    if pre_values_NP is None:
        return None, grad_weights_TMC, None, final_TMC
    assert pre_input_TP is not None
    d_dot_TM = d_dot_TM.to(dtype) * exists_TM
    pre_rows_TMP = gather_rows(pre_values_NP, local_TM, pre_value_scales_N)
    grad_input_TP = torch.einsum("tm,tmp->tp", d_dot_TM, pre_rows_TMP).to(pre_input_TP.dtype)
    return grad_input_TP, grad_weights_TMC, d_dot_TM, final_TMC


def add_rows_(
    grad_ND: torch.Tensor,
    local_TM: torch.Tensor,
    exists_TM: torch.Tensor,
    weights_TMC: torch.Tensor,
    x_TD: torch.Tensor,
    core_width: int,
    column_start: int = 0,
) -> None:
    """`grad[row(t, m), col] += weights[t, m, core(col)] * x[t, col]` in place: the gradient of either table."""
    core_D = column_cores(grad_ND.shape[1], core_width, column_start, grad_ND.device)
    weights_TMC = weights_TMC.to(grad_ND.dtype) * exists_TM.unsqueeze(-1)
    for low in range(0, local_TM.shape[0], 1024):  # chunks of tokens bound the [chunk, M, D] temporary
        part = slice(low, low + 1024)
        rows_TMD = weights_TMC[part][:, :, core_D] * x_TD[part].to(grad_ND.dtype).unsqueeze(1)
        grad_ND.index_add_(0, local_TM[part].reshape(-1), rows_TMD.flatten(0, 1))
