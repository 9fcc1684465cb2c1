"""Launchers of the hand-written CUDA selection (select.cu). Legend as in reference.py."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch

from ultramem_kernels.nvrtc import Module, long

WARPS = 4  # per block, as in select.cu
MAX_KEYS = 4096
MAX_COARSE_K = 128
MAX_EXACT_K = 32
MAX_EXACT_M = 64


@lru_cache(maxsize=None)
def _module(device: torch.device, **defines: object) -> Module:
    return Module((Path(__file__).parent / "select.cu").read_text(), defines, device)


def _dtype_defines(dtype: torch.dtype) -> dict[str, int]:
    return {"FP16": int(dtype == torch.float16), "WIDE": int(dtype == torch.float32)}


def _available(side_SRTN: torch.Tensor) -> bool:
    return (
        side_SRTN.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(side_SRTN.device) >= (8, 0)
        and side_SRTN.dtype in (torch.bfloat16, torch.float16, torch.float32)
    )


def supports_coarse(side_SRTN: torch.Tensor, coarse_k: int) -> bool:
    """Whether the coarse kernel covers the shape; it reads rows of scores in steps of 16 bytes."""
    aligned = all(stride % 8 == 0 for stride in side_SRTN.stride()[:3]) and side_SRTN.data_ptr() % 32 == 0
    return _available(side_SRTN) and aligned and side_SRTN.shape[3] <= MAX_KEYS and coarse_k <= MAX_COARSE_K


def supports_exact(side_SRTN: torch.Tensor, coarse_k: int, top_m: int) -> bool:
    """Whether the exact kernel covers the shape."""
    return _available(side_SRTN) and coarse_k <= MAX_EXACT_K and top_m <= MAX_EXACT_M


def coarse_pass(side_SRTN: torch.Tensor, leading_SR: torch.Tensor, coarse_k: int) -> torch.Tensor:
    """Candidates [T, S, K] int32; `leading_SR` fp32. Reads up to 7 scores beyond N, which must be inside the allocation."""
    S, R, T, N = side_SRTN.shape
    candidates = torch.empty(T, S, coarse_k, dtype=torch.int32, device=side_SRTN.device)
    if T:
        cap = 128 if coarse_k <= 64 else 256
        module = _module(
            side_SRTN.device, **_dtype_defines(side_SRTN.dtype), R=R, C=1, K=coarse_k, CHUNKS=-(-N // 256), CAP_K=cap
        )
        strides = [long(stride) for stride in side_SRTN.stride()[:3]]
        grid = (-(-T // WARPS), S)
        module.launch("coarse", grid, 32 * WARPS, side_SRTN, leading_SR, candidates, T, N, *strides)
    return candidates


def exact_pass(
    side_SRTN: torch.Tensor,
    candidates_TSK: torch.Tensor,
    cores_CRR: torch.Tensor,
    top_m: int,
    permutation: torch.Tensor | None,
    offset: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices [T, M], scores [T, M, C] fp32, keys [S, T, M] int32, their side scores [S, R, T, M] fp32); cores fp32."""
    S, R, T, N = side_SRTN.shape
    C, K, device = cores_CRR.shape[0], candidates_TSK.shape[2], side_SRTN.device
    narrow = rows <= 2**31 - 1
    indices = torch.empty(T, top_m, dtype=torch.int32 if narrow else torch.int64, device=device)
    scores = torch.empty(T, top_m, C, dtype=torch.float32, device=device)
    keys = torch.empty(S, T, top_m, dtype=torch.int32, device=device)
    kept = torch.empty(S, R, T, top_m, dtype=torch.float32, device=device)
    if T:
        module = _module(
            device, **_dtype_defines(side_SRTN.dtype), R=R, C=C, K=K, M=top_m, CAP_M=128, OUT="int" if narrow else "i64",
            SHUFFLE=int(permutation is not None),
        )  # fmt: skip
        strides = [long(stride) for stride in side_SRTN.stride()[:3]]
        module.launch(
            "exact", (-(-T // WARPS), 1), 32 * WARPS, side_SRTN, candidates_TSK, cores_CRR, permutation, indices, scores,
            keys, kept, T, N, *strides, long(offset), long(rows),
        )  # fmt: skip
    return indices, scores, keys, kept
