"""Launchers of the hand-written CUDA kernels of the lookup (by_token.cu, segments.cu). Legend as in reference.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ultramem_kernels.nvrtc import Module, long
from ultramem_kernels.tiles import rows_argument

WARPS = 4  # per block, as in common.cuh
TILE = 32
FAN = 32
BACKWARD_BLOCKS = 4  # per multiprocessor at a time in the backward by token: leaves room for the sort beside it


@cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    return (folder / "common.cuh").read_text() + (folder / name).read_text()


@cache
def _module(name: str, device: torch.device, **defines: object) -> Module:
    return Module(_source(name), defines, device)


def _c_type(dtype: torch.dtype) -> str:
    return {torch.int32: "int", torch.int64: "i64"}[dtype]


def lanes_per_row(P: int, V: int) -> int:
    """8, 16 or 32 lanes share a row: the fewest that keep it to at most 3 loads of 16 bytes a lane."""
    for lanes in (8, 16):
        if max(P, V) <= 3 * 8 * lanes:
            return lanes
    return 32


def supports(
    table: torch.Tensor, indices_TM: torch.Tensor, P: int, V: int, C: int, core_width: int, column_start: int
) -> bool:
    """Whether these kernels cover the shape: 16-bit tables, columns in chunks of 8 that lie in one core."""
    return (
        table.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(table.device) >= (8, 0)
        and table.dtype in (torch.bfloat16, torch.float16)
        and table.data_ptr() % 16 == 0
        and indices_TM.dtype in (torch.int32, torch.int64)
        and P % 8 == 0
        and V % 8 == 0
        and core_width % 8 == 0
        and column_start % 8 == 0
        and max(P, V) <= 1024
        and C <= 8
        and indices_TM.numel() < 2**31
    )


def _aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that starts at a multiple of 16 bytes, as vector loads need it."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def _by_token(
    table: torch.Tensor, indices: torch.Tensor, P: int, V: int, C: int, activation: str, padding: bool, unroll: int
) -> Module:
    return _module(
        "by_token.cu", table.device, FP16=int(table.dtype == torch.float16), INDEX=_c_type(indices.dtype), ROW="int",
        P=P, V=V, C=C, G=lanes_per_row(P, V), UNROLL=unroll, GELU=int(activation == "gelu"), PADDING=int(padding),
    )  # fmt: skip


def forward(
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TP: torch.Tensor,
    values_NV: torch.Tensor,
    pre_values_NP: torch.Tensor,
    *,
    activation: str = "none",
    row_start: int = 0,
    padding_index: int | None = None,
    unroll: int = 1,
) -> torch.Tensor:
    """Pooled values [T, V]; scores fp32."""
    T, M = indices_TM.shape
    C, P, V = scores_TMC.shape[2], pre_values_NP.shape[1], values_NV.shape[1]
    pre_input_TP = _aligned(pre_input_TP)
    out = torch.empty(T, V, dtype=values_NV.dtype, device=values_NV.device)
    if T:
        module = _by_token(values_NV, indices_TM, P, V, C, activation, padding_index is not None, unroll)
        module.launch(
            "lookup_forward", (-(-T // WARPS), 1), 32 * WARPS, indices_TM, scores_TMC, pre_input_TP, pre_values_NP,
            values_NV, out, T, M, long(row_start), long(rows_argument(values_NV)), long(padding_index or 0), V // C, 0,
        )  # fmt: skip
    return out


def backward_by_token(
    indices_TM: torch.Tensor,
    scores_TMC: torch.Tensor,
    pre_input_TP: torch.Tensor,
    values_NV: torch.Tensor,
    pre_values_NP: torch.Tensor,
    grad_out_TV: torch.Tensor,
    *,
    activation: str = "none",
    row_start: int = 0,
    padding_index: int | None = None,
    unroll: int = 1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(grad_pre_input, grad_scores fp32, d_dot [T, M] fp32, final weights [T, M, C] fp32); scores fp32."""
    T, M = indices_TM.shape
    C, P, V = scores_TMC.shape[2], pre_values_NP.shape[1], values_NV.shape[1]
    pre_input_TP, grad_out_TV = _aligned(pre_input_TP), _aligned(grad_out_TV)
    grad_pre_input, grad_scores = torch.empty_like(pre_input_TP), torch.empty_like(scores_TMC)
    d_dots = torch.empty(T, M, dtype=torch.float32, device=values_NV.device)
    final = torch.empty(T, M, C, dtype=torch.float32, device=values_NV.device)
    if T:
        module = _by_token(values_NV, indices_TM, P, V, C, activation, padding_index is not None, unroll)
        multiprocessors = torch.cuda.get_device_properties(values_NV.device).multi_processor_count
        module.launch(
            "lookup_backward", (min(-(-T // WARPS), BACKWARD_BLOCKS * multiprocessors), 1), 32 * WARPS, indices_TM,
            scores_TMC, pre_input_TP, pre_values_NP, values_NV, grad_out_TV, grad_pre_input, grad_scores, d_dots, final,
            T, M, long(row_start), long(rows_argument(values_NV)), long(padding_index or 0), V // C, 0,
        )  # fmt: skip
    return grad_pre_input, grad_scores, d_dots, final


def add_segments_(
    sorted_rows: torch.Tensor,
    order: torch.Tensor,
    M: int,
    pre_values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    core_width: int,
    column_start: int = 0,
    *,
    unroll: int = 2,
) -> None:
    """Both tables' gradients, in place, in an order fixed by the indices. `sorted_rows`, `order` from sort_entries.

    `pre_values`: (grad [N, P] fp32, pre_input [T, P], d_dot [T, M] fp32);
    `values`: (grad [N, V] fp32, grad_out [T, V], weights [T, M, C] fp32). Either may be absent.
    """
    N = order.numel()
    if N == 0:
        return
    grad_p, x, d_dots = pre_values or (None, None, None)
    grad_v, grad_out, weights = values or (None, None, None)
    x, grad_out = (None if t is None else _aligned(t) for t in (x, grad_out))
    inputs = x if x is not None else grad_out
    rows = (grad_p if grad_p is not None else grad_v).shape[0]  # type: ignore[union-attr]
    P = grad_p.shape[1] if grad_p is not None else 0
    V = grad_v.shape[1] if grad_v is not None else 0
    quads = (P + V) // 4
    groups = -(-quads // 128) if quads > 96 else 1
    nj = -(-quads // (32 * groups))
    module = _module(
        "segments.cu", order.device, FP16=int(inputs.dtype == torch.float16), INDEX="int",  # type: ignore[union-attr]
        ROW=_c_type(sorted_rows.dtype), P=P, V=V, C=weights.shape[2] if weights is not None else 1, G=32,
        UNROLL=unroll, GELU=0, PADDING=0, NJ=nj,
    )  # fmt: skip
    tiles = -(-N // TILE)
    partial = torch.empty(tiles, 2, P + V, dtype=torch.float32, device=order.device)
    module.launch(
        "segments", (-(-tiles // WARPS), groups), 32 * WARPS, sorted_rows, order, d_dots, weights, x, grad_out,
        grad_p, grad_v, partial, long(N), long(rows), M, core_width, column_start,
    )  # fmt: skip
    span, count = TILE, tiles
    while count > 1:
        parts = -(-count // FAN)
        parents = torch.empty(parts, 2, P + V, dtype=torch.float32, device=order.device)
        module.launch(
            "merge", (parts, -(-quads // 32)), 32, sorted_rows, grad_p, grad_v, partial, parents, long(N), long(rows),
            long(span), long(count),
        )  # fmt: skip
        partial, span, count = parents, span * FAN, parts
