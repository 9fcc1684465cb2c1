"""Launchers of the hand-written CUDA kernels of the retrieval. Legend as in reference.py."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from ultramem_kernels.nvrtc import Module, long

WARPS = 4  # per block, as in the sources
MAX_KEYS = 4096
MAX_COARSE_K = 128
MAX_EXACT_K = 128
MAX_EXACT_M = 1024
MAX_CORES = 32  # numbers of all cores together, in the backward


@cache
def _source(name: str) -> str:
    folder = Path(__file__).parent
    shared = "" if name == "dense_gradient.cu" else (folder / "top_k.cuh").read_text()
    return shared + (folder / name).read_text()


@cache
def _module(name: str, device: torch.device, **defines: object) -> Module:
    return Module(_source(name), defines, device)


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
    largest = MAX_EXACT_M if coarse_k > 32 else MAX_EXACT_M // 2  # several tokens share a block's shared memory
    return _available(side_SRTN) and coarse_k <= MAX_EXACT_K and top_m <= largest


def coarse_pass(side_SRTN: torch.Tensor, leading_SR: torch.Tensor, coarse_k: int) -> torch.Tensor:
    """Candidates [T, S, K] int32; `leading_SR` fp32. Reads up to 7 scores beyond N: they must be allocated."""
    S, R, T, N = side_SRTN.shape
    candidates = torch.empty(T, S, coarse_k, dtype=torch.int32, device=side_SRTN.device)
    if T:
        cap = 128 if coarse_k <= 64 else 256
        module = _module(
            "coarse.cu", side_SRTN.device, **_dtype_defines(side_SRTN.dtype), R=R, K=coarse_k,
            CHUNKS=-(-N // 256), CAP_K=cap,
        )  # fmt: skip
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
    """(indices [T, M], scores [T, M, C] fp32, keys [S, T, M] int32, side scores at them [S, R, T, M] fp32)."""
    S, R, T, N = side_SRTN.shape
    C, K, device = cores_CRR.shape[0], candidates_TSK.shape[2], side_SRTN.device
    narrow = rows <= 2**31 - 1
    indices = torch.empty(T, top_m, dtype=torch.int32 if narrow else torch.int64, device=device)
    scores = torch.empty(T, top_m, C, dtype=torch.float32, device=device)
    keys = torch.empty(S, T, top_m, dtype=torch.int32, device=device)
    kept = torch.empty(S, R, T, top_m, dtype=torch.float32, device=device)
    if T:
        warps = -(-K // 32)
        module = _module(
            "exact.cu", device, **_dtype_defines(side_SRTN.dtype), R=R, C=C, K=K, M=top_m, NW=warps,
            CAP_M=max(128, -(-2 * top_m // (32 * warps)) * 32 * warps), OUT="int" if narrow else "i64",
            SHUFFLE=int(permutation is not None),
        )  # fmt: skip
        strides = [long(stride) for stride in side_SRTN.stride()[:3]]
        grid, threads = ((-(-T // WARPS), 1), 32 * WARPS) if warps == 1 else ((T, 1), 32 * warps)
        module.launch(
            "exact", grid, threads, side_SRTN, candidates_TSK, cores_CRR, permutation, indices, scores,
            keys, kept, T, N, *strides, long(offset), long(rows),
        )  # fmt: skip
    return indices, scores, keys, kept


def supports_dense_gradient(kept_SRTM: torch.Tensor, cores_CRR: torch.Tensor, width: int) -> bool:
    """Whether the backward kernel covers the shape; `width` is that of the dense gradient's rows."""
    return (
        kept_SRTM.is_cuda
        and torch.version.cuda is not None
        and torch.cuda.get_device_capability(kept_SRTM.device) >= (8, 0)
        and kept_SRTM.shape[3] <= MAX_EXACT_M
        and cores_CRR.numel() <= MAX_CORES
        and kept_SRTM.shape[3] * (1 + kept_SRTM.shape[1]) * 8 <= 40960  # bytes of shared memory
        and width % 8 == 0
    )


def dense_gradient(
    grad_scores_TMC: torch.Tensor,
    kept_SRTM: torch.Tensor,
    cores_CRR: torch.Tensor,
    keys_STM: torch.Tensor,
    width: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_side [S, R, T, width] in `dtype`, d_cores [C, R, R] fp32); scores' gradient and cores fp32."""
    S, R, T, M = kept_SRTM.shape
    C, device = cores_CRR.shape[0], kept_SRTM.device
    grad_side = torch.empty(S, R, T, width, dtype=dtype, device=device)
    grad_cores = torch.empty(T, C, R, R, dtype=torch.float32, device=device)
    if T:
        threads = 32 if M <= 32 else min(-(-M // 32) * 32, 256)
        module = _module("dense_gradient.cu", device, **_dtype_defines(dtype), R=R, C=C, M=M, THREADS=threads)
        grid, block = ((-(-T // WARPS), 1), 32 * WARPS) if threads == 32 else ((T, 1), threads)
        module.launch(
            "dense_gradient",
            grid,
            block,
            grad_scores_TMC,
            kept_SRTM,
            cores_CRR,
            keys_STM,
            grad_side,
            grad_cores,
            T,
            width,
        )
    return grad_side, grad_cores.sum(0)
