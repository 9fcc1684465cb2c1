"""RMS norm in Triton, forward and backward: ROWS rows per program at a time, each read once.

Rows come as [G, B, A, D] of any strides but 1 of D and go out as contiguous [G, A, B, D]: the norm of queries (or keys)
also turns [tokens, side * rank, D] into the [side * rank, tokens, D] that the score product reads.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ultramem_kernels.tiles import next_power_of_two


@triton.jit
def input_offsets(row, A, B, stride_g, stride_b, stride_a):
    """Where row number `row` of the output order (g, a, b) lies in an input of the given strides."""
    b, rest = row % B, row // B
    a, g = rest % A, rest // A
    return g.to(tl.int64) * stride_g + b.to(tl.int64) * stride_b + a.to(tl.int64) * stride_a


@triton.jit
def forward_kernel(
    x, gain, y, total_rows, A, B, B_OUT, stride_g, stride_b, stride_a, D, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Rows B..B_OUT-1 of the result are zero."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    mask = (row < total_rows)[:, None] & (columns < D)[None, :]
    start = input_offsets(row, A, B_OUT, stride_g, stride_b, stride_a)
    real = mask & (row % B_OUT < B)[:, None]
    tile = tl.load(x + start[:, None] + columns[None, :], mask=real, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(tile * tile, axis=1) / D + eps)
    factor = tl.load(gain + columns, mask=columns < D, other=0.0).to(tl.float32)
    out = tile * scale[:, None] * factor[None, :]
    tl.store(y + row.to(tl.int64)[:, None] * D + columns[None, :], out.to(y.dtype.element_ty), mask=mask)


@triton.jit
def backward_kernel(
    x, gain, grad_y, grad_x, grad_gain, total_rows, A, B, B_OUT, stride_g, stride_b, stride_a, D, eps,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, REPEAT: tl.constexpr,
):  # fmt: skip
    """grad_x = scale * (g - xhat * mean(g * xhat)), g = grad_y * gain; gain's gradient as one partial per program."""
    columns = tl.arange(0, BLOCK)
    factor = tl.load(gain + columns, mask=columns < D, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for repeat in range(REPEAT):
        row = (tl.program_id(0) * REPEAT + repeat) * ROWS + tl.arange(0, ROWS)
        mask = (row < total_rows)[:, None] & (columns < D)[None, :]
        at = input_offsets(row, A, B, stride_g, stride_b, stride_a)[:, None] + columns[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
        slope_at = (row // B).to(tl.int64) * B_OUT + row % B
        slope_at = slope_at[:, None] * D + columns[None, :]
        slope = tl.load(grad_y + slope_at, mask=mask, other=0.0).to(tl.float32)
        scale = tl.rsqrt(tl.sum(tile * tile, axis=1) / D + eps)
        normed = tile * scale[:, None]
        total += slope * normed
        slope *= factor[None, :]
        mean = tl.sum(slope * normed, axis=1) / D
        out = scale[:, None] * (slope - normed * mean[:, None])
        home = input_offsets(row, A, B, B * A * D, A * D, D)[:, None] + columns[None, :]
        tl.store(grad_x + home, out.to(grad_x.dtype.element_ty), mask=mask)
    tl.store(grad_gain + tl.program_id(0) * D + columns, tl.sum(total, axis=0), mask=columns < D)


def _tile(D: int) -> tuple[int, int]:
    """(rows per program, padded width): about 2048 numbers a program."""
    block = next_power_of_two(D)
    return max(1, 2048 // block), block


def forward(x_GBAD: torch.Tensor, gain_D: torch.Tensor, eps: float, rows_out: int) -> torch.Tensor:
    """[G, B, A, D] -> contiguous [G, A, rows_out, D]."""
    G, B, A, D = x_GBAD.shape
    y = torch.empty(G, A, rows_out, D, dtype=x_GBAD.dtype, device=x_GBAD.device)
    rows, block = _tile(D)
    if y.numel():
        forward_kernel[(triton.cdiv(G * A * rows_out, rows),)](
            x_GBAD, gain_D, y, G * A * rows_out, A, B, rows_out, *x_GBAD.stride()[:3], D, eps, rows, block, num_warps=4
        )
    return y


def backward(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, grad_GABD: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_x contiguous [G, B, A, D], grad_gain [D]). `grad_GABD` contiguous, perhaps with more than B rows."""
    G, B, A, D = x_GBAD.shape
    grad_x = torch.empty(x_GBAD.shape, dtype=x_GBAD.dtype, device=x_GBAD.device)
    rows, block = _tile(D)
    repeat = max(1, min(8, G * A * B // (rows * 1024)))
    programs = triton.cdiv(G * A * B, rows * repeat)
    grad_gain = torch.empty(programs, D, dtype=torch.float32, device=x_GBAD.device)
    if x_GBAD.numel():
        backward_kernel[(programs,)](
            x_GBAD, gain_D, grad_GABD, grad_x, grad_gain, G * A * B, A, B, grad_GABD.shape[2],
            *x_GBAD.stride()[:3], D, eps, rows, block, repeat, num_warps=4,
        )  # fmt: skip
    return grad_x, grad_gain.sum(0).to(gain_D.dtype)
