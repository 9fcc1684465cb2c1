"""The retrieval's backward pass up to the dense gradient of the side scores, in Triton: one program per token.

    d_side[0, a, t, i] = sum over pairs with row i    of sum_c d_score[c] sum_b cores[c, a, b] side[1, b, t, j]
    d_side[1, b, t, j] = sum over pairs with column j of sum_c d_score[c] sum_a cores[c, a, b] side[0, a, t, i]
    d_cores[c, a, b]   = sum over tokens and pairs of d_score[c] side[0, a, t, i] side[1, b, t, j]

A key may occur in several pairs: every pair computes its key's total and all of them store the same value, so the
result does not depend on the order of the stores.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs
# (Triton's kernels take pointers and constants that Python's types do not describe.)
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ultramem_kernels.tiles import next_power_of_two


@triton.jit
def pair_gradient(grad_scores, kept, cores, token, m, T, M, which, rank, R: tl.constexpr, C: tl.constexpr):
    """Gradient of side[which, rank] that each of the pairs m contributes."""
    total = tl.zeros(m.shape, tl.float32)
    for c in tl.static_range(C):
        inner = tl.zeros(m.shape, tl.float32)
        for other in tl.static_range(R):
            if which == 0:
                core = tl.load(cores + (c * R + rank) * R + other).to(tl.float32)
            else:
                core = tl.load(cores + (c * R + other) * R + rank).to(tl.float32)
            inner += core * tl.load(kept + (((1 - which) * R + other) * T + token) * M + m, mask=m < M, other=0.0)
        total += inner * tl.load(grad_scores + (token * M + m) * C + c, mask=m < M, other=0.0).to(tl.float32)
    return total


@triton.jit
def dense_gradient_kernel(
    grad_scores, kept, cores, keys, grad_side, grad_cores, T, stride_side, stride_rank, stride_token,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr, C: tl.constexpr, NB: tl.constexpr, MB: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, NB)
    zeros = tl.zeros((NB,), grad_side.dtype.element_ty)
    for which in tl.static_range(2):
        for rank in tl.static_range(R):
            row = grad_side + which * stride_side + rank * stride_rank + token * stride_token
            for first in range(0, N, NB):
                tl.store(row + first + columns, zeros, mask=first + columns < N)
    tl.debug_barrier()
    for which in tl.static_range(2):
        for rank in tl.static_range(R):
            row = grad_side + which * stride_side + rank * stride_rank + token * stride_token
            for first in range(0, M, MB):
                m = first + tl.arange(0, MB)
                key = tl.load(keys + (which * T + token) * M + m, mask=m < M, other=-1)
                total = tl.zeros((MB,), tl.float32)
                for again in range(0, M, MB):
                    other = again + tl.arange(0, MB)
                    other_key = tl.load(keys + (which * T + token) * M + other, mask=other < M, other=-2)
                    part = pair_gradient(grad_scores, kept, cores, token, other, T, M, which, rank, R, C)
                    total += tl.sum(tl.where(key[:, None] == other_key[None, :], part[None, :], 0.0), axis=1)
                tl.store(row + key, total.to(grad_side.dtype.element_ty), mask=m < M)
    for c in tl.static_range(C):
        for a in tl.static_range(R):
            for b in tl.static_range(R):
                total_core = tl.zeros((MB,), tl.float32)
                for first in range(0, M, MB):
                    m = first + tl.arange(0, MB)
                    row_score = tl.load(kept + (a * T + token) * M + m, mask=m < M, other=0.0)
                    column_score = tl.load(kept + ((R + b) * T + token) * M + m, mask=m < M, other=0.0)
                    slope = tl.load(grad_scores + (token * M + m) * C + c, mask=m < M, other=0.0).to(tl.float32)
                    total_core += slope * row_score * column_score
                tl.store(grad_cores + ((token * C + c) * R + a) * R + b, tl.sum(total_core, axis=0))


def dense_gradient(
    grad_scores_TMC: torch.Tensor,
    kept_SRTM: torch.Tensor,
    cores_CRR: torch.Tensor,
    keys_STM: torch.Tensor,
    keys_per_side: int,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_side [S, R, T, N] in `dtype`, d_cores [C, R, R] fp32)."""
    S, R, T, M = kept_SRTM.shape
    C = cores_CRR.shape[0]
    # Rows of 16-byte multiples: the matrix products that follow are slow on others.
    padded = (keys_per_side + 63) // 64 * 64
    grad_side = torch.empty(S, R, T, padded, dtype=dtype, device=kept_SRTM.device)[..., :keys_per_side]
    grad_cores = torch.empty(T, C, R, R, dtype=torch.float32, device=kept_SRTM.device)
    if T:
        block = min(next_power_of_two(M), 64)
        dense_gradient_kernel[(T,)](
            grad_scores_TMC, kept_SRTM, cores_CRR.contiguous(), keys_STM, grad_side, grad_cores, T,
            *grad_side.stride()[:3], keys_per_side, M, R, C, 1024, max(block, 16), num_warps=1 if M <= 32 else 4,
        )  # fmt: skip
    return grad_side, grad_cores.sum(0)
