"""Product-key retrieval with softmax (PKM, arXiv 1907.05242; Memory+, PEER), and the layer that the three share.

Each side (0 rows, 1 columns) scores its n keys with its half of the query. The best m pairs by s_row[i] + s_col[j] are
among the best m keys of each side; their scores go through a softmax per head, and have gradients.

Shapes: T tokens, H heads, S=2 sides, R=1 (kept, so that `retrieval.py` serves here too), N keys per side, D key width,
K candidates per side, M values per head (per token in `indices_TM` and `scores_TM1`, where M = heads * top_m).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F

from megatron_ultramem.memory.base import Kept, MemoryLayer
from megatron_ultramem.memory.geometry import coarse_k
from megatron_ultramem.memory.init import Constant, Initializer, Uniform
from megatron_ultramem.memory.kinds import pair_candidates, query_norm, query_width
from megatron_ultramem.memory.numerics import accumulation_dtype
from megatron_ultramem.memory.query_norm import QueryBatchNorm
from megatron_ultramem.memory.retrieval import gather_keys, side_scores, side_scores_at, token_chunks


@functools.cache
def best_pairs(k: int, m: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ranks (i, j) of the pairs of two descending lists of k that can be among the m largest sums.

    (i+1)*(j+1) pairs are at least as large as pair (i, j), itself included: no more than m may be. Of k*k >= m pairs
    at least m remain.
    """
    pairs = [(row, column) for row in range(min(k, m)) for column in range(min(k, m // (row + 1)))]
    assert len(pairs) == pair_candidates(k, m)
    rows, columns = zip(*pairs, strict=True)
    return rows, columns


@functools.cache
def _best_pairs_on(k: int, m: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`best_pairs` on a device, where it stays: a CUDA graph cannot record a copy from pageable memory."""
    rows, columns = (torch.tensor(ranks, device=device) for ranks in best_pairs(k, m))
    return rows, columns


@torch.no_grad()
def select_pairs(
    query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, k: int, m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys [H, S, T, M] (int64) of the m best pairs, best first, and their side scores [H, S, R, T, M]."""
    H, S, R, T, _ = query_HSRTD.shape
    device = query_HSRTD.device
    rows, columns = _best_pairs_on(k, m, device)
    keys_HSTM = torch.empty(H, S, T, m, dtype=torch.int64, device=device)
    at_keys_HSRTM = torch.empty(H, S, R, T, m, dtype=accumulation_dtype(query_HSRTD.dtype), device=device)
    for low, high in token_chunks(query_HSRTD, key_HSRND, extra=H * len(rows)):
        chunk_HSRTN = side_scores(query_HSRTD[:, :, :, low:high], key_HSRND)
        best_HSTK, coarse_HSTK = chunk_HSRTN.squeeze(2).topk(k, dim=-1, sorted=True)
        sums_HTX = best_HSTK[:, 0, :, rows] + best_HSTK[:, 1, :, columns]
        best_HTM = sums_HTX.topk(m, dim=-1, sorted=True).indices
        place_HSTM = torch.stack((rows[best_HTM], columns[best_HTM]), dim=1)
        keys_HSTM[:, :, low:high] = coarse_HSTK.gather(-1, place_HSTM)
        at_keys_HSRTM[:, :, :, low:high] = gather_keys(chunk_HSRTN, keys_HSTM[:, :, low:high])
    return keys_HSTM, at_keys_HSRTM


class ProductKeyRetrieval(nn.Module):
    """Keys and norms of one layer.

    Parameters: `keys` [H, 2, N, Dk], U(+-1/sqrt(2 Dk)); with norm 'rms' `query_gain` and `key_gain` [Dk], with 'batch'
    those of `query_norm` [H*2*Dk]. The gains start at Dk^-0.25, so that a side's scores start with variance 1, as those
    of attention do: at 1 the softmax would see its best value alone.
    """

    def __init__(
        self,
        *,
        keys_per_side: int,
        key_dim: int,
        top_m: int,
        coarse_k: int,
        num_heads: int = 1,
        norm: str = "none",
        norm_eps: float = 1e-5,
        tokens_group: dist.ProcessGroup | None = None,
        data_group: dist.ProcessGroup | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """norm: 'rms' (queries and keys), 'batch' (queries) or 'none'; the groups are `QueryBatchNorm`'s."""
        super().__init__()
        self.keys_per_side, self.key_dim, self.num_heads = keys_per_side, key_dim, num_heads
        self.top_m, self.coarse_k, self.norm, self.norm_eps = top_m, coarse_k, norm, norm_eps

        def parameter(initializer: Initializer, *shape: int) -> nn.Parameter:
            made = nn.Parameter(torch.empty(shape, dtype=dtype, device=device))
            made.initializer = initializer  # type: ignore[attr-defined]
            return made

        bound = (2 * key_dim) ** -0.5
        self.keys = parameter(Uniform(-bound, bound), num_heads, 2, keys_per_side, key_dim)
        if norm == "rms":
            self.query_gain = parameter(Constant(key_dim**-0.25), key_dim)
            self.key_gain = parameter(Constant(key_dim**-0.25), key_dim)
        if norm == "batch":
            width = num_heads * 2 * key_dim
            self.query_norm = QueryBatchNorm(
                width, tokens_group=tokens_group, data_group=data_group, dtype=dtype, device=device
            )

    def forward(self, query_TQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`query_TQ` [T, H*2*Dk] -> grid indices i*n + j [T, M] (int64), softmax scores [T, M, 1]."""
        query_HSRTD, key_HSRND = self.normalised(query_TQ)
        keys_HSTM, known_HSRTM = self.select(query_HSRTD, key_HSRND)
        return self.grid_indices(keys_HSTM), self.score_at(query_HSRTD, key_HSRND, keys_HSTM, known_HSRTM)

    def normalised(self, query_TQ: torch.Tensor, *, count: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, S, R, T, D] and keys [H, S, R, N, D], in the dtype of the keys. count: see `QueryBatchNorm`."""
        if self.norm == "batch":
            query_TQ = self.query_norm(query_TQ, count=count)
        query_THSD = query_TQ.reshape(query_TQ.shape[0], self.num_heads, 2, self.key_dim)
        key_HSND: torch.Tensor = self.keys
        if self.norm == "rms":
            query_THSD = self._rms(query_THSD, self.query_gain)
            key_HSND = self._rms(key_HSND, self.key_gain)
        return query_THSD.to(self.keys.dtype).permute(1, 2, 0, 3).unsqueeze(2), key_HSND.unsqueeze(2)

    def select(self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`select_pairs` with this layer's sizes."""
        return select_pairs(query_HSRTD, key_HSRND, self.coarse_k, self.top_m)

    def score_at(
        self,
        query_HSRTD: torch.Tensor,
        key_HSRND: torch.Tensor,
        keys_HSTM: torch.Tensor,
        known_HSRTM: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Differentiable scores [T, H*M, 1] of selected keys: of every head they add up to 1."""
        side_HSRTM = side_scores_at(query_HSRTD, key_HSRND, keys_HSTM, known_HSRTM)
        score_HTM = side_HSRTM.sum((1, 2)).softmax(-1)
        return score_HTM.transpose(0, 1).flatten(1).unsqueeze(-1)

    def grid_indices(self, keys_HSTM: torch.Tensor) -> torch.Tensor:
        """Grid indices i*n + j [T, H*M] of selected keys."""
        rows_HTM, columns_HTM = keys_HSTM.unbind(1)
        return (rows_HTM * self.keys_per_side + columns_HTM).transpose(0, 1).flatten(1)

    def _rms(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), (self.key_dim,), gain.to(dtype), self.norm_eps).to(self.keys.dtype)


class ProductKeyLayer(MemoryLayer):
    """A memory layer with product keys; see `MemoryLayer` for the arguments."""

    retrieval: ProductKeyRetrieval

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = self.config
        self.retrieval = ProductKeyRetrieval(
            keys_per_side=self.pool.keys_per_side,
            key_dim=config.key_dim,
            top_m=config.top_m,
            coarse_k=coarse_k(config, self.pool.keys_per_side),
            num_heads=config.num_heads,
            norm=query_norm(config),
            norm_eps=self.norm_eps,
            tokens_group=self.tokens_group,
            data_group=self.data_group,
            dtype=self._dtype,
            device=self._device,
        )
        self.query_proj = self._projection(self.hidden_size, query_width(config))

    def retrieve(self, x_TH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        indices_TM, scores_TM1 = self.retrieval(self.query_proj(x_TH))
        return self._rows(indices_TM), scores_TM1

    def end_step(self) -> None:
        """Moves the running statistics of batch norm."""
        if self.retrieval.norm == "batch":
            self.retrieval.query_norm.end_step()

    def forget_step(self) -> None:
        if self.retrieval.norm == "batch":
            self.retrieval.query_norm.forget_step()

    def reset_parameters(self, seed: int) -> None:
        super().reset_parameters(seed)
        if self.retrieval.norm == "batch":
            self.retrieval.query_norm.reset()

    def _forward(self, x_TH: torch.Tensor, kept: Kept, retrieved: Callable[[], None] | None = None) -> torch.Tensor:
        retrieval, known_HSRTM = self.retrieval, None
        query_HSRTD, key_HSRND = retrieval.normalised(self.query_proj(x_TH), count=kept.keys_HSTM is None)
        if kept.keys_HSTM is None:
            kept.keys_HSTM, known_HSRTM = retrieval.select(query_HSRTD, key_HSRND)
        scores_TM1 = retrieval.score_at(query_HSRTD, key_HSRND, kept.keys_HSTM, known_HSRTM)
        rows_TM = self._rows(retrieval.grid_indices(kept.keys_HSTM))
        if retrieved is not None:
            retrieved()
        return self.output(x_TH, rows_TM, scores_TM1)
