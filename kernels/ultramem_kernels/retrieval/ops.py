"""The differentiable retrieval. Legend as in reference.py.

side = query key^T           a matrix product (cuBLAS), rounded to the queries' dtype, in rows of a multiple of 64 keys
coarse pass, exact pass      one kernel each: from side scores to row indices and scores
backward                     one kernel from score gradients to the dense gradient of `side`, then two products
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Optional

import torch
from torch.nn import functional as F

from ultramem_kernels.dispatch import choose, for_this_call
from ultramem_kernels.retrieval import cuda, reference

KEYS_MULTIPLE = 64  # other row lengths cost cuBLAS a factor of 2.7 on an H100 (NOTES.md)
FEW_TOKENS = 512  # below, padding the keys costs more than it saves
TOKEN_CHUNKS = 4  # the keys' gradient sums over all tokens: cuBLAS does that well only when it is cut into batches


def padded_keys(keys: int) -> int:
    """Rows of normalised keys that the products like: give `retrieve` as many and it need not pad them."""
    return -(-keys // KEYS_MULTIPLE) * KEYS_MULTIPLE


def _side_scores(query_SRTD: torch.Tensor, key_SRND: torch.Tensor, num_keys: int) -> torch.Tensor:
    """[S, R, T, num_keys], rows of `padded_keys(num_keys)`; what lies beyond is not read by the passes."""
    S, R, T, D = query_SRTD.shape
    width, given = padded_keys(num_keys), key_SRND.shape[2]
    query_XTD, key_XND = query_SRTD.reshape(S * R, T, D), key_SRND.reshape(S * R, given, D)
    if T >= FEW_TOKENS and given < width:
        key_XND, given = F.pad(key_XND, (0, 0, 0, width - given)), width
    if given >= width:
        side_XTN = torch.bmm(query_XTD, (key_XND if given == width else key_XND[:, :width]).mT)
    else:
        side_XTN = torch.empty(S * R, T, width, dtype=query_SRTD.dtype, device=query_SRTD.device)
        torch.bmm(query_XTD, key_XND.mT, out=side_XTN[..., :given])
    return side_XTN.view(S, R, T, width)[..., :num_keys]


def run_retrieve_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    leading: torch.Tensor,
    cores: torch.Tensor,
    coarse_k: int,
    top_m: int,
    permutation: Optional[torch.Tensor],
    offset: int,
    rows: int,
    num_keys: int,
    known_keys: Optional[torch.Tensor],
    backend: Optional[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row indices [T, M], scores [T, M, C], keys [S, T, M], side scores at them [S, R, T, M])."""
    chosen = choose(backend, query, lambda: True)
    if chosen == "reference":
        key = key[:, :, :num_keys]
        return _reference_forward(query, key, leading, cores, coarse_k, top_m, permutation, offset, rows, known_keys)
    side = _side_scores(query, key, num_keys)
    by_hand = chosen == "cuda"
    if not (by_hand and cuda.supports_cores(side, cores)):
        cores = cores.float().contiguous()
    if by_hand and known_keys is not None:
        indices, scores, kept = cuda.scores_at(side, known_keys.contiguous(), cores, permutation, offset, rows)
        return indices, scores, known_keys.clone(), kept
    coarse_by_hand = by_hand and cuda.supports_coarse(side, coarse_k)
    exact_by_hand = by_hand and cuda.supports_exact(side, coarse_k, top_m)
    coarse: ModuleType = cuda
    exact: ModuleType = cuda
    if not (coarse_by_hand and exact_by_hand):
        from ultramem_kernels.retrieval import select_triton

        if known_keys is not None:
            return select_triton.exact_pass(side, None, cores, top_m, permutation, offset, rows, known_keys.clone())
        coarse = cuda if coarse_by_hand else select_triton
        exact = cuda if exact_by_hand else select_triton
    candidates = coarse.coarse_pass(side, leading.float().contiguous(), coarse_k)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor] = exact.exact_pass(
        side, candidates, cores, top_m, permutation, offset, rows
    )
    return found


