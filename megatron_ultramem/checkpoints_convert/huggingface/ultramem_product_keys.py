"""Product-key retrieval with a softmax (arXiv 1907.05242): of PKM, Memory+ (2412.09764) and PEER (2407.04153).

Each side scores its N keys against its half of the query; of the K best of each side, the M pairs with the largest sums
S_row[i] + S_col[j] are taken, per head, and weighted by a softmax over those sums.

Shapes: T tokens, H heads, S = 2 sides, N keys per side, D width of a key, Q = H*S*D; t tokens of a chunk.
"""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .ultramem_common import Fp32Buffers, accumulation_dtype, chunks, pool_rows


class UltraMemQueryNorm(Fp32Buffers):
    """Batch norm of queries by its running statistics, in training too: a batch of padded texts would distort them."""

    eps = 1e-5
    running_mean: torch.Tensor
    running_var: torch.Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.bias = nn.Parameter(torch.empty(width))
        self.register_buffer("running_mean", torch.zeros(width, dtype=torch.float32))
        self.register_buffer("running_var", torch.ones(width, dtype=torch.float32))

    def forward(self, query_TQ: torch.Tensor) -> torch.Tensor:
        """[T, Q] in the accumulation dtype."""
        dtype = accumulation_dtype(query_TQ.dtype)
        mean, variance = self.running_mean.to(dtype), self.running_var.to(dtype)
        scale = self.weight.to(dtype) * torch.rsqrt(variance + self.eps)
        return (query_TQ.to(dtype) - mean) * scale + self.bias.to(dtype)


class UltraMemProductKeys(nn.Module):
    """Keys, and what normalises queries and keys: `rms` (both, per half), `batch` (queries alone) or `none`."""

    def __init__(self, memory: dict[str, Any], keys_per_side: int, norm_eps: float) -> None:
        super().__init__()
        self.num_heads, self.key_dim = memory["num_heads"], memory["key_dim"]
        self.top_m, self.coarse_k = memory["top_m"], memory["coarse_k"]
        self.keys_per_side, self.norm_eps, self.norm = keys_per_side, norm_eps, memory["query_norm"]
        self.keys = nn.Parameter(torch.empty(self.num_heads, 2, keys_per_side, self.key_dim))
        if self.norm == "rms":
            self.query_gain = nn.Parameter(torch.empty(self.key_dim))
            self.key_gain = nn.Parameter(torch.empty(self.key_dim))
        elif self.norm == "batch":
            self.query_norm = UltraMemQueryNorm(self.query_width)

    @property
    def query_width(self) -> int:
        return self.num_heads * 2 * self.key_dim

    def forward(
        self, query_TQ: torch.Tensor, permutation: torch.Tensor | None, row_offset: int, rows: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of the pool [T, H*M] and their weights [T, H*M], which carry gradients; arguments as `pool_rows`."""
        query_HSTD, key_HSND = self._normalised(query_TQ)
        keys_HSTM = self._select(query_HSTD, key_HSND)
        weights_HTM = self._sums_at(query_HSTD, key_HSND, keys_HSTM).softmax(dim=-1)
        rows_TM = pool_rows(keys_HSTM, self.keys_per_side, permutation, row_offset, rows)
        return rows_TM, weights_HTM.transpose(0, 1).flatten(1)

    def _normalised(self, query_TQ: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Queries [H, S, T, D] and keys [H, S, N, D], rounded to the dtype of the keys, in that of sums."""
        if self.norm == "batch":
            query_TQ = self.query_norm(query_TQ)
        query_HSTD = query_TQ.view(query_TQ.shape[0], self.num_heads, 2, self.key_dim).permute(1, 2, 0, 3)
        key_HSND: torch.Tensor = self.keys
        if self.norm == "rms":
            query_HSTD, key_HSND = self._rms(query_HSTD, self.query_gain), self._rms(key_HSND, self.key_gain)
        dtype = accumulation_dtype(self.keys.dtype)
        return query_HSTD.to(self.keys.dtype).to(dtype), key_HSND.to(self.keys.dtype).to(dtype)

    def _rms(self, x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        dtype = accumulation_dtype(x.dtype)
        return F.rms_norm(x.to(dtype), (self.key_dim,), gain.to(dtype), self.norm_eps)

    @torch.no_grad()
    def _select(self, query_HSTD: torch.Tensor, key_HSND: torch.Tensor) -> torch.Tensor:
        """Selected keys [H, S, T, M]."""
        found = []
        for part in self._parts(query_HSTD, self.num_heads * self.coarse_k**2):
            side_HStN = query_HSTD[:, :, part] @ key_HSND.mT
            best_HStK, keys_HStK = side_HStN.topk(self.coarse_k, dim=-1, sorted=False)
            row_HtK, column_HtK = best_HStK.unbind(1)
            pairs_HtKK = row_HtK.unsqueeze(-1) + column_HtK.unsqueeze(-2)
            best_HtM = pairs_HtKK.flatten(2).topk(self.top_m, dim=-1).indices
            place_HStM = torch.stack((best_HtM // self.coarse_k, best_HtM % self.coarse_k), dim=1)
            found.append(keys_HStK.gather(-1, place_HStM))
        return torch.cat(found, dim=2)

    def _sums_at(self, query_HSTD: torch.Tensor, key_HSND: torch.Tensor, keys_HSTM: torch.Tensor) -> torch.Tensor:
        """S_row[i] + S_col[j] of the selected pairs [H, T, M]; keeps queries, keys and key numbers for the backward."""
        sides = [
            (query_HSTD[:, :, part] @ key_HSND.mT).gather(-1, keys_HSTM[:, :, part]) for part in self._parts(query_HSTD)
        ]
        return torch.cat(sides, dim=2).sum(1)

    def _parts(self, query_HSTD: torch.Tensor, extra: int = 0) -> Any:
        H, S, T, _ = query_HSTD.shape
        return chunks(T, H * S * self.keys_per_side + extra, query_HSTD.device)
