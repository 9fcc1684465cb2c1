"""Tables whose rows are read as E4M3 codes (OCP 8-bit floats, no infinities) with one fp32 scale a row.

    scale[n]     = max |row n| * (1 / 448)    448: the largest number of E4M3
    codes[n, d]  = E4M3 nearest to row[n, d] * (448 / max |row n|), ties to even
    row n        ~ scale[n] * codes[n]        within 1/16 of each number, or scale / 1024 of those near zero

Rows of zeros, or of numbers so small that their scale would have no reciprocal, have scale 0 and codes 0. Codes are
uint8, which torch's operations take that know no 8-bit floats. Scales are fp32: 4 bytes beside a row of 192 are 2 %,
and products with them round as those of fp32 arithmetic do anyway. The scales of two tables whose rows are read
together are best the two columns of one [N, 2], that of the pre-values first: DRAM then gives both in one access.
"""

from __future__ import annotations

import torch

from ultramem_kernels.dispatch import choose

LARGEST = 448.0
SMALLEST_AMAX = 2.0**-100


def row_amax(table_ND: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every row, [N] fp32. Of rows that lie in several shards, to be made the largest of all."""
    return torch.linalg.vector_norm(table_ND, float("inf"), dim=1, dtype=torch.float32)


def quantize_(
    table_ND: torch.Tensor,
    codes_ND: torch.Tensor,
    scales_N: torch.Tensor,
    amax_N: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> None:
    """Fills codes (uint8) and scales (fp32, of any stride) of a table of any float dtype.

    amax_N: `row_amax` of the whole rows, where the table is a shard of their columns; None: of these.
    backend: 'reference' or 'triton'; None chooses by device.
    """
    if choose(backend, table_ND, lambda: False) == "triton":
        from ultramem_kernels.lookup.fp8_rows_triton import quantize_ as by_triton

        by_triton(table_ND, codes_ND, scales_N, amax_N)
        return
    amax_N = row_amax(table_ND) if amax_N is None else amax_N
    some_N = amax_N > SMALLEST_AMAX
    zero = amax_N.new_zeros(())
    scales_N.copy_((amax_N * (1 / LARGEST)).where(some_N, zero))  # GPUs divide by a constant so, CPUs do not
    factor_N = (amax_N.new_full((), LARGEST) / amax_N).where(some_N, zero)  # a quotient: 448 / amax is a reciprocal
    step = max(1, (1 << 24) // max(1, table_ND.shape[1]))  # rows whose fp32 copies exist at a time
    for low in range(0, len(table_ND), step):
        part = slice(low, low + step)
        scaled = table_ND[part].float() * factor_N[part, None]
        codes_ND[part] = scaled.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def decode(codes: torch.Tensor) -> torch.Tensor:
    """The fp32 numbers of E4M3 codes, without their scales."""
    return codes.view(torch.float8_e4m3fn).float()
