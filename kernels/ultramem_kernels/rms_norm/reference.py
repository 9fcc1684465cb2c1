"""RMS norm over the last dimension, in plain PyTorch: y = x / sqrt(mean(x^2) + eps) * gain (queries and keys).

Legend: G groups, B tokens or keys, A parts of each (sides * ranks of a query, ranks of a key), D width of a part.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F


def rms_norm(x: torch.Tensor, gain_D: torch.Tensor, eps: float) -> torch.Tensor:
    """`x` [..., D] -> the same shape and dtype; arithmetic in fp32 (fp64 for fp64), rounded once."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * gain_D.to(dtype)).to(x.dtype)


def rms_norm_swapped(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, eps: float, rows_out: int | None = None
) -> torch.Tensor:
    """`rms_norm`, with B and A swapped in the result: contiguous [G, A, rows_out, D], zeros from row B on."""
    y_GABD = rms_norm(x_GBAD, gain_D, eps).transpose(1, 2)
    more = (rows_out or x_GBAD.shape[1]) - x_GBAD.shape[1]
    return (F.pad(y_GABD, (0, 0, 0, more)) if more else y_GABD).contiguous()


def backward_swapped(
    x_GBAD: torch.Tensor, gain_D: torch.Tensor, grad_GABD: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of `rms_norm_swapped`: (x [G, B, A, D], gain [D])."""
    dtype = torch.promote_types(x_GBAD.dtype, torch.float32)
    wide, slope = x_GBAD.to(dtype), grad_GABD[:, :, : x_GBAD.shape[1]].transpose(1, 2).to(dtype)
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    normed = wide * scale
    grad_gain = (slope * normed).sum((0, 1, 2)).to(gain_D.dtype)
    slope = slope * gain_D.to(dtype)
    return (scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))).to(x_GBAD.dtype), grad_gain
