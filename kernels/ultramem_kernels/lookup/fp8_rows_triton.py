"""Quantisation of rows to E4M3 in Triton, and the decoding that the lookup's kernels share.

Both by integer arithmetic: GPUs without 8-bit floats, and Triton's interpreter, compute the same codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ultramem_kernels.lookup.fp8_rows import SMALLEST_AMAX
from ultramem_kernels.tiles import next_power_of_two, rows_argument


@triton.jit
def decode(codes):
    """fp32 of E4M3 codes: fp32 has the same layout but for the widths, and its exponent is off by 120."""
    codes = codes.to(tl.uint32)
    return ((codes & 0x80) << 24 | (codes & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36


@triton.jit
def encode(x):
    """uint8 codes of fp32 numbers within +-448, rounded to nearest, ties to even."""
    bits = x.to(tl.uint32, bitcast=True)
    sign, magnitude = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = ((magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) >> 20) - 960  # 960 = 120 << 3
    # Below 2^-6 codes are multiples of 2^-9, which is the last place of 2^14.
    small = (magnitude.to(tl.float32, bitcast=True) + 16384.0).to(tl.uint32, bitcast=True) - 0x46800000
    return (sign | tl.where(magnitude < 0x3C800000, small, normal)).to(tl.uint8)


@triton.jit
def quantize_kernel(
    table, codes, scales, amax, rows, scale_stride, tiny,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, HAS_AMAX: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    column = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (column < D)[None, :]
    at = row[:, None] * D + column[None, :]
    x = tl.load(table + at, mask=mask, other=0.0).to(tl.float32)
    if HAS_AMAX:
        largest = tl.load(amax + row, mask=row < rows, other=0.0)
    else:
        largest = tl.max(tl.abs(x), axis=1)
    some = largest > tiny
    divisor = tl.where(some, largest, 1.0)
    factor = tl.where(some, tl.div_rn(448.0, divisor), 0.0)
    tl.store(scales + row * scale_stride, tl.where(some, largest * 0.002232142857142857, 0.0), mask=row < rows)
    scaled = tl.minimum(tl.maximum(x * factor[:, None], -448.0), 448.0)
    tl.store(codes + at, encode(scaled), mask=mask)


def quantize_(
    table_ND: torch.Tensor, codes_ND: torch.Tensor, scales_N: torch.Tensor, amax_N: torch.Tensor | None
) -> None:
    """As `fp8_rows.quantize_`."""
    rows, D = rows_argument(table_ND), table_ND.shape[1]
    if rows == 0:
        return
    block_d = next_power_of_two(D)
    block_n = max(1, 4096 // block_d)
    quantize_kernel[(triton.cdiv(rows, block_n),)](
        table_ND, codes_ND, scales_N, amax_N, rows, scales_N.stride(0), SMALLEST_AMAX,
        D, block_n, block_d, HAS_AMAX=amax_N is not None, num_warps=4,
    )  # fmt: skip
