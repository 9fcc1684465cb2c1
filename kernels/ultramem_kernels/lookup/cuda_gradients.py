"""Launchers of the tables' gradients by hand for NVIDIA GPUs: sort.cu, then segments.cu. Legend as in reference.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from ultramem_kernels.lookup.cuda import aligned, make_module
from ultramem_kernels.nvrtc import C_TYPES, Kernel, pointer

TILE = 32  # as in segments.cu
SORT_BLOCK, SORT_THREADS = 4096, 512  # as in sort.cu
MERGE_THREADS = 256


class Spans(NamedTuple):
    """How segments.cu cuts the work: entries a warp, chunks asked for at once, warps a block, columns at a time."""

    span: int = 32
    ahead: int = 2
    warps: int = 4
    columns: int = 384


# Ways to cut the work, for autotuning; all give the same sums, bit by bit. Fewer columns at a time keep more of the
# inputs in the L2 cache.
WAYS = {"segments": Spans(), "segments_192": Spans(16, 2, 4, 192), "segments_128": Spans(8, 4, 4, 128)}
SORT_LIMIT = (1 << 30) - 1  # entries: as many as sort.cu's published sums can say


class _Sort(NamedTuple):
    begin: Kernel
    one_pass: Kernel


class _Segments(NamedTuple):
    segments: Kernel
    merge: Kernel
    groups: int  # of columns: blocks in y of `segments`


_sorts: dict[tuple[Any, ...], _Sort] = {}
_segments: dict[tuple[Any, ...], _Segments] = {}


def digits_of(rows: int) -> tuple[int, int]:
    """(passes, bits a pass) of the sort of numbers 0..rows."""
    bits = max(rows.bit_length(), 1)
    passes = -(-bits // 8)
    return passes, -(-bits // passes)


def sort_entries(
    indices_TM: torch.Tensor, rows: int, row_start: int = 0, padding_index: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `table_gradients.sort_entries`, but both results int32. `rows` below 2^31, T*M at most `SORT_LIMIT`."""
    N, device = indices_TM.numel(), indices_TM.device
    passes, bits = digits_of(rows)
    key = (device, indices_TM.dtype, passes, bits, padding_index is not None)
    kernels = _sorts.get(key)
    if kernels is None:
        defines = {
            "FP16": 0, "INDEX": C_TYPES[indices_TM.dtype], "BITS": bits, "PASSES": passes,
            "PADDING": int(padding_index is not None),
        }  # fmt: skip
        module = make_module("sort.cu", device, defines)
        kernels = _sorts[key] = _Sort(module.kernel("sort_begin", "PPPqqqq"), module.kernel("sort_pass", "PPPPPPPqi"))
    blocks = -(-N // SORT_BLOCK)
    digits = 1 << bits
    # Rows and entries, each twice (passes alternate between the two).
    space = torch.empty(4, N, dtype=torch.int32, device=device)
    if N:
        # For every pass: of each digit, how often it occurs, and what every block publishes; how many blocks started.
        control = torch.zeros(passes * (digits + blocks * digits + 1), dtype=torch.int32, device=device)
        rows_at, entries_at = (space[0].data_ptr(), space[1].data_ptr()), (space[2].data_ptr(), space[3].data_ptr())
        totals = control.data_ptr()
        published = totals + 4 * passes * digits
        started, grid = published + 4 * passes * blocks * digits, (blocks, 1)
        kernels.begin(
            grid, SORT_THREADS, indices_TM.data_ptr(), rows_at[0], totals, N, row_start, rows, padding_index or 0
        )
        for number in range(passes):
            old, new = number % 2, 1 - number % 2
            kernels.one_pass(
                grid, SORT_THREADS, rows_at[old], entries_at[old] if number else 0, rows_at[new], entries_at[new],
                totals, published, started, N, number,
            )  # fmt: skip
    last = passes % 2
    return space[last], space[2 + last]


def add_segments_(
    sorted_rows: torch.Tensor,
    order: torch.Tensor,
    M: int,
    pre_values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    values: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
    core_width: int,
    column_start: int = 0,
    *,
    spans: Spans = WAYS["segments"],
) -> None:
    """Both tables' gradients, in place, in an order fixed by the indices. `sorted_rows`, `order` from `sort_entries`.

    `pre_values`: (grad [N, P] fp32, pre_input [T, P], d_dot [T, M]);
    `values`: (grad [N, V] fp32, grad_out [T, V], weights [T, M, C]). Either may be absent.
    """
    N = order.numel()
    if N == 0:
        return
    grad_p, x, d_dots = pre_values or (None, None, None)
    grad_v, grad_out, weights = values or (None, None, None)
    inputs, table = (x, grad_p) if x is not None else (grad_out, grad_v)
    assert inputs is not None and table is not None
    P = 0 if grad_p is None else grad_p.shape[1]
    V = 0 if grad_v is None else grad_v.shape[1]
    C = 1 if weights is None else weights.shape[2]
    dot_dtype = torch.float32 if d_dots is None else d_dots.dtype
    weight_dtype = torch.float32 if weights is None else weights.dtype
    quads = (P + V) // 4
    key = (table.device, inputs.dtype, dot_dtype, weight_dtype, P, V, C, spans)
    kernels = _segments.get(key)
    if kernels is None:
        groups = -(-(P + V) // spans.columns)
        defines = {
            "FP16": int(inputs.dtype == torch.float16), "INDEX": "int", "ROW": "int", "WEIGHT": C_TYPES[weight_dtype],
            "DOT": C_TYPES[dot_dtype], "P": P, "V": V, "C": C, "PADDING": 0, "NJ": -(-quads // (32 * groups)),
            "SPAN": spans.span, "AHEAD": spans.ahead, "WARPS": spans.warps,
        }  # fmt: skip
        module = make_module("segments.cu", table.device, defines)
        kernels = _segments[key] = _Segments(
            module.kernel("segments", "P" * 9 + "qqiii"), module.kernel("merge", "PPPPqq"), groups
        )
    tiles = -(-N // TILE)
    partial = torch.empty(tiles, 2, P + V, dtype=torch.float32, device=table.device)
    x = None if x is None else aligned(x)
    grad_out = None if grad_out is None else aligned(grad_out)
    kernels.segments(
        (-(-N // (spans.span * spans.warps)), kernels.groups), 32 * spans.warps, sorted_rows.data_ptr(),
        order.data_ptr(), pointer(d_dots), pointer(weights), pointer(x), pointer(grad_out), pointer(grad_p),
        pointer(grad_v), partial.data_ptr(), N, table.shape[0], M, core_width, column_start,
    )  # fmt: skip
    if tiles > 1:
        kernels.merge(
            (-(-tiles // 32), -(-quads // 32)), MERGE_THREADS, sorted_rows.data_ptr(), pointer(grad_p),
            pointer(grad_v), partial.data_ptr(), N, table.shape[0],
        )  # fmt: skip
