"""Launchers of the hand-written CUDA kernels of the norm (norm.cu). Legend as in reference.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from ultramem_kernels.column_sums import column_sums
from ultramem_kernels.nvrtc import C_TYPES, Kernel, Module, device_supported, multiprocessors, read_source

WARPS = 8
BACKWARD_BLOCKS = 4  # per multiprocessor; each leaves one partial sum of the gain's gradient


def source() -> str:
    """Text of the kernel source."""
    return read_source(Path(__file__).parent / "norm.cu")


def make_module(device: torch.device, defines: dict[str, object]) -> Module:
    """The compiled source."""
    return Module(source(), defines, device)


class _Kernels(NamedTuple):
    forward: Kernel
    backward: Kernel


_kernels: dict[tuple[Any, ...], _Kernels] = {}


def _kernels_for(x_GBAD: torch.Tensor, gain_D: torch.Tensor) -> _Kernels:
    key = (x_GBAD.device, x_GBAD.dtype, gain_D.dtype, x_GBAD.shape[3])
    kernels = _kernels.get(key)
    if kernels is None:
        defines = {
            "FP16": int(x_GBAD.dtype == torch.float16), "WIDE": int(x_GBAD.dtype == torch.float32),
            "GAIN": C_TYPES[gain_D.dtype], "D": x_GBAD.shape[3], "WARPS": WARPS,
        }  # fmt: skip
        module = make_module(x_GBAD.device, defines)
        kernels = _kernels[key] = _Kernels(
            module.kernel("norm_forward", "PPPqiiiqqqf"), module.kernel("norm_backward", "PPPPPqiiiqqqf")
        )
    return kernels


def supports(x_GBAD: torch.Tensor, gain_D: torch.Tensor) -> bool:
    """Whether these kernels cover the shape: rows that start at multiples of 16 bytes, up to 1024 wide."""
    D, dtype = x_GBAD.shape[3], x_GBAD.dtype
    return (
        device_supported(x_GBAD.device)
        and dtype in (torch.bfloat16, torch.float16, torch.float32)
        and gain_D.dtype in (torch.float32, dtype)
        and D % 8 == 0
        and 0 < D <= 1024
        and x_GBAD.data_ptr() % 16 == 0
        and (x_GBAD.stride(0) | x_GBAD.stride(1) | x_GBAD.stride(2)) % 8 == 0
    )


def forward(x_GBAD: torch.Tensor, gain_D: torch.Tensor, eps: float, rows_out: int) -> torch.Tensor:
    """[G, B, A, D] -> contiguous [G, A, rows_out, D]."""
    G, B, A, D = x_GBAD.shape
    y = torch.empty(G, A, rows_out, D, dtype=x_GBAD.dtype, device=x_GBAD.device)
    rows = G * A * rows_out
    if rows:
        _kernels_for(x_GBAD, gain_D).forward(
            (-(-rows // WARPS), 1), 32 * WARPS, x_GBAD.data_ptr(), gain_D.data_ptr(), y.data_ptr(), rows, A, B,
            rows_out, *x_GBAD.stride()[:3], eps,
        )  # fmt: skip
    return y


def backward(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, grad_GABD: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_x contiguous [G, B, A, D], grad_gain [D]). `grad_GABD` contiguous, perhaps with more than B rows."""
    G, B, A, D = x_GBAD.shape
    device = x_GBAD.device
    grad_x = torch.empty(G, B, A, D, dtype=x_GBAD.dtype, device=device)
    rows = G * A * B
    if rows == 0:
        return grad_x, torch.zeros_like(gain_D)
    blocks = min(-(-rows // WARPS), BACKWARD_BLOCKS * multiprocessors(device))
    grad_gain = torch.empty(blocks, D, dtype=torch.float32, device=device)
    _kernels_for(x_GBAD, gain_D).backward(
        (blocks, 1), 32 * WARPS, x_GBAD.data_ptr(), gain_D.data_ptr(), grad_GABD.data_ptr(), grad_x.data_ptr(),
        grad_gain.data_ptr(), rows, A, B, grad_GABD.shape[2], *x_GBAD.stride()[:3], eps,
    )  # fmt: skip
    return grad_x, column_sums(grad_gain, gain_D.dtype)