def _reference_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    leading: torch.Tensor,
    cores: torch.Tensor,
    coarse_k: int,
    top_m: int,
    permutation: torch.Tensor | None,
    offset: int,
    rows: int,
    known_keys: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    side = reference.side_scores(query, key)
    keys = (
        known_keys.clone() if known_keys is not None else reference.select(side, leading, cores.sum(0), coarse_k, top_m)
    )
    kept = reference.gather_keys(side, keys).to(torch.promote_types(side.dtype, torch.float32))
    indices = reference.physical_rows(keys, key.shape[2], permutation, offset, rows)
    return indices, reference.pair_scores(kept, cores).contiguous(), keys, kept


retrieve_forward = torch.library.custom_op("ultramem::retrieve_forward", mutates_args=())(run_retrieve_forward)


@retrieve_forward.register_fake
def _(query, key, leading, cores, coarse_k, top_m, permutation, offset, rows, num_keys, known_keys, backend):  # type: ignore[no-untyped-def]
    S, R, T, _ = query.shape
    wide = torch.promote_types(query.dtype, torch.float32)
    return (
        query.new_empty(T, top_m, dtype=torch.int32 if rows <= 2**31 - 1 else torch.int64),
        query.new_empty(T, top_m, cores.shape[0], dtype=wide),
        query.new_empty(S, T, top_m, dtype=torch.int32),
        query.new_empty(S, R, T, top_m, dtype=wide),
    )


