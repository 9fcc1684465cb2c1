"""A memory layer made of the kernels' public functions, as a trainer would call them."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from ultramem_kernels.bench.shapes import DTYPE, Shape, Tables
from ultramem_kernels.lookup.ops import lookup
from ultramem_kernels.retrieval.ops import retrieve
from ultramem_kernels.retrieval.search import search
from ultramem_kernels.rms_norm.ops import rms_norm_swapped

EPS = 1e-5


class Layer:
    """Random parameters and a forward pass.

    Args:
        shape: sizes.
        tables: the tables that it reads, perhaps those of other layers too.
        gain: of the norms of queries and keys.
    """

    offset = 17  # of the layer's window in the tables: a shared pool's is not zero

    def __init__(self, shape: Shape, tables: Tables, gain: float = 0.1) -> None:
        self.shape, self.tables, self.device = shape, tables, tables.values.device
        s, h = shape, shape.hidden
        self.query_proj, self.pre_proj = self._weight(2 * s.ranks * s.key_dim, h), self._weight(s.pre_value_dim, h)
        self.value_proj = self._weight(h, s.value_dim)
        self.keys = self._weight(2, s.keys, s.ranks, s.key_dim)
        self.gain = torch.full((s.key_dim,), gain, device=self.device, dtype=DTYPE, requires_grad=True)
        self.cores = torch.rand(s.cores, s.ranks, s.ranks, device=self.device).requires_grad_()
        u, _, v = torch.linalg.svd(self.cores.detach().sum(0))
        self.leading = torch.stack((u[:, 0], v[0])) * torch.sign(u[:, 0].sum())
        self.permutation = torch.randperm(s.keys**2, device=self.device, dtype=torch.int32)
        self.key_SRND: torch.Tensor | None = None  # normalised once, when the weights stand still (decoding)

    def _weight(self, *size: int) -> torch.Tensor:
        return torch.empty(size, device=self.device, dtype=DTYPE).normal_(std=size[-1] ** -0.5).requires_grad_()

    def parameters(self) -> list[torch.Tensor]:
        """All but the tables."""
        return [self.query_proj, self.pre_proj, self.value_proj, self.keys, self.gain, self.cores]

    def normalised_keys(self, backend: str | None = None) -> torch.Tensor:
        """[S, R, N, Dk]"""
        return rms_norm_swapped(self.keys, self.gain, EPS, backend=backend)

    def queries(self, x_TH: torch.Tensor, backend: str | None = None) -> torch.Tensor:
        """[S, R, T, Dk]"""
        s, T = self.shape, x_TH.shape[0]
        query = F.linear(x_TH, self.query_proj).view(1, T, 2 * s.ranks, s.key_dim)
        return rms_norm_swapped(query, self.gain, EPS, backend=backend).view(2, s.ranks, T, s.key_dim)

    def retrieve(
        self, query_SRTD: torch.Tensor, key_SRND: torch.Tensor, backend: str | None = None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(indices [T, M], scores [T, M, C], keys [S, T, M]) of normalised queries and keys."""
        s = self.shape
        return retrieve(
            query_SRTD, key_SRND, self.leading, self.cores, coarse_k=s.coarse_k, top_m=s.m, rows=s.rows,
            offset=self.offset, permutation=self.permutation, backend=backend,
        )  # fmt: skip

    def __call__(self, x_TH: torch.Tensor, deterministic: bool = False, backend: str | None = None) -> torch.Tensor:
        """[T, h]"""
        s = self.shape
        if self.key_SRND is not None:
            indices, scores, _ = self.retrieve(self.queries(x_TH, backend), self.key_SRND, backend)
        else:
            query_TQD = F.linear(x_TH, self.query_proj).view(len(x_TH), 2 * s.ranks, s.key_dim)
            indices, scores, _ = search(
                query_TQD, self.keys, self.gain, self.gain, self.leading, self.cores, eps=EPS, coarse_k=s.coarse_k,
                top_m=s.m, rows=s.rows, offset=self.offset, permutation=self.permutation, backend=backend,
            )  # fmt: skip
        pre_input = F.linear(x_TH, self.pre_proj)
        pooled = lookup(indices, scores, pre_input, *self.tables.both(), deterministic=deterministic, backend=backend)
        return F.linear(pooled, self.value_proj)
