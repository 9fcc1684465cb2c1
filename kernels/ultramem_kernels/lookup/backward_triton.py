"""The lookup's backward pass by token, in Triton: one program per token, both tables read once.

It gives the gradients of the pre-inputs and of the scores, and either adds the tables' gradients by atomics (fast to
write down, order of additions not fixed), or leaves the per-entry factors from which segments_triton.py forms them.

    q[t, m, c]  = sum over the columns of core c of grad_out[t] * values[row]      (gradient of the final weight)
    d_scores    = act(dot) * q
    d_dot       = act'(dot) * sum_c scores[c] * q[c]
    d_pre_input = sum_m d_dot * pre_values[row]
    d_pre_values[row] += d_dot * pre_input[t];   d_values[row, col] += act(dot) * scores[core(col)] * grad_out[t, col]
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ultramem_kernels.lookup.forward_triton import gelu, load_local_rows, load_tile, scale_stride, spread_over_columns
from ultramem_kernels.tiles import cover, float_dtype_ok, rows_argument


@triton.jit
def gelu_slope(x):
    cdf = 0.5 * (1.0 + tl.math.erf(x * 0.7071067811865476))
    return cdf + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)


@triton.jit
def add_tile(grad, local, exists, columns, tile, WIDTH):
    """Adds a tile to rows of an fp32 gradient, atomically."""
    pointers = grad + local[:, None] * WIDTH + columns[None, :]
    tl.atomic_add(pointers, tile, mask=exists[:, None] & (columns < WIDTH)[None, :], sem="relaxed")


@triton.jit
def core_sum(products, columns, core_width, column_start, c, C: tl.constexpr):
    """Sum over the columns of core c, [BLOCK_M]."""
    if C == 1:
        return tl.sum(products, axis=1)
    core = (columns + column_start) // core_width
    return tl.sum(tl.where((core == c)[None, :], products, 0.0), axis=1)


@triton.jit
def lookup_backward_kernel(
    indices, weights, pre_input, pre_values, values, pre_scales, scales, grad_out, grad_dots,
    grad_pre_input, grad_weights, dots_out, weights_out, grad_pre_values, grad_values,
    row_start, rows, padding, core_width, column_start,
    M: tl.constexpr, P: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, WITH_DOT: tl.constexpr, WITH_SUM: tl.constexpr, GELU: tl.constexpr,
    ATOMIC_P: tl.constexpr, ATOMIC_V: tl.constexpr, HAS_PADDING: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    p0, p1 = tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 1)
    v0, v1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 > 0 else 1)
    if WITH_DOT:
        x0 = tl.load(pre_input + token * P + p0, mask=p0 < P, other=0.0).to(tl.float32)
        dx0 = tl.zeros((BLOCK_M, P0), tl.float32)
        if P1 > 0:
            x1 = tl.load(pre_input + token * P + p1, mask=p1 < P, other=0.0).to(tl.float32)
            dx1 = tl.zeros((BLOCK_M, P1), tl.float32)
    if WITH_SUM:
        g0 = tl.load(grad_out + token * V + v0, mask=v0 < V, other=0.0).to(tl.float32)
        if V1 > 0:
            g1 = tl.load(grad_out + token * V + v1, mask=v1 < V, other=0.0).to(tl.float32)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        entry = token * M + m
        local, exists = load_local_rows(indices, entry, m < M, row_start, rows, padding, HAS_PADDING)
        if WITH_SUM:
            product0 = load_tile(values, scales, local, exists, v0, V, CODES) * g0[None, :]
            if V1 > 0:
                product1 = load_tile(values, scales, local, exists, v1, V, CODES) * g1[None, :]
        if WITH_DOT:
            row0 = load_tile(pre_values, pre_scales, local, exists, p0, P, CODES)
            if P1 > 0:
                row1 = load_tile(pre_values, pre_scales, local, exists, p1, P, CODES)
        if WITH_SUM:
            factor = tl.full((BLOCK_M,), 1.0, tl.float32)
            if WITH_DOT:
                dot = tl.sum(row0 * x0[None, :], axis=1)
                if P1 > 0:
                    dot += tl.sum(row1 * x1[None, :], axis=1)
                factor = dot
                if GELU:
                    factor = gelu(dot)
            d_dot = tl.zeros((BLOCK_M,), tl.float32)
            for c in tl.static_range(C):
                q = core_sum(product0, v0, core_width, column_start, c, C)
                if V1 > 0:
                    q += core_sum(product1, v1, core_width, column_start, c, C)
                d_weight = factor * q
                tl.store(grad_weights + entry * C + c, d_weight.to(grad_weights.dtype.element_ty), mask=m < M)
                if WITH_DOT:
                    score = tl.load(weights + entry * C + c, mask=exists, other=0.0).to(tl.float32)
                    d_dot += score * q
                    if not ATOMIC_V:
                        tl.store(weights_out + entry * C + c, factor * score, mask=m < M)
            if ATOMIC_V:
                spread = spread_over_columns(weights, entry, exists, factor, v0, core_width, column_start, C)
                add_tile(grad_values, local, exists, v0, spread * g0[None, :], V)
                if V1 > 0:
                    spread = spread_over_columns(weights, entry, exists, factor, v1, core_width, column_start, C)
                    add_tile(grad_values, local, exists, v1, spread * g1[None, :], V)
        if WITH_DOT:
            if WITH_SUM:
                if GELU:
                    d_dot *= gelu_slope(dot)
                if not ATOMIC_P:
                    tl.store(dots_out + entry, d_dot, mask=m < M)
            else:
                d_dot = tl.load(grad_dots + entry, mask=exists, other=0.0).to(tl.float32)
            dx0 += d_dot[:, None] * row0
            if P1 > 0:
                dx1 += d_dot[:, None] * row1
            if ATOMIC_P:
                add_tile(grad_pre_values, local, exists, p0, d_dot[:, None] * x0[None, :], P)
                if P1 > 0:
                    add_tile(grad_pre_values, local, exists, p1, d_dot[:, None] * x1[None, :], P)
    if WITH_DOT:
        tl.store(grad_pre_input + token * P + p0, tl.sum(dx0, 0).to(grad_pre_input.dtype.element_ty), mask=p0 < P)
        if P1 > 0:
            tl.store(grad_pre_input + token * P + p1, tl.sum(dx1, 0).to(grad_pre_input.dtype.element_ty), mask=p1 < P)


def backward_by_token(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor | None,
    pre_input_TP: torch.Tensor | None,
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    grad_out_TV: torch.Tensor | None,
    grad_dots_TM: torch.Tensor | None,
    *,
    grad_values_NV: torch.Tensor | None = None,
    grad_pre_values_NP: torch.Tensor | None = None,
    activation: str = "none",
    core_width: int = 0,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
    block_m: int | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(grad_pre_input, grad_weights, d_dot [T, M] fp32, final weights [T, M, C] fp32).

    A table's gradient given (fp32, contiguous) is added to by atomics. Not given, the factors of its rows are returned
    instead: `d_dot` for the pre-values (grad_dots_TM itself where that is given), the final weights for the values
    (weights_TMC itself without pre-values).
    """
    table: Any = values_NV if values_NV is not None else pre_values_NP
    codes = scale_stride(value_scales_N, pre_value_scales_N)
    float_dtype_ok(None if codes else table)
    T, M = indices_TM.shape
    device = indices_TM.device
    with_dot, with_sum = pre_values_NP is not None, values_NV is not None
    P = 1 if pre_values_NP is None else pre_values_NP.shape[1]
    V = 1 if values_NV is None else values_NV.shape[1]
    C = 1 if weights_TMC is None else weights_TMC.shape[2]
    atomic_p, atomic_v = grad_pre_values_NP is not None, grad_values_NV is not None
    grad_pre_input = None if pre_input_TP is None else torch.empty_like(pre_input_TP)
    grad_weights = None if weights_TMC is None else torch.empty_like(weights_TMC)
    d_dots, final = grad_dots_TM, weights_TMC
    if with_dot and with_sum:
        d_dots = None if atomic_p else torch.empty(T, M, dtype=torch.float32, device=device)
        final = None if atomic_v else torch.empty(T, M, C, dtype=torch.float32, device=device)
    if T == 0 or M == 0:
        return (None if grad_pre_input is None else grad_pre_input.zero_()), grad_weights, d_dots, final
    P0, P1 = cover(P)
    V0, V1 = cover(V)
    width = (P if with_dot else 0) + (V if with_sum else 0)
    block_m = block_m or min(triton.next_power_of_2(M), max(2, 2048 // triton.next_power_of_2(width)))
    num_warps = num_warps or (1 if block_m * width <= 2048 else 2)
    lookup_backward_kernel[(T,)](
        indices_TM, weights_TMC, pre_input_TP, pre_values_NP, values_NV, pre_value_scales_N, value_scales_N,
        grad_out_TV, grad_dots_TM,
        grad_pre_input, grad_weights, d_dots, final, grad_pre_values_NP, grad_values_NV,
        row_start, rows_argument(table),
        -1 if padding_index is None else padding_index, core_width or max(V // C, 1), column_start,
        M, P, V, C, P0, P1, V0, V1, BLOCK_M=block_m, WITH_DOT=with_dot, WITH_SUM=with_sum, GELU=activation == "gelu",
        ATOMIC_P=atomic_p, ATOMIC_V=atomic_v, HAS_PADDING=padding_index is not None,
        CODES=codes, num_warps=num_warps,
    )  # fmt: skip
    return grad_pre_input, grad_weights, d_dots, final
