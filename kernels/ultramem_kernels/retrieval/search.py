"""Norms of queries and keys and the retrieval in one autograd node: each node costs the host tens of microseconds.

Legend as in reference.py; Q = S * (R or 1) parts of a query.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ultramem_kernels.dispatch import for_this_call
from ultramem_kernels.retrieval.ops import (
    check_sizes,
    padded_keys,
    retrieve_backward,
    retrieve_forward,
    run_retrieve_backward,
    run_retrieve_forward,
)
from ultramem_kernels.rms_norm.ops import (
    rms_norm_backward,
    rms_norm_forward,
    run_rms_norm_backward,
    run_rms_norm_forward,
)


@dataclass
class KeptKeys:
    """Normalised keys, left by the first `search` that it is given to and taken over by the next ones.

    It holds as long as keys and gain do not change: make a new one in every optimizer step. A call that is being
    captured in a CUDA graph neither reads nor fills it.
    """

    keys_SRWD: torch.Tensor | None = None


class _Options(NamedTuple):
    eps: float
    coarse_k: int
    top_m: int
    permutation: torch.Tensor | None
    offset: int
    rows: int
    kept_keys: KeptKeys | None
    known_keys_STM: torch.Tensor | None
    backend: str | None


class _Search(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query_TQD: torch.Tensor,
        keys_SNRD: torch.Tensor,
        query_gain: torch.Tensor,
        key_gain: torch.Tensor,
        leading_SR: torch.Tensor,
        cores_CRR: torch.Tensor,
        o: _Options,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        T, Q, D = query_TQD.shape
        _, N, R, _ = keys_SNRD.shape
        norm = for_this_call(rms_norm_forward, run_rms_norm_forward)
        query_SRTD = norm(query_TQD.unsqueeze(0), query_gain, o.eps, T, o.backend).view(2, Q // 2, T, D)
        keeps = o.kept_keys is not None and not (keys_SNRD.is_cuda and torch.cuda.is_current_stream_capturing())
        key_SRWD = o.kept_keys.keys_SRWD if keeps else None  # type: ignore[union-attr]
        if key_SRWD is None:
            key_SRWD = norm(keys_SNRD, key_gain, o.eps, padded_keys(N), o.backend)
            if keeps:
                o.kept_keys.keys_SRWD = key_SRWD  # type: ignore[union-attr]
        indices, scores, selected, kept = for_this_call(retrieve_forward, run_retrieve_forward)(
            query_SRTD.expand(-1, R, -1, -1), key_SRWD, leading_SR, cores_CRR, o.coarse_k, o.top_m, o.permutation,
            o.offset, o.rows, N, o.known_keys_STM, o.backend,
        )  # fmt: skip
        ctx.save_for_backward(
            query_TQD, keys_SNRD, query_gain, key_gain, cores_CRR, query_SRTD, key_SRWD, selected, kept
        )
        ctx.eps, ctx.backend = o.eps, o.backend
        ctx.mark_non_differentiable(indices, selected)
        return indices, scores, selected

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, _indices: Any, grad_scores: torch.Tensor, _keys: Any) -> tuple[torch.Tensor | None, ...]:
        query_TQD, keys_SNRD, query_gain, key_gain, cores_CRR, query_SRTD, key_SRWD, selected, kept = ctx.saved_tensors
        T, Q, D = query_TQD.shape
        N, R = keys_SNRD.shape[1:3]
        norm = for_this_call(rms_norm_backward, run_rms_norm_backward)
        grad_query, grad_key, grad_cores = for_this_call(retrieve_backward, run_retrieve_backward)(
            grad_scores.contiguous(), query_SRTD.expand(-1, R, -1, -1), key_SRWD, cores_CRR, selected, kept, N,
            ctx.backend,
        )  # fmt: skip
        if Q // 2 < R:
            grad_query = grad_query.sum(1)
        grad_query, grad_query_gain = norm(
            query_TQD.unsqueeze(0), query_gain, grad_query.view(1, Q, T, D), ctx.eps, ctx.backend
        )
        grad_keys, grad_key_gain = norm(keys_SNRD, key_gain, grad_key, ctx.eps, ctx.backend)
        return grad_query.view(T, Q, D), grad_keys, grad_query_gain, grad_key_gain, None, grad_cores, None


def search(
    query_TQD: torch.Tensor,
    keys_SNRD: torch.Tensor,
    query_gain_D: torch.Tensor,
    key_gain_D: torch.Tensor,
    leading_SR: torch.Tensor,
    cores_CRR: torch.Tensor,
    *,
    eps: float,
    coarse_k: int,
    top_m: int,
    permutation: torch.Tensor | None = None,
    offset: int = 0,
    rows: int | None = None,
    kept_keys: KeptKeys | None = None,
    known_keys_STM: torch.Tensor | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`retrieve` of RMS-normalised queries and keys: (row indices [T, M], scores [T, M, C] fp32, keys [S, T, M]).

    query_TQD      queries as projected, any strides but 1 of D; Q = 2*R, or 2: one query a side for all ranks
    keys_SNRD      keys as stored, contiguous, dtype of the queries
    kept_keys      where normalised keys are kept from call to call (once per step instead of once per micro-batch)
    others         as in `retrieve`

    Scores carry gradients to queries, keys, both gains and cores. Raises ValueError where the sizes do not fit.
    """
    S, N, R, D = keys_SNRD.shape
    Q = query_TQD.shape[1]
    if S != 2 or Q not in (2, 2 * R) or query_TQD.shape[2] != D or query_TQD.dtype != keys_SNRD.dtype:
        raise ValueError(f"queries {tuple(query_TQD.shape)} {query_TQD.dtype} and keys {tuple(keys_SNRD.shape)} "
                         f"{keys_SNRD.dtype} must agree in sides (2), ranks, width and dtype")  # fmt: skip
    check_sizes(N, coarse_k, top_m, permutation)
    options = _Options(eps, coarse_k, top_m, permutation, offset, rows or N * N, kept_keys, known_keys_STM, backend)
    return _Search.apply(query_TQD, keys_SNRD, query_gain_D, key_gain_D, leading_SR, cores_CRR, options)
