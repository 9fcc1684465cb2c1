"""Sums of the partial gradients that blocks leave (of gains, of Tucker cores), in one launch and in a fixed order."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ultramem_kernels.nvrtc import C_TYPES, Kernel, Module, read_source
from ultramem_kernels.tiles import next_power_of_two


def source() -> str:
    """Text of the kernel source."""
    return read_source(Path(__file__).parent / "column_sums.cu")


def make_module(device: torch.device, defines: dict[str, object]) -> Module:
    """The compiled source."""
    return Module(source(), defines, device)


_kernels: dict[tuple[Any, ...], tuple[Kernel, int]] = {}


def column_sums(parts_RW: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Sum over the rows of contiguous fp32 `parts_RW` on a GPU, [W] in `dtype` (fp32, bf16 or fp16)."""
    rows, width = parts_RW.shape
    out = torch.empty(width, dtype=dtype, device=parts_RW.device)
    key = (parts_RW.device, dtype, width)
    found = _kernels.get(key)
    if found is None:
        columns = min(next_power_of_two(width), 32)
        defines = {"FP16": int(dtype == torch.float16), "WIDTH": width, "OUT": C_TYPES[dtype], "COLUMNS": columns}
        kernel = make_module(parts_RW.device, defines).kernel("column_sums", "PPq")
        found = _kernels[key] = kernel, -(-width // columns)
    kernel, blocks = found
    kernel((blocks, 1), 1024, parts_RW.data_ptr(), out.data_ptr(), rows)
    return out
