"""Gradients of a table by sorted segment sums, in Triton: bitwise equal from run to run.

The T*M entries are sorted by row (one sort serves both tables). A *segment* is the run of entries of one row. Entries
are cut into tiles of TILE; a segment is *hot* at a tile boundary when it crosses it and reaches beyond the two tiles
around it. A *chunk* starts where a segment starts and at every hot boundary; it ends at its segment's end or at the
next hot boundary, so it has at most 2*TILE entries. A whole segment is added to its row of the gradient at once; chunks
of hot segments leave partial sums, which `merge` levels add up in tile order, FAN tiles at a time, until one group is
left.

    partial[b, 0] (head): what the tiles of group b add to the segment that is hot at the group's first boundary
    partial[b, 1] (tail): what they add to the segment that is hot at its last boundary and started inside the group
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ultramem_kernels.tiles import cover

TILE = 32
FAN = 64


@triton.jit
def hot_boundary(sorted_rows, position, N, TILE: tl.constexpr):
    """Whether a segment crosses `position` (a multiple of TILE) and reaches beyond the tiles before and after it."""
    inside = (position > 0) & (position < N)
    row = tl.load(sorted_rows + position, mask=inside, other=-1)
    crosses = inside & (tl.load(sorted_rows + position - 1, mask=inside, other=-2) == row)
    far_left = tl.load(sorted_rows + position - TILE - 1, mask=crosses & (position > TILE), other=-2) == row
    far_right = tl.load(sorted_rows + position + TILE, mask=crosses & (position + TILE < N), other=-2) == row
    return crosses & (far_left | far_right)


@triton.jit
def chunk_weights(weights, entry, active, columns, core_width, column_start, C: tl.constexpr):
    """[BLOCK, width]: weights[entry, core(column)]; 0 where not active."""
    spread = tl.load(weights + entry * C, mask=active, other=0.0).to(tl.float32)[:, None]
    spread = tl.broadcast_to(spread, (entry.shape[0], columns.shape[0]))
    core = (columns + column_start) // core_width
    for c in tl.static_range(1, C):
        weight = tl.load(weights + entry * C + c, mask=active, other=0.0).to(tl.float32)
        spread = tl.where((core >= c)[None, :], weight[:, None], spread)
    return spread


@triton.jit
def add_chunk(grad, partial, row, tile, total, to_grad, is_head, is_tail, columns, D):
    """Where a chunk's sum belongs: the gradient's row, or one of the two partial sums of its tile."""
    inside = (columns < D)[None, :]
    pointers = grad + row[:, None] * D + columns[None, :]
    old = tl.load(pointers, mask=to_grad[:, None] & inside, other=0.0)
    tl.store(pointers, old + total, mask=to_grad[:, None] & inside)
    slot = tile * 2 + is_tail.to(tl.int64)
    tl.store(partial + slot[:, None] * D + columns[None, :], total, mask=(is_head | is_tail)[:, None] & inside)


@triton.jit
def segments_kernel(
    sorted_rows, order, weights, x, grad, partial,
    N, rows, M, core_width, column_start,
    D: tl.constexpr, C: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """BLOCK consecutive positions per program; the chunks that start at them are summed side by side."""
    start = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d0, d1 = tl.arange(0, D0), D0 + tl.arange(0, D1 if D1 > 0 else 1)
    inside = start < N
    row = tl.load(sorted_rows + start, mask=inside, other=-1).to(tl.int64)
    before = tl.load(sorted_rows + start - 1, mask=inside & (start > 0), other=-1).to(tl.int64)
    exists = inside & (row >= 0) & (row < rows)
    is_head = exists & (start % TILE == 0) & hot_boundary(sorted_rows, start, N, TILE)
    live = exists & ((before != row) | is_head)
    next_boundary = (start // TILE + 1) * TILE
    boundary_hot = hot_boundary(sorted_rows, next_boundary, N, TILE)
    total0 = tl.zeros((BLOCK, D0), tl.float32)
    total1 = tl.zeros((BLOCK, D1 if D1 > 0 else 1), tl.float32)
    active = live
    ended_hot = live & (start < 0)
    step = 0
    while tl.max(active.to(tl.int32), axis=0) > 0:
        entry = tl.load(order + start + step, mask=active, other=0).to(tl.int64)
        token = entry // M
        x0 = tl.load(x + token[:, None] * D + d0[None, :], mask=active[:, None] & (d0 < D)[None, :], other=0.0)
        total0 += x0.to(tl.float32) * chunk_weights(weights, entry, active, d0, core_width, column_start, C)
        if D1 > 0:
            x1 = tl.load(x + token[:, None] * D + d1[None, :], mask=active[:, None] & (d1 < D)[None, :], other=0.0)
            total1 += x1.to(tl.float32) * chunk_weights(weights, entry, active, d1, core_width, column_start, C)
        step += 1
        follower = tl.load(sorted_rows + start + step, mask=active & (start + step < N), other=-1).to(tl.int64)
        at_hot = active & (follower == row) & (start + step == next_boundary) & boundary_hot
        ended_hot = ended_hot | at_hot
        active = active & (follower == row) & (at_hot == 0)
    is_tail = ended_hot & (is_head == 0)
    to_grad = live & (is_head == 0) & (ended_hot == 0)
    tile = start // TILE
    add_chunk(grad, partial, row, tile, total0, to_grad, is_head, is_tail, d0, D)
    if D1 > 0:
        add_chunk(grad, partial, row, tile, total1, to_grad, is_head, is_tail, d1, D)


@triton.jit
def merge_kernel(
    sorted_rows, grad, children, parents, N, rows, child_span, child_count,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FAN: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums of FAN children (each `child_span` entries wide) in order; one program per group."""
    group = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = columns < D
    child = group * FAN + tl.arange(0, FAN)
    hot_start = hot_boundary(sorted_rows, child * child_span, N, TILE) & (child < child_count)
    hot_end = hot_boundary(sorted_rows, (child + 1) * child_span, N, TILE) & (child < child_count)
    wanted = hot_start | hot_end
    inherited = group < 0
    total = tl.zeros((BLOCK_D,), tl.float32)
    nothing = FAN
    at = tl.min(tl.where(wanted, tl.arange(0, FAN), nothing), axis=0)
    while at < nothing:
        here = group * FAN + at
        first = here * child_span
        last = tl.minimum(first + child_span, N) - 1
        starts_hot = tl.max((hot_start & (child == here)).to(tl.int32), axis=0) > 0
        ends_hot = tl.max((hot_end & (child == here)).to(tl.int32), axis=0) > 0
        one_row = tl.load(sorted_rows + first) == tl.load(sorted_rows + last)
        if starts_hot:
            total += tl.load(children + here * 2 * D + columns, mask=inside, other=0.0)
            inherited = inherited | (at == 0)
            if not (ends_hot & one_row):
                row = tl.load(sorted_rows + first).to(tl.int64)
                if inherited:
                    tl.store(parents + group * 2 * D + columns, total, mask=inside)
                else:
                    exists = inside & (row >= 0) & (row < rows)
                    old = tl.load(grad + row * D + columns, mask=exists, other=0.0)
                    tl.store(grad + row * D + columns, old + total, mask=exists)
                total = tl.zeros((BLOCK_D,), tl.float32)
                inherited = group < 0
        if ends_hot & ((starts_hot & one_row) == 0):
            total = tl.load(children + (here * 2 + 1) * D + columns, mask=inside, other=0.0)
        at = tl.min(tl.where(wanted & (tl.arange(0, FAN) > at), tl.arange(0, FAN), nothing), axis=0)
    last_hot = tl.max((hot_end & (tl.arange(0, FAN) == FAN - 1)).to(tl.int32), axis=0) > 0
    if last_hot:
        slot = tl.where(inherited, 0, 1)
        tl.store(parents + (group * 2 + slot) * D + columns, total, mask=inside)


