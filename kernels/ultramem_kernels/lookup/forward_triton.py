"""The lookup's forward pass in Triton: one program per token, both tables in one pass.

Rows are read as tiles of [BLOCK_M, width]; a width that is no power of two is covered by two powers of two
(192 = 128 + 64), so that no lane loads padding. Legend as in reference.py.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ultramem_kernels.lookup.fp8_rows_triton import decode
from ultramem_kernels.tiles import cover, float_dtype_ok, rows_argument


@triton.jit
def load_local_rows(indices, entry, mask, row_start, rows, padding, HAS_PADDING: tl.constexpr):
    """(int64 row number inside the shard, mask) of the entries `entry` of the flat indices."""
    index = tl.load(indices + entry, mask=mask, other=-1).to(tl.int64)
    local = index - row_start
    exists = mask & (local >= 0) & (local < rows)
    if HAS_PADDING:
        exists = exists & (index != padding)
    return local, exists


@triton.jit
def load_tile(table, scales, local, exists, columns, WIDTH, CODES: tl.constexpr):
    """Rows `local` of a table, columns `columns`, in fp32; 0 where the row or the column does not exist. CODES: 0, or
    the distance of the scales of neighbouring rows of codes."""
    pointers = table + local[:, None] * WIDTH + columns[None, :]
    tile = tl.load(pointers, mask=exists[:, None] & (columns < WIDTH)[None, :], other=0)
    if CODES:
        return decode(tile) * tl.load(scales + local * CODES, mask=exists, other=0.0)[:, None]
    return tile.to(tl.float32)


@triton.jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.math.erf(x * 0.7071067811865476))


@triton.jit
def spread_over_columns(weights, entry, exists, factor, columns, core_width, column_start, C: tl.constexpr):
    """[BLOCK_M, width]: factor * weights[entry, core(column)] for a [*, C] weight array in memory."""
    core = (columns + column_start) // core_width
    spread = (tl.load(weights + entry * C, mask=exists, other=0.0).to(tl.float32) * factor)[:, None]
    spread = tl.broadcast_to(spread, (entry.shape[0], columns.shape[0]))
    for c in tl.static_range(1, C):
        weight = tl.load(weights + entry * C + c, mask=exists, other=0.0).to(tl.float32) * factor
        spread = tl.where((core >= c)[None, :], weight[:, None], spread)
    return spread


@triton.jit
def lookup_forward_kernel(
    indices, weights, pre_input, pre_values, values, pre_scales, scales, out, dots,
    row_start, rows, padding, core_width, column_start,
    M: tl.constexpr, P: tl.constexpr, V: tl.constexpr, C: tl.constexpr,
    P0: tl.constexpr, P1: tl.constexpr, V0: tl.constexpr, V1: tl.constexpr,
    BLOCK_M: tl.constexpr, WITH_DOT: tl.constexpr, WITH_SUM: tl.constexpr, GELU: tl.constexpr,
    HAS_PADDING: tl.constexpr, CODES: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    p0, p1 = tl.arange(0, P0), P0 + tl.arange(0, P1 if P1 > 0 else 1)
    v0, v1 = tl.arange(0, V0), V0 + tl.arange(0, V1 if V1 > 0 else 1)
    if WITH_DOT:
        x0 = tl.load(pre_input + token * P + p0, mask=p0 < P, other=0.0).to(tl.float32)
        if P1 > 0:
            x1 = tl.load(pre_input + token * P + p1, mask=p1 < P, other=0.0).to(tl.float32)
    if WITH_SUM:
        sum0 = tl.zeros((BLOCK_M, V0), tl.float32)
        sum1 = tl.zeros((BLOCK_M, V1 if V1 > 0 else 1), tl.float32)
    for first in range(0, M, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        entry = token * M + m
        local, exists = load_local_rows(indices, entry, m < M, row_start, rows, padding, HAS_PADDING)
        # The value rows are asked for before the dot products are reduced: their latencies overlap.
        if WITH_SUM:
            row0 = load_tile(values, scales, local, exists, v0, V, CODES)
            if V1 > 0:
                row1 = load_tile(values, scales, local, exists, v1, V, CODES)
        if WITH_DOT:
            dot = tl.sum(load_tile(pre_values, pre_scales, local, exists, p0, P, CODES) * x0[None, :], axis=1)
            if P1 > 0:
                dot += tl.sum(load_tile(pre_values, pre_scales, local, exists, p1, P, CODES) * x1[None, :], axis=1)
            if not WITH_SUM:
                tl.store(dots + entry, dot, mask=m < M)
            factor = dot
            if GELU:
                factor = gelu(dot)
        else:
            factor = tl.full((BLOCK_M,), 1.0, tl.float32)
        if WITH_SUM:
            sum0 += row0 * spread_over_columns(weights, entry, exists, factor, v0, core_width, column_start, C)
            if V1 > 0:
                sum1 += row1 * spread_over_columns(weights, entry, exists, factor, v1, core_width, column_start, C)
    if WITH_SUM:
        tl.store(out + token * V + v0, tl.sum(sum0, axis=0).to(out.dtype.element_ty), mask=v0 < V)
        if V1 > 0:
            tl.store(out + token * V + v1, tl.sum(sum1, axis=0).to(out.dtype.element_ty), mask=v1 < V)


def scale_stride(value_scales_N: torch.Tensor | None, pre_value_scales_N: torch.Tensor | None) -> int:
    """Distance of the scales of neighbouring rows, the same for both tables; 0 without scales."""
    strides = {scales.stride(0) for scales in (value_scales_N, pre_value_scales_N) if scales is not None}
    if len(strides) > 1:
        raise ValueError(f"scales of strides {sorted(strides)}: those of both tables need one stride")
    return strides.pop() if strides else 0


def forward(
    indices_TM: torch.Tensor,
    weights_TMC: torch.Tensor | None,
    pre_input_TP: torch.Tensor | None,
    values_NV: torch.Tensor | None,
    pre_values_NP: torch.Tensor | None,
    *,
    activation: str = "none",
    core_width: int = 0,
    column_start: int = 0,
    row_start: int = 0,
    padding_index: int | None = None,
    value_scales_N: torch.Tensor | None = None,
    pre_value_scales_N: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
    block_m: int | None = None,
    num_warps: int | None = None,
) -> torch.Tensor:
    """Pooled values [T, V] (`dtype`, or the tables') if `values_NV` is given, else the partial dots [T, M] fp32.

    With both tables `weights_TMC` are scores, multiplied by act(dot); with `values_NV` alone they are final weights.
    """
    table: Any = values_NV if values_NV is not None else pre_values_NP
    codes = scale_stride(value_scales_N, pre_value_scales_N)
    float_dtype_ok(None if codes else table)
    T, M = indices_TM.shape
    with_dot, with_sum = pre_values_NP is not None, values_NV is not None
    P = 1 if pre_values_NP is None else pre_values_NP.shape[1]
    V = 1 if values_NV is None else values_NV.shape[1]
    C = 1 if weights_TMC is None else weights_TMC.shape[2]
    if with_sum:
        out = torch.empty(T, V, dtype=dtype or table.dtype, device=indices_TM.device)
    else:
        out = torch.empty(T, M, dtype=torch.float32, device=indices_TM.device)
    if T == 0:
        return out
    if M == 0:
        return out.zero_()
    P0, P1 = cover(P)
    V0, V1 = cover(V)
    # About 4 KiB of rows per warp in flight; few tokens (decoding) get more warps per token instead.
    width = (P if with_dot else 0) + (V if with_sum else 0)
    block_m = block_m or min(
        triton.next_power_of_2(M), 32 if T < 512 else max(2, 2048 // triton.next_power_of_2(width))
    )
    num_warps = num_warps or (8 if T < 512 else 1 if block_m * width <= 2048 else 2)
    lookup_forward_kernel[(T,)](
        indices_TM, weights_TMC, pre_input_TP, pre_values_NP, values_NV, pre_value_scales_N, value_scales_N, out, out,
        row_start, rows_argument(table), -1 if padding_index is None else padding_index,
        core_width or max(V // C, 1), column_start, M, P, V, C, P0, P1, V0, V1,
        BLOCK_M=block_m, WITH_DOT=with_dot, WITH_SUM=with_sum, GELU=activation == "gelu",
        HAS_PADDING=padding_index is not None, CODES=codes, num_warps=num_warps,
    )  # fmt: skip
    return out