def run_retrieve_backward(
    grad_scores: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    cores: torch.Tensor,
    keys: torch.Tensor,
    kept: torch.Tensor,
    num_keys: int,
    backend: Optional[str],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of the queries [S, R, T, D], the keys [S, R, N, D] and the cores [C, R, R]."""
    S, R, T, D = query.shape
    given, width, X = key.shape[2], padded_keys(num_keys), S * R
    chosen = choose(backend, query, lambda: True)
    if chosen == "reference":
        grad_side, grad_cores = reference.dense_gradient(grad_scores, kept, cores, keys, given)
        wide_query, wide_key = query.to(grad_side.dtype), key.to(grad_side.dtype)
        grad_query = torch.matmul(grad_side, wide_key).to(query.dtype)
        return grad_query, torch.matmul(grad_side.mT, wide_query).to(key.dtype), grad_cores.to(cores.dtype)
    kernels: ModuleType = cuda
    if not (
        chosen == "cuda" and cuda.supports_cores(query, cores) and cuda.supports_dense_gradient(kept, cores, width)
    ):
        from ultramem_kernels.retrieval import backward_triton

        kernels = backward_triton
    grad_side, grad_cores = kernels.dense_gradient(grad_scores.float(), kept, cores, keys, width, query.dtype)
    grad_side, query_XTD, key_XND = grad_side.view(X, T, width), query.reshape(X, T, D), key.reshape(X, given, D)
    if given < width:
        key_XND = F.pad(key_XND, (0, 0, 0, width - given))
    grad_query = torch.bmm(grad_side, key_XND[:, :width]).view(S, R, T, D)
    chunks = TOKEN_CHUNKS if T % TOKEN_CHUNKS == 0 and T >= FEW_TOKENS else 1
    grad_key = torch.bmm(
        grad_side.view(X * chunks, T // chunks, width).mT, query_XTD.reshape(X * chunks, T // chunks, D)
    )
    if chunks > 1:
        grad_key = grad_key.view(X, chunks, width, D).sum(1)  # sums in fp32, rounds once
    if given != width:
        grad_key = grad_key[:, :given] if given < width else F.pad(grad_key, (0, 0, 0, given - width))
    return grad_query, grad_key.contiguous().view(S, R, given, D), grad_cores.to(cores.dtype)


retrieve_backward = torch.library.custom_op("ultramem::retrieve_backward", mutates_args=())(run_retrieve_backward)


@retrieve_backward.register_fake
def _(grad_scores, query, key, cores, keys, kept, num_keys, backend):  # type: ignore[no-untyped-def]
    return query.new_empty(query.shape), key.new_empty(key.shape), torch.empty_like(cores)


class _Retrieve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        leading: torch.Tensor,
        cores: torch.Tensor,
        coarse_k: int,
        top_m: int,
        permutation: torch.Tensor | None,
        offset: int,
        rows: int,
        num_keys: int,
        known_keys: torch.Tensor | None,
        backend: str | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        indices, scores, keys, kept = for_this_call(retrieve_forward, run_retrieve_forward)(
            query, key, leading, cores, coarse_k, top_m, permutation, offset, rows, num_keys, known_keys, backend
        )
        ctx.save_for_backward(query, key, cores, keys, kept)
        ctx.num_keys, ctx.backend = num_keys, backend
        ctx.mark_non_differentiable(indices, keys)
        return indices, scores, keys

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _indices: Any, grad_scores: torch.Tensor, _keys: Any) -> tuple[torch.Tensor | None, ...]:
        query, key, cores, keys, kept = ctx.saved_tensors
        grads = for_this_call(retrieve_backward, run_retrieve_backward)(
            grad_scores.contiguous(), query, key, cores, keys, kept, ctx.num_keys, ctx.backend
        )
        return grads[0], grads[1], None, grads[2], *(None,) * 8


def check_sizes(n: int, coarse_k: int, top_m: int, permutation: torch.Tensor | None) -> None:
    """Raises ValueError where the sizes of a selection among n keys a side do not fit."""
    if not (1 <= coarse_k <= n and 1 <= top_m <= coarse_k**2):
        raise ValueError(f"coarse_k={coarse_k} must be in 1..{n} (keys per side) and top_m={top_m} in 1..coarse_k**2")
    if permutation is not None and permutation.numel() != n * n:
        raise ValueError(f"permutation of {permutation.numel()} entries for {n}*{n} pairs")


def retrieve(
    query_SRTD: torch.Tensor,
    key_SRND: torch.Tensor,
    leading_SR: torch.Tensor,
    cores_CRR: torch.Tensor,
    *,
    coarse_k: int,
    top_m: int,
    permutation: torch.Tensor | None = None,
    offset: int = 0,
    rows: int | None = None,
    num_keys: int | None = None,
    known_keys_STM: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(row indices [T, M] int32, scores [T, M, C] fp32, keys [S, T, M] int32) of `reference.retrieve`.

    query_SRTD      normalised queries, any strides; an expanded R is fine (one query per side for all ranks)
    key_SRND        normalised keys, dtype of the queries
    leading_SR      leading singular vectors (u, t) of the summed cores, detached
    cores_CRR       Tucker cores
    num_keys        n, where `key_SRND` has more (finite) rows than keys: `padded_keys(n)` spare a copy
    permutation     int32 [n*n] or None; row = (permutation[i*n + j] + offset) mod rows, rows n*n by default
    known_keys_STM  keys that an earlier call returned, to skip the selection (activation recompute)

    Scores carry gradients to queries, keys and cores. The M pairs of a token come in no particular order, but always in
    the same one. Indices are int64 where `rows` exceeds int32. Raises ValueError where the sizes do not fit.
    """
    n = key_SRND.shape[2] if num_keys is None else num_keys
    if query_SRTD.shape[0] != 2 or key_SRND.shape[:2] != query_SRTD.shape[:2] or query_SRTD.dtype != key_SRND.dtype:
        raise ValueError(f"queries {tuple(query_SRTD.shape)} {query_SRTD.dtype} and keys {tuple(key_SRND.shape)} "
                         f"{key_SRND.dtype} must agree in sides (2), ranks and dtype")  # fmt: skip
    if not 0 < n <= key_SRND.shape[2]:
        raise ValueError(f"num_keys={n} of {key_SRND.shape[2]} rows")
    check_sizes(n, coarse_k, top_m, permutation)
    return _Retrieve.apply(
        query_SRTD, key_SRND, leading_SR, cores_CRR, coarse_k, top_m, permutation, offset, rows or n * n, n,
        known_keys_STM, backend,
    )  # fmt: skip
