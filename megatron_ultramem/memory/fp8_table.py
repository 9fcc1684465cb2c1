"""Value tables read as E4M3 numbers with one fp32 scale a row (model.memory.table_read = fp8).

    scale[row] = max |row| * (1 / 448),   codes = E4M3(row * (448 / max |row|)),   read: scale * codes

A copy beside the parameter, of 1 byte a number, so that lookups move half the bytes of bf16; the gradient of what was
read is the parameter's (straight through the rounding). The largest number is that of the whole row, whatever part of
its columns a rank holds, so that every placement reads the same numbers.

The copy is made of the parameter, that is of the fp32 master weight rounded to bf16, and not of the master itself: that
is cut over data-parallel ranks and may lie in host memory, whereas evaluation, generation and resumed runs have the
parameter and must read what training reads. bf16 has 8 significant bits and E4M3 has 4, so that rounding twice adds
less than 0.5 % to the error of rounding once (tested).

Plain PyTorch, the documentation of what the kernels in `ultramem_kernels.lookup.fp8_rows` compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

LARGEST = 448.0  # of E4M3
SMALLEST_AMAX = 2.0**-100  # a row of smaller numbers reads as zeros: its scale would have no reciprocal


@dataclass(frozen=True)
class Fp8Table:
    """What a lookup reads in place of a table, or of a shard of one, of `dtype`.

    codes: uint8 [rows, width], E4M3. scales: fp32 [rows], of any stride.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    dtype: torch.dtype

    @classmethod
    def like(cls, *tables: torch.Tensor) -> tuple[Fp8Table, ...]:
        """For tables [rows, width] of a pool; not filled yet. Their scales lie side by side, row by row: a lookup that
        wants those of several gets them in one access to memory."""
        scales_NX = torch.empty(len(tables[0]), len(tables), dtype=torch.float32, device=tables[0].device)
        return tuple(
            cls(torch.empty(table.shape, dtype=torch.uint8, device=table.device), scales_N, table.dtype)
            for table, scales_N in zip(tables, scales_NX.unbind(1), strict=True)
        )

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def is_cuda(self) -> bool:
        return self.codes.is_cuda

    def rows(self, index_X: torch.Tensor) -> torch.Tensor:
        """The numbers of some rows, fp32 [X, width]."""
        codes_XD = self.codes.index_select(0, index_X).view(torch.float8_e4m3fn)
        return codes_XD.float() * self.scales.index_select(0, index_X).unsqueeze(-1)


Table = torch.Tensor | Fp8Table


def row_amax(table_ND: torch.Tensor) -> torch.Tensor:
    """Largest magnitude of every row, fp32 [N]."""
    return torch.linalg.vector_norm(table_ND, float("inf"), dim=1).float()


def quantize_(copy: Fp8Table, table_ND: torch.Tensor, amax_N: torch.Tensor) -> None:
    """Fills the copy of a table, whose whole rows have the largest magnitudes `amax_N` (fp32)."""
    some_N, zero = amax_N > SMALLEST_AMAX, amax_N.new_zeros(())
    copy.scales.copy_((amax_N * (1 / LARGEST)).where(some_N, zero))  # GPUs divide by a constant so, CPUs do not
    factor_N = (amax_N.new_full((), LARGEST) / amax_N).where(some_N, zero)  # a quotient: 448 / amax is a reciprocal
    step = max(1, (1 << 24) // max(1, table_ND.shape[1]))  # rows whose fp32 copies exist at a time
    for low in range(0, len(table_ND), step):
        part = slice(low, low + step)
        scaled = (table_ND[part].float() * factor_N[part, None]).clamp(-LARGEST, LARGEST)
        copy.codes[part] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)