def add_segments_(
    grad_ND: torch.Tensor,
    sorted_rows: torch.Tensor,
    order: torch.Tensor,
    weights_TMC: torch.Tensor,
    x_TD: torch.Tensor,
    core_width: int,
    column_start: int = 0,
    *,
    block: int = 8,
    num_warps: int = 4,
) -> None:
    """`grad[row(t, m), col] += weights[t, m, core(col)] * x[t, col]` in place, in an order fixed by the indices.

    `grad_ND` fp32 contiguous; `sorted_rows`, `order` from `table_gradients.sort_entries`.
    """
    rows, D = grad_ND.shape
    T, M, C = weights_TMC.shape
    N = T * M
    if N == 0:
        return
    D0, D1 = cover(D)
    tiles = triton.cdiv(N, TILE)
    partial = torch.empty(tiles, 2, D, dtype=torch.float32, device=grad_ND.device)
    segments_kernel[(triton.cdiv(N, block),)](
        sorted_rows, order, weights_TMC, x_TD, grad_ND, partial, N, rows, M, core_width, column_start,
        D, C, D0, D1, BLOCK=block, TILE=TILE, num_warps=num_warps,
    )  # fmt: skip
    span, count = TILE, tiles
    block_d = min(triton.next_power_of_2(D), 256)
    while count > 1:
        groups = triton.cdiv(count, FAN)
        parents = torch.empty(groups, 2, D, dtype=torch.float32, device=grad_ND.device)
        merge_kernel[(groups, triton.cdiv(D, block_d))](
            sorted_rows, grad_ND, partial, parents, N, rows, span, count,
            D, block_d, FAN=FAN, TILE=TILE, num_warps=2,
        )  # fmt: skip
        partial, span, count = parents, span * FAN, groups
