"""Precision rules shared by the memory layer: bf16 in, fp32 accumulation and out; fp64 stays fp64."""

from __future__ import annotations

import torch


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which sums of `dtype` numbers are formed: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def bmm_accumulated(a_BXY: torch.Tensor, b_BYZ: torch.Tensor) -> torch.Tensor:
    """Batched product without rounding of the result: [B, X, Z] in the accumulation dtype. Not differentiable."""
    if a_BXY.is_cuda and a_BXY.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a_BXY, b_BYZ, out_dtype=torch.float32)  # tensor cores, without an fp32 copy of the inputs
    dtype = accumulation_dtype(a_BXY.dtype)
    return torch.bmm(a_BXY.to(dtype), b_BYZ.to(dtype))


def tokens_per_chunk(elements_per_token: int, is_cuda: bool) -> int:
    """Tokens whose temporaries together stay near 64 Mi elements on a GPU, 1 Mi on a CPU (its caches); at least one."""
    return max(1, ((1 << 26) if is_cuda else (1 << 20)) // max(1, elements_per_token))
