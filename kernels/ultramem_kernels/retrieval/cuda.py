"""Launchers of the hand-written CUDA kernels of the retrieval. Legend as in reference.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ultramem_kernels.column_sums import column_sums
from ultramem_kernels.nvrtc import C_TYPES, Kernel, Module, device_supported, pointer, read_source

WARPS = 4  # per block, as in the sources
MAX_KEYS = 4096
MAX_COARSE_K = 128
MAX_EXACT_K = 128
MAX_EXACT_M = 1024
MAX_CORES = 32  # numbers of all cores together, in the backward


def source(name: str) -> str:
    """Text of a kernel source with what it shares with the others in front."""
    folder = Path(__file__).parent
    return read_source(*([] if name == "dense_gradient.cu" else [folder / "top_k.cuh"]), folder / name)


def make_module(name: str, device: torch.device, defines: dict[str, object]) -> Module:
    """A compiled source."""
    return Module(source(name), defines, device)


_kernels: dict[tuple[Any, ...], Kernel] = {}

_SIGNATURES = {
    "coarse": "PPPiiqqq",
    "exact": "PPPPPPPPiiqqqqq",
    "known": "PPPPPPPiiiqqqqq",
    "dense_gradient": "PPPPPPii",
}


def _kernel(name: str, device: torch.device, dtype: torch.dtype, core_dtype: torch.dtype, **defines: int) -> Kernel:
    key = (name, device, dtype, core_dtype, *defines.values())
    kernel = _kernels.get(key)
    if kernel is None:
        fp16 = torch.float16 in (dtype, core_dtype)
        of_dtype = {"FP16": int(fp16), "WIDE": int(dtype == torch.float32), "CORE": C_TYPES[core_dtype]}
        module = make_module(f"{name}.cu", device, {**of_dtype, **defines})
        kernel = _kernels[key] = module.kernel(name, _SIGNATURES[name])
    return kernel


def _available(side_SRTN: torch.Tensor) -> bool:
    return device_supported(side_SRTN.device) and side_SRTN.dtype in (torch.bfloat16, torch.float16, torch.float32)


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
    device = side_SRTN.device
    candidates = torch.empty(T, S, coarse_k, dtype=torch.int32, device=device)
    if T:
        kernel = _kernel(
            "coarse", device, side_SRTN.dtype, torch.float32, R=R, K=coarse_k, CHUNKS=-(-N // 256),
            CAP_K=128 if coarse_k <= 64 else 256,
        )  # fmt: skip
        kernel(
            (-(-T // WARPS), S), 32 * WARPS, side_SRTN.data_ptr(), leading_SR.data_ptr(), candidates.data_ptr(), T, N,
            *side_SRTN.stride()[:3],
        )  # fmt: skip
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
        kernel = _kernel(
            "exact", device, side_SRTN.dtype, cores_CRR.dtype, R=R, C=C, K=K, M=top_m, NW=warps,
            CAP_M=max(128, -(-2 * top_m // (32 * warps)) * 32 * warps), NARROW=int(narrow),
            SHUFFLE=int(permutation is not None),
        )  # fmt: skip
        grid, threads = ((-(-T // WARPS), 1), 32 * WARPS) if warps == 1 else ((T, 1), 32 * warps)
        kernel(
            grid, threads, side_SRTN.data_ptr(), candidates_TSK.data_ptr(), cores_CRR.data_ptr(), pointer(permutation),
            indices.data_ptr(), scores.data_ptr(), keys.data_ptr(), kept.data_ptr(), T, N, *side_SRTN.stride()[:3],
            offset, rows,
        )  # fmt: skip
    return indices, scores, keys, kept


def scores_at(
    side_SRTN: torch.Tensor,
    keys_STM: torch.Tensor,
    cores_CRR: torch.Tensor,
    permutation: torch.Tensor | None,
    offset: int,
    rows: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """For known keys: (indices [T, M], scores [T, M, C] fp32, their side scores [S, R, T, M] fp32)."""
    S, R, T, N = side_SRTN.shape
    C, M, device = cores_CRR.shape[0], keys_STM.shape[2], side_SRTN.device
    narrow = rows <= 2**31 - 1
    indices = torch.empty(T, M, dtype=torch.int32 if narrow else torch.int64, device=device)
    scores = torch.empty(T, M, C, dtype=torch.float32, device=device)
    kept = torch.empty(S, R, T, M, dtype=torch.float32, device=device)
    if T:
        # K is a constant of the shared header that this kernel has no use for.
        kernel = _kernel(
            "known", device, side_SRTN.dtype, cores_CRR.dtype, R=R, C=C, K=1, NARROW=int(narrow),
            SHUFFLE=int(permutation is not None),
        )  # fmt: skip
        kernel(
            (-(-T * M // 256), 1), 256, side_SRTN.data_ptr(), cores_CRR.data_ptr(), pointer(permutation),
            keys_STM.data_ptr(), indices.data_ptr(), scores.data_ptr(), kept.data_ptr(), T, M, N,
            *side_SRTN.stride()[:3], offset, rows,
        )  # fmt: skip
    return indices, scores, kept


def supports_cores(side_SRTN: torch.Tensor, cores_CRR: torch.Tensor) -> bool:
    """Whether the kernels read cores of this dtype; others must be converted."""
    return cores_CRR.dtype in (torch.float32, side_SRTN.dtype) and cores_CRR.is_contiguous()


def supports_dense_gradient(kept_SRTM: torch.Tensor, cores_CRR: torch.Tensor, width: int) -> bool:
    """Whether the backward kernel covers the shape; `width` is that of the dense gradient's rows."""
    return (
        device_supported(kept_SRTM.device)
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
    """(d_side [S, R, T, width] in `dtype`, d_cores [C, R, R] in the cores' dtype); scores' gradient fp32."""
    S, R, T, M = kept_SRTM.shape
    C, device = cores_CRR.shape[0], kept_SRTM.device
    grad_side = torch.empty(S, R, T, width, dtype=dtype, device=device)
    grad_cores = torch.empty(T, C, R, R, dtype=torch.float32, device=device)
    if T:
        threads = 32 if M <= 32 else min(-(-M // 32) * 32, 256)
        kernel = _kernel("dense_gradient", device, dtype, cores_CRR.dtype, R=R, C=C, M=M, THREADS=threads)
        grid, block = ((-(-T // WARPS), 1), 32 * WARPS) if threads == 32 else ((T, 1), threads)
        kernel(
            grid, block, grad_scores_TMC.data_ptr(), kept_SRTM.data_ptr(), cores_CRR.data_ptr(), keys_STM.data_ptr(),
            grad_side.data_ptr(), grad_cores.data_ptr(), T, width,
        )  # fmt: skip
    if T == 0:
        return grad_side, torch.zeros_like(cores_CRR)
    return grad_side, column_sums(grad_cores.view(T, -1), cores_CRR.dtype).view_as(cores_CRR)
