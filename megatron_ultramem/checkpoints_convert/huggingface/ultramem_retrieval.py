"""Tucker-decomposed query-key retrieval (arXiv 2508.18756 section 3.1).

Each side (0 rows, 1 columns) scores its N keys once per Tucker rank. Coarse pass: the K best keys of each side by
u . S_row[i] and t . S_col[j], u and t being the leading singular vectors of the summed cores. Exact pass: the M best of
the K x K pairs by S_row[i] (sum of cores) S_col[j]. Core c then scores a pair by S_row[i] C_c S_col[j].

Shapes: T tokens, H heads, S = 2 sides, R Tucker ranks, N keys per side, D key width, C cores; t tokens of a chunk.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .ultramem_common import Fp32Buffers, accumulation_dtype, chunks, fused_kernels, pool_rows


class UltraMemTuckerRetrieval(Fp32Buffers):
    """Keys, cores and norm gains; u and t are buffers, fp32 whatever the rest is cast to."""

    u: torch.Tensor
    t: torch.Tensor

    def __init__(self, memory: dict[str, Any], keys_per_side: int, norm_eps: float, kernels: str) -> None:
        super().__init__()
        self.num_heads, self.key_dim = memory["num_heads"], memory["key_dim"]
        self.tucker_rank, self.num_cores = memory["tucker_rank"], memory["num_cores"]
        self.query_ranks = self.tucker_rank if memory["query_per_rank"] else 1
        self.top_m, self.coarse_k = memory["top_m"], memory["coarse_k"]
        self.keys_per_side, self.norm_eps, self.kernels = keys_per_side, norm_eps, kernels
        heads, rank = self.num_heads, self.tucker_rank
        self.keys = nn.Parameter(torch.empty(heads, 2, keys_per_side, rank, self.key_dim))
        self.cores = nn.Parameter(torch.empty(heads, self.num_cores, rank, rank))
        self.query_gain = nn.Parameter(torch.empty(self.key_dim))
        self.key_gain = nn.Parameter(torch.empty(self.key_dim))
        self.register_buffer("u", torch.zeros(heads, rank, dtype=torch.float32))
        self.register_buffer("t", torch.zeros(heads, rank, dtype=torch.float32))
        self._cores_version: int | None = None

    @property
    def query_width(self) -> int:
        return self.num_heads * 2 * self.query_ranks * self.key_dim

    def forward(
        self, query_TQ: torch.Tensor, permutation: torch.Tensor | None, row_offset: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the pool [T, H*M] and their scores [T, H*M, C], which carry gradients.

        Args:
            query_TQ: [T, query_width].
            permutation: of the grid indices i*N + j, or None.
            row_offset, rows: row v, after the permutation, is row (v + row_offset) mod rows of the pool.
        """
        if self.training and torch.is_grad_enabled():
            self._follow_cores()
        if kernels := fused_kernels(self.kernels, query_TQ):
            return self._fused(kernels, query_TQ, permutation, row_offset, rows)
        query_HSRTD, key_HSRND = self._normalised(query_TQ)
        keys_HSTM, side_HSRTM = self._select(query_HSRTD, key_HSRND)
        if torch.is_grad_enabled():
            side_HSRTM = _side_scores_at(query_HSRTD, key_HSRND, keys_HSTM)
        return pool_rows(keys_HSTM, self.keys_per_side, permutation, row_offset, rows), self._core_scores(side_HSRTM)

    @torch.no_grad()
    def leading_vectors(self) -> torch.Tensor:
        """(u, t) of the summed cores [H, 2, R], of the sign that is closer to the present ones.

        Where those are zeros, of the sign with a non-negative sum.
        """
        left, _, right = torch.linalg.svd(self.cores.detach().to(torch.float64).sum(1))
        vectors_HSR = torch.stack((left[..., 0], right[..., 0, :]), dim=-2)
        towards_HSR = self._leading().double()
        towards_HSR = towards_HSR + (towards_HSR == 0).all((-2, -1), keepdim=True)
        agreement = (vectors_HSR * towards_HSR).sum((-2, -1), keepdim=True)
        return torch.where(agreement < 0, -vectors_HSR, vectors_HSR)

    def _follow_cores(self) -> None:
        """Renews u and t, in training, when an optimizer (or a checkpoint) has changed the cores."""
        if self._cores_version != self.cores._version:
            vectors_HSR = self.leading_vectors()
            self.u.copy_(vectors_HSR[:, 0])
            self.t.copy_(vectors_HSR[:, 1])
            self._cores_version = self.cores._version

    def _leading(self) -> torch.Tensor:
        return torch.stack((self.u, self.t), dim=1)

    def _normalised(self, query_TQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, S, R, T, D] and keys [H, S, R, N, D], rounded to the dtype of the keys, in that of sums."""
        query_THSRD = query_TQ.view(query_TQ.shape[0], self.num_heads, 2, self.query_ranks, self.key_dim)
        query_HSRTD = self._norm(query_THSRD, self.query_gain).permute(1, 2, 3, 0, 4)
        key_HSRND = self._norm(self.keys, self.key_gain).transpose(2, 3)
        return query_HSRTD.expand(-1, -1, self.tucker_rank, -1, -1), key_HSRND

    def _norm(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype)
        normed = F.rms_norm(x.to(dtype), (self.key_dim,), gain.to(dtype), self.norm_eps)
        return normed.to(self.keys.dtype).to(dtype)

    @torch.no_grad()
    def _select(self, query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Both passes: selected keys [H, S, T, M] and their side scores [H, S, R, T, M]."""
        core_HRR = self.cores.to(query_HSRTD.dtype).sum(1)
        leading_HSR = self._leading().to(query_HSRTD.dtype)
        found = []
        for part in _parts(query_HSRTD, key_HSRND, self.num_heads * self.coarse_k**2):
            side_HSRtN = query_HSRTD[:, :, :, part] @ key_HSRND.mT
            coarse_HStN = torch.einsum("hsrtn,hsr->hstn", side_HSRtN, leading_HSR)
            coarse_HStK = coarse_HStN.topk(self.coarse_k, dim=-1, sorted=False).indices
            kept_HSRtK = _at(side_HSRtN, coarse_HStK)
            row_HRtK, column_HRtK = kept_HSRtK.unbind(1)
            weighted_HRtK = torch.einsum("hatk,hab->hbtk", row_HRtK, core_HRR)
            pairs_HtKK = torch.einsum("hrtk,hrtl->htkl", weighted_HRtK, column_HRtK)
            best_HtM = pairs_HtKK.flatten(2).topk(self.top_m, dim=-1).indices
            place_HStM = torch.stack((best_HtM // self.coarse_k, best_HtM % self.coarse_k), dim=1)
            found.append((coarse_HStK.gather(-1, place_HStM), _at(kept_HSRtK, place_HStM)))
        keys, sides = zip(*found, strict=True)
        return torch.cat(keys, dim=2), torch.cat(sides, dim=3)

    def _core_scores(self, side_HSRTM: torch.Tensor) -> torch.Tensor:
        """S_row C_c S_col of the selected pairs [T, H*M, C]."""
        row_HRTM, column_HRTM = side_HSRTM.unbind(1)
        # Two steps: left to itself, einsum would form an [R, R] product of rows and columns for every selected pair.
        weighted_CHBTM = torch.einsum("hatm,hcab->chbtm", row_HRTM, self.cores.to(side_HSRTM.dtype))
        return torch.einsum("chbtm,hbtm->thmc", weighted_CHBTM, column_HRTM).flatten(1, 2)

    def _fused(
        self,
        kernels: ModuleType,
        query_TQ: torch.Tensor,
        permutation: torch.Tensor | None,
        row_offset: int,
        rows: int,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads, T, N, R, D = self.num_heads, query_TQ.shape[0], self.keys_per_side, self.tucker_rank, self.key_dim
        query = kernels.rms_norm_swapped(query_TQ.to(self.keys.dtype).view(1, T, -1, D), self.query_gain, self.norm_eps)
        query_HSRTD = query.view(heads, 2, self.query_ranks, T, D).expand(-1, -1, R, -1, -1)
        key = kernels.rms_norm_swapped(self.keys.view(heads * 2, N, R, D), self.key_gain, self.norm_eps)
        key_HSRND, leading_HSR = key.view(heads, 2, R, N, D), self._leading()
        found = [
            kernels.retrieve(
                query_HSRTD[head],
                key_HSRND[head],
                leading_HSR[head],
                self.cores[head],
                coarse_k=self.coarse_k,
                top_m=self.top_m,
                permutation=permutation,
                offset=row_offset,
                rows=rows,
            )
            for head in range(heads)
        ]
        rows_TM, scores_TMC, _ = zip(*found, strict=True)
        return torch.cat(rows_TM, dim=1), torch.cat(scores_TMC, dim=1)


def _side_scores_at(query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, keys_HSTM: torch.Tensor) -> torch.Tensor:
    """Differentiable side scores [H, S, R, T, M] at given keys; keeps queries, keys and key numbers for the backward,
    never a full [T, N] of all tokens."""
    return torch.cat(
        [
            _at(query_HSRTD[:, :, :, part] @ key_HSRND.mT, keys_HSTM[:, :, part])
            for part in _parts(query_HSRTD, key_HSRND)
        ],
        dim=3,
    )


def _at(side_HSRtN: torch.Tensor, keys_HStM: torch.Tensor) -> torch.Tensor:
    """Every rank's scores [H, S, R, t, M] at the keys."""
    return side_HSRtN.gather(-1, keys_HStM.unsqueeze(2).expand(-1, -1, side_HSRtN.shape[2], -1, -1))


def _parts(query_HSRTD: torch.Tensor, key_HSRND: torch.Tensor, extra: int = 0) -> Any:
    H, S, R, T, _ = query_HSRTD.shape
    return chunks(T, H * S * R * key_HSRND.shape[3] + extra, query_HSRTD.device)
