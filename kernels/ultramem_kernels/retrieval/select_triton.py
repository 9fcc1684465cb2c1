"""Selection from side scores in Triton: the coarse pass (one program per token and side), the exact pass with scores
and row indices (one program per token). Neither the coarse scores nor the K x K pair scores reach memory.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ultramem_kernels.retrieval.top_k_triton import SMALLEST, kth_largest, order_key, places
from ultramem_kernels.tiles import cover, next_power_of_two


@triton.jit
def coarse_keys(side, leading, columns, N, stride_rank, R: tl.constexpr):
    """Order keys of sum_r leading[r] * side[r, columns]; SMALLEST beyond N."""
    coarse = tl.zeros(columns.shape, tl.float32)
    for r in tl.static_range(R):
        part = tl.load(side + r * stride_rank + columns, mask=columns < N, other=0.0)
        coarse += part.to(tl.float32) * tl.load(leading + r).to(tl.float32)
    return tl.where(columns < N, order_key(coarse), SMALLEST)


@triton.jit
def coarse_kernel(
    side, leading, candidates, N, stride_side, stride_rank, stride_token, K,
    R: tl.constexpr, B0: tl.constexpr, B1: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    """candidates[token, side, :K]: the K keys with the largest coarse score."""
    token = tl.program_id(0).to(tl.int64)
    which = tl.program_id(1).to(tl.int64)
    start = side + which * stride_side + token * stride_token
    c0 = tl.arange(0, B0)
    c1 = B0 + tl.arange(0, B1)
    a = coarse_keys(start, leading + which * R, c0, N, stride_rank, R)
    b = coarse_keys(start, leading + which * R, c1, N, stride_rank, R)
    low = kth_largest(a, b, K, GROUPS)
    place_a, place_b = places(a, b, low, K)
    out = candidates + (token * 2 + which) * K
    tl.store(out + place_a, c0, mask=place_a < K)
    tl.store(out + place_b, c1, mask=place_b < K)


@triton.jit
def exact_kernel(
    side, candidates, cores, permutation, indices, scores, keys, kept,
    T, N, stride_side, stride_rank, stride_token, M, K, offset, rows,
    R: tl.constexpr, C: tl.constexpr, KB: tl.constexpr, MB: tl.constexpr, GROUPS: tl.constexpr, SHUFFLE: tl.constexpr,
    SELECT: tl.constexpr,
):  # fmt: skip
    """Top M of the K x K pairs, their keys, side scores (`kept` [S, R, T, M]), scores and row indices.

    SELECT false: `keys` are given and only what follows from them is computed.
    """
    token = tl.program_id(0).to(tl.int64)
    row_start = side + token * stride_token
    column_start = row_start + stride_side
    m = tl.arange(0, MB)
    if SELECT:
        k = tl.arange(0, KB)
        row_key = tl.load(candidates + token * 2 * K + k, mask=k < K, other=0)
        column_key = tl.load(candidates + (token * 2 + 1) * K + k, mask=k < K, other=0)
        pair = tl.zeros((KB, KB), tl.float32)
        for b in tl.static_range(R):
            weighted = tl.zeros((KB,), tl.float32)
            for a in tl.static_range(R):
                core = 0.0
                for c in tl.static_range(C):
                    core += tl.load(cores + (c * R + a) * R + b).to(tl.float32)
                weighted += tl.load(row_start + a * stride_rank + row_key).to(tl.float32) * core
            pair += weighted[:, None] * tl.load(column_start + b * stride_rank + column_key).to(tl.float32)[None, :]
        exists = (k < K)[:, None] & (k < K)[None, :]
        flat = tl.reshape(tl.where(exists, order_key(pair), SMALLEST), (KB * KB,))
        nothing = tl.full((16,), SMALLEST, tl.int32)
        low = kth_largest(flat, nothing, M, GROUPS)
        place, _ = places(flat, nothing, low, M)
        # The winners' pair numbers pass through memory: a register tile cannot be compacted otherwise.
        tl.store(keys + token * M + place, tl.arange(0, KB * KB), mask=place < M)
        tl.debug_barrier()
        winner = tl.load(keys + token * M + m, mask=m < M, other=0)
        i = tl.load(candidates + token * 2 * K + winner // KB, mask=m < M, other=0)
        j = tl.load(candidates + (token * 2 + 1) * K + winner % KB, mask=m < M, other=0)
        tl.debug_barrier()
        tl.store(keys + token * M + m, i, mask=m < M)
        tl.store(keys + (T + token) * M + m, j, mask=m < M)
    else:
        i = tl.load(keys + token * M + m, mask=m < M, other=0)
        j = tl.load(keys + (T + token) * M + m, mask=m < M, other=0)
    for r in tl.static_range(R):
        row_score = tl.load(row_start + r * stride_rank + i, mask=m < M, other=0.0).to(tl.float32)
        column_score = tl.load(column_start + r * stride_rank + j, mask=m < M, other=0.0).to(tl.float32)
        tl.store(kept + (r * T + token) * M + m, row_score, mask=m < M)
        tl.store(kept + ((R + r) * T + token) * M + m, column_score, mask=m < M)
    for c in tl.static_range(C):
        score = tl.zeros((MB,), tl.float32)
        for a in tl.static_range(R):
            row_score = tl.load(row_start + a * stride_rank + i, mask=m < M, other=0.0).to(tl.float32)
            for b in tl.static_range(R):
                column_score = tl.load(column_start + b * stride_rank + j, mask=m < M, other=0.0).to(tl.float32)
                score += row_score * tl.load(cores + (c * R + a) * R + b).to(tl.float32) * column_score
        tl.store(scores + (token * M + m) * C + c, score, mask=m < M)
    index = i.to(tl.int64) * N + j
    if SHUFFLE:
        index = tl.load(permutation + index, mask=m < M, other=0).to(tl.int64)
    index = (index + offset) % rows
    tl.store(indices + token * M + m, index.to(indices.dtype.element_ty), mask=m < M)


def coarse_pass(side_SRTN: torch.Tensor, leading_SR: torch.Tensor, coarse_k: int, num_warps: int | None = None
                ) -> torch.Tensor:  # fmt: skip
    """Candidates [T, S, K] int32."""
    S, R, T, N = side_SRTN.shape
    candidates = torch.empty(T, S, coarse_k, dtype=torch.int32, device=side_SRTN.device)
    B0, B1 = cover(N)
    groups = min(max(next_power_of_two(coarse_k), 16), B0)
    if T:
        coarse_kernel[(T, S)](
            side_SRTN, leading_SR.contiguous(), candidates, N, *side_SRTN.stride()[:3], coarse_k,
            R, B0, B1 or 16, groups if groups >= coarse_k else B0, num_warps=num_warps or (4 if T < 512 else 1),
        )  # fmt: skip
    return candidates


def exact_pass(
    side_SRTN: torch.Tensor,
    candidates_TSK: torch.Tensor | None,
    cores_CRR: torch.Tensor,
    top_m: int,
    permutation: torch.Tensor | None,
    offset: int,
    rows: int,
    known_keys_STM: torch.Tensor | None = None,
    num_warps: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indices [T, M], scores [T, M, C] fp32, keys [S, T, M] int32, their side scores [S, R, T, M] fp32)."""
    S, R, T, N = side_SRTN.shape
    C = cores_CRR.shape[0]
    device = side_SRTN.device
    K = candidates_TSK.shape[2] if candidates_TSK is not None else 1
    index_dtype = torch.int32 if rows <= 2**31 - 1 else torch.int64
    indices = torch.empty(T, top_m, dtype=index_dtype, device=device)
    scores = torch.empty(T, top_m, C, dtype=torch.float32, device=device)
    keys = torch.empty(S, T, top_m, dtype=torch.int32, device=device) if known_keys_STM is None else known_keys_STM
    kept = torch.empty(S, R, T, top_m, dtype=torch.float32, device=device)
    KB = max(next_power_of_two(K), 16)
    MB = max(next_power_of_two(top_m), 16)
    if T:
        exact_kernel[(T,)](
            side_SRTN, candidates_TSK, cores_CRR.contiguous(), permutation, indices, scores, keys, kept,
            T, N, *side_SRTN.stride()[:3], top_m, K, offset, rows, R, C, KB, MB, MB,
            SHUFFLE=permutation is not None, SELECT=known_keys_STM is None,
            num_warps=num_warps or (4 if T < 512 and KB <= 32 else max(1, KB * KB // 2048)),
        )  # fmt: skip
    return indices, scores, keys, kept
