"""How widths are cut into tiles of powers of two, and the checks that every launcher shares."""

from __future__ import annotations

import torch

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def next_power_of_two(x: int) -> int:
    """Smallest power of two >= x (1 for x <= 1)."""
    return 1 << max(x - 1, 0).bit_length()


def cover(width: int, smallest: int = 16) -> tuple[int, int]:
    """(first, second): powers of two whose sum is the least that covers `width`; second is 0 when one is as good.

    cover(192) = (128, 64), cover(72) = (64, 16), cover(256) = (256, 0), cover(1138) = (1024, 128).
    """
    whole = max(next_power_of_two(width), smallest)
    first = whole // 2
    if first < smallest or width <= first:
        return whole, 0
    second = max(next_power_of_two(width - first), smallest)
    return (whole, 0) if first + second >= whole else (first, second)


def float_dtype_ok(table: torch.Tensor | None) -> None:
    """Raises TypeError unless the table's dtype is one the kernels read."""
    if table is not None and table.dtype not in FLOAT_DTYPES:
        raise TypeError(f"tables of dtype {table.dtype}: the kernels read bfloat16, float16 and float32")


def rows_argument(table: torch.Tensor) -> int:
    """Rows of a table, after checking that its rows lie one behind the other."""
    if not table.is_contiguous():
        raise ValueError(f"a table of strides {table.stride()}: the kernels need contiguous rows")
    return table.shape[0]
